"""The disk space that `tinymim distill` needs, compared with the free space."""

import os
import pathlib
import shutil
from collections.abc import Iterable

from tinymim_jax.starter.choices import Measured

_SPARE = 100 * 2**20  # logs, metrics, reports


def check_space(output: pathlib.Path, runs: Iterable[tuple[Measured, int]], prepared: int) -> int:
    """Returns the bytes that the runs need. Raises OSError, with a remedy, if less is free at `output`.

    Args:
      output: need not exist yet.
      runs: for each training its measurements, and its checkpoint.keep.
      prepared: bytes of a converted copy of the images.
    """
    needed = _SPARE + prepared
    for measured, keep in runs:
        # Parameters, and two moments of the trained ones; one checkpoint more exists while it is written.
        needed += (keep + 1) * 4 * (measured.parameters + 2 * measured.trained) + 8 * measured.parameters
    free = free_bytes(output)
    if free < needed:
        raise OSError(
            f"--output {output}: about {_size(needed)} are needed for checkpoints, exports"
            f"{' and the converted images' if prepared else ''}, and {_size(free)} are free. Free some space, name an "
            "--output on another disk, or keep fewer checkpoints (checkpoint.keep=1"
            f"{', --prepare never' if prepared else ''})"
        )
    return needed


def free_bytes(output: pathlib.Path) -> int:
    """Free bytes on the disk of `output`, which need not exist yet. Raises OSError if it cannot be written to."""
    folder = output.absolute()
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        raise OSError(f"--output {output}: {folder} cannot be written to; choose a folder of your own")
    return shutil.disk_usage(folder).free


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"
