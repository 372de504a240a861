"""The classes of masks in the order of their numbers: names, stored values and colours."""

import numpy as np

from tinymim_jax.data.sources.examples import MaskClass

# In a file with colours: pixels of the colours of these names are ignored.
_IGNORED_NAMES = ("ignore", "ignored")
IGNORED = -1


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


def class_names(classes: tuple[MaskClass, ...]) -> tuple[str, ...]:
    """The names in the order of their numbers, without repetitions and without `ignore`."""
    return tuple(dict.fromkeys(each.name for each in classes if not is_ignored(each)))


def is_ignored(row: MaskClass) -> bool:
    """Whether a row of a file of classes marks the pixels to ignore, and is no class."""
    return row.name.lower() in _IGNORED_NAMES


def class_numbers(classes: tuple[MaskClass, ...]) -> list[tuple[tuple[int, int, int], int]]:
    """(colour, stored value of the class, or IGNORED) of each colour of the classes.

    The stored value is the number of the class, from 1 on if `numbered_from_one`.
    """
    names, first = class_names(classes), int(numbered_from_one(classes))
    return [
        (each.colour, names.index(each.name) + first if each.name in names else IGNORED)
        for each in classes
        if each.colour is not None
    ]


def numbered_from_one(classes: tuple[MaskClass, ...]) -> bool:
    """Whether the file of the classes says that their values in masks begin at 1, as in ADE20K's objectInfo150.txt."""
    return any(each.stored == 1 for each in classes) and not any(each.stored == 0 for each in classes)


def class_colours(classes: tuple[MaskClass, ...]) -> tuple[tuple[int, int, int], ...]:
    """A colour for each class: its own, or else a distinct one."""
    names = class_names(classes)
    own = {each.name: each.colour for each in reversed(classes) if each.colour is not None}
    return tuple(own.get(name, other) for name, other in zip(names, distinct_colours(len(names))))


def palette_bytes(colours: tuple[tuple[int, int, int], ...]) -> bytes:
    """A palette of 256 colours for Pillow: those of the classes, then black, and white for ignored pixels (255)."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(colours[:255])] = colours[:255]
    table[255] = 255
    return table.tobytes()
