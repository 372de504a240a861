"""Finds the tar, Parquet or ArrayRecord files of a LOCATION and a split."""

import dataclasses
import fnmatch
import glob
import re
from collections import defaultdict

import numpy as np

from tinymim_jax.data.sources import files
from tinymim_jax.data.sources.files import File
from tinymim_jax.data.sources.splits import ALL

# Labels this large are probably not classes, but for example row ids.
_MAX_CLASSES = 1_000_000
# "train-00003-of-00008-1a2b.parquet": prefix, shard number, shard count.
_NUMBERED = re.compile(r"(.*?)-(\d+)-of-(\d+)(?!\d)")
_SPLIT_OF_STEM = re.compile(r"([\w-]*?)(?:[-_.]?\d+-of-\d+.*|[-_]\d+|)")


@dataclasses.dataclass(frozen=True)
class Format:
    """A file format.

    kind: its prefix in source names, such as `tar`.
    suffix: matches the end of a file name, after the stem.
    refused, remedy: matches names of files that cannot be read (such as compressed ones), and what to do about them.
    """

    kind: str
    suffix: re.Pattern
    refused: re.Pattern | None = None
    remedy: str = ""

    def stem(self, path: str) -> str | None:
        """The file name without its suffix; None for files of other formats."""
        name = path.rsplit("/", 1)[-1]
        found = self.suffix.search(name)
        return name[: found.start()] if found and found.start() and not name.startswith(".") else None

    def refuses(self, path: str) -> bool:
        return self.refused is not None and self.refused.search(path) is not None


def find(form: Format, name: str, location: str, split: str) -> list[File]:
    """The files of a whole split, sorted by path. See `sources.open_source` for the file layout.

    Raises:
        FileNotFoundError: `location` does not exist, or a shard of a numbered set is missing.
        ValueError: there is no such split, or no file of this format.
    """
    location = files.absolute(location)
    if "{split}" in location:
        found = _expand(form, location.replace("{split}", "*" if split == ALL else split))
    elif split == ALL:
        found = _expand(form, location)
    else:
        inside = files.join(files.as_pattern(location), split)
        found = [path for place in files.matches(inside) if files.is_folder(place) for path in _under(form, place)]
        found = found or _files_of_split(form, inside, split)
    if not found:
        raise _not_found(form, name, location, split)
    if refused := [path for path in found if form.refuses(path)]:
        raise ValueError(
            f"{refused[0]} (one of {len(refused)} such files) does not support random access; {form.remedy}"
        )
    _check_complete(found)
    return files.in_threads(files.status, found)


def split_names(form: Format, location: str) -> list[str]:
    """The names of the whole splits at `location`; `['all']` if it is not divided into splits."""
    location = files.absolute(location)
    if "{split}" in location:
        return _splits_in_pattern(location)
    places = files.matches(location)
    if not places:
        raise FileNotFoundError(f"no such file or folder: {location}")
    names = set()
    for place in places:
        for path in _under(form, place) if files.is_folder(place) else []:
            relative = path.removeprefix(place.rstrip("/") + "/")
            names.add(relative.split("/")[0] if "/" in relative else _split_of(form, relative))
        if not files.is_folder(place):
            names.add("")
    return sorted(names) if names and "" not in names else [ALL]


def fingerprint(form: Format, found: list[File]) -> list:
    """The fingerprint of the index of these files: their paths, sizes, versions, and `classes.txt`."""
    try:
        named = [files.status(_names_file(found[0].path))]
    except FileNotFoundError:
        named = []
    return [form.kind, found, named]


def class_names(first: str, labels: np.ndarray) -> tuple[list[str], str]:
    """The class names for integer `labels`, and the reason if the labels cannot be used (otherwise empty).

    Names are the lines of `classes.txt` in the folder of the file `first`, or else the numbers 0 to the highest label;
    there are none if all labels are -1.
    """
    highest = int(labels.max(initial=-1))
    if highest < 0:
        return [], ""
    if names := named_classes(first):
        return names, ""
    if highest >= _MAX_CLASSES:
        return [], f"the highest label is {highest:,}, too large for a class number"
    return [str(label) for label in range(highest + 1)], ""


