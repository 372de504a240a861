"""`tinymim distill`: a small network from a folder of images and a teacher, in one command."""

import argparse
from typing import Any

from tinymim_jax.cli.options import add_compile_cache, add_overrides

HELP = "distil a small network from a teacher on your images; the same command continues it"

# Copies of the names in starter.choices and starter.helpers, which take seconds to import.
STUDENTS = ("pico", "nano", "hybrid", "Ti", "S", "B")
PRESETS = ("5k", "50k", "1M")
EXPORTS = ("auto", "onnx", "litert", "stablehlo", "hub", "none")

_EPILOG = """\
DATA is a folder of images, with a folder for each class or without classes; or what data.source takes: tar:, parquet:
or array_record:LOCATION, or the name of a TFDS data set. --teacher is the workdir of a run, what `tinymim convert`
wrote, a PyTorch file or a folder of the Hugging Face hub.

  tinymim distill /data/pets --teacher mae_pretrain_vit_base.pth --student S --output runs/pets
  tinymim distill /data/pets --teacher teachers/mae_vit_base --student Ti --output runs/pets --hours 4
  tinymim distill /data/pets --teacher teachers/mae_vit_base --student pico --output runs/pets --dry_run

Steps; those that are done already are skipped:
  1. images, teacher, disk and memory are checked, and a step of each training is measured, or planned on accelerators
  2. if it saves more time than it takes, the images are converted to smaller files (OUTPUT/data)
  3. with labels, the k-NN accuracy of the teacher and of the untrained student is measured
  4. the student is distilled (OUTPUT/student), and its k-NN accuracy is measured again
  5. with labels, it is fine-tuned (OUTPUT/classifier)
  6. it is exported (OUTPUT/model.onnx, or model/ if onnx is not installed), and OUTPUT/report.html is written

Choices are printed with reasons and kept in OUTPUT/choices.json and in the config.json of each training. KEY=VALUE
changes one (configs/base.py has all keys), STAGE.KEY=VALUE in one training only: student.optim.base_lr=1e-3.

Ctrl-C saves and stops; the same command continues. Exit status: 0 done, 1 error, 75 stopped with everything saved.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of the `distill` command."""
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, _EPILOG
    command.add_argument("data", metavar="DATA", help="folder of images, or what data.source takes")
    command.add_argument("--teacher", required=True, metavar="PATH", help="run, converted checkpoint or PyTorch file")
    command.add_argument("--student", default="S", metavar="SIZE", help=f"{', '.join(STUDENTS)} (default S)")
    command.add_argument("--output", required=True, metavar="DIR", help="folder for all results")
    command.add_argument(
        "--hours",
        type=float,
        help="time for everything; trainings are shortened to fit (default: what the preset takes; on a CPU 0.15)",
    )
    command.add_argument("--preset", choices=PRESETS, help="recipe by number of images (default: the nearest)")
    command.add_argument("--no_labels", action="store_true", help="ignore labels: no k-NN, no fine-tuning")
    command.add_argument("--no_finetune", action="store_true", help="distil only")
    command.add_argument(
        "--export", choices=EXPORTS, default="auto", help="format (default: onnx if installed, else hub)"
    )
    command.add_argument(
        "--prepare", choices=("auto", "always", "never"), default="auto", help="convert the images first (default auto)"
    )
    command.add_argument("--dry_run", action="store_true", help="check, measure, print what would be done, and stop")
    command.add_argument("--data_dir", help="where TFDS data sets are")
    command.add_argument(
        "--workers", type=int, metavar="N", help="processes that decode images (default: cores - 1; on a CPU 0)"
    )
    add_compile_cache(command)
    add_overrides(command)


def request_of(options: argparse.Namespace) -> Any:
    """The starter's Request for the parsed options."""
    from tinymim_jax.starter.request import Request
    from tinymim_jax.sweeps.points import parse_overrides

    if options.hours is not None and not options.hours > 0:
        raise ValueError(f"--hours {options.hours:g}: give a number above 0, such as 4 or 0.5")
    return Request(
        data=options.data,
        teacher=options.teacher,
        student=options.student,
        output=options.output,
        hours=options.hours,
        preset=options.preset,
        labels=not options.no_labels,
        finetune=not options.no_finetune,
        export=options.export,
        prepare=options.prepare,
        overrides=parse_overrides(options.overrides),
        data_dir=options.data_dir,
        workers=options.workers,
        compile_cache=options.compile_cache,
    )


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 0 done, 1 a command failed, 75 stopped with everything saved."""
    from tinymim_jax.starter.distill import run_distill

    return run_distill(request_of(options), dry_run=options.dry_run)
