"""`digits`: 1,797 handwritten digits of 8 x 8 pixels, prepared locally without a download."""

import io
import pathlib
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

TEST_EXAMPLES = 500


class Digits(tfds.core.GeneratorBasedBuilder):
    """The test set of the UCI "Optical Recognition of Handwritten Digits" data, in the order of scikit-learn's copy.

    By E. Alpaydin and C. Kaynak, licence CC BY 4.0, doi 10.24432/C50P49. digits.npz has all of it.
    Splits `train` (1,297) and `test` (500). `image`: 8 x 8 grayscale PNG; `label`: 0 to 9.
    """

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None  # no downloads, so TFDS does not look for a checksum file in this package

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Handwritten digits of 8 x 8 pixels, by E. Alpaydin and C. Kaynak (CC BY 4.0).",
            homepage="https://archive.ics.uci.edu/dataset/80",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
        )

    def _split_generators(self, dl_manager):
        images, labels = load()
        in_test = held_out(labels, TEST_EXAMPLES)
        return {
            "train": self._generate_examples(images, labels, np.flatnonzero(~in_test)),
            "test": self._generate_examples(images, labels, np.flatnonzero(in_test)),
        }

    def _generate_examples(self, images, labels, chosen) -> Iterator[tuple[int, dict]]:
        for index in chosen:
            # Encoded bytes, because TFDS would import TensorFlow to encode an array as PNG.
            yield int(index), {"image": png(images[index]), "label": int(labels[index])}


def load() -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[1797, 8, 8]`, the 17 gray levels scaled to 0 to 255, and labels int64 `[1797]`."""
    with np.load(pathlib.Path(__file__).with_name("digits.npz")) as file:
        levels, labels = file["levels"], file["labels"]  # 0 to 16, [1797, 8, 8]
    return np.rint(levels * (255 / 16)).astype(np.uint8), labels.astype(np.int64)


def held_out(labels: np.ndarray, count: int) -> np.ndarray:
    """The mask of the test split: bool `[examples]`, with exactly `count` True values.

    The test examples are evenly spaced among the examples sorted by class, so each class is represented proportionally
    to within one example, without depending on a random generator that may change.
    """
    by_class = np.argsort(labels, kind="stable")
    share = np.arange(len(labels) + 1) * count // len(labels)
    chosen = np.zeros(len(labels), bool)
    chosen[by_class] = np.diff(share) == 1
    return chosen


def png(image: np.ndarray) -> io.BytesIO:
    """A grayscale uint8 `[height, width]` array encoded as PNG, in a buffer positioned at its start."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    buffer.seek(0)
    return buffer
