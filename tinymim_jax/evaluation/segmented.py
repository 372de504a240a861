"""The labels of an image's pixels, as a file of class numbers and as a picture; and what makes them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from tinymim_jax.data.masks.classes import distinct_colours, palette_bytes
from tinymim_jax.models.segmentation import SegmentationNetwork, variables
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.tasks.segmenter import Segmenter, Windows

_OPACITY = 0.55  # of the colours over the image


@dataclasses.dataclass(frozen=True)
class Segmented:
    """The class of every pixel of an image.

    labels: uint8 `[height, width]`, uint16 with more than 254 classes.
    class_names: empty if the checkpoint does not name its classes.
    colours: RGB of each class.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...]

    def name(self, number: int) -> str:
        """The name of a class, or its number."""
        return self.class_names[number] if self.class_names else str(number)

    def shares(self) -> dict[str, float]:
        """The share of the pixels of each class that occurs, by name, largest first."""
        numbers, counts = np.unique(self.labels, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return {self.name(int(numbers[i])): float(counts[i] / self.labels.size) for i in order}

    def mask(self) -> Image.Image:
        """The labels as an image to save as PNG: class numbers with a palette, or of 16 bits above 254 classes."""
        image = Image.fromarray(self.labels)
        if self.labels.dtype == np.uint8:
            image.putpalette(palette_bytes(self.colours))
        return image

    def overlay(self, pixels: np.ndarray) -> Image.Image:
        """The colours of the classes over the image uint8 `[height, width, 3]` that was segmented."""
        colours = np.asarray(self.colours, np.float32)[self.labels]
        return Image.fromarray(np.rint(_OPACITY * colours + (1 - _OPACITY) * pixels).astype(np.uint8))


def segmenter_of(
    record: Mapping[str, Any], encoder: ViT, preprocessing: Mapping[str, Any], windows: Windows | None = None
) -> Segmenter:
    """The Segmenter of a checkpoint's record (model.json).

    windows: how images are shown; None: as in its evaluation during training, or as published.
    """
    network = SegmentationNetwork.from_record(encoder, record["segmenter"], auxiliary=False)
    mean, std = tuple(preprocessing["mean"]), tuple(preprocessing["std"])

    def logits(params: Any, frozen: Any, pixels: Any) -> Any:
        del frozen
        return network.apply(variables(params), normalize(pixels, mean, std))

    red, green, blue = (round(255 * value) for value in mean)
    how = recorded_windows(preprocessing) if windows is None else windows
    return Segmenter(logits, encoder.image_size, network.classes, (red, green, blue), how)


def recorded_windows(preprocessing: Mapping[str, Any]) -> Windows:
    """How the checkpoint was evaluated during training; as published where it does not say."""
    known = preprocessing.get("windows")
    return Windows() if known is None else Windows(**{key: _as_tuple(value) for key, value in known.items()})


def colours_of(preprocessing: Mapping[str, Any], classes: int) -> tuple[tuple[int, int, int], ...]:
    """The recorded colours of the classes, or distinct ones."""
    known: Sequence[Any] = preprocessing.get("class_colours") or ()
    return tuple(tuple(colour) for colour in known) if len(known) == classes else distinct_colours(classes)  # type: ignore[return-value]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
