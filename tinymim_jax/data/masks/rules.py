"""MaskRules: from the file of a mask to the class of every pixel."""

import dataclasses
import functools

import numpy as np

from tinymim_jax.data.masks.classes import IGNORED, class_numbers
from tinymim_jax.data.sources.examples import MaskClass
from tinymim_jax.data.sources.labels import LabelError
from tinymim_jax.data.views.decoding import as_undecodable, open_image

_COLOUR_MODES = ("RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_VALUES_SHOWN = 8


@dataclasses.dataclass(frozen=True)
class MaskRules:
    """How stored values become classes.

    classes: their number, 1 to 65,534.
    colours: all classes with their colours, for masks that are coded by colours (RGB); empty without colours.
    ignore: stored values of pixels to ignore.
    label_map: (stored value, class) pairs, class -1 for pixels to ignore; a value that is not in it is an error. Empty:
      the stored values are the classes.
    reduce_zero_label: stored 0 is ignored, and stored k is class k - 1.

    For masks that are coded by colours, the stored value is the number of the colour's class (classes.class_numbers).
    """

    classes: int
    colours: tuple[MaskClass, ...] = ()
    ignore: tuple[int, ...] = (255,)
    label_map: tuple[tuple[int, int], ...] = ()
    reduce_zero_label: bool = False

    def __post_init__(self):
        if not 1 <= self.classes <= 65534:
            raise ValueError(f"{self.classes} classes: a mask can hold 1 to 65,534")
        if self.label_map and self.reduce_zero_label:
            raise ValueError("data.masks.label_map and .reduce_zero_label both say what stored values mean: use one")
        both = sorted({stored for stored, number in self.label_map if number != IGNORED} & set(self.ignore))
        if both:
            raise ValueError(
                f"data.masks.label_map makes the stored value {both[0]} a class, and data.masks.ignore={self.ignore} "
                "ignores it: leave it out of one of them"
            )
        for key, values in (("label_map", [stored for stored, _ in self.label_map]), ("ignore", self.ignore)):
            if outside := [value for value in values if not 0 <= value <= 65535]:
                raise ValueError(f"data.masks.{key}: a mask cannot hold {outside[0]}; values are 0 to 65,535")
        wrong = [pair for pair in self.label_map if not IGNORED <= pair[1] < self.classes]
        if wrong:
            raise ValueError(
                f"data.masks.label_map: {wrong[0]} maps to a class that does not exist; classes are 0 to "
                f"{self.classes - 1}, and -1 ignores a value"
            )

    @property
    def dtype(self) -> type[np.uint8] | type[np.uint16]:
        """Of the labels; its largest value marks pixels to ignore."""
        return np.uint8 if self.classes <= 254 else np.uint16

    @property
    def ignored(self) -> int:
        """The label of pixels to ignore."""
        return int(np.iinfo(self.dtype).max)

    def labels(self, data: bytes) -> np.ndarray:
        """The class of every pixel of an encoded mask, `[height, width]`, uint8 or uint16.

        Raises:
          Undecodable: the file is damaged.
          LabelError: it holds values that are no class, or is of a kind that cannot hold classes.
        """
        stored = self.stored(data)
        labels = self._table[stored]
        if labels.max(initial=0) >= self._wrong and (wrong := labels == self._wrong).any():
            values, counts = np.unique(stored[wrong], return_counts=True)
            shown = ", ".join(map(str, values[:_VALUES_SHOWN].tolist())) + ", ..." * (len(values) > _VALUES_SHOWN)
            share = counts.sum() / labels.size
            raise LabelError(
                f"its mask holds values that are none of the {self.classes} classes, {share:.1%} of its pixels: "
                f"{shown}. Say what they mean by data.masks.classes, .label_map or .ignore"
            )
        return labels

    def stored(self, data: bytes) -> np.ndarray:
        """The values as stored, uint8 or uint16 `[height, width]`; of colours, the numbers of their classes."""
        pixels, _ = read_mask(data)
        if pixels.ndim == 2:
            return pixels
        grey = bool((pixels == pixels[..., :1]).all())
        if grey and not class_numbers(self.colours):
            return pixels[..., 0]  # values that were saved as RGB
        try:
            return self._of_colours(pixels)
        except LabelError:
            if grey:
                return pixels[..., 0]
            raise

    def meaning(self, value: int) -> int | None:
        """The class of a stored value; -1 if it is ignored, None if it is no class."""
        found = int(self._table[value])
        return IGNORED if found == self.ignored else None if found == self._wrong else found

    def _of_colours(self, pixels: np.ndarray) -> np.ndarray:
        known = class_numbers(self.colours)
        if not known:
            raise LabelError(
                "its mask is coded by colours, and no colours are known: give data.masks.classes a file with a line "
                "NAME R G B for each class"
            )
        codes = pixels[..., 0].astype(np.int32) << 16 | pixels[..., 1].astype(np.int32) << 8 | pixels[..., 2]
        table = np.array([red << 16 | green << 8 | blue for (red, green, blue), _ in known], np.int32)
        # The class `ignore` is stored as the largest value, which always is ignored.
        numbers = np.array([65535 if number == IGNORED else number for _, number in known], np.uint16)
        order = np.argsort(table)
        place = np.searchsorted(table, codes, sorter=order).clip(max=len(table) - 1)
        found = order[place]
        if (unknown := table[found] != codes).any():
            colours, counts = np.unique(pixels[unknown].reshape(-1, 3), axis=0, return_counts=True)
            shown = ", ".join(str(tuple(colour)) for colour in colours[np.argsort(-counts)][:3].tolist())
            raise LabelError(
                f"its mask has {len(colours)} colours, on {unknown.mean():.1%} of its pixels, that are no class: "
                f"{shown}. Add them to the file of data.masks.classes; the line `ignore R G B` ignores one"
            )
        return numbers[found]

    @property
    def _wrong(self) -> int:
        return self.ignored - 1

    @functools.cached_property
    def _table(self) -> np.ndarray:
        """The label of every stored value."""
        table = np.full(65536, self._wrong, self.dtype)
        if self.label_map:
            for stored, number in self.label_map:
                table[stored] = self.ignored if number == IGNORED else number
        elif self.reduce_zero_label:
            table[1 : self.classes + 1] = np.arange(self.classes)
            table[0] = self.ignored
        else:
            table[: self.classes] = np.arange(self.classes)
        table[[*self.ignore, 65535]] = self.ignored
        return table


def read_mask(data: bytes) -> tuple[np.ndarray, str]:
    """(pixels, Pillow's mode) of an encoded mask: values `[height, width]`, or colours uint8 `[height, width, 3]`.

    Of a palette the indices are read, not the colours. Raises Undecodable for a damaged file, and LabelError for pixels
    that cannot be classes: floating-point numbers, negative or large ones, and JPEG.
    """
    with as_undecodable():
        image = open_image(data)
        image.load()
    if image.format in ("JPEG", "MPO"):
        raise LabelError(
            "its mask is a JPEG, whose values are changed by the compression, most of all at the borders of classes: "
            "use masks in PNG"
        )
    mode = image.mode
    if mode == "1":
        return np.asarray(image).astype(np.uint8), mode
    if mode in ("L", "P"):
        return np.asarray(image) // _scale_of_greys(data), mode
    if mode in ("LA", "PA"):
        return np.asarray(image)[..., 0], mode
    if mode in _COLOUR_MODES:
        return np.asarray(image.convert("RGB")), mode
    values = np.asarray(image)
    if values.dtype.kind == "f" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise LabelError(
            f"its mask has pixels of mode {mode!r} from {values.min()} to {values.max()}, which are no class numbers: "
            "save whole numbers of 8 or 16 bits"
        )
    return values.astype(np.uint16), mode


def _scale_of_greys(data: bytes) -> int:
    """What Pillow multiplies the stored values by, so that white is 255: 1, but for grey PNG of 2 and 4 bits."""
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[25] != 0:  # the header's kind of colour: 0 is grey
        return 1
    return {2: 85, 4: 17}.get(data[24], 1)
