"""Which files are images, which are their masks, and to which split they belong, judged by names alone."""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from tinymim_jax.data.sources import layout

# Words for a folder of masks or of images, also joined to a split's name: `trainannot`, `val_labels`, `masks-test`.
_MASK_WORDS = (
    *("masks?", "annotations?", "annot", "anno", "labels?", "gt", "gtfine", "gtcoarse", "ground_?truths?", "segs?"),
    *("segmentations?", "segmentation_?masks?", "segmentationclass(?:aug|raw)?", "targets?", "seg_?maps?"),
)
_IMAGE_WORDS = ("images?", "imgs?", "jpegimages", "leftimg8bit", "rgb", "photos?", "pictures?", "inputs?")
_SPLIT_WORD = r"(?P<split>train(?:ing)?|trn|val(?:id(?:ation)?)?|dev|test(?:ing)?|tst)"
# What a mask's name has after the image's, the most usual first. Masks of other kinds lie beside them in Cityscapes.
_MASK_SUFFIXES = (
    *("_labelids", "_labeltrainids", "_l", "_mask", "_masks", "_label", "_labels", "_gt", "_seg", "_segmentation"),
    *("_annotation", "_groundtruth", "-mask", "-label", ".mask", "_m"),
)
# What may come before the number or name that an image and its mask share: image_12 and mask_12, img12 and label12.
_MASK_PREFIX = re.compile(r"(?:masks?|labels?|annotations?|gt|segs?|segmentations?|targets?)(?:[-_. ]|(?=\d))", re.I)
_IMAGE_PREFIX = re.compile(r"(?:images?|imgs?|photos?|pictures?|inputs?|rgb|sat)(?:[-_. ]|(?=\d))", re.I)
_IMAGE_SUFFIXES = ("_leftimg8bit", "_sat", "_image", "_img", "_rgb")
_OTHER_KINDS = ("_color", "_instanceids", "_instance", "_panoptic", "_depth", "_edges")


class Pairs(NamedTuple):
    """What pairing found; paths are relative to the location.

    pairs: (image, mask) by split; "" if there are no splits.
    unpaired: images without a mask, by split.
    unused: masks without an image, or of an image that has another one.
    absent: by split, the stems of images that the list of the split names and that are not there.
    """

    pairs: dict[str, list[tuple[str, str]]]
    unpaired: dict[str, list[str]]
    unused: list[str]
    absent: dict[str, list[str]]


class _Item(NamedTuple):
    path: str
    split: str
    folder: str  # without the words for images or masks
    stem: str


def is_mask(name: str) -> bool:
    """Whether a file can be a mask: an image, or a GIF."""
    return layout.is_image(name) or name.lower().endswith(".gif")


def names_mask(word: str) -> bool:
    """Whether a word in the name of a file says that it is a mask: "seg", "labelIds"."""
    return role_of(word)[0] == "mask" or f"_{word.lower()}" in _MASK_SUFFIXES


def role_of(folder: str) -> tuple[str, str]:
    """("image", "mask" or "", the name of the folder without that word): "trainannot" -> ("mask", "train")."""
    for role, words in (("mask", _MASK_WORDS), ("image", _IMAGE_WORDS)):
        word = "|".join(words)
        if re.fullmatch(word, folder, re.I):
            return role, ""
        for pattern in (rf"{_SPLIT_WORD}[-_. ]?(?:{word})", rf"(?:{word})[-_. ]?{_SPLIT_WORD}"):
            if match := re.fullmatch(pattern, folder, re.I):
                return role, match["split"]
    return "", folder


