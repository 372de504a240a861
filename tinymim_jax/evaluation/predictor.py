"""A checkpoint for inference: images in; classes, logits or features out."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageOps

from tinymim_jax.checkpoints.params import load_params
from tinymim_jax.convert.preprocessing import ASSUMED
from tinymim_jax.data.views.decoding import Picture, Undecodable
from tinymim_jax.data.views.transforms import EvalView
from tinymim_jax.errors import unknown
from tinymim_jax.evaluation.segmentation import PixelLabeller
from tinymim_jax.evaluation.segmented import Segmented, colours_of, segmenter_of
from tinymim_jax.models.heads import POOLS, Classifier, pool_tokens
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.sharding import make_mesh
from tinymim_jax.tasks.pretrained import Loaded, fit_positions
from tinymim_jax.tasks.segmenter import Windows

# A path, a Pillow image, or pixels uint8 [height, width, 3], RGB, of any size.
AnyImage = str | os.PathLike | Image.Image | np.ndarray

BATCH = 64  # images that are decoded and computed at a time


class Prediction(NamedTuple):
    """A class and its probability; `name` is the number of the class where the checkpoint has no class names."""

    name: str
    index: int
    probability: float


def load(path: str | os.PathLike, *, dtype: Any = jnp.float32) -> "Model":
    """The model in `path`: the workdir of a run, or what `tinymim convert` wrote.

    Raises CheckpointError if there is no checkpoint, or it is damaged.
    """
    record, params = load_params(path)
    return Model(str(path), record, params, dtype)


class Model:
    """A trained encoder, with a classifier, or a network that labels pixels, where the checkpoint has one.

    preprocessing: how images are prepared, from the checkpoint's record: `image_size` (height, width), `resize` (short
        side before the center crop), `interpolation`, `upright`, `mean`, `std`; and `class_names`. Of one that labels
        pixels, also `windows` and `class_colours`.
    """

    def __init__(self, path: str, record: dict[str, Any], params: dict[str, Any], dtype: Any = jnp.float32):
        self._path, self._record = path, record
        encoder = ViT.from_record(record["encoder"], dtype=dtype)
        # As published, 256 for images of 224; in proportion for other sizes.
        sizes = {"image_size": list(encoder.image_size), "resize": round(max(encoder.image_size) * 256 / 224)}
        self.preprocessing: dict[str, Any] = sizes | ASSUMED | record.get("preprocessing", {})
        self._encoder = encoder
        params = params | {"encoder": fit_positions(Loaded(path, record, params), encoder)}
        self._params = jax.device_put(params)
        self._programs: dict[str, Any] = {}
        self._labellers: dict[Windows | None, PixelLabeller] = {}
        self._classifier = None
        if record.get("classifier", {}).get("classes") and "head" in params:
            self._classifier = Classifier(encoder, **record["classifier"])
        self._view = EvalView(
            tuple(self.preprocessing["image_size"]), self.preprocessing["resize"], self.preprocessing["interpolation"]
        )

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; empty if there is no classifier, or the checkpoint does not name its classes."""
        return tuple(self.preprocessing["class_names"]) if self._classifier or self.labels_pixels else ()

    @property
    def labels_pixels(self) -> bool:
        """Whether `segment` can be used."""
        return "segmenter" in self._record

    def classify(self, images: AnyImage | Sequence[AnyImage], *, top: int = 5) -> Any:
        """The `top` most probable classes, best first, as Predictions; for several images a list of such lists."""
        if top < 1:
            raise ValueError(f"top={top}: ask for at least one class")
        logits = self.logits(images)
        probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
        rows = [self._predictions(row, top) for row in np.atleast_2d(probabilities)]
        return rows if logits.ndim == 2 else rows[0]

    def logits(self, images: AnyImage | Sequence[AnyImage]) -> np.ndarray:
        """float32 `[classes]`; for several images `[images, classes]`."""
        return self._run("logits", images, self.classifier())

    @property
    def record(self) -> dict[str, Any]:
        """The architecture and preprocessing as plain JSON (model.json)."""
        return self._record

    @property
    def params(self) -> Any:
        """The parameters that `classifier()` takes."""
        return self._params

    def classifier(self) -> Callable[[Any, jax.Array], jax.Array]:
        """(params, normalised pixels `[batch, height, width, 3]`) -> logits `[batch, classes]`: a function to jit.

        Raises ValueError if the checkpoint has no classifier.
        """
        if self._classifier is None:
            raise ValueError(
                f"{self._path} has no classifier: fine-tune it first (tinymim train --config configs/finetune_s.py "
                f"init={self._path}), or use embed()"
            )
        network: Any = self._classifier
        return lambda params, pixels: network.apply({"params": params}, pixels)

    def embed(self, images: AnyImage | Sequence[AnyImage], *, pool: str = "mean") -> np.ndarray:
        """Features float32 `[dim]`: the mean of the patch tokens, or the 'cls' token. Of several images a row each."""
        if pool not in POOLS:
            raise unknown("pool", pool, POOLS)

        def pooled(params: Any, pixels: jax.Array) -> jax.Array:
            tokens: Any = self._encoder.apply({"params": params["encoder"]}, pixels)
            return pool_tokens(tokens, pool, self._encoder)

        return self._run(pool, images, pooled)

    def segment(self, images: AnyImage | Sequence[AnyImage], *, windows: Windows | None = None) -> Any:
        """The class of every pixel, for images of any size: a Segmented; for several images a list of them.

        windows: how images are shown to the network; None: as in the evaluation of its training.

        Raises ValueError if the checkpoint does not label pixels.
        """
        if not self.labels_pixels:
            raise ValueError(
                f"{self._path} does not label pixels: train it first (tinymim train --config configs/segment_b.py "
                f"init={self._path}), or use classify() or embed()"
            )
        labeller = self._labeller(windows)
        several = _are_several(images)
        given: Any = images if several else [images]
        classes = self._record["segmenter"]["classes"]
        colours, found = colours_of(self.preprocessing, classes), []
        for image in given:
            work = labeller.work(self._picture(image).pixels())
            labels: Any = labeller.label(self._params, {}, [work], fetch=True)[1][0]
            found.append(Segmented(labels, self.class_names, colours))
        return found if several else found[0]

    def pixels(self, image: AnyImage) -> np.ndarray:
        """The image as it is read: RGB, uint8 `[height, width, 3]`, of its own size."""
        return self._picture(image).pixels()

    def views(self, images: Sequence[AnyImage]) -> np.ndarray:
        """The images resized and cropped as the network sees them: uint8 [images, height, width, 3]."""
        return np.stack([self._view(self._picture(image)) for image in images])

    def _run(self, name: str, images: Any, function: Any) -> np.ndarray:
        several = _are_several(images)
        given: Any = images if several else [images]
        if len(given) == 0:
            raise ValueError("no images were given")
        step, found = self._compiled(name, function), []
        for start in range(0, len(given), BATCH):
            views = [self._view(self._picture(image)) for image in given[start : start + BATCH]]
            # Padding to powers of two bounds the number of programs to compile.
            padding = (1 << (len(views) - 1).bit_length()) - len(views)
            batch = np.stack(views + [np.zeros_like(views[0])] * padding)
            found.append(np.asarray(step(self._params, batch))[: len(views)])
        result = np.concatenate(found)
        return result if several else result[0]

    def _compiled(self, name: str, function: Any) -> Any:
        if name not in self._programs:
            mean, std = tuple(self.preprocessing["mean"]), tuple(self.preprocessing["std"])
            self._programs[name] = jax.jit(lambda params, pixels: function(params, normalize(pixels, mean, std)))
        return self._programs[name]

    def _labeller(self, windows: Windows | None) -> PixelLabeller:
        if windows not in self._labellers:
            segmenter = segmenter_of(self._record, self._encoder, self.preprocessing, windows)
            self._labellers[windows] = PixelLabeller(segmenter, make_mesh(devices=jax.local_devices()[:1]))
        return self._labellers[windows]

    def _picture(self, image: AnyImage) -> Picture:
        if isinstance(image, (str, os.PathLike)):
            try:
                picture = Picture(_read(pathlib.Path(image)), upright=self.preprocessing["upright"])
                return Picture.of(picture.pixels())
            except Undecodable as error:
                raise ValueError(f"{image} cannot be decoded: {error}") from error
        if isinstance(image, Image.Image):
            if image.mode.startswith(("I", "F")):
                raise ValueError(
                    f"an image of mode {image.mode!r} has more than 8 bits for each pixel, which Pillow's conversion "
                    "to RGB would clip: give the path of the file, or scale the pixels to 0..255 first"
                )
            image = ImageOps.exif_transpose(image) if self.preprocessing["upright"] else image
            image = np.asarray(image.convert("RGB"))
        pixels = np.asarray(image)
        if pixels.size == 0:
            raise ValueError(f"an image of {list(pixels.shape)} has no pixels")
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
            raise ValueError(
                f"an image is uint8 [height, width, 3], RGB; got {pixels.dtype} {list(pixels.shape)}. For floats in "
                "0..1 give (255 * x).round().astype('uint8'); for grey np.repeat(x[..., None], 3, axis=-1)"
            )
        return Picture.of(pixels)

    def _predictions(self, probabilities: np.ndarray, top: int) -> list[Prediction]:
        names = self.class_names
        order = np.argsort(-probabilities, kind="stable")[:top]
        return [Prediction(names[i] if names else str(i), int(i), float(probabilities[i])) for i in order]


def _are_several(images: Any) -> bool:
    """Whether this is a sequence of images, or an array of them, and not one image."""
    is_sequence = isinstance(images, Sequence) and not isinstance(images, str)
    return is_sequence or (isinstance(images, np.ndarray) and images.ndim == 4)


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise IsADirectoryError(f"{path} is a folder: name image files, such as {path}/*.jpg") from None
