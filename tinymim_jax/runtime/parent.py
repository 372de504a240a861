"""Ends a child process together with the process that started it."""

import os
import sys
import threading
import time

PARENT_GONE = 87  # exit status of a child whose parent has gone


def end_with_parent() -> None:
    """Watches standard input, a pipe that the parent holds open, and exits at once when it closes.

    However the parent ends (kill -9 included), the kernel closes its end of the pipe.
    """
    threading.Thread(target=_watch, name="parent", daemon=True).start()


def _watch() -> None:
    while os.read(sys.stdin.fileno(), 1):  # nothing is ever written
        time.sleep(0.1)
    os._exit(PARENT_GONE)
