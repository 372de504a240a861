"""`tinymim analyze`: features of the layers of a student and its teacher, and their similarity."""

import argparse
import json

from tinymim_jax.cli.options import add_runtime, config_of, start_jax

HELP = "layers of a checkpoint and its teacher: CKA, attention, relations, accuracy of each block; suggests a tap"

_EPILOG = """\
For each block of the checkpoint, and of the teacher that it was distilled from: attention distance and entropy of each
head, effective rank, k-NN and linear accuracy where the data have labels. For each pair of blocks: CKA, and the KL of
QK and VV relations for each head. The block of the teacher with the best features is suggested as distill.teacher.tap;
no student is distilled for that.

Written to RUN/analysis (or --output DIR): analysis.json and a picture of each chart. `tinymim report RUN` shows them.
A converted checkpoint needs --config, which names the data. KEY=VALUE words change the config, as in other commands.

  tinymim analyze runs/b
  tinymim analyze teachers/mae_vit_large --config distill_b --output runs/teacher_analysis
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `analyze`."""
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, _EPILOG
    command.add_argument("checkpoints", nargs="+", metavar="RUN", help="workdirs, or what `tinymim convert` wrote")
    command.add_argument(
        "--config", metavar="FILE[:ARGUMENT]", help="experiment with the data (default: the run's own config.json)"
    )
    command.add_argument("--teacher", metavar="PATH", help="compare with this checkpoint, not with the run's teacher")
    command.add_argument("--output", metavar="DIR", help="folder for the results (default: RUN/analysis)")
    command.add_argument(
        "--images", type=int, default=256, metavar="N", help="images for CKA and attention (default 256)"
    )
    command.add_argument(
        "--labelled",
        type=int,
        default=2000,
        metavar="N",
        help="training images for k-NN and linear accuracy, and half as many to classify (default 2000; 0: none)",
    )
    add_runtime(command)
    command.set_defaults(overrides=[])  # KEY=VALUE words; a second positional list would take no word


def run(options: argparse.Namespace) -> int:
    """Prints a table of the blocks of each checkpoint and the suggested tap."""
    if options.output and len(options.checkpoints) > 1:
        raise ValueError(f"--output {options.output} is one folder, but there are {len(options.checkpoints)} runs")
    configs = []
    for checkpoint in options.checkpoints:
        options.checkpoint = checkpoint
        configs.append(config_of(options))
    start_jax(options)
    from etils import epath

    from tinymim_jax.analysis.analyze import analyze, write_analysis
    from tinymim_jax.analysis.charts import block_rows
    from tinymim_jax.markdown import markdown_table
    from tinymim_jax.pages.page import number

    for checkpoint, config in zip(options.checkpoints, configs):
        found = analyze(
            checkpoint,
            config,
            images=options.images,
            labelled=options.labelled,
            teacher=options.teacher,
            data_dir=options.data_dir,
            workers=options.workers,
        )
        folder = epath.Path(options.output or epath.Path(checkpoint) / "analysis").expanduser()
        names = write_analysis(found, folder)
        head, rows = block_rows(found)
        table = markdown_table(head, [[number(cell) for cell in row] for row in rows])
        print(f"{checkpoint}: {found['note']}\n\n{table}\n\nSuggested tap: {found['tap']['text']}.")
        print(f"\n{folder}: {', '.join(names)}")
        print(json.dumps({"checkpoint": checkpoint, "tap": found["tap"]["block"], "of": found["tap"]["network"]}))
    return 0
