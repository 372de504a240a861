"""`pairs:LOCATION`: images with masks, for semantic segmentation, in the layouts of common data sets or your own.

Pairs are found by names (pair_names.py). Understood are, among others:

    images/training/a.jpg            annotations/training/a.png               (ADEChallengeData2016)
    leftImg8bit/train/CITY/a_leftImg8bit.png   gtFine/train/CITY/a_gtFine_labelIds.png   (Cityscapes)
    JPEGImages/a.jpg                 SegmentationClass/a.png and ImageSets/Segmentation/train.txt   (PASCAL VOC)
    train/a.png                      trainannot/a.png, or train_labels/a_L.png            (CamVid)
    images/a.jpg                     masks/a.png, with or without a folder for each split
    a.jpg                            a_mask.png

Class names and colours are read from `classes.txt` and other files (masks/class_files.py) in LOCATION.
"""

import fnmatch
import hashlib
import logging
from collections.abc import Mapping

from tinymim_jax.data.masks.class_files import classes_beside
from tinymim_jax.data.sources import files, layout, pair_names
from tinymim_jax.data.sources.examples import Example, MaskClass, Source
from tinymim_jax.data.sources.index import Index, Records, cached
from tinymim_jax.data.sources.pair_names import Pairs
from tinymim_jax.data.sources.splits import ALL

log = logging.getLogger(__name__)

# Folders with lists of the images of a split, SPLIT.txt, relative to the location.
_LIST_FOLDERS = ("ImageSets/Segmentation", "splits", "annotations", "")
_BETWEEN = "\0"  # image and mask in a record's name
_SHOWN = 5


def open_split(name: str, location: str, split: str) -> Source:
    """Opens a whole split of the pairs at `location`, in shuffled order; see `sources.open_source`.

    Raises ValueError for images without a mask, and names them.
    """
    root, pairs, whole = _find(name, location, split)
    found = pairs.pairs.get(whole, []) if split != ALL else [pair for each in pairs.pairs.values() for pair in each]
    found = list(dict.fromkeys(found))
    splits = [whole] if split != ALL else list(pairs.unpaired)
    if without := [path for each in splits for path in pairs.unpaired.get(each, [])]:
        raise ValueError(
            f"{len(without):,} of {len(without) + len(found):,} images of split {split!r} of {name!r} have no mask: "
            f"{_listed(without)}. Add the masks, or move these images elsewhere"
        )
    if not found:
        raise ValueError(f"no image of split {split!r} of {name!r} has a mask; choices: {', '.join(_names(pairs))}")
    if pairs.unused:
        log.warning(
            "%s: %d masks or other files are not used, as they belong to no image or it has another mask: %s",
            name,
            len(pairs.unused),
            _listed(pairs.unused),
        )

    if absent := {stem for each in pairs.absent if split == ALL or each in splits for stem in pairs.absent[each]}:
        log.warning(
            "%s: %d images that the list of split %r names are not there: %s",
            name,
            len(absent),
            split,
            _listed(sorted(absent)),
        )

    def build() -> Records:
        records = Records()
        for image, mask in found:
            records.add(f"{image}{_BETWEEN}{mask}")
        return records.mixed()

    listing = hashlib.sha256("\n".join(_BETWEEN.join(pair) for pair in found).encode("utf-8", "surrogateescape"))
    index = cached(f"{name}/{split}", ["pairs", root, listing.hexdigest()], build)
    return PairSource(name, split, root, index, classes_beside(root))


def split_names(location: str) -> list[str]:
    """The whole splits at `location` that have masks; `['all']` if there are no splits."""
    if "{split}" in location:
        before = files.absolute(location.partition("::")[0].partition("{split}")[0])
        parent = before if files.is_folder(before) else before.rsplit("/", 1)[0]
        names = [each for each in files.list_folder(parent)[0] if layout.is_split(each)]
        return names or [ALL]
    _, pairs, _ = _find(f"pairs:{location}", location, ALL)
    return _names(pairs)


