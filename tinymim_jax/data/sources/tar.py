"""`tar:LOCATION`: random access to WebDataset shards, `key.jpg` with `key.cls` or `key.json`, or with a mask.

The mask of `key.jpg` is `key.mask.png`, or .seg.png, .labelIds.png, and other words of pair_names.py.
"""

import contextlib
import itertools
import json
import posixpath
import re
import tarfile
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from tinymim_jax.data.masks.class_files import classes_beside
from tinymim_jax.data.sources import files, shards
from tinymim_jax.data.sources.examples import Example, MaskClass, Source
from tinymim_jax.data.sources.files import File
from tinymim_jax.data.sources.index import Index, Records, cached
from tinymim_jax.data.sources.labels import shown
from tinymim_jax.data.sources.layout import is_image
from tinymim_jax.data.sources.pair_names import names_mask

FORMAT = shards.Format(
    "tar",
    re.compile(r"\.tar$"),
    refused=re.compile(r"\.(tgz|tar\.\w+)$"),
    remedy="decompress the shards (gunzip *.tar.gz); for JPEG images the size hardly changes",
)
_LABELS = ("cls", "json")
_MAX_LINKS = 8  # maximum length of a chain of links


def open_split(name: str, location: str, split: str) -> Source:
    """Opens a whole split of the shards at `location`; see `sources.open_source` for the file layout and errors."""
    found = shards.find(FORMAT, name, location, split)
    what = f"{name}/{split}"
    fingerprint = [*shards.fingerprint(FORMAT, found), "with masks"]  # indexes before these have no places of masks
    index = cached(what, fingerprint, lambda: _records(what, found))
    classes = () if index.mask_sizes is None else classes_beside(found[0].path.rpartition("/")[0])
    return TarSource(name, split, index, classes)


def split_names(location: str) -> list[str]:
    return shards.split_names(FORMAT, location)


class TarSource(Source):
    """The samples of tar files, in file order, read by byte offset."""

    def __init__(self, name: str, split: str, index: Index, mask_classes: tuple[MaskClass, ...] = ()):
        self.name = name
        self.split = split
        self.mask_classes = mask_classes
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
        shard = int(place.shards[index])
        image = self._shards.read(shard, int(place.offsets[index]), int(place.sizes[index]))
        example: Example = {"image": image, "label": int(place.labels[index])}
        if place.mask_offsets is None or place.mask_sizes is None:
            return example
        size = int(place.mask_sizes[index])
        return {**example, "mask": self._shards.read(shard, int(place.mask_offsets[index]), size) if size else b""}

    def known_labels(self) -> np.ndarray:
        return self._index.labels

    def describe(self, index: int) -> str:
        if not 0 <= index < len(self):
            return super().describe(index)
        return f"{self._index.name(index)} of {self._shards.paths[self._index.shards[index]]}"

    def __reduce__(self):
        return TarSource, (self.name, self.split, self._index, self.mask_classes)


class _Member(NamedTuple):
    name: str
    key: str  # as in WebDataset: the path up to the first dot of the file name; empty for ignored files
    extension: str  # the rest of the name after that dot, in lower case
    offset: int
    size: int
    text: bytes  # the contents of a label file; empty for images


class _Problems:
    """Label errors, counted by kind, with the first of each. Only tasks that need labels fail on them."""

    def __init__(self):
        self._kinds: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, first: str, count: int = 1) -> None:
        before, kept = self._kinds.get(kind, (0, first))
        self._kinds[kind] = before + count, kept

    def extend(self, other: "_Problems") -> None:
        for kind, (count, first) in other._kinds.items():
            self.add(kind, first, count)

    def __str__(self) -> str:
        return "; ".join(f"{kind}: {count:,}, first: {first}" for kind, (count, first) in self._kinds.items())


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
        image, mask = _image_of(file, key, sample)
        label = _label_of(file, sample, problems)
        if image is not None:
            place = (0, 0) if mask is None else (mask.offset, mask.size)
            records.add(image.name, label, number, image.offset, image.size, place)
        elif label != -1:
            first = f"sample {key!r} of {file.path}, which has a label but no image"
            problems.add("samples with a label but no image", first)
        for member in sample:
            if member.extension.endswith(".cls"):
                first = f"{member.name} of {file.path}; only {key}.cls is read as this sample's label"
                problems.add(".cls files whose stem is not the sample's key", first)
    return records, problems


