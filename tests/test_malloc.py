"""Freed memory is used again without page faults."""

import platform
import resource
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tinymim_jax.runtime.malloc import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is of glibc")
def test_freed_arrays_have_page_faults_once():
    """Thirty arrays of 1 MiB have 7680 pages; in the main thread, and in others, which have arenas of their own."""

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        for _ in range(4):
            held = [np.ones(1 << 17) for _ in range(30)]
            del held
        return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before

    keep_freed_memory()
    with ThreadPoolExecutor(1) as pool:
        for run in (faults, lambda: pool.submit(faults).result()):
            run()
            assert run() < 1000
