"""ImageNet's classes, as TFDS and PyTorch number them."""

import re

import tensorflow_datasets as tfds

WORDNET_ID = re.compile(r"n\d{8}")


def imagenet_classes() -> tuple[str, ...]:
    """The 1,000 WordNet ids in label order (sorted), from the list that TFDS uses for ImageNet and its variants."""
    return tuple(tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split())
