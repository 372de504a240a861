"""`tar:LOCATION`: WebDataset shards, `key.jpg` with `key.cls` or `key.json`, read by index."""

import contextlib
import itertools
import json
import posixpath
import re
import tarfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from tinymim_jax.data.sources import files, shards
from tinymim_jax.data.sources.examples import Example, Source
from tinymim_jax.data.sources.files import File
from tinymim_jax.data.sources.index import Index, Records, cached
from tinymim_jax.data.sources.labels import shown
from tinymim_jax.data.sources.layout import is_image

FORMAT = shards.Format(
    "tar",
    re.compile(r"\.tar$"),
    refused=re.compile(r"\.(tgz|tar\.\w+)$"),
    remedy="decompress the shards once (gunzip *.tar.gz): JPEGs hardly grow by that",
)
_LABELS = ("cls", "json")
_MAX_LINKS = 8  # from one to the next, before a file is met


def open_split(name: str, location: str, split: str) -> Source:
    """A whole split of the shards at `location`; for the rules and the errors see `sources.open_source`."""
    found = shards.find(FORMAT, name, location, split)
    what = f"{name}/{split}"
    return TarSource(name, split, cached(what, shards.fingerprint(FORMAT, found), lambda: _records(what, found)))


def split_names(location: str) -> list[str]:
    return shards.split_names(FORMAT, location)


class TarSource(Source):
    """Samples of tar files, in the order they lie there, each read by its offset."""

    def __init__(self, name: str, split: str, index: Index):
        self.name = name
        self.split = split
        self.class_names = tuple(index.meta["class_names"])
        self.label_problem = index.meta["label_problem"]
        self._index = index
        self._shards = files.Shards(index.meta["paths"])

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}/{self.split} has records 0 to {len(self) - 1}, got {index}")
        place = self._index
        image = self._shards.read(int(place.shards[index]), int(place.offsets[index]), int(place.sizes[index]))
        return {"image": image, "label": int(place.labels[index])}

    def known_labels(self) -> np.ndarray:
        return self._index.labels

    def describe(self, index: int) -> str:
        if not 0 <= index < len(self):
            return super().describe(index)
        return f"{self._index.name(index)} of {self._shards.paths[self._index.shards[index]]}"

    def __reduce__(self):
        return TarSource, (self.name, self.split, self._index)


class _Member(NamedTuple):
    name: str
    key: str  # WebDataset's rule: the path up to the first dot of the file's name
    extension: str  # what is behind that dot
    offset: int
    size: int
    text: bytes  # of a label; an image stays where it is


class _Problems:
    """Mistakes in labels, counted by kind, with the first of each: they stop no task that needs no labels."""

    def __init__(self):
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, first: str, count: int = 1) -> None:
        before, kept = self._kinds.get(kind, (0, first))
        self._kinds[kind] = before + count, kept

    def extend(self, other: "_Problems") -> None:
        for kind, (count, first) in other._kinds.items():
            self.add(kind, first, count)

    def __str__(self) -> str:
        return "; ".join(f"{kind}: {count:,}, the first {first}" for kind, (count, first) in self._kinds.items())


def _records(what: str, found: list[File]) -> Records:
    records, problems = Records(), _Problems()
    for one, theirs in files.in_threads(lambda numbered: _index_shard(*numbered), list(enumerate(found))):
        records.extend(one)
        problems.extend(theirs)
    if not len(records):
        raise ValueError(f"{what} holds no image" + (f": {problems}" if str(problems) else ""))
    labels = records.columns()["labels"]
    names, problem = shards.class_names(found[0].path, labels)
    records.meta = {
        "paths": [file.path for file in found],
        "class_names": names,
        "label_problem": "; ".join(filter(None, (problem, str(problems)))),
    }
    return records


def _index_shard(number: int, file: File) -> tuple[Records, _Problems]:
    records, problems = Records(), _Problems()
    with files.open_file(file.path) as opened:
        samples = _samples(_members(file, opened))
    for sample in samples:
        key = sample[0].key
        image = _image_of(file, key, sample)
        label = _label_of(file, sample, problems)
        if image is not None:
            records.add(image.name, label, number, image.offset, image.size)
        elif label != -1:
            first = f"sample {key!r} of {file.path}, which has a label but no image"
            problems.add("samples with a label but no image", first)
        for member in sample:
            if member.extension.endswith(".cls"):
                first = f"{member.name} of {file.path}; only {key}.cls is read as this sample's label"
                problems.add(".cls files whose stem is not the sample's key", first)
    return records, problems