def find_pairs(found: Mapping[str, list[str]], lists: Mapping[str, frozenset[str]]) -> Pairs:
    """Pairs the files of a walk.

    Args:
      found: file names by folder, relative to the location.
      lists: stems of the images of each split, where files such as ImageSets/Segmentation/train.txt list them.

    Raises ValueError if there are no masks, or it is unclear which of several masks of an image is meant.
    """
    images, masks = _sorted_out(found)
    if not masks:
        raise ValueError(
            "no masks were found: they belong into a folder named masks, annotations, labels or gt (in or beside that "
            "of the images), or beside their images under names such as IMAGE_mask.png. For other names give both "
            "folders: pairs:IMAGES::MASKS"
        )
    masks_of, unused = _matched(images, masks)
    if images and not masks_of:
        raise ValueError(
            f"no mask has the name of an image: there are {len(images):,} images such as {images[0].path}, and "
            f"{len(masks):,} masks such as {masks[0].path}. A mask is called as its image, with or without an ending "
            "such as _mask; or they are called image_NAME and mask_NAME"
        )
    pairs: dict[str, list[tuple[str, str]]] = collections.defaultdict(list)
    unpaired: dict[str, list[str]] = collections.defaultdict(list)
    for image in images:
        for split in _splits_of(image, lists):
            if image.path in masks_of:
                pairs[split].append((image.path, masks_of[image.path]))
            elif lists or not _is_whole_set_without_masks(image, images, masks_of):
                unpaired[split].append(image.path)
    there = {stem for image in images for stem in (image.stem, _base(image))}
    absent = {split: sorted(stems - there) for split, stems in lists.items()}
    return Pairs(dict(pairs), dict(unpaired), unused, absent)


def pair_folders(images: Iterable[str], masks: Iterable[str]) -> Pairs:
    """Pairs the files of two folders that the user has named, without splits. Paths are relative to their folders."""
    image_items = [_item(path, "", path) for path in images]
    mask_items = [_item(path, "", path) for path in masks]
    masks_of, unused = _matched(image_items, mask_items)
    pairs = [(item.path, masks_of[item.path]) for item in image_items if item.path in masks_of]
    return Pairs({"": pairs}, {"": [item.path for item in image_items if item.path not in masks_of]}, unused, {})


def _sorted_out(found: Mapping[str, list[str]]) -> tuple[list[_Item], list[_Item]]:
    """The images and the masks. Without a folder of masks, their files are told by the ends of their names."""
    items: dict[str, list[_Item]] = {"image": [], "mask": [], "": []}
    for folder in sorted(found):
        parts = folder.split("/") if folder else []
        roles = [role_of(part) for part in parts]
        role = next((each for each in ("mask", "image") if any(found == each for found, _ in roles)), "")
        kept = [rest for own, rest in roles if rest] if role else parts
        names = [name for name in found[folder] if is_mask(name)]
        items[role] += [_item(f"{folder}/{name}" if folder else name, "/".join(kept), name) for name in names]
    if not items["mask"]:
        everything = items["image"] + items[""]
        stems = {(item.folder, item.stem.lower()) for item in everything}
        stems |= {(item.folder, _without(_IMAGE_PREFIX, item.stem.lower())) for item in everything}
        masks = [item for item in everything if _is_named_as_mask(item, stems)]
        return [item for item in everything if item not in masks], masks
    return items["image"] or items[""], items["mask"]


def _item(path: str, folder: str, name: str) -> _Item:
    stem = name.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    first = folder.split("/")[0]
    return _Item(path, first if layout.is_split(first) else "", folder, stem)


def _is_named_as_mask(item: _Item, stems: set[tuple[str, str]]) -> bool:
    """Whether a file is a mask beside its image: its name without a mask's suffix or prefix is an image's."""
    stem = item.stem.lower()
    bases = [stem.removesuffix(suffix) for suffix in _MASK_SUFFIXES if stem.endswith(suffix)]
    bases += [_without(_MASK_PREFIX, stem)] if _MASK_PREFIX.match(stem) else []
    return any((item.folder, base + more) in stems for base in bases for more in ("", *_IMAGE_SUFFIXES))


