"""Start of a command: logging, output to a terminal or pipe, and the cache of compiled programs."""

import contextlib
import logging
import os
import sys

from tinymim_jax.runtime.exits import is_first, process_label, stdout_closed
from tinymim_jax.runtime.terminal import erase


def start_logging(prefix: str = "", *, to_stderr: bool = False) -> None:
    """Logs to standard output, each line behind `prefix`: this package from level INFO on, other libraries warnings.

    With `to_stderr`, standard output is left to the result of the command.

    Output that cannot be written, as its reader has gone or the disk is full, is dropped and does not stop the process.
    """
    with contextlib.suppress(AttributeError):  # a stream that a test has put in its place
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    handler = _Handler(sys.stderr if to_stderr else sys.stdout)
    handler.setFormatter(logging.Formatter(f"%(asctime)s {prefix}%(message)s", datefmt="%H:%M:%S"))
    # Some libraries configure logging when they are imported: `force` replaces that.
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("tinymim_jax").setLevel(logging.INFO)


def print_line(text: str = "") -> None:
    """Prints a line at once. If its reader has exited (`| head`) or the disk is full, the line is dropped."""
    try:
        print(text, flush=True)
    except (OSError, ValueError):
        with contextlib.suppress(OSError, ValueError):
            stdout_closed()


class _Handler(logging.StreamHandler):
    def emit(self, record: logging.LogRecord) -> None:
        erase()  # the progress bar of a terminal
        super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            return super().handleError(record)
        with contextlib.suppress(OSError, ValueError):
            stdout_closed()


def quiet_unless_first() -> None:
    """Makes all processes of a job but the first log only warnings, each line with the number of the process."""
    if not is_first():
        start_logging(process_label().strip() + " ")
        logging.getLogger("tinymim_jax").setLevel(logging.WARNING)


def use_compile_cache(directory: str) -> None:
    """Makes jax keep compiled programs in `directory` for later runs; "" keeps none."""
    import jax

    if directory:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