def _samples(members: Iterable[_Member]) -> list[list[_Member]]:
    """Members grouped into samples by key, in the order of each sample's first member.

    The members of a sample need not be adjacent: all images may precede all labels. A repeated extension, such as a
    second `1.jpg`, starts a new sample with the same key.
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
    """The members of a tar that have a key, without reading image contents.

    Links are resolved to the members they refer to. Raises ValueError if the tar is damaged or the target of a link
    is missing.
    """
    damaged = f"{file.path} is truncated or not a tar file; download it again"
    members: list[_Member] = []
    links: list[tuple[int, str, str]] = []  # position in `members`, name, target
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore  # else tarfile keeps every header in memory
                if info.islnk() or info.issym():
                    links.append((len(members), info.name, _target(info)))
                elif info.issparse():
                    raise ValueError(f"{info.name} of {file.path} is a sparse file; create the tar without --sparse")
                elif info.isreg():
                    if not 0 <= info.size <= file.size - info.offset_data:
                        raise ValueError(damaged)
                    members.append(_member(info.name, info.offset_data, info.size, opened))
            # tarfile stops silently at a damaged header; a valid archive ends with zeros or at the end of the file.
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
    # Hidden files and WebDataset's internal files (__name__) get no key.
    key = files.join(folder, stem) if dot and stem and not re.fullmatch("__.*__", base) else ""
    extension, text = extension.lower(), b""
    if key and extension in _LABELS:  # read now: seeking back later is slow in remote files
        opened.seek(offset)
        text = opened.read(size)
    return _Member(name, key, extension, offset, size, text)


def _target(info: tarfile.TarInfo) -> str:
    """The target of a link; for symbolic links, resolved relative to the folder of the link."""
    if info.islnk():
        return posixpath.normpath(info.linkname)
    return posixpath.normpath(posixpath.join(posixpath.dirname(info.name), info.linkname))


def _resolved(
    file: File, opened, members: list[_Member], links: list[tuple[int, str, str]]
) -> list[tuple[int, _Member]]:
    """The links resolved to members, each with its position in `members`."""
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
                f"{name} of {file.path} is a link to {target}, which is not in the tar; create the tar with "
                "--dereference"
            )
    return resolved


def _image_of(file: File, key: str, sample: list[_Member]) -> tuple[_Member | None, _Member | None]:
    """The image of a sample and its mask, where it has them."""
    pictures = [member for member in sample if is_image(f".{member.extension}")]
    masks = [each for each in pictures if names_mask(each.extension.rpartition(".")[0])]
    # "key.seg.png" accompanies "key.jpg"; without "key.jpg" it is the image.
    images = [member for member in pictures if "." not in member.extension]
    if not images:
        images, masks = pictures, []
    for kind, found in (("images", images), ("masks", masks)):
        if len(found) > 1:
            raise ValueError(
                f"sample {key!r} of {file.path} has {len(found)} {kind}: {shown([each.name for each in found])}; "
                "expected one. The key of a sample is the file name up to its first dot: replace any other dots in it. "
                "The mask of KEY.jpg is KEY.mask.png"
            )
    return images[0] if images else None, masks[0] if masks else None


def _label_of(file: File, sample: list[_Member], problems: _Problems) -> int:
    """The label of a sample; -1 if it has none or an invalid one, which is added to `problems`."""
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
            f"{member.name} of {file.path} holds {member.text[:50]!r}; expected a class number from 0, or -1 for "
            'no label; in a .json file as {"label": 3}'
        )
        problems.add("labels that are not integers", first)
        return -1
    return -1
