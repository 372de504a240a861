"""`folder:LOCATION`: image files, in one folder per class or without classes."""

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import time

import numpy as np

from tinymim_jax.data.sources import files, layout
from tinymim_jax.data.sources.examples import Example, Source
from tinymim_jax.data.sources.index import Index, Records, cache_folder, cached, writable
from tinymim_jax.data.sources.splits import ALL, Parts

log = logging.getLogger(__name__)

# A change within the resolution of modification times may go unseen, so newer folders are not cached.
_SETTLED_SECONDS = 2.0


def open_split(name: str, location: str, split: str) -> Source:
    """Opens a whole split of the images at `location`, in shuffled order; see `sources.open_source`."""
    names = split_names(location)
    if split == ALL and names != [ALL]:
        wholes = [open_split(name, location, each) for each in names]
        return Parts(name, split, [(whole, 0, len(whole)) for whole in wholes])
    root = _root(location, split)
    if root is None or not files.is_folder(root):
        raise ValueError(
            f"split={split!r} of {name!r} is unknown: there is no such folder in {files.absolute(location)}; choices: "
            f"{_choices(location, names)}, or a part such as 'train[:90%]'{_elsewhere(location)}"
        )
    index = _index(root)
    source = FolderSource(name, split, root, index)
    if skipped := layout.left_out_images(index.meta["left_out"]):
        log.warning(
            "%s: skipped files by extension: %s. Supported extensions are %s: convert or rename the others",
            root,
            skipped,
            " ".join(layout.IMAGE_EXTENSIONS),
        )
    return source


def split_names(location: str) -> list[str]:
    """The whole splits at `location`: its folders if they are named like splits, otherwise `all`."""
    before, marker, after = files.absolute(location).partition("{split}")
    if marker:
        pattern = re.compile(re.escape(files.bare(before)) + r"([\w-]+)" + _repeated_split(re.escape(after)))
        found = files.matches(f"{before}*{after.replace('{split}', '*')}")
        names = [match[1] for path in found if (match := pattern.fullmatch(files.bare(path)))]
        if not names:
            raise FileNotFoundError(f"there is no folder {before}*{after}")
        return names
    if not files.is_folder(before):
        raise FileNotFoundError(f"there is no folder {before}")
    folders, _ = files.list_folder(before)
    return layout.split_folders(before, folders) or [ALL]


class FolderSource(Source):
    """The image files under `root`, read on access."""

    def __init__(self, name: str, split: str, root: str, index: Index):
        self.name = name
        self.split = split
        self.class_names = tuple(index.meta["class_names"])
        self.label_problem = index.meta["label_problem"]
        self._root = root
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        return {"image": files.read(self._path(index)), "label": int(self._index.labels[index])}

    def known_labels(self) -> np.ndarray:
        return self._index.labels

    def describe(self, index: int) -> str:
        return self._path(index) if 0 <= index < len(self) else super().describe(index)

    def _path(self, index: int) -> str:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}/{self.split} has records 0 to {len(self) - 1}, got {index}")
        return files.join(self._root, self._index.name(index))

    def __reduce__(self):
        return FolderSource, (self.name, self.split, self._root, self._index)


def _repeated_split(after: str) -> str:
    """Replaces further `{split}` markers in an escaped location by a reference to the first match."""
    return after.replace(re.escape("{split}"), r"\1")


def _root(location: str, split: str) -> str | None:
    """The folder of a split, or None if there is none of that name."""
    location = files.absolute(location)
    if "{split}" in location:
        return location.replace("{split}", split)
    if split == ALL:
        return location
    if files.is_folder(files.join(location, split)):
        return files.join(location, split)
    folder = layout.matching_folder(split, files.list_folder(location)[0])
    return None if folder is None else files.join(location, folder)


def _choices(location: str, names: list[str]) -> str:
    if names == [ALL]:  # any folder can be opened as a split
        names = names + files.list_folder(files.absolute(location))[0]
    return ", ".join(names[:20]) + ", ..." * (len(names) > 20)


def _elsewhere(location: str) -> str:
    location = files.absolute(location)
    found = layout.find_split_root(location) if "{split}" not in location else None
    return f". Did you mean folder:{found}, which has split folders?" if found not in (None, location) else ""


def _index(root: str) -> Index:
    """The index of the images under `root`; reused until a folder under `root` changes."""
    note = cache_folder() / f"folders-{hashlib.sha256(os.fsencode(root)).hexdigest()}.json"
    if not files.is_remote(root) and note.is_file():
        known: dict[str, str] = {}
        with contextlib.suppress(ValueError):  # damaged: the folder is listed again
            known = json.loads(note.read_text())
        if known and known == _versions(root, list(known)):
            return _cached(root, known)
    return _list_again(root, note)


def _list_again(root: str, note) -> Index:
    started = time.time()
    found = dict(files.walk(root))
    if files.is_remote(root):  # buckets have no folder modification times: fingerprint the listing
        listing = hashlib.sha256()
        for folder in sorted(found):
            listing.update("\0".join([folder, *found[folder], ""]).encode())
        return _cached(root, listing.hexdigest(), found)
    versions = _versions(root, list(found))
    if any(int(version) / 1e9 > started - _SETTLED_SECONDS for version in versions.values()):
        return _cached(root, [versions, time.time_ns()], found)
    index = _cached(root, versions, found)
    with writable(note.parent), tempfile.NamedTemporaryFile("w", dir=note.parent, delete=False) as scratch:
        json.dump(versions, scratch)
    os.replace(scratch.name, note)
    return index


def _versions(root: str, folders: list[str]) -> dict[str, str]:
    try:
        statuses = files.in_threads(files.status, [files.join(root, folder) for folder in folders])
    except OSError:
        return {}  # a folder was removed
    return {folder: status.version for folder, status in zip(folders, statuses)}


def _cached(root: str, versions, found: dict[str, list[str]] | None = None) -> Index:
    def build() -> Records:
        return _records(root, dict(files.walk(root)) if found is None else found)

    return cached(root, ["folder", root, versions], build)


def _records(root: str, found: dict[str, list[str]]) -> Records:
    images = {folder: [name for name in names if layout.is_image(name)] for folder, names in found.items()}
    classes = sorted(folder for folder in images if folder and "/" not in folder)
    in_folders = [folder for folder in images if folder and images[folder]]
    records = Records()
    if images[""] and in_folders:
        raise ValueError(
            f"{root} contains images directly ({images[''][0]}, ...) and in folders ({in_folders[0]}, ...): "
            "either put each class into its own folder, or put all images into one folder"
        )
    left_out = layout.left_out(found)
    if not images[""] and not in_folders:
        others = layout.left_out_images(left_out)
        raise ValueError(
            f"{root} holds no image; looked for {', '.join(layout.IMAGE_EXTENSIONS)} in all folders under it"
            + (f"; there are {others}" if others else "")
        )
    problem = layout.class_problem(root, images) if in_folders else ""
    if not in_folders or (problem and len(classes) > 1):
        classes = []
    records.meta = {"class_names": classes, "label_problem": problem, "left_out": left_out}
    labels = {name: label for label, name in enumerate(classes)}
    for folder in sorted(images, key=lambda folder: (folder.split("/")[0], folder)):
        label = labels.get(folder.split("/")[0], -1)
        records.add_files([files.join(folder, name) for name in images[folder]], label)
    return records.mixed()
