"""Interpretation of image folder trees: which folders are splits or classes, and trees that are ambiguous."""

import re
from collections import Counter, defaultdict

from tinymim_jax.data.sources import files

# torchvision.datasets.folder.IMG_EXTENSIONS, plus AVIF and alternative JPEG extensions.
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".avif"),
)
_SPLIT = re.compile(
    r"(?P<base>train|trn|val|valid|validation|dev|test|tst|eval|extra|mini|unlabel+ed)(ing)?(?P<rest>[-_.\d].*)?", re.I
)
_BASES = {"trn": "train", "valid": "val", "validation": "val", "tst": "test"}
# Unsupported files that are, or may be, images: skipping them is reported. "" is a name without extension.
_OTHER_IMAGES = (".gif", ".jp2", ".j2k", ".heic", ".heif", ".jxl", ".ico", ".dng", ".cr2", ".nef", ".svg", ".psd", "")
_TREE_LINES = 12
_SEARCHED = 40  # maximum number of folders listed to find split folders


def is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def is_split(name: str) -> bool:
    """Whether a folder's name is that of a split, such as `train`, `Validation` or `test_2`."""
    return _SPLIT.fullmatch(name) is not None


def split_folders(location: str, folders: list[str]) -> list[str]:
    """Those of the `folders` in `location` that are splits; empty if the folders are classes.

    Folders are splits if at least two have split names (in any case), or one has and the others contain no images.
    A single split name among classes is a class: COCO has a class `train`.
    """
    found = [name for name in folders if _SPLIT.fullmatch(name)]
    others = [name for name in folders if name not in found]
    if len(found) >= 2 or (found and not any(_holds_images(files.join(location, name)) for name in others)):
        return found
    return []


def matching_folder(split: str, folders: list[str]) -> str | None:
    """The folder for `split`: the exact name, or the only variant in case or spelling (`train`, `Training`).

    None if there is no such folder, or several variants.
    """
    if split in folders:
        return split
    for form in (str.lower, _plain):
        same = [name for name in folders if form(name) == form(split)]
        if len(same) == 1:
            return same[0]
    return None


def find_split_root(location: str) -> str | None:
    """The first folder at or under `location` that has split folders; None if a bounded search finds none."""
    level, listed = [location], 0
    while level and listed < _SEARCHED:
        following = []
        for folder in level[: _SEARCHED - listed]:
            folders, _ = files.list_folder(folder)
            listed += 1
            if len(splits := [name for name in folders if _SPLIT.fullmatch(name)]) >= 2 or "train" in splits:
                return folder
            following += [files.join(folder, name) for name in folders]
        level = following
    return None


def class_problem(root: str, images: dict[str, list[str]]) -> str:
    """Why the folders directly under `root` are probably not classes; empty if they may be.

    `images`: the image names of each folder, by folder path relative to `root`.
    """
    inner: dict[str, set[str]] = defaultdict(set)
    direct = set()
    for folder, names in images.items():
        first, _, rest = folder.partition("/")
        if names and rest:
            inner[first].add(rest.split("/")[0])
        elif names and first:
            direct.add(first)
    filled = direct | set(inner)
    if len(filled) == 1 and len([folder for folder in images if folder and "/" not in folder]) == 1:
        return (
            f"{root} has only one class folder; if the classes are the folders inside it, use "
            f"{files.join(root, next(iter(filled)))} instead, with {{split}} in place of the split's name in the "
            f"path\n{tree(root, images)}"
        )
    doubled = [folder for folder, names in images.items() if names and _is_doubled(folder)]
    if doubled and len(doubled) == sum(bool(names) for names in images.values()):
        return (
            f"each folder of {root} holds one folder of the same name with folders in it ({doubled[0]}), so these may "
            f"be splits and not classes: choose one of them as the location, or put the images of each split into a "
            f"folder LOCATION/SPLIT/CLASS\n{tree(root, images)}"
        )
    alike = set(map(frozenset, inner.values()))
    if len(inner) > 1 and not direct and len(alike) == 1:
        names = sorted(next(iter(alike)))
        if len(names) > 1 or _SPLIT.fullmatch(names[0]):
            return (
                f"the folders of {root} contain the same folders ({', '.join(names[:5])}{', ...' * (len(names) > 5)}), "
                "so it is unclear which level is the classes: arrange the images as "
                f"LOCATION/SPLIT/CLASS, with all images of a class in one folder\n{tree(root, images)}"
            )
    return ""


def tree(root: str, images: dict[str, list[str]]) -> str:
    """The first folders under `root`, one per line, with the number of images directly in each."""
    lines = [root]
    for folder in sorted(images, key=lambda folder: folder.split("/")):
        if folder and folder.count("/") < 3:
            count = f"  ({len(images[folder]):,} images)" if images[folder] else ""
            lines.append(f"{'  ' * (folder.count('/') + 1)}{folder.rsplit('/', 1)[-1]}/{count}")
    if len(lines) > _TREE_LINES:
        lines[_TREE_LINES:] = [f"  ... and {len(lines) - _TREE_LINES:,} more folders"]
    return "\n".join(lines)


def left_out(found: dict[str, list[str]]) -> dict[str, tuple[int, str]]:
    """Skipped files: (count, first path) by extension, most frequent first."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for folder in sorted(found):
        for name in found[folder]:
            if not is_image(name):
                extension = f".{name.rsplit('.', 1)[1].lower()}" if "." in name else ""
                counts[extension] += 1
                first.setdefault(extension, files.join(folder, name))
    return {extension: (count, first[extension]) for extension, count in counts.most_common(20)}


def left_out_images(counts: dict[str, tuple[int, str]]) -> str:
    """A description of those skipped files (from `left_out`) that may be images; empty if there are none."""
    return ", ".join(
        f"{count:,} {extension or 'without an extension'} (such as {first})"
        for extension, (count, first) in counts.items()
        if extension in _OTHER_IMAGES
    )


def _is_doubled(folder: str) -> bool:
    """Whether a path is `a/a/more`. With images in `a/a`, `a` may well be a class."""
    first, second, *more = [*folder.split("/"), ""]
    return first == second and bool(more) and more != [""]


def _plain(name: str) -> str:
    if (match := _SPLIT.fullmatch(name)) is None:
        return name.lower()
    base = match["base"].lower()
    return _BASES.get(base, base) + (match["rest"] or "").lower()


def _holds_images(folder: str) -> bool:
    return any(is_image(name) for _, names in files.walk(folder) for name in names)
