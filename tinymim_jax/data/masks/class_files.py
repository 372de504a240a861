"""Reads and writes files with the classes of masks."""

import csv
import json
import re
from typing import Any

from tinymim_jax.data.masks.classes import is_ignored
from tinymim_jax.data.sources import files
from tinymim_jax.data.sources.examples import MaskClass

# Files with the classes of a set of pairs, as data sets come with them.
CLASS_FILES = ("classes.txt", "class_dict.csv", "label_colors.txt", "labelmap.txt", "objectInfo150.txt", "codes.txt")
# Columns of a table that may hold the values of the classes in masks.
_NUMBER_COLUMNS = ("id", "idx", "index", "number", "value", "class", "label")


def read_classes(path: str) -> tuple[MaskClass, ...]:
    """The classes in a file, in the order of their numbers.

    One of
        text with a class a line: its name, or its name and colour in any order: `road 128 64 128`, `128 64 128 road`,
            `road: 128, 64, 128` (CVAT's labelmap.txt), `road #804080`. All lines may begin with a number: `0 road`.
            Empty lines and lines that start with # are skipped;
        a table (comma or tab) whose header has a column Name, and perhaps columns r, g, b, or color, as class_dict.csv
            and objectInfo150.txt, and perhaps numbers in a column id, idx, index, number, value, class or label;
        JSON: a list of names, or of {"name": ..., "color": [r, g, b], "id": 0}; {"0": "road"}; or {"road": [r, g, b]}.
    Two lines of the same name are one class with two colours; pixels of the colour of a line `ignore` are ignored.
    Numbers are the values in masks, in ascending order from 0 or 1 without gaps.

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
        found = [_of_line(path, *row) for row in _without_numbers(rows)]
    if not found:
        raise ValueError(f"{path} names no class")
    plain = [each.name for each in found if each.colour is None]
    if twice := [name for name in plain if [each.name for each in found].count(name) > 1]:
        raise ValueError(f"{path} names {twice[0]!r} twice: every class has one line, unless each line has a colour")
    _check_colours(path, found)
    _check_numbers(path, found)
    return tuple(found)


def classes_beside(folder: str) -> tuple[MaskClass, ...]:
    """The classes in the first of CLASS_FILES that lies in `folder`; empty if there is none."""
    if not folder:
        return ()
    _, names = files.list_folder(folder)
    path = next((name for name in CLASS_FILES if name in names), None)
    return () if path is None else read_classes(files.join(folder, path))


def classes_text(classes: tuple[MaskClass, ...]) -> str:
    """The classes as lines that `read_classes` reads: `NAME`, or `NAME R G B`, after their numbers if they have any."""
    lines = [[*([] if each.stored is None else [each.stored]), each.name, *(each.colour or ())] for each in classes]
    return "".join(" ".join(map(str, line)) + "\n" for line in lines)


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
        colour, number = item.get("color", item.get("colour")), item.get("id")
        stored = int(number) if isinstance(number, int | str) and str(number).isdigit() else None
        return MaskClass(str(item["name"]), None if colour is None else _colour(path, colour), stored)
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
    rows = [
        (number, [value.strip() for value in row])
        for number, row in enumerate(csv.reader(text.splitlines(), delimiter=separator), 1)
        if number > 1 and any(value.strip() for value in row)
    ]
    if short := [number for number, row in rows if len(row) < len(columns)]:
        raise ValueError(f"{path}, line {short[0]}: fewer values than the {len(columns)} columns of the header")
    numbered = next((key for key in _NUMBER_COLUMNS if _holds_numbers(rows, columns, key)), None)
    found = []
    for _, row in rows:
        values = dict(zip(columns, row))
        colour = [values[key] for key in ("r", "g", "b") if key in values]
        written = values.get("color") or values.get("colour")
        # ADE20K gives several names for each class: "door;double door".
        name = re.split(r"[;,]", values["name"])[0].strip()
        colour = colour if len(colour) == 3 else written
        stored = int(values[numbered]) if numbered else None
        found.append(MaskClass(name, _colour(path, colour) if colour else None, stored))
    return found


def _holds_numbers(rows: list[tuple[int, list[str]]], columns: list[str], key: str) -> bool:
    return key in columns and all(row[columns.index(key)].isdigit() for _, row in rows)


def _check_colours(path: str, found: list[MaskClass]) -> None:
    """Raises ValueError for a colour that two classes have: its pixels could be either."""
    of_colour: dict[tuple[int, int, int], str] = {}
    for each in found:
        if each.colour is not None and of_colour.setdefault(each.colour, each.name) != each.name:
            raise ValueError(
                f"{path}: {of_colour[each.colour]!r} and {each.name!r} have the same colour {each.colour}: give every "
                "class its own, or both the same name"
            )


def _check_numbers(path: str, found: list[MaskClass]) -> None:
    """Raises ValueError if the numbers in a file of classes are not those of its lines, from 0 or 1 on."""
    of_name: dict[str, int] = {}
    for each in found:
        if each.stored is not None and not is_ignored(each):
            of_name.setdefault(each.name, each.stored)
    numbers = list(of_name.values())
    if numbers and numbers not in (list(range(len(numbers))), list(range(1, len(numbers) + 1))):
        first = ", ".join(map(str, numbers[:8])) + ", ..." * (len(numbers) > 8)
        raise ValueError(
            f"{path}: its classes have the numbers {first}, and classes are numbered from 0 or 1 in the order of the "
            "lines: leave these numbers out, and say by data.masks.label_map which stored value is which class"
        )


def _parts(line: str) -> list[str]:
    return [part for part in re.split(r"[\s,;:]+", line) if part]


_Row = tuple[int, list[str], str, int | None]  # number of the line, its parts, its text, stored value of its class


def _without_numbers(rows: list[tuple[int, list[str], str]]) -> list[_Row]:
    """The lines (number, parts, text) with the number of their class apart, where all begin with it.

    Three numbers are a colour, so such a line begins with one number, or with four.
    """
    leading = [next((i for i, part in enumerate(parts) if not part.isdigit()), 0) for _, parts, _ in rows]
    if not all(count in (1, 4) for count in leading):
        return [(*row, None) for row in rows]
    return [
        (number, parts[1:], line.split(parts[0], 1)[1].lstrip(" \t,;:"), int(parts[0])) for number, parts, line in rows
    ]


def _of_line(path: str, number: int, parts: list[str], line: str, stored: int | None) -> MaskClass:
    for numbers, words in ((parts[:3], parts[3:]), (parts[-3:], parts[:-3])):
        if len(numbers) == 3 and words and all(part.isdigit() for part in numbers):
            return MaskClass(" ".join(words), _colour(f"{path}, line {number}", numbers), stored)
    if len(parts) > 1 and re.fullmatch("#[0-9a-fA-F]{6}", parts[-1]):
        return MaskClass(" ".join(parts[:-1]), _colour(f"{path}, line {number}", parts[-1]), stored)
    if all(part.isdigit() for part in parts) and len(parts) > 1:
        raise ValueError(f"{path}, line {number}: {line!r} has no name; write NAME, or NAME R G B")
    return MaskClass(line, None, stored)


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
