"""Tiny TFDS sets with the names, features and label spaces of ImageNet's test sets."""

import contextlib
import io

import numpy as np
import tensorflow_datasets as tfds
from pictures import encoded
from PIL import Image

from tinymim_jax.data.sources.imagenet import imagenet_classes


class _Pictures(tfds.core.GeneratorBasedBuilder):
    """`pictures` uint8 [height, width, 3] with `labels`; subclasses set the other attributes."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None
    split, pictures, labels, several, classes = "test", (), (), None, imagenet_classes()

    def _info(self):
        classes = tfds.features.ClassLabel(names=list(self.classes))
        features = {"image": tfds.features.Image(encoding_format="jpeg"), "file_name": tfds.features.Text()}
        if self.several is None:
            features["label"] = classes
        else:
            features |= {"original_label": classes, "real_label": tfds.features.Sequence(classes)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {self.split: self._generate_examples()}

    def _generate_examples(self):
        for i, (picture, label) in enumerate(zip(self.pictures, self.labels)):
            # A PNG, so that what is stored is what was drawn; readers go by the bytes.
            example = {"image": io.BytesIO(encoded(picture, "PNG")), "file_name": f"{i}.JPEG"}
            if self.several is None:
                yield i, example | {"label": int(label)}
            else:
                yield i, example | {"original_label": int(label), "real_label": list(self.several[i])}


def write_set(data_dir, name: str, pictures, labels, *, split: str = "test", **fields) -> None:
    """Writes the TFDS set `name`, such as "imagenet_v2/topimages", under `data_dir`; `fields` are those above."""
    base, _, config = name.partition("/")
    fields |= {"name": base, "split": split, "pictures": pictures, "labels": labels}
    if config:
        fields["BUILDER_CONFIGS"] = [tfds.core.BuilderConfig(name=config, version="1.0.0")]
    with tfds.core.registered.skip_registration():
        builder = type("Set", (_Pictures,), fields)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        options = {"config": config} if config else {}
        builder(data_dir=data_dir, file_format="array_record", **options).download_and_prepare()


def pictures(seed: int, count: int, size: tuple[int, int] = (40, 48)) -> np.ndarray:
    """Smooth random images uint8 [count, *size, 3] that differ in colour and pattern."""
    coarse = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 3), np.uint8)
    return np.stack([np.asarray(Image.fromarray(each).resize(size[::-1], Image.Resampling.BICUBIC)) for each in coarse])
