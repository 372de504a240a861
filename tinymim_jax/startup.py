"""What every process of ours does before its first step: logging, the cache of compiled programs, the CPU's memory."""

import contextlib
import ctypes
import logging
import os
import sys


def start_logging(prefix: str = "") -> None:
    """Our progress goes to standard output, each line behind `prefix`; other libraries speak up from warnings on."""
    line = f"%(asctime)s {prefix}%(message)s"
    # Some libraries configure logging on import; whoever starts a process decides.
    logging.basicConfig(level=logging.WARNING, format=line, datefmt="%H:%M:%S", stream=sys.stdout, force=True)
    logging.getLogger("tinymim_jax").setLevel(logging.INFO)


def start_jax(compile_cache: str) -> None:
    """Keeps compiled programs in folder `compile_cache` for the next run ("" keeps none); settles the backend.

    A job of several processes has joined them before (`sharding.initialize_distributed`).
    """
    import jax

    if jax.default_backend() == "cpu":
        _keep_freed_memory()
    if compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(compile_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


# mallopt's names for them, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def _keep_freed_memory() -> None:
    """Has malloc keep what is freed: XLA's CPU client asks for every buffer of every step anew.

    By default glibc maps large ones and unmaps them again, so that each step takes its pages one fault at a time: a
    fifth of a small distillation step (benchmarks/README.md). Without glibc nothing changes.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(_M_TOP_PAD, 64 << 20)
