"""Set-up of worker processes that decode images, for training and for `prepare`."""

import multiprocessing
import os
import signal
import threading

from tinymim_jax.runtime.malloc import keep_freed_memory


def start_worker() -> None:
    """Call it first in a worker process: limits it to one core, ignores SIGTERM and SIGINT, exits with its parent.

    It also keeps freed memory for the next image.
    """
    keep_freed_memory()
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # by default kornia starts one thread per core in every worker
    # SIGTERM from a cluster, like Ctrl-C, is sent to the whole process group. The main process may still need its
    # workers until it has saved a checkpoint, and ends them itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # A main process that is killed, or calls os._exit, cannot end its workers, which would run forever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