def _matched(images: list[_Item], masks: list[_Item]) -> tuple[dict[str, str], list[str]]:
    """(the mask of each image, by their paths; masks without an image).

    Where no names agree, they are compared without prefixes such as `mask_`.
    """
    found = _matched_names(images, masks)
    if found[0]:
        return found
    bare_images = [item._replace(stem=_without(_IMAGE_PREFIX, item.stem)) for item in images]
    return _matched_names(bare_images, [item._replace(stem=_without(_MASK_PREFIX, item.stem)) for item in masks])


def _matched_names(images: list[_Item], masks: list[_Item]) -> tuple[dict[str, str], list[str]]:
    """See `_matched`.

    Names are compared within the same folder, or over all folders where no image of a folder has a mask otherwise.
    """
    for in_folder in (True, False):
        of_image: dict[tuple[str, str], _Item] = {}
        for item in images:
            of_image[item.folder if in_folder else "", _base(item)] = item
        if not in_folder and len(of_image) < len(images):
            break  # the same name in several folders
        candidates: dict[str, dict[str, str]] = collections.defaultdict(dict)
        unused = []
        for mask in masks:
            image, suffix = _image_of(mask, of_image, mask.folder if in_folder else "")
            if image is None or suffix in candidates[image.path]:  # the latter: the same name in another file format
                unused.append(mask.path)
            else:
                candidates[image.path][suffix] = mask.path
        if candidates:
            suffix = _chosen_suffix(candidates)
            chosen = {path: found[suffix] for path, found in candidates.items() if suffix in found}
            return chosen, unused
    return {}, [mask.path for mask in masks]


def _without(prefix: re.Pattern[str], stem: str) -> str:
    """`stem` without a prefix, where something is left of it."""
    match = prefix.match(stem)
    return stem[match.end() :] or stem if match else stem


def _base(item: _Item) -> str:
    stem = item.stem.lower()
    return next((stem.removesuffix(suffix) for suffix in _IMAGE_SUFFIXES if stem.endswith(suffix)), stem)


def _image_of(mask: _Item, of_image: Mapping[tuple[str, str], _Item], folder: str) -> tuple[_Item | None, str]:
    """The image with the longest name that the mask's begins with, and the rest of the mask's name."""
    stem = mask.stem.lower()
    for end in (len(stem), *(match.start() for match in reversed(list(re.finditer(r"[-_. ]", stem))))):
        if end and (image := of_image.get((folder, stem[:end]))) is not None:
            return image, stem[end:]
    base = _base(mask)
    return of_image.get((folder, base)), ""


def _chosen_suffix(candidates: Mapping[str, Mapping[str, str]]) -> str:
    """The end of the names of the masks to use, where images have several kinds of masks."""
    counts = collections.Counter(suffix for found in candidates.values() for suffix in found)
    usable = [suffix for suffix in counts if not suffix.endswith(_OTHER_KINDS)] or list(counts)
    if len(usable) == 1:
        return usable[0]
    for usual in ("", *_MASK_SUFFIXES):
        ends = [suffix for suffix in usable if (suffix.endswith(usual) if usual else not suffix)]
        if len(ends) == 1 and counts[ends[0]] == max(counts[suffix] for suffix in usable):
            return ends[0]
    kinds = ", ".join(f"*{suffix} ({counts[suffix]})" for suffix in sorted(usable))
    raise ValueError(
        f"the images have masks of several kinds: {kinds}; choose one by a pattern: "
        f"pairs:IMAGES::MASKS/*{usable[0]}.png"
    )


def _splits_of(image: _Item, lists: Mapping[str, frozenset[str]]) -> list[str]:
    if lists:
        return [split for split, stems in lists.items() if image.stem in stems or _base(image) in stems]
    return [image.split]


def _is_whole_set_without_masks(image: _Item, images: list[_Item], masks_of: Mapping[str, str]) -> bool:
    """Whether no image of this image's split has a mask, as in test sets whose masks are not published."""
    return bool(image.split) and not any(other.path in masks_of for other in images if other.split == image.split)
