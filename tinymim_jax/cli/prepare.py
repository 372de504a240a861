"""`tinymim prepare`: downloads a TFDS data set, or converts any source of images into one."""

import argparse
import contextlib
import logging
import os
import pathlib
from collections.abc import Iterator

from tinymim_jax.runtime.files import is_remote
from tinymim_jax.runtime.hosts import find_job
from tinymim_jax.runtime.locks import locked
from tinymim_jax.runtime.progress import format_seconds

log = logging.getLogger(__name__)

EXIT_TERMINATED, EXIT_INTERRUPTED = 75, 130

HELP = "download or convert a data set into ArrayRecord files"

_EPILOG = """\
Without --output: downloads SOURCE, a classification data set of TFDS, and writes it as ArrayRecord files. If it is
there already, nothing is done:

  tinymim prepare imagenet2012

With --output: converts SOURCE, any source of images, into the data set DIR/NAME/1.0.0, which can then be used by its
name. Every image is decoded; damaged ones are left out and listed. Run the same command again to resume after an
interruption:

  tinymim prepare folder:/data/pets --output /data/sets
  tinymim prepare imagenet2012 --short_side 256 --output /data/sets
  tinymim train --config configs/distill_b.py --workdir runs/b --data_dir /data/sets data.source=imagenet2012_256
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of the `prepare` command.

    Options that need --output default to None, so that `run` can tell whether they were given.
    """
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = _EPILOG
    command.add_argument("source", help="a TFDS data set, such as imagenet2012 or cifar10; digits; folder:/data/pets")
    command.add_argument(
        "--data_dir", help="folder of the TFDS data sets (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)"
    )
    command.add_argument("--output", metavar="DIR", help="folder to write the data set to; the options below need it")
    options = command.add_argument_group("options of --output")
    options.add_argument(
        "--name", help="name of the new data set (default: from the source, with _256 for --short_side 256)"
    )
    options.add_argument(
        "--splits", nargs="+", metavar="SPLIT", help="splits to convert, such as train validation (default: all)"
    )
    options.add_argument(
        "--short_side",
        type=int,
        metavar="PIXELS",
        help="resize images whose short side is larger to it, as JPEG (default: keep the files as they are)",
    )
    options.add_argument(
        "--quality", type=int, metavar="1-100", help="JPEG quality of images that are re-encoded (default 90)"
    )
    options.add_argument(
        "--upright",
        action="store_true",
        default=None,
        help="rotate images according to their EXIF orientation; re-encoded images lose their EXIF data",
    )
    options.add_argument("--workers", type=int, metavar="N", help="number of processes (default: one per core)")
    options.add_argument("--shard_images", type=int, metavar="N", help="images in each ArrayRecord file (default 2048)")
    options.add_argument(
        "--max_rejected", type=float, metavar="FRACTION", help="fraction of a split that may be damaged (default 0.01)"
    )


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns the exit status: 0, EXIT_TERMINATED or EXIT_INTERRUPTED.

    Raises ValueError if options that need --output are given without it, and what preparing raises.
    """
    if options.output is None:
        given = [key for key in _OUTPUT_OPTIONS if getattr(options, key) is not None]
        if given:
            raise ValueError(f"--{given[0]} needs --output DIR, the folder in which the new set is written")
        from tinymim_jax.data.sources.sources import is_place, prepare

        if is_place(options.source):
            raise ValueError(
                f"{options.source!r} can be used for training as it is (data.source={options.source}); to convert it "
                "into a TFDS data set, give the output folder: --output DIR"
            )
        with one_by_one(options.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"):
            print(prepare(options.source, data_dir=options.data_dir))
        return 0
    with one_by_one(options.output):
        return _write(options)


@contextlib.contextmanager
def one_by_one(folder: str) -> Iterator[None]:
    """Lets the processes of a job (launch/local.sh, srun) run the block one at a time, with a lock in `folder`.

    On each file system the first process prepares the data set; the others then find it complete. With a single
    process or a remote `folder` there is no lock.
    """
    if (find_job().processes or 1) == 1 or is_remote(folder):
        yield
        return
    path = pathlib.Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    with locked(path, wait=True):
        yield


_OUTPUT_OPTIONS = ("name", "splits", "short_side", "quality", "upright", "workers", "shard_images", "max_rejected")


def _write(options: argparse.Namespace) -> int:
    from tinymim_jax.data.prepare.prepare import prepare_images, read_report
    from tinymim_jax.data.prepare.report import table
    from tinymim_jax.data.prepare.shards import Conversion
    from tinymim_jax.data.prepare.workers import GO_ON, Terminated, terminable

    given = {key: getattr(options, key) for key in _OUTPUT_OPTIONS if getattr(options, key) is not None}
    conversion = Conversion(**{key: given.pop(key) for key in ("short_side", "quality", "upright") if key in given})
    given["set_name"] = given.pop("name", None)
    try:
        with terminable():
            folder = prepare_images(
                options.source,
                output=options.output,
                data_dir=options.data_dir,
                conversion=conversion,
                on_progress=_log_progress,
                **given,
            )
    except Terminated:
        log.warning("stopped by SIGTERM; %s", GO_ON)
        return EXIT_TERMINATED
    except KeyboardInterrupt:
        log.warning("interrupted; %s", GO_ON)
        return EXIT_INTERRUPTED
    print(table(read_report(folder)))
    print(folder)
    return 0


def _log_progress(progress) -> None:
    from tinymim_jax.data.prepare.report import size

    speed, left = progress.images_per_second, progress.total - progress.done
    log.info(
        "%s/%s images (%.0f %%) | %s images/s | ETA %s | %s read",
        f"{progress.done:,}",
        f"{progress.total:,}",
        100 * progress.done / max(progress.total, 1),
        f"{speed:,.0f}",
        format_seconds(left / speed) if speed else "-",
        size(progress.bytes_read),
    )
