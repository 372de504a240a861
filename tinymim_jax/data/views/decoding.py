"""Decodes image files to the RGB pixels that Pillow gives, skipping parts of JPEG files that are not needed."""

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

# JPEG color spaces that TurboJPEG converts to RGB exactly as Pillow does. Pillow decodes the others (CMYK, YCCK).
_FAST_COLORSPACES = ("YCbCr", "RGB", "Gray")
# Larger images are refused as decompression bombs, as in Pillow: a tiny file may claim 65535 x 65535 pixels, 12 GB.
_MAX_PIXELS = 178_956_970
# Limit of memory for one image: the pixels that the decoder holds and their RGB copy.
_MAX_BYTES = 1 << 30
# Bytes per pixel in Pillow's memory, by mode; 4 for all other modes.
_DECODED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
_LARGE = 1 << 25  # pixels; the threads of a process decode larger images one at a time, to limit memory
_STRIP = 1 << 24  # pixels that are converted to RGB at a time
_DARK = 4096  # 16-bit gray levels that are all below this would look black; most likely they are 12-bit data
_FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "DIB", "PPM", "GIF", "JPEG2000")
_ORIENTATION = 0x0112  # the EXIF tag
_one_large = threading.Lock()


def decode(data: bytes, *, upright: bool = False) -> np.ndarray:
    """Decodes an image file to RGB, uint8 `[height, width, 3]`, with the pixels of Pillow's `convert("RGB")`.

    Gray is repeated for all channels, palettes and CMYK are converted, alpha is dropped, and of an animation the first
    frame is taken. 16-bit gray is scaled to 8 bits, as Pillow does for 16-bit RGB (Pillow's own conversion clips gray
    to white). Floating-point pixels, and 16-bit gray levels that would all become black, are refused.

    upright: rotate the image according to its EXIF orientation; torchvision does not.

    Raises Undecodable if the file is damaged or truncated.
    """
    return Picture(data, upright=upright).pixels()


class Undecodable(Exception):
    """The data is not an image or is damaged; the message is the decoder's."""


class Picture:
    """An encoded image that is decoded only when its pixels are needed; for most JPEG files the size needs no decoding.

    upright: see `decode`.
    several_views: several crops of the image will be taken, so it is decoded completely, once.

    Raises Undecodable for a damaged file, either in the constructor or in `pixels`.
    """

    def __init__(self, data: bytes, *, upright: bool = False, several_views: bool = False):
        with as_undecodable():
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
                pass  # also raised for mere warnings; Pillow tells harmless ones from a truncated file
            else:
                self._is_fast = colorspace in _FAST_COLORSPACES
                self._size = (height, width) if self._orientation < 5 else (width, height)
                _check_size(height, width)
        if not self._is_fast:
            self._size = self.pixels().shape[:2]

    @classmethod
    def of(cls, image: Union["Picture", np.ndarray]) -> "Picture":
        """`image` itself if it is a Picture, else a Picture of these pixels, uint8 `[height, width, 3]`."""
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
        """Whether `pixels` accepts `reduction` > 1; the blocks of a reduced image then start at the top left corner."""
        # If a side is not a multiple of 8, the last block is partial, and a rotation may move it to the top or left.
        return self._is_fast and (self._orientation == 1 or not any(side % 8 for side in self._size))

    def pixels(self, reduction: int = 1, *, rows: int | None = None) -> np.ndarray:
        """RGB, uint8 `[height, width, 3]`. The array is cached: do not write to it.

        reduction: 2, 4 or 8, only if `reducible`: an image of `ceil(height / reduction)` by `ceil(width / reduction)`
            pixels, each the mean of a block. The decoder skips high frequencies, which saves most of its work.
        rows: number of rows from the top, before reduction, that are needed; rows below them may be missing.
        """
        with as_undecodable():
            if self._may_leave_rows and rows is not None and (data := first_rows(self._data, rows)) is not None:
                self._may_leave_rows = False  # a second call decodes the whole image
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
def as_undecodable() -> Iterator[None]:
    """Turns the errors of decoders, which are of many types, into Undecodable."""
    try:
        yield
    except Undecodable:
        raise
    except UnidentifiedImageError as error:
        raise Undecodable(
            f"UnidentifiedImageError: not an image in one of the supported formats: {', '.join(_FORMATS)}"
        ) from error
    except Exception as error:  # decoders raise exceptions of many types
        raise Undecodable(f"{type(error).__name__}: {error}") from error


