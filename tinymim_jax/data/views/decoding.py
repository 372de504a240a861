"""From the bytes of an image file to RGB pixels, as Pillow would give them, decoding no more than is needed."""

import contextlib
import io
import math
from collections.abc import Iterator
from typing import Union

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from tinymim_jax.data.views.jpeg import first_rows

# TurboJPEG turns these into RGB exactly as Pillow does; the rest (CMYK, YCCK) is left to Pillow.
_FAST_COLORSPACES = ("YCbCr", "RGB", "Gray")
# More is taken for a decompression bomb, as Pillow does: a few bytes may claim 65535 x 65535 pixels, 12 GB.
_MAX_PIXELS = 178_956_970
_ORIENTATION = 0x0112  # the EXIF tag


def decode(data: bytes, *, upright: bool = False) -> np.ndarray:
    """An image file as RGB, uint8 `[height, width, 3]`, with the pixels of Pillow's `convert("RGB")`.

    Grey is repeated, palettes looked up, CMYK converted, alpha dropped, the first frame taken. 16-bit grey
    is scaled to 8 bits, as Pillow itself does for 16-bit RGB (its conversion would clip grey to white).
    With `upright` the picture is turned as its EXIF orientation says; without, as in torchvision, it is not.
    Raises Undecodable for a damaged file, also one that is merely cut short.
    """
    return Picture(data, upright=upright).pixels()


class Undecodable(Exception):
    """No image, or a damaged one; the message is the decoder's."""


class Picture:
    """An encoded image whose size is known before, and often without, its being decoded.

    `upright`: see `decode`. `several_views`: more than one part of it will be wanted.
    Raises Undecodable for a damaged file, when made or not before its pixels are asked for.
    """

    def __init__(self, data: bytes, *, upright: bool = False, several_views: bool = False):
        with _as_undecodable():
            self._open(data, upright)
        self._may_leave_rows = self._is_fast and self._orientation == 1 and not several_views

    def _open(self, data: bytes, upright: bool) -> None:
        self._data = data
        self._upright = upright
        self._may_leave_rows = False
        self._decoded: dict[int, np.ndarray] = {}
        self._orientation = _exif_orientation(data) if upright else 1
        self._is_fast = False
        if data[:2] == b"\xff\xd8":
            try:
                height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
            except ValueError:
                pass  # strict: mere warnings end here as well, and Pillow tells them from a file cut short
            else:
                self._is_fast = colorspace in _FAST_COLORSPACES
                self._size = (height, width) if self._orientation < 5 else (width, height)
                _check_size(height, width)
        if not self._is_fast:
            self._size = self.pixels().shape[:2]

    @classmethod
    def of(cls, image: Union["Picture", np.ndarray]) -> "Picture":
        """`image` itself, or one that holds these pixels, uint8 `[height, width, 3]`."""
        if isinstance(image, Picture):
            return image
        picture = cls.__new__(cls)
        picture._decoded, picture._size = {1: image}, image.shape[:2]
        picture._is_fast = picture._may_leave_rows = False
        return picture

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)"""
        return self._size

    @property
    def reducible(self) -> bool:
        """Whether `pixels` can be asked for a reduced picture, with both beginning at the same edge."""
        # Where a side is no multiple of 8 the last block is a part of one; turning would bring it to the front.
        return self._is_fast and (self._orientation == 1 or not any(side % 8 for side in self._size))

    def pixels(self, reduction: int = 1, *, rows: int | None = None) -> np.ndarray:
        """RGB, uint8 `[height, width, 3]`; the same array each time, so not to be written to.

        reduction: 2, 4 or 8, where `reducible`, gives `ceil(height / reduction)` rows and as few columns, each
            pixel the mean of those it stands for: the decoder leaves the fine detail out, which saves most of its work.
        rows: how many, before reduction, are wanted from the top; what comes below them may be missing.
        """
        with _as_undecodable():
            if self._may_leave_rows and rows is not None and (data := first_rows(self._data, rows)) is not None:
                self._may_leave_rows = False  # asked once more, it decodes all
                with contextlib.suppress(ValueError):
                    return self._decode_fast(reduction, data)
            if reduction not in self._decoded:
                self._decoded[reduction] = self._decode(reduction)
        return self._decoded[reduction]

    def _decode(self, reduction: int) -> np.ndarray:
        if self._is_fast:
            try:
                return _turn(self._decode_fast(reduction), self._orientation)
            except ValueError:
                if reduction > 1:
                    return np.asarray(Image.fromarray(self.pixels()).reduce(reduction))
        with Image.open(io.BytesIO(self._data)) as image:
            if self._upright:
                image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # "I;16" and its kin, or "I" with 16 bits in use
                grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
                return np.repeat(grey[..., None], 3, axis=-1)
            return np.asarray(image.convert("RGB"))

    def _decode_fast(self, reduction: int, shortened: bytearray | None = None) -> np.ndarray:
        data, strict = (self._data, True) if shortened is None else (shortened, False)
        if reduction == 1:
            return simplejpeg.decode_jpeg(data, "RGB", strict=strict)
        sides = simplejpeg.decode_jpeg_header(data, strict=strict)[:2]
        height, width = (math.ceil(side / reduction) for side in sides)
        return simplejpeg.decode_jpeg(data, "RGB", min_height=height, min_width=width, strict=strict)


@contextlib.contextmanager
def _as_undecodable() -> Iterator[None]:
    try:
        yield
    except Undecodable:
        raise
    except UnidentifiedImageError as error:
        raise Undecodable("UnidentifiedImageError: in no image format that is known") from error
    except Exception as error:  # decoders raise all sorts of them
        raise Undecodable(f"{type(error).__name__}: {error}") from error


def _check_size(height: int, width: int) -> None:
    if height * width > _MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels: taken for a decompression bomb, the limit is {_MAX_PIXELS:,}")


def _exif_orientation(data: bytes) -> int:
    """1 to 8, as EXIF numbers them; 1 is upright, or unknown."""
    if data[:2] != b"\xff\xd8" or b"Exif\0\0" not in data[:65536]:
        return 1  # not a JPEG: Pillow will turn it
    with Image.open(io.BytesIO(data)) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The upright picture of one stored in EXIF orientation `orientation`."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
