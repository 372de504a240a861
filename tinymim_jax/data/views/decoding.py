"""From the bytes of an image file to RGB pixels, as Pillow would give them, decoding no more than is needed."""

import contextlib
import functools
import io
import math
import threading
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
# Memory for the decoder's pixels and the RGB made of them.
_MAX_BYTES = 1 << 30
# Bytes that Pillow keeps for a pixel, by mode; 4 for all others.
_DECODED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
_LARGE = 1 << 25  # pixels; of larger images each process decodes one at a time, however many threads it has
_STRIP = 1 << 24  # pixels that are converted at a time
_DARK = 4096  # 16-bit grey levels all below this look black: most likely they are 12 bits
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "PPM", "GIF", "JPEG2000")
_ORIENTATION = 0x0112  # the EXIF tag
_one_large = threading.Lock()


def decode(data: bytes, *, upright: bool = False) -> np.ndarray:
    """An image file as RGB, uint8 `[height, width, 3]`, with the pixels of Pillow's `convert("RGB")`.

    Grey is repeated, palettes looked up, CMYK converted, alpha dropped, the first frame taken. 16-bit grey
    is scaled to 8 bits, as Pillow itself does for 16-bit RGB (its conversion would clip grey to white); floating-point
    pixels, and greys that would all be black when scaled so, are refused.
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
        with open_image(self._data) as image:
            _check_size(image.height, image.width, _DECODED_BYTES.get(image.mode, 4))
            if image.height * image.width <= _LARGE:
                return _as_rgb(image, self._upright)
            with _one_large:
                return _as_rgb(image, self._upright)

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
        raise Undecodable(
            f"UnidentifiedImageError: in none of the formats that are read: {', '.join(_FORMATS)}"
        ) from error
    except Exception as error:  # decoders raise all sorts of them
        raise Undecodable(f"{type(error).__name__}: {error}") from error


def open_image(data: bytes) -> Image.Image:
    """`Image.open` for the formats that are read; it decodes no pixels.

    Pillow by itself tries others too, and hands Encapsulated PostScript, a program, to Ghostscript.
    """
    return Image.open(io.BytesIO(data), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_size(height: int, width: int, decoded_bytes: int = 0) -> None:
    """Raises ValueError for an image of too many pixels, or one whose decoding would take too much memory.

    `decoded_bytes`: what the decoder keeps of each pixel, beside the RGB that is made of it.
    """
    if height * width > _MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels: taken for a decompression bomb, the limit is {_MAX_PIXELS:,}")
    if (needed := height * width * (decoded_bytes + 3)) > _MAX_BYTES and decoded_bytes:
        raise ValueError(
            f"{width} x {height} pixels would take {needed / 2**30:.1f} GiB of memory to decode, the limit is "
            f"{_MAX_BYTES / 2**30:.0f} GiB: make the image smaller"
        )


def _as_rgb(image: Image.Image, upright: bool) -> np.ndarray:
    """The pixels of an opened image as `decode` describes them, in strips, so that no more than one copy exists."""
    if upright:
        image = ImageOps.exif_transpose(image)
    image.load()
    rows = max(1, _STRIP // image.width)
    strips = [slice(top, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    if image.mode == "F" or image.mode.startswith("I"):
        grey = _sixteen_bits(image)
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        for strip in strips:
            pixels[strip] = (grey[strip] >> 8)[..., None]
        return pixels
    if len(strips) == 1:
        return np.asarray(image.convert("RGB"))
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for strip in strips:
        pixels[strip] = np.asarray(image.crop((0, strip.start, image.width, strip.stop)).convert("RGB"))
    return pixels


def _sixteen_bits(image: Image.Image) -> np.ndarray:
    """Grey levels of 0 to 65535, `[height, width]`.

    Raises ValueError for other numbers: which of them is white is written nowhere, and as 16 bits they may all be
    black. X-rays and microscopes' images often hold 12 bits in 16.
    """
    remedy = "convert it to 8 bits, or to the whole range of 16"
    if image.mode == "F":
        raise ValueError(f"its pixels are floating-point numbers, of which none is known to be white: {remedy}")
    grey = np.asarray(image)
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise ValueError(f"its grey levels go from {low:,} to {high:,}, beyond 16 bits: {remedy}")
    if 0 < high < _DARK:
        raise ValueError(f"it has 16 bits and grey levels of {high:,} at most, so it would look black: {remedy}")
    return grey


def _exif_orientation(data: bytes) -> int:
    """1 to 8, as EXIF numbers them; 1 is upright, or unknown."""
    if data[:2] != b"\xff\xd8" or b"Exif\0\0" not in data[:65536]:
        return 1  # not a JPEG: Pillow will turn it
    with open_image(data) as image:
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
