"""The classes of masks: their names and colours, read from a file or known for common data sets."""

import csv
import json
import re
from typing import Any, NamedTuple

import numpy as np

from tinymim_jax.data.masks.ade20k import ADE20K
from tinymim_jax.data.sources import files
from tinymim_jax.data.sources.examples import MaskClass
from tinymim_jax.errors import unknown

# Files with the classes of a set of pairs, as data sets come with them.
CLASS_FILES = ("classes.txt", "class_dict.csv", "label_colors.txt", "labelmap.txt", "objectInfo150.txt", "codes.txt")
# In a file with colours: pixels of these colours are ignored.
_IGNORED_NAMES = ("ignore", "ignored")
IGNORED = -1


class KnownSet(NamedTuple):
    """How the masks of a well-known set are read; see `rules.MaskRules`."""

    classes: tuple[MaskClass, ...]
    ignore: tuple[int, ...] = (255,)
    label_map: tuple[tuple[int, int], ...] = ()
    reduce_zero_label: bool = False


def _named(*rows: tuple[str, tuple[int, int, int]]) -> tuple[MaskClass, ...]:
    return tuple(MaskClass(name, colour) for name, colour in rows)


def distinct_colours(classes: int) -> tuple[tuple[int, int, int], ...]:
    """Colours that are easy to tell apart, for classes without any: those of PASCAL VOC from number 1 on."""
    colours = []
    for number in range(1, classes + 1):
        colour = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                colour[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
        colours.append(tuple(colour))
    return tuple(colours)


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
        raise unknown("set of classes", name, KNOWN)
    return KNOWN[name]


def read_classes(path: str) -> tuple[MaskClass, ...]:
    """The classes in a file, in the order of their numbers.

    One of
        text with a class a line: its name, or its name and colour in any order: `road 128 64 128`, `128 64 128 road`,
            `road: 128, 64, 128` (CVAT's labelmap.txt), `road #804080`. All lines may begin with the number of their
            class, from 0: `0 road`. Empty lines and lines that start with # are skipped;
        a table (comma or tab) whose header has a column Name, and perhaps columns r, g, b, or color, as class_dict.csv
            and objectInfo150.txt;
        JSON: a list of names, or of {"name": ..., "color": [r, g, b]}; {"0": "road"}; or {"road": [r, g, b]}.
    Two lines of the same name are one class with two colours; pixels of the colour of a line `ignore` are ignored.

    Raises ValueError, with the line, for anything else.
    """
    text = files.read(files.absolute(path)).decode("utf-8-sig")
    if path.lower().endswith((".yaml", ".yml", ".xml", ".toml")):
        raise ValueError(f"{path}: such files of classes are not read: write a text file with a class a line, or JSON")
    if path.lower().endswith(".json"):
        found = _of_json(path, text)
    elif header := _header(text):
        found = _of_table(path, text, header)
    else:
        lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), 1)]
        rows = [(number, _parts(line), line) for number, line in lines if line and not line.startswith("#")]
        found = [_of_line(path, *row) for row in _without_numbers(path, rows)]
    if not found:
        raise ValueError(f"{path} names no class")
    plain = [each.name for each in found if each.colour is None]
    if twice := [name for name in plain if [each.name for each in found].count(name) > 1]:
        raise ValueError(f"{path} names {twice[0]!r} twice: every class has one line, unless each line has a colour")
    return tuple(found)


def classes_beside(folder: str) -> tuple[MaskClass, ...]:
    """The classes in the first of CLASS_FILES that lies in `folder`; empty where there is none."""
    if not folder:
        return ()
    _, names = files.list_folder(folder)
    path = next((name for name in CLASS_FILES if name in names), None)
    return () if path is None else read_classes(files.join(folder, path))


def classes_text(classes: tuple[MaskClass, ...]) -> str:
    """The classes as lines that `read_classes` reads: `NAME`, or `NAME R G B`."""
    return "".join(" ".join([each.name, *map(str, each.colour or ())]) + "\n" for each in classes)


def class_names(classes: tuple[MaskClass, ...]) -> tuple[str, ...]:
    """The names in the order of their numbers, without repetitions and without `ignore`."""
    return tuple(dict.fromkeys(each.name for each in classes if each.name.lower() not in _IGNORED_NAMES))


def class_numbers(classes: tuple[MaskClass, ...]) -> list[tuple[tuple[int, int, int], int]]:
    """(colour, number of the class, or IGNORED) of each colour of the classes."""
    names = class_names(classes)
    return [
        (each.colour, names.index(each.name) if each.name in names else IGNORED)
        for each in classes
        if each.colour is not None
    ]


def class_colours(classes: tuple[MaskClass, ...]) -> tuple[tuple[int, int, int], ...]:
    """A colour for each class: its own, or else a distinct one."""
    names = class_names(classes)
    own = {each.name: each.colour for each in reversed(classes) if each.colour is not None}
    return tuple(own.get(name, other) for name, other in zip(names, distinct_colours(len(names))))


