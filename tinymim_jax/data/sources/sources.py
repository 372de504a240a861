"""Opening image sets by one string: the name of a TFDS set, or where files of your own lie.

TensorFlow is never imported for reading.
"""

import logging
import os

from tinymim_jax.data.sources import array_record as array_record_source
from tinymim_jax.data.sources import folder as folder_source
from tinymim_jax.data.sources import parquet as parquet_source
from tinymim_jax.data.sources import tar as tar_source
from tinymim_jax.data.sources.examples import Source, balanced_subset
from tinymim_jax.data.sources.files import raise_open_file_limit
from tinymim_jax.data.sources.splits import open_parts
from tinymim_jax.data.sources.tfds import open_tfds, prepare, tfds_splits

log = logging.getLogger(__name__)

__all__ = ["is_place", "open_source", "prepare", "splits"]

# Each has open_split(name, location, split) -> Source and split_names(location) -> list of str.
_KINDS = {
    "folder": folder_source,
    "tar": tar_source,
    "parquet": parquet_source,
    "array_record": array_record_source,
}


def open_source(
    name: str,
    *,
    split: str,
    data_dir: str | os.PathLike | None = None,
    examples: int | None = None,
    seed: int = 0,
) -> Source:
    """Opens a set of images for reading.

    Args:
        name: one of
            `digits`, which is prepared on first use, or a TFDS set that `tinymim prepare` has prepared, with config
                and version if wanted: `imagenet2012`, `imagenet_a:0.1.0`. It needs images; labels are of use;
            `folder:LOCATION`, image files: the first folder is the class, as in torchvision's ImageFolder, or
                there are no folders and no classes. Hidden files are left out;
            `tar:LOCATION`, WebDataset's shards: `key.jpg` with `key.cls` or `key.json` (`{"label": 3}`), or without;
            `parquet:LOCATION`, as Hugging Face keeps images: columns are found by its metadata, or by name
                (`image`, `img` or `jpg`; `label`, `labels` or `fine_label`);
            `array_record:LOCATION`, of image files, or of tf.train.Examples with `image` or `image/encoded`, and
                `label` or `image/class/label`.
            In LOCATION `{split}` stands for the split's name. Otherwise the split is the folder LOCATION/SPLIT, or
            the files LOCATION/SPLIT-* and LOCATION/SPLIT.*; `all` is everything there. Patterns (`*`) and URLs that
            fsspec knows (`gs://`) are allowed, but URLs not for ArrayRecord. Class names of tar and ArrayRecord
            files are the lines of `classes.txt` beside them, or numbers.
        split: a split or parts of some, in TFDS's syntax: `train`, `train[:90%]`, `train[1000:]+test`.
        data_dir: where TFDS keeps its sets; by default `$TFDS_DATA_DIR`, or `~/tensorflow_datasets`.
        examples: keep only so many, the same number of each class (see `balanced_subset`).
        seed: decides which examples those are.

    Raises:
        FileNotFoundError: nothing at LOCATION, or a shard of a numbered set is missing; or the TFDS set is known but
            not prepared under `data_dir`.
        OSError: a folder or file cannot be read.
        ValueError: unknown set or split, no images, a format without random access, or more `examples` than the
            split can give.
    """
    raise_open_file_limit()
    kind, location = _kind(name)
    if kind is None:
        source = open_tfds(name, split, data_dir)
    else:
        source = open_parts(name, split, lambda whole: kind.open_split(name, location, whole))
    if source.label_problem:
        log.warning("labels of split %r of %r: %s", split, name, source.label_problem)
    return source if examples is None else balanced_subset(source, examples, seed=seed)


def splits(name: str, data_dir: str | os.PathLike | None = None) -> dict[str, int]:
    """The whole splits that a set offers, and how many images each has. Arguments and errors as `open_source`.

    A set of files that is not divided into splits has one, `all`.
    """
    raise_open_file_limit()
    kind, location = _kind(name)
    if kind is None:
        return tfds_splits(name, data_dir)
    return {split: len(kind.open_split(name, location, split)) for split in kind.split_names(location)}


def is_place(name: str) -> bool:
    """Whether `name` says where files lie (`folder:/data/pets`), rather than being a TFDS set's."""
    return _kind(name)[0] is not None


def _kind(name: str):
    prefix, colon, location = name.partition(":")
    if not colon or prefix not in _KINDS:
        return None, ""
    if not location:
        raise ValueError(f"{name!r} names no place; write {prefix}:LOCATION, such as {prefix}:/data/images")
    return _KINDS[prefix], location