class PairSource(Source):
    """Images and masks under `root`, read on access."""

    class_names = ()

    def __init__(self, name: str, split: str, root: str, index: Index, mask_classes: tuple[MaskClass, ...]):
        self.name = name
        self.split = split
        self.mask_classes = mask_classes
        self._root = root
        self._index = index

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Example:
        image, mask = self.paths(index)
        return {"image": files.read(image), "label": -1, "mask": files.read(mask)}

    def paths(self, index: int) -> tuple[str, str]:
        """The image file and the mask file of record `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}/{self.split} has records 0 to {len(self) - 1}, got {index}")
        image, mask = self._index.name(index).split(_BETWEEN)
        return files.join(self._root, image), files.join(self._root, mask)

    def describe(self, index: int) -> str:
        if not 0 <= index < len(self):
            return super().describe(index)
        image, mask = self.paths(index)
        return f"{image} with its mask {mask}"

    def __reduce__(self):
        return PairSource, (self.name, self.split, self._root, self._index, self.mask_classes)


def _find(name: str, location: str, split: str) -> tuple[str, Pairs, str]:
    """(folder that the paths are relative to, all pairs in it, the split's own name)."""
    if "::" in location:
        root, pairs = _named_folders(name, location, split)
        return root, pairs, ""
    root = files.absolute(location.replace("{split}", split))
    if not files.is_folder(root):
        raise FileNotFoundError(f"{name!r}: there is no folder {root}")
    found = dict(files.walk(root))
    try:
        pairs = pair_names.find_pairs(found, _lists(root, found))
    except ValueError as error:
        above, _, own = root.rstrip("/").rpartition("/")
        hint = f". {own} is the folder of the images: did you mean pairs:{above}?"
        raise ValueError(f"{root}: {error}{hint if pair_names.role_of(own)[0] == 'image' else ''}") from None
    names = _names(pairs)
    if split == ALL or "{split}" in location:
        return root, pairs, ""
    if (whole := layout.matching_folder(split, [each for each in names if each != ALL])) is None:
        raise ValueError(
            f"split={split!r} of {name!r} is unknown, or has no masks; choices: {', '.join(names)}, or a part such as "
            f"'{names[0] if names else ALL}[:90%]'{_other_level(root)}"
        )
    return root, pairs, whole


def _other_level(root: str) -> str:
    """A hint if `root` is itself the folder of a split, or contains the folders of the splits at a deeper level."""
    below = None if files.is_remote(root) else layout.find_split_root(root)
    if below not in (None, root):
        return f". The folders of the splits are in {below}: did you mean pairs:{below}?"
    above, _, own = root.rstrip("/").rpartition("/")
    return f". {own} is itself the folder of a split: did you mean pairs:{above}?" if layout.is_split(own) else ""


def _names(pairs: Pairs) -> list[str]:
    return sorted(each for each in pairs.pairs if each) or [ALL]


def _named_folders(name: str, location: str, split: str) -> tuple[str, Pairs]:
    """Pairs of `IMAGES::MASKS`, both with the split's name in place of {split}."""
    places = [files.absolute(part.replace("{split}", split)) for part in location.split("::")]
    if len(places) != 2:
        raise ValueError(f"{name!r}: write pairs:IMAGES::MASKS, two folders")
    if "{split}" not in location and split != ALL:
        raise ValueError(
            f"split={split!r} of {name!r}: put {{split}} into both folders in place of the split's name, or use "
            f"split {ALL!r} or a part of it, such as '{ALL}[:90%]'"
        )
    listed = []
    for place in places:
        folder, pattern = (place, "*") if files.is_folder(place) else place.rsplit("/", 1)
        if not files.is_folder(folder):
            raise FileNotFoundError(f"{name!r}: there is no folder {folder}")
        paths = [files.join(inside, each) for inside, names in files.walk(folder) for each in names]
        fit = [path for path in paths if pair_names.is_mask(path) and fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern)]
        if not fit:
            raise ValueError(f"{name!r}: no image in {folder} fits {pattern!r}")
        listed.append((folder, fit))
    (image_folder, images), (mask_folder, masks) = listed
    pairs = pair_names.pair_folders(images, masks)
    full = [(files.join(image_folder, image), files.join(mask_folder, mask)) for image, mask in pairs.pairs[""]]
    return "", pairs._replace(pairs={"": full})


def _lists(root: str, found: Mapping[str, list[str]]) -> dict[str, frozenset[str]]:
    """Stems of the images of each split that a file SPLIT.txt lists: the first word of each line, without folders."""
    for folder in found:
        if folder not in _LIST_FOLDERS and not folder.endswith("/" + _LIST_FOLDERS[0]):
            continue
        lists = {}
        for name in found[folder]:
            split = name.removesuffix(".txt")
            if name.endswith(".txt") and (layout.is_split(split) or split == "trainval"):
                lines = files.read(files.join(root, files.join(folder, name))).decode("utf-8", "replace").splitlines()
                words = [line.replace(",", " ").split()[0] for line in lines if line.strip()]
                lists[split] = frozenset(_stem(word) for word in words)
        if lists:
            return lists
    return {}


def _stem(path: str) -> str:
    name = path.rsplit("/", 1)[-1]
    return name.rsplit(".", 1)[0] if layout.is_image(name) else name


def _listed(paths: list[str]) -> str:
    return ", ".join(paths[:_SHOWN]) + ", ..." * (len(paths) > _SHOWN)
