"""`tinymim report`: one HTML file that shows what happened in a run, a sweep or a chain."""

import argparse

from tinymim_jax.cli.options import add_runtime, start_jax

HELP = "write report.html: curves, time, images, relations, layers, classes and versions of a run, sweep or chain"

_EPILOG = """\
The file needs no network and no other file. DIR is the --workdir of a run, a sweep or a chain, or any folder with runs
in it; or a file that `tinymim evaluate --suite ... --output FILE` wrote. Every training, sweep and chain writes its
report at its end; that of a short run has no pictures of what the networks see until this command adds them.

  tinymim report runs/b
  tinymim report runs/sweep --output sweep.html
  tinymim report results.json
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `report`."""
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, _EPILOG
    command.add_argument("path", metavar="DIR", help="folder of a run, sweep or chain, or results of test suites")
    command.add_argument("--output", metavar="FILE.html", help="the file (default: DIR/report.html)")
    command.add_argument(
        "--files_only", action="store_true", help="only what the files say: load no checkpoint and no images"
    )
    add_runtime(command)


def run(options: argparse.Namespace) -> int:
    """Writes the report and prints its path."""
    start_jax(options)
    from tinymim_jax.reports.write import write_report

    path = write_report(
        options.path,
        output=options.output,
        look=not options.files_only,
        data_dir=options.data_dir,
        workers=options.workers,
    )
    print(path)
    return 0