def open_image(data: bytes) -> Image.Image:
    """`Image.open`, restricted to the supported formats; it decodes no pixels.

    By default Pillow tries more formats; it would run Encapsulated PostScript, which is a program, in Ghostscript.
    """
    return Image.open(io.BytesIO(data), formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_size(height: int, width: int, decoded_bytes: int = 0) -> None:
    """Raises ValueError if an image has too many pixels or would take too much memory to decode.

    decoded_bytes: bytes per pixel that the decoder holds besides the RGB copy; 0 skips the check of memory.
    """
    if height * width > _MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels: refused as a decompression bomb, the limit is {_MAX_PIXELS:,}")
    if (needed := height * width * (decoded_bytes + 3)) > _MAX_BYTES and decoded_bytes:
        raise ValueError(
            f"{width} x {height} pixels would take {needed / 2**30:.1f} GiB of memory to decode, the limit is "
            f"{_MAX_BYTES / 2**30:.0f} GiB: make the image smaller"
        )


def _as_rgb(image: Image.Image, upright: bool) -> np.ndarray:
    """The RGB pixels that `decode` describes. Large images are converted in strips, which avoids temporary copies."""
    if upright:
        image = ImageOps.exif_transpose(image)
    image.load()
    rows = max(1, _STRIP // image.width)
    strips = [slice(top, min(top + rows, image.height)) for top in range(0, image.height, rows)]
    if image.mode == "F" or image.mode.startswith("I"):
        gray = _sixteen_bits(image)
        pixels = np.empty((image.height, image.width, 3), np.uint8)
        for strip in strips:
            pixels[strip] = (gray[strip] >> 8)[..., None]
        return pixels
    if len(strips) == 1:
        return np.asarray(image.convert("RGB"))
    pixels = np.empty((image.height, image.width, 3), np.uint8)
    for strip in strips:
        pixels[strip] = np.asarray(image.crop((0, strip.start, image.width, strip.stop)).convert("RGB"))
    return pixels


def _sixteen_bits(image: Image.Image) -> np.ndarray:
    """Gray levels of 0 to 65535, `[height, width]`.

    Raises ValueError if the level of white is not known: for floating-point pixels, levels outside 16 bits, and levels
    that are all very small (X-ray and microscope images often hold 12-bit data in 16 bits).
    """
    remedy = "convert it to 8 bits, or scale it to the full 16-bit range"
    if image.mode == "F":
        raise ValueError(f"its pixels are floating-point numbers, and the value of white is not known: {remedy}")
    gray = np.asarray(image)
    low, high = int(gray.min()), int(gray.max())
    if low < 0 or high > 65535:
        raise ValueError(f"its gray levels range from {low:,} to {high:,}, outside 16 bits: {remedy}")
    if 0 < high < _DARK:
        raise ValueError(f"it has 16 bits but gray levels of at most {high:,}, so it would look black: {remedy}")
    return gray


def _exif_orientation(data: bytes) -> int:
    """The EXIF orientation of a JPEG file, 1 to 8; 1 means upright or unknown."""
    if data[:2] != b"\xff\xd8" or b"Exif\0\0" not in data[:65536]:
        return 1  # not a JPEG: Pillow rotates the decoded image
    with open_image(data) as image:
        orientation = image.getexif().get(_ORIENTATION, 1)
    return orientation if orientation in range(1, 9) else 1


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotates or mirrors pixels stored in EXIF orientation `orientation`, so that the image is upright."""
    if orientation == 1:
        return pixels
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
