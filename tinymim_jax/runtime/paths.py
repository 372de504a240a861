"""Checks of paths before the work whose result is written there."""

import os
import sys
from pathlib import Path, PurePath

_SPECIAL = "[*?\\"


def check_output_path(path: str | os.PathLike, option: str) -> None:
    """Refuses a folder whose whole path has a character of a file name pattern in it, or is not valid UTF-8.

    Orbax, which writes the checkpoints, uses its folder as part of a pattern without escaping it: with [ ] * ? or a
    backslash anywhere in the path it does not find its own files again, and reports no error. Its storage library takes
    names in UTF-8 alone.

    Args:
      option: what the user gave the path for, such as '--workdir'.

    Raises:
      ValueError: naming the characters or the part of the path, and the remedy.
    """
    whole = os.fspath(path)
    if "://" not in whole:
        whole = os.path.abspath(os.path.expanduser(whole))
    if found := [character for character in _SPECIAL if character in whole]:
        name = next((part for part in reversed(PurePath(whole).parts) if any(c in part for c in found)), whole)
        raise ValueError(
            f"{option} {path}: checkpoints cannot be kept in a path with {' '.join(found)} in it, because the library "
            f"that stores them takes these characters for a pattern. Rename {name!r} or choose another folder"
        )
    if not is_utf8(whole):
        name = next(part for part in reversed(PurePath(whole).parts) if not is_utf8(part))
        remedy = "set LANG=C.UTF-8" if sys.getfilesystemencoding() != "utf-8" else "rename it, or choose another folder"
        raise ValueError(
            f"{option} {whole!a}: checkpoints cannot be kept in a path that is not valid UTF-8, because of {name!a}: "
            f"{remedy}"
        )


def is_utf8(text: str) -> bool:
    """Whether a path or name has no bytes of another encoding, which Python keeps in it as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


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
