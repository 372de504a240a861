"""The classes of well-known sets of masks, and how their values are stored."""

from typing import NamedTuple

from tinymim_jax.data.masks.ade20k import ADE20K
from tinymim_jax.data.masks.classes import IGNORED, distinct_colours
from tinymim_jax.data.sources.examples import MaskClass
from tinymim_jax.errors import unknown


class KnownSet(NamedTuple):
    """How the masks of a well-known set are read; see `rules.MaskRules`."""

    classes: tuple[MaskClass, ...]
    ignore: tuple[int, ...] = (255,)
    label_map: tuple[tuple[int, int], ...] = ()
    reduce_zero_label: bool = False


def _named(*rows: tuple[str, tuple[int, int, int]]) -> tuple[MaskClass, ...]:
    return tuple(MaskClass(name, colour) for name, colour in rows)


_VOC = (
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"),
)
_CITYSCAPES = _named(
    ("road", (128, 64, 128)),
    ("sidewalk", (244, 35, 232)),
    ("building", (70, 70, 70)),
    ("wall", (102, 102, 156)),
    ("fence", (190, 153, 153)),
    ("pole", (153, 153, 153)),
    ("traffic light", (250, 170, 30)),
    ("traffic sign", (220, 220, 0)),
    ("vegetation", (107, 142, 35)),
    ("terrain", (152, 251, 152)),
    ("sky", (70, 130, 180)),
    ("person", (220, 20, 60)),
    ("rider", (255, 0, 0)),
    ("car", (0, 0, 142)),
    ("truck", (0, 0, 70)),
    ("bus", (0, 60, 100)),
    ("train", (0, 80, 100)),
    ("motorcycle", (0, 0, 230)),
    ("bicycle", (119, 11, 32)),
)
# The ids of the 19 classes in *_labelIds.png (cityscapesScripts, labels.py); all others are ignored.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CAMVID = _named(
    ("sky", (128, 128, 128)),
    ("building", (128, 0, 0)),
    ("pole", (192, 192, 128)),
    ("road", (128, 64, 128)),
    ("pavement", (60, 40, 222)),
    ("tree", (128, 128, 0)),
    ("sign", (192, 128, 128)),
    ("fence", (64, 64, 128)),
    ("car", (64, 0, 128)),
    ("pedestrian", (64, 64, 0)),
    ("bicyclist", (0, 128, 192)),
)

KNOWN: dict[str, KnownSet] = {
    # Stored 0 is "other", which the benchmark ignores.
    "ade20k": KnownSet(_named(*zip(ADE20K, distinct_colours(150))), reduce_zero_label=True),
    "cityscapes": KnownSet(
        _CITYSCAPES,
        label_map=tuple(
            (stored, _CITYSCAPES_IDS.index(stored) if stored in _CITYSCAPES_IDS else IGNORED) for stored in range(34)
        ),
    ),
    # cityscapes with *_labelTrainIds.png, whose values are the classes.
    "cityscapes_train_ids": KnownSet(_CITYSCAPES),
    "voc": KnownSet(_named(*zip(_VOC, ((0, 0, 0), *distinct_colours(20))))),
    # The 11 classes of SegNet's copy; 11 is void.
    "camvid": KnownSet(_CAMVID, ignore=(11, 255)),
}


def known_set(name: str) -> KnownSet:
    """The rules of a well-known set. Raises ValueError for other names."""
    if name not in KNOWN:
        error = unknown("data.masks.classes", name, KNOWN)
        raise ValueError(f"{error}, a file with a class a line, or a number of classes")
    return KNOWN[name]