def named_classes(first: str) -> list[str]:
    """The lines of `classes.txt` in the folder of the file `first`; empty if there is no such file."""
    try:
        names = files.read(_names_file(first)).decode().split("\n")
    except FileNotFoundError:
        return []
    names = [name.strip() for name in names]
    while names and not names[-1]:
        names.pop()
    return names


def _names_file(first: str) -> str:
    return files.join(first.rsplit("/", 1)[0], "classes.txt")


def _expand(form: Format, pattern: str) -> list[str]:
    places = files.matches(pattern)
    if places == [pattern] and not files.is_folder(pattern):
        return places  # a single file, with any name
    found = [path for place in places for path in (_under(form, place) if files.is_folder(place) else [place])]
    return sorted({path for path in found if form.stem(path) is not None or form.refuses(path)})


def _under(form: Format, folder: str) -> list[str]:
    return sorted(
        path
        for inside, names in files.walk(folder)
        for path in (files.join(files.join(folder, inside), name) for name in names)
        if form.stem(path) is not None or form.refuses(path)
    )


def _files_of_split(form: Format, inside: str, split: str) -> list[str]:
    """Files LOCATION/SPLIT-* and LOCATION/SPLIT.*. Files of `train` are preferred to those of e.g. `train-extra`."""
    found = {path for pattern in ("-*", "_*", ".*") for path in files.matches(inside + pattern)}
    found = sorted(path for path in found if form.stem(path) is not None or form.refuses(path))
    exact = [path for path in found if _split_of(form, path) == split or form.refuses(path)]
    return exact or [path for path in found if not path.rsplit("/", 1)[-1].startswith(split + "_")]


def _split_of(form: Format, path: str) -> str:
    """The split that a file name contains; empty if it contains none."""
    stem = form.stem(path) or ""
    found = _SPLIT_OF_STEM.fullmatch(stem)
    return found[1] if found and not stem.isdigit() else ""


def _splits_in_pattern(location: str) -> list[str]:
    pattern = fnmatch.translate(files.bare(location).replace("{split}", "SPLITMARK"))
    pattern = pattern.replace("SPLITMARK", r"(?P<split>[\w-]+?)", 1).replace("SPLITMARK", r"(?P=split)")
    found = (re.match(pattern, files.bare(path)) for path in files.matches(location.replace("{split}", "*")))
    names = sorted({match["split"] for match in found if match})
    if not names:
        raise FileNotFoundError(f"no file or folder matches {location} for any split")
    return names


def _not_found(form: Format, name: str, location: str, split: str) -> Exception:
    if "{split}" not in location and not files.matches(location):
        return FileNotFoundError(f"{name!r}: no such file or folder: {location}")
    choices = split_names(form, location)
    if split == ALL or (choices == [ALL] and not _expand(form, location)):
        return ValueError(f"{name!r}: there is no {form.kind} file at {location}")
    hint = ", or write {split} in the location in place of the split's name" if choices == [ALL] else ""
    return ValueError(
        f"split={split!r} of {name!r} is unknown; choices: {', '.join(choices[:20])}{', ...' * (len(choices) > 20)}, "
        f"or a part such as '{choices[0]}[:90%]'{hint}"
    )


def _check_complete(paths: list[str]) -> None:
    numbers = defaultdict(set)
    for path in paths:
        if found := _NUMBERED.fullmatch(path) or _NUMBERED.match(path):
            numbers[found[1], found[3]].add(int(found[2]))
    for (before, count), present in numbers.items():
        for number in sorted(set(range(int(count))) - present):
            shard = f"{before}-{number:0{len(count)}d}-of-{count}"
            if not files.matches(f"{glob.escape(shard)}*"):  # otherwise it exists, but the user's pattern excludes it
                raise FileNotFoundError(
                    f"{shard} is missing, {len(present)} of {int(count)} such files exist; "
                    "download it again, or move the files to use to another folder and match them with a pattern"
                )
