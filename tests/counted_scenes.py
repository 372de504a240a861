"""A segmentation of scenes of several sizes, counted on any mesh: for tests of one and of several processes."""

import jax.numpy as jnp
import numpy as np
from pictures import encoded

from tinymim_jax.data.sources.examples import Source
from tinymim_jax.evaluation.segmentation import PixelLabeller, count_split
from tinymim_jax.tasks.segmenter import Segmenter, Windows

CLASSES, SIZE = 4, (24, 32)
SIZES = [(40, 50), (24, 32), (31, 70), (64, 33), (20, 20), (50, 50), (33, 47), (25, 90), (48, 30), (70, 41), (29, 36)]


class Scenes(Source):
    """Coarse random images; the masks have every class, and pixels to ignore."""

    name, split, class_names = "scenes", "test", tuple("abcd")

    def __len__(self):
        return len(SIZES)

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        coarse = rng.integers(0, 256, (10, 10, 3), dtype=np.uint8).repeat(9, 0).repeat(9, 1)
        height, width = SIZES[index]
        labels = rng.choice([0, 1, 2, 3, 255], (height, width)).astype(np.uint8)
        return {"image": encoded(coarse[:height, :width], "PNG"), "label": -1, "pixel_labels": labels}


def logits(params, frozen, pixels):
    """Of a class for each colour and one for the dark, with gaps between them that rounding does not close."""
    x = pixels[:, ::4, ::4].astype(jnp.float32) // 16
    return jnp.concatenate([x * jnp.asarray([1.0, 1.03, 1.07]), 9.01 * jnp.ones_like(x[..., :1])], axis=-1)


def counted(mesh) -> np.ndarray:
    """The confusion matrix of all scenes."""
    segmenter = Segmenter(logits, SIZE, CLASSES, (0, 0, 0), Windows(stride=(17, 23), resize=(64, 30)))
    total, _ = count_split(PixelLabeller(segmenter, mesh, tile=64), {}, {}, Scenes(), mesh)
    return total
