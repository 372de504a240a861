"""What the processes that decode images have in common, training's and `prepare`'s."""

import multiprocessing
import os
import signal
import threading


def settle_in() -> None:
    """Called in a worker first: it works on one core, leaves signals to its parent, and ends when that ends."""
    os.environ.setdefault("RAYON_NUM_THREADS", "1")  # or kornia starts a thread per core, in every worker
    # A cluster's SIGTERM, like Ctrl-C, reaches the whole process group, but the main process may still want
    # its workers on its way to a checkpoint. It ends them itself.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # A main process that is killed, or leaves by os._exit, cannot end its workers: they would stay for ever.
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
