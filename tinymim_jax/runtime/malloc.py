"""How this process's malloc treats freed memory."""

import contextlib
import ctypes

# mallopt's names for them, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Makes malloc keep freed memory for the next allocation. Without glibc this does nothing.

    By default glibc maps and unmaps each large buffer, so each has page faults anew. XLA's CPU client allocates every
    buffer of every step, which takes a fifth of the time of a small distillation step; decoders allocate several
    images' worth for each image, which takes up to a third of the time of an input pipeline (benchmarks/README.md).
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)  # never
        libc.mallopt(_M_TOP_PAD, 64 << 20)
