"""`tar:LOCATION`: WebDataset shards, `key.jpg` with `key.cls` or `key.json`, read by index."""

import contextlib
import itertools
import json
import re
import tarfile
from array import array
from collections.abc import Iterable
from typing import Any, NamedTuple

from tinymim_jax.data.sources import files, shards
from tinymim_jax.data.sources.examples import Example, Source
from tinymim_jax.data.sources.files import File
from tinymim_jax.data.sources.folder import is_image
from tinymim_jax.data.sources.index import Index, Records, cached

FORMAT = shards.Format(
    "tar",
    re.compile(r"\.tar$"),
    refused=re.compile(r"\.(tgz|tar\.\w+)$"),
    remedy="decompress the shards once (gunzip *.tar.gz): JPEGs hardly grow by that",
)
_LABELS = ("cls", "json")
_NO_LABEL = -(2**31)  # while indexing: a sample that says nothing of a label


def open_split(name: str, location: str, split: str) -> Source:
    """A whole split of the shards at `location`; for the rules and the errors see `sources.open_source`."""
    found = shards.find(FORMAT, name, location, split)
    return TarSource(name, split, cached(f"{name}/{split}", shards.fingerprint(FORMAT, found), lambda: _records(found)))


def split_names(location: str) -> list[str]:
    return shards.split_names(FORMAT, location)


class TarSource(Source):
    """Samples of tar files, in the order they lie there, each read by its offset."""

    def __init__(self, name: str, split: str, index: Index):
        self.name = name
        self.split = split
        self.class_names = tuple(index.meta["class_names"])
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


def _records(found: list[File]) -> Records:
    records = Records()
    for one in files.in_threads(lambda numbered: _index_shard(*numbered), list(enumerate(found))):
        records.extend(one)
    labels = records.columns()["labels"]
    without = int((labels == _NO_LABEL).sum())
    if 0 < without < len(records):
        raise ValueError(
            f"{without} of {len(records)} samples of {found[0].path} and its fellows have no label (no .cls, no .json "
            "with a 'label'), the others have one: complete them, or keep the two kinds in shards of their own"
        )
    if without:
        labels = labels * 0 - 1
    records.labels = array("i", labels.tobytes())
    count = int(labels.max(initial=-1)) + 1
    records.meta = {
        "paths": [file.path for file in found],
        "class_names": [] if without else shards.class_names(found[0].path, count),
    }
    return records


def _index_shard(number: int, file: File) -> Records:
    records = Records()
    with files.open_file(file.path) as opened:
        for key, group in itertools.groupby(_members(file, opened), key=lambda member: member.key):
            sample = list(group)
            image = _image_of(file, key, sample)
            label = _label_of(file, sample)
            if image is not None:
                records.add(image.name, label, number, image.offset, image.size)
            elif label != _NO_LABEL:
                raise ValueError(f"sample {key!r} of {file.path} has a label but no image: {_names(sample)}")
    return records


def _members(file: File, opened) -> Iterable[_Member]:
    """The regular files of a tar, of which only the headers are read. Raises ValueError where it is damaged."""
    damaged = f"{file.path} is cut short or not a tar file; fetch it again"
    try:
        with tarfile.open(fileobj=opened, mode="r:") as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore  # or it keeps them all
                folder, _, base = info.name.removeprefix("./").rpartition("/")
                stem, dot, extension = base.partition(".")
                # Hidden files have no key, __such__ are WebDataset's own.
                if info.isreg() and dot and stem and not re.fullmatch("__.*__", base):
                    if info.offset_data + info.size > file.size:
                        raise ValueError(damaged)
                    text = b""
                    if extension.lower() in _LABELS:  # read in passing: going back costs a bucket's reader much
                        opened.seek(info.offset_data)
                        text = opened.read(info.size)
                    key = files.join(folder, stem)
                    yield _Member(info.name, key, extension.lower(), info.offset_data, info.size, text)
            # tarfile takes a damaged header for the end: a real one is of zeros, or of the file.
            opened.seek(tar.offset)
            if any(opened.read(512)):
                raise ValueError(damaged)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{damaged} ({error})") from error


def _image_of(file: File, key: str, sample: list[_Member]) -> _Member | None:
    images = [member for member in sample if is_image(f".{member.extension}")]
    # "key.seg.png" goes with "key.jpg"; where it is alone it is the image.
    images = [member for member in images if "." not in member.extension] or images
    if len(images) > 1:
        raise ValueError(f"sample {key!r} of {file.path} has {len(images)} images: {_names(images)}; needed is one")
    return images[0] if images else None


def _label_of(file: File, sample: list[_Member]) -> int:
    for member in sample:
        if member.extension not in _LABELS:
            continue
        value: Any = None
        with contextlib.suppress(ValueError):  # of which a JSON error is one
            value = int(member.text) if member.extension == "cls" else json.loads(member.text)
        if isinstance(value, dict):
            if "label" not in value:
                continue
            value = value["label"]
        if not isinstance(value, int) or not -1 <= value < 2**31:
            raise ValueError(
                f"{member.name} of {file.path} holds {member.text[:50]!r}; needed is a class number from 0, "
                'or -1 for none; in a .json file as {"label": 3}'
            )
        return value
    return _NO_LABEL


def _names(sample: list[_Member]) -> str:
    return ", ".join(member.name for member in sample)
