"""Paths that can be written to."""

import os
from pathlib import PurePath

_SPECIAL = "[*?\\"


def check_output_path(path: str | os.PathLike, option: str) -> None:
    """Refuses a folder whose whole path has a character of a file name pattern in it.

    Orbax, which writes the checkpoints, uses its folder as part of a pattern without escaping it: with [ ] * ? or a
    backslash anywhere in the path it does not find its own files again, and reports no error.

    Args:
      option: what the user gave the path for, such as '--workdir'.

    Raises:
      ValueError: naming the characters and the remedy.
    """
    whole = os.fspath(path)
    if "://" not in whole:
        whole = os.path.abspath(os.path.expanduser(whole))
    if found := [character for character in _SPECIAL if character in whole]:
        name = next((part for part in reversed(PurePath(whole).parts) if any(c in part for c in found)), whole)
        raise ValueError(
            f"{option} {path}: a path with {' '.join(found)} in it cannot be used, because what is written there is "
            f"not found again: these characters are taken for a pattern. Rename {name!r} or choose another folder"
        )