def _samples(members: Iterable[_Member]) -> list[list[_Member]]:
    """Members grouped by their keys, in the order of each sample's first member.

    Members of one sample need not lie side by side, as where all images come before all labels. A member that a sample
    has already, such as another `1.jpg` further on, begins another sample of the same key.
    """
    samples: list[list[_Member]] = []
    latest: dict[str, list[_Member]] = {}
    for key, run in itertools.groupby(members, key=lambda member: member.key):
        more = list(run)
        before = latest.get(key)
        if before is not None and not {m.extension for m in before} & {m.extension for m in more}:
            before.extend(more)
        else:
            samples.append(more)
            latest[key] = more
    return samples


def _members(file: File, opened) -> list[_Member]:
    """The files in a tar that have a key; of images only the headers are read.

    A link stands for the file that it names. Raises ValueError where the tar is damaged or holds such a link alone.
    """
    damaged = f"{file.path} is cut short or not a tar file; fetch it again"
    members: list[_Member] = []
    links: list[tuple[int, str, str]] = []  # place among `members`, name, name of the file that it stands for
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore  # or it keeps them all
                if info.islnk() or info.issym():
                    links.append((len(members), info.name, _target(info)))
                elif info.issparse():
                    raise ValueError(f"{info.name} of {file.path} is a sparse file; write the tar without --sparse")
                elif info.isreg():
                    if not 0 <= info.size <= file.size - info.offset_data:
                        raise ValueError(damaged)
                    members.append(_member(info.name, info.offset_data, info.size, opened))
            # tarfile takes a damaged header for the end: a real one is of zeros, or of the file.
            opened.seek(tar.offset)
            if any(opened.read(512)):
                raise ValueError(damaged)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{damaged} ({error})") from error
    for member in reversed(_resolved(file, opened, members, links)):
        members.insert(*member)
    return [member for member in members if member.key]


def _member(name: str, offset: int, size: int, opened) -> _Member:
    folder, _, base = name.removeprefix("./").rpartition("/")
    stem, dot, extension = base.partition(".")
    # Hidden files have no key, __such__ are WebDataset's own.
    key = files.join(folder, stem) if dot and stem and not re.fullmatch("__.*__", base) else ""
    extension, text = extension.lower(), b""
    if key and extension in _LABELS:  # read in passing: going back costs a bucket's reader much
        opened.seek(offset)
        text = opened.read(size)
    return _Member(name, key, extension, offset, size, text)


def _target(info: tarfile.TarInfo) -> str:
    """The member that a link stands for; a symbolic link's is named relative to the folder of the link."""
    if info.islnk():
        return posixpath.normpath(info.linkname)
    return posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))


def _resolved(
    file: File, opened, members: list[_Member], links: list[tuple[int, str, str]]
) -> list[tuple[int, _Member]]:
    """The links as members, each with its place among `members`."""
    places = {posixpath.normpath(member.name): (member.offset, member.size) for member in members} if links else {}
    targets = {posixpath.normpath(name): target for _, name, target in links}
    resolved = []
    for place, name, target in links:
        for _ in range(_MAX_LINKS):  # a link to a link
            target = target if target in places else targets.get(target, target)
        if target in places:
            resolved.append((place, _member(name, *places[target], opened)))
        elif is_image(name) or name.lower().endswith(tuple(f".{extension}" for extension in _LABELS)):
            raise ValueError(
                f"{name} of {file.path} is a link to {target}, which the tar does not hold; write the tar with "
                "--dereference"
            )
    return resolved


def _image_of(file: File, key: str, sample: list[_Member]) -> _Member | None:
    images = [member for member in sample if is_image(f".{member.extension}")]
    # "key.seg.png" goes with "key.jpg"; where it is alone it is the image.
    images = [member for member in images if "." not in member.extension] or images
    if len(images) > 1:
        raise ValueError(
            f"sample {key!r} of {file.path} has {len(images)} images: {shown([image.name for image in images])}; "
            "needed is one. A name up to its first dot is the sample's key: write other dots as another sign"
        )
    return images[0] if images else None


def _label_of(file: File, sample: list[_Member], problems: _Problems) -> int:
    """The label of a sample; -1 where it has none, or one that is noted among the problems."""
    for member in sample:
        if member.extension not in _LABELS:
            continue
        value: Any = None
        with contextlib.suppress(ValueError, RecursionError):  # a JSON error is a ValueError
            value = int(member.text) if member.extension == "cls" else json.loads(member.text)
        if isinstance(value, dict):
            if "label" not in value:
                continue
            value = value["label"]
        if isinstance(value, int) and -1 <= value < 2**31:
            return value
        first = (
            f"{member.name} of {file.path} holds {member.text[:50]!r}; needed is a class number from 0, or -1 for "
            'none; in a .json file as {"label": 3}'
        )
        problems.add("labels that are no number", first)
        return -1
    return -1