def _of_json(path: str, text: str) -> list[MaskClass]:
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if isinstance(content, dict) and len(content) == 1 and isinstance(inner := next(iter(content.values())), list):
        content = inner if not all(isinstance(each, int) for each in inner) else content  # {"classes": [...]}
    if isinstance(content, dict) and all(key.isdigit() for key in content):
        if sorted(map(int, content)) != list(range(len(content))):
            raise ValueError(
                f"{path}: its numbers of classes are not 0 to {len(content) - 1}; see data.masks.label_map"
            )
        content = [content[key] for key in sorted(content, key=int)]
    elif isinstance(content, dict):
        content = [{"name": name, "color": colour} for name, colour in content.items()]
    return [_of_item(path, item) for item in content]


def _of_item(path: str, item: Any) -> MaskClass:
    if isinstance(item, str):
        return MaskClass(item, None)
    if isinstance(item, dict) and "name" in item:
        colour = item.get("color", item.get("colour"))
        return MaskClass(str(item["name"]), None if colour is None else _colour(path, colour))
    raise ValueError(f"{path}: {item!r} is no class; expected a name, or an object with 'name' and perhaps 'color'")


def _header(text: str) -> tuple[str, list[str]] | None:
    """(separator, lower-case columns) where the first line is the header of a table with a column `name`."""
    first = text.splitlines()[0] if text else ""
    for separator in ("\t", ",", ";"):
        columns = [column.strip().lower() for column in first.split(separator)]
        if len(columns) > 1 and "name" in columns:
            return separator, columns
    return None


def _of_table(path: str, text: str, header: tuple[str, list[str]]) -> list[MaskClass]:
    separator, columns = header
    found = []
    for row in list(csv.reader(text.splitlines(), delimiter=separator))[1:]:
        if len(row) < len(columns):
            continue
        values = dict(zip(columns, (value.strip() for value in row)))
        colour = [values[key] for key in ("r", "g", "b") if key in values]
        written = values.get("color") or values.get("colour")
        # ADE20K gives several names for each class: "door;double door".
        name = re.split(r"[;,]", values["name"])[0].strip()
        colour = colour if len(colour) == 3 else written
        found.append(MaskClass(name, _colour(path, colour) if colour else None))
    return found


def _parts(line: str) -> list[str]:
    return [part for part in re.split(r"[\s,;:]+", line) if part]


def _without_numbers(path: str, rows: list[tuple[int, list[str], str]]) -> list[tuple[int, list[str], str]]:
    """The lines (number, parts, text) without the number of their class, where all begin with it.

    Three numbers are a colour, so such a line begins with one number, or with four.
    """
    leading = [next((i for i, part in enumerate(parts) if not part.isdigit()), 0) for _, parts, _ in rows]
    if not rows or not all(count in (1, 4) for count in leading):
        return rows
    numbers = [int(parts[0]) for _, parts, _ in rows]
    if numbers != list(range(len(rows))):
        first = ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)
        raise ValueError(
            f"{path}: its lines begin with {first}, and classes are numbered from 0 in the order of the lines: leave "
            "these numbers out, and say by data.masks.label_map which stored value is which class"
        )
    return [(number, parts[1:], line.split(parts[0], 1)[1].lstrip(" \t,;:")) for number, parts, line in rows]


def _of_line(path: str, number: int, parts: list[str], line: str) -> MaskClass:
    for numbers, words in ((parts[:3], parts[3:]), (parts[-3:], parts[:-3])):
        if len(numbers) == 3 and words and all(part.isdigit() for part in numbers):
            return MaskClass(" ".join(words), _colour(f"{path}, line {number}", numbers))
    if len(parts) > 1 and re.fullmatch("#[0-9a-fA-F]{6}", parts[-1]):
        return MaskClass(" ".join(parts[:-1]), _colour(f"{path}, line {number}", parts[-1]))
    if all(part.isdigit() for part in parts) and len(parts) > 1:
        raise ValueError(f"{path}, line {number}: {line!r} has no name; write NAME, or NAME R G B")
    return MaskClass(line, None)


def _colour(where: str, values: Any) -> tuple[int, int, int]:
    """Of three numbers, or "#rrggbb"."""
    try:
        if isinstance(values, str):
            values = bytes.fromhex(values.removeprefix("#"))
        colour = tuple(int(value) for value in values)
    except (TypeError, ValueError):
        colour = ()
    if len(colour) != 3 or not all(0 <= value <= 255 for value in colour):
        raise ValueError(f"{where}: {values!r} is no colour; expected three numbers from 0 to 255, or #rrggbb")
    return colour  # type: ignore[return-value]


def palette_bytes(colours: tuple[tuple[int, int, int], ...]) -> bytes:
    """A palette of 256 colours for Pillow: those of the classes, then black, and white for ignored pixels (255)."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours[:255])] = colours[:255]
    table[255] = 255
    return table.tobytes()
