"""Checks of paths before the work whose result is written there."""

import os
from pathlib import Path, PurePath

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


def check_output_file(path: str | os.PathLike, option: str) -> Path:
    """The file at `path`, with ~ resolved, for results that take long to compute. It need not exist yet.

    Args:
      option: what the user gave the path for, such as '--output'.

    Raises ValueError if it is a folder, or its folder is missing or cannot be written to.
    """
    file = Path(path).expanduser()
    folder = file.absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{option} {path}: {folder} is not a folder that can be written to")
    if file.is_dir():
        raise ValueError(f"{option} {path} is a folder: name a file in it, such as results.json")
    return file
