"""Which files a LOCATION and a split stand for, where sets are kept as tar, Parquet or ArrayRecord files."""

import dataclasses
import fnmatch
import glob
import re
from collections import defaultdict

import numpy as np

from tinymim_jax.data.sources import files
from tinymim_jax.data.sources.files import File
from tinymim_jax.data.sources.splits import ALL

# Labels above this are taken for something else, such as a row's id.
_MAX_CLASSES = 1_000_000
# "train-00003-of-00008-1a2b.parquet": what goes before, the number, the count.
_NUMBERED = re.compile(r"(.*?)-(\d+)-of-(\d+)(?!\d)")
_SPLIT_OF_STEM = re.compile(r"([\w-]*?)(?:[-_.]?\d+-of-\d+.*|[-_]\d+|)")


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file: its prefix in a source's name and what such files are called.

    suffix: matches from where the name's stem ends.
    refused, remedy: names of such files as cannot be read, and what to do about it.
    """

    kind: str
    suffix: re.Pattern
    refused: re.Pattern | None = None
    remedy: str = ""

    def stem(self, path: str) -> str | None:
        """The file's name without its suffix; None for other files."""
        name = path.rsplit("/", 1)[-1]
        found = self.suffix.search(name)
        return name[: found.start()] if found and found.start() and not name.startswith(".") else None

    def refuses(self, path: str) -> bool:
        return self.refused is not None and self.refused.search(path) is not None


def find(form: Format, name: str, location: str, split: str) -> list[File]:
    """The files of a whole split, in the order of their paths. For the rules see `sources.open_source`.

    Raises:
        FileNotFoundError: there is nothing at `location`, or a shard of a numbered set is missing.
        ValueError: there is no such split, or no file of this kind.
    """
    location = files.absolute(location)
    if "{split}" in location:
        found = _expand(form, location.replace("{split}", "*" if split == ALL else split))
    elif split == ALL:
        found = _expand(form, location)
    else:
        inside = files.join(files.as_pattern(location), split)
        found = [path for place in files.matches(inside) if files.is_folder(place) for path in _under(form, place)]
        found = found or _called(form, inside, split)
    if not found:
        raise _nothing(form, name, location, split)
    if refused := [path for path in found if form.refuses(path)]:
        raise ValueError(f"{refused[0]} (one of {len(refused)} such) cannot be read by index; {form.remedy}")
    _check_complete(found)
    return files.in_threads(files.status, found)


def split_names(form: Format, location: str) -> list[str]:
    """The whole splits that `find` would find, but for `all` where there are others."""
    location = files.absolute(location)
    if "{split}" in location:
        return _marked_splits(location)
    places = files.matches(location)
    if not places:
        raise FileNotFoundError(f"there is nothing at {location}")
    names = set()
    for place in places:
        for path in _under(form, place) if files.is_folder(place) else []:
            relative = path.removeprefix(place.rstrip("/") + "/")
            names.add(relative.split("/")[0] if "/" in relative else _split_of(form, relative))
        if not files.is_folder(place):
            names.add("")
    return sorted(names) if names and "" not in names else [ALL]


def fingerprint(form: Format, found: list[File]) -> list:
    """What an index of these files depends on."""
    try:
        named = [files.status(_names_file(found[0].path))]
    except FileNotFoundError:
        named = []
    return [form.kind, found, named]


def class_names(first: str, labels: np.ndarray) -> tuple[list[str], str]:
    """The classes of integer labels and, where these cannot be used, the reason.

    The lines of `classes.txt` beside the file `first`, or else the numbers 0 to the highest label; none where all
    labels are -1.
    """
    highest = int(labels.max(initial=-1))
    if highest < 0:
        return [], ""
    if names := named_classes(first):
        return names, ""
    if highest >= _MAX_CLASSES:
        return [], f"the highest label is {highest:,}: not the number of a class"
    return [str(label) for label in range(highest + 1)], ""


def named_classes(first: str) -> list[str]:
    """The lines of `classes.txt` beside the file `first`; none where there is no such file."""
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
        return places  # one file, whatever it is called
    found = [path for place in places for path in (_under(form, place) if files.is_folder(place) else [place])]
    return sorted({path for path in found if form.stem(path) is not None or form.refuses(path)})


def _under(form: Format, folder: str) -> list[str]:
    return sorted(
        path
        for inside, names in files.walk(folder)
        for path in (files.join(files.join(folder, inside), name) for name in names)
        if form.stem(path) is not None or form.refuses(path)
    )


def _called(form: Format, inside: str, split: str) -> list[str]:
    """Files LOCATION/SPLIT-* and LOCATION/SPLIT.*; not those of `train-extra` for `train`, if there are of `train`."""
    found = {path for pattern in ("-*", "_*", ".*") for path in files.matches(inside + pattern)}
    found = sorted(path for path in found if form.stem(path) is not None or form.refuses(path))
    exact = [path for path in found if _split_of(form, path) == split or form.refuses(path)]
    return exact or [path for path in found if not path.rsplit("/", 1)[-1].startswith(split + "_")]


def _split_of(form: Format, path: str) -> str:
    """The split that a file is of by its name alone; empty where it does not say."""
    stem = form.stem(path) or ""
    found = _SPLIT_OF_STEM.fullmatch(stem)
    return found[1] if found and not stem.isdigit() else ""


def _marked_splits(location: str) -> list[str]:
    pattern = fnmatch.translate(files.bare(location).replace("{split}", "SPLITMARK"))
    pattern = pattern.replace("SPLITMARK", r"(?P<split>[\w-]+?)", 1).replace("SPLITMARK", r"(?P=split)")
    found = (re.match(pattern, files.bare(path)) for path in files.matches(location.replace("{split}", "*")))
    names = sorted({match["split"] for match in found if match})
    if not names:
        raise FileNotFoundError(f"there is nothing at {location}, whatever the split")
    return names


def _nothing(form: Format, name: str, location: str, split: str) -> Exception:
    if "{split}" not in location and not files.matches(location):
        return FileNotFoundError(f"{name!r}: there is nothing at {location}")
    choices = split_names(form, location)
    if split == ALL or (choices == [ALL] and not _expand(form, location)):
        return ValueError(f"{name!r}: there is no file of kind {form.kind} at {location}")
    hint = ", or write {split} into the location where the split's name goes" if choices == [ALL] else ""
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
            if not files.matches(f"{glob.escape(shard)}*"):  # else a pattern of the user's has left it out
                raise FileNotFoundError(
                    f"{shard} is missing, {len(present)} of {int(count)} such files are there; "
                    "fetch it again, or name the files to read by a pattern in another folder"
                )
