"""`tinymim advise`: whether distillation will help, from a short trial."""

import argparse

from tinymim_jax.cli.distill import PRESETS, STUDENTS
from tinymim_jax.cli.options import add_compile_cache, add_overrides

HELP = "will distillation help on your images? yes, no or unclear, with figures and costs, after a short trial"

_EPILOG = """\
Measured are the k-NN accuracy of the teacher, of the same network with random weights and of the untrained student on
your images, and that of the student at eight points of a short distillation. A power law through these points gives the
accuracy that the whole distillation would reach, with a 90 % interval. A teacher that is no better than random weights
is refused before that. The answer is

  no       the teacher is no better on your images than the same network with random weights or than an untrained
           student, or the student does not learn it
  yes      the whole interval is better than the untrained student, by more than chance
  unclear  otherwise

The cost of the whole distillation is measured for these devices, and planned for others; `tinymim plan --help` lists
their names:

  tinymim advise /data/pets --teacher teachers/mae_vit_base --student Ti --output runs/advice
  tinymim advise /data/pets --teacher teachers/mae_vit_base --output runs/advice --on h100x1 v5e-8

The images need classes: a folder for each. Everything is kept in OUTPUT (advice.json); the same command continues.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of the `advise` command."""
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, _EPILOG
    command.add_argument("data", metavar="DATA", help="folder of images with classes, or what data.source takes")
    command.add_argument("--teacher", required=True, metavar="PATH", help="run, converted checkpoint or PyTorch file")
    command.add_argument("--student", default="S", metavar="SIZE", help=f"{', '.join(STUDENTS)} (default S)")
    command.add_argument("--output", required=True, metavar="DIR", help="folder for all results")
    command.add_argument("--hours", type=float, help="time for the trial (default 0.25; on a CPU 0.05)")
    command.add_argument("--preset", choices=PRESETS, help="recipe by number of images (default: the nearest)")
    command.add_argument(
        "--on", nargs="+", default=[], metavar="HARDWARE", help="plan the whole distillation for these: h100x8 v5e-8"
    )
    command.add_argument("--data_dir", help="where TFDS data sets are")
    command.add_argument("--workers", type=int, metavar="N", help="processes that decode images (default: cores - 1)")
    add_compile_cache(command)
    add_overrides(command)


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 0 advice was given, 1 error, 75 stopped with everything saved."""
    from tinymim_jax.plan.topology import parse_topology
    from tinymim_jax.starter.advise import HOURS, PROBES, advise
    from tinymim_jax.starter.request import Request
    from tinymim_jax.sweeps.points import parse_overrides

    if options.hours is not None and not options.hours > 0:
        raise ValueError(f"--hours {options.hours:g}: give a number above 0, such as 0.5")
    for name in options.on:
        parse_topology(name)
    request = Request(
        data=options.data,
        teacher=options.teacher,
        student=options.student,
        output=options.output,
        hours=options.hours,
        preset=options.preset,
        finetune=False,
        export="none",
        prepare="never",
        overrides=parse_overrides(options.overrides),
        data_dir=options.data_dir,
        workers=options.workers,
        compile_cache=options.compile_cache,
        default_hours=HOURS,
        training_hours=True,
        probes=PROBES,
    )
    return advise(request, topologies=options.on)
