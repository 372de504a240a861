"""The colour map of heat maps, and images as data URIs."""

import base64
import io

import numpy as np
from PIL import Image

# Every sixteenth of matplotlib's viridis (S. van der Walt and N. Smith, CC0), interpolated between.
_VIRIDIS = (
    "440154 481a6c 472f7d 414487 39568c 31688e 2a788e 23888e 1f988b 22a884 35b779 54c568 7ad151 a5db36 d2e21b fde725"
)
_ANCHORS = np.array([[int(word[i : i + 2], 16) for i in (0, 2, 4)] for word in _VIRIDIS.split()], np.float64)
_PHOTOGRAPH = 64  # sides from which JPEG is smaller and shows no blocks


def viridis(share: float) -> str:
    """The colour #rrggbb of a value in 0..1; other values are clipped."""
    return "#" + "".join(f"{round(channel):02x}" for channel in _colours(np.asarray(share)))


def coloured(values: np.ndarray) -> np.ndarray:
    """uint8 [height, width, 3]: the values [height, width] in colours, scaled to their minimum and maximum."""
    low, high = float(np.min(values)), float(np.max(values))
    return np.round(_colours((values - low) / (high - low or 1.0))).astype(np.uint8)


def pixels_of(image: np.ndarray) -> np.ndarray:
    """Values in 0..1 as uint8; NaN becomes 0."""
    return np.round(255 * np.clip(np.nan_to_num(image), 0.0, 1.0)).astype(np.uint8)


def data_uri(image: np.ndarray) -> str:
    """An image uint8 [height, width, 3] as a data URI: PNG if it is small, JPEG otherwise."""
    buffer = io.BytesIO()
    if min(image.shape[:2]) >= _PHOTOGRAPH:
        Image.fromarray(image).save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    else:
        Image.fromarray(image).save(buffer, "PNG", optimize=True)
        kind = "png"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _colours(shares: np.ndarray) -> np.ndarray:
    places = np.clip(shares, 0.0, 1.0) * (len(_ANCHORS) - 1)
    below = np.minimum(places.astype(int), len(_ANCHORS) - 2)
    part = (places - below)[..., None]
    return _ANCHORS[below] * (1 - part) + _ANCHORS[below + 1] * part
