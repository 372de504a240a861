"""Opens image data sets by name: a TFDS data set, or the format and location of your own files.

Reading never imports TensorFlow.
"""

import logging
import os

from tinymim_jax.data.sources import array_record as array_record_source
from tinymim_jax.data.sources import folder as folder_source
from tinymim_jax.data.sources import pairs as pairs_source
from tinymim_jax.data.sources import parquet as parquet_source
from tinymim_jax.data.sources import tar as tar_source
from tinymim_jax.data.sources.examples import Source, balanced_subset
from tinymim_jax.data.sources.files import raise_open_file_limit
from tinymim_jax.data.sources.splits import open_parts
from tinymim_jax.data.sources.tfds import open_tfds, prepare, tfds_splits

log = logging.getLogger(__name__)

__all__ = ["is_place", "open_source", "prepare", "splits"]

# Each module has open_split(name, location, split) -> Source and split_names(location) -> list of str.
_KINDS = {
    "folder": folder_source,
    "pairs": pairs_source,
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
    """Opens an image data set for reading.

    Args:
        name: one of
            `digits`, which is prepared on first use, or a TFDS data set prepared by `tinymim prepare`, optionally with
                config and version: `imagenet2012`, `imagenet_a:0.1.0`. It must have images; labels are optional;
            `folder:LOCATION`, image files: the first folder level is the class, as in torchvision's ImageFolder, or
                there are no folders and no classes. Hidden files are skipped;
            `pairs:LOCATION`, images and masks for semantic segmentation, found by the names of their folders and files
                (pairs.py); `pairs:IMAGES::MASKS` names both folders, and MASKS may end in a pattern such as `*_L.png`;
            `tar:LOCATION`, WebDataset shards: `key.jpg`, optionally with `key.cls` or `key.json` (`{"label": 3}`),
                or with a mask, `key.mask.png` or `key.seg.png`;
            `parquet:LOCATION`, in the layout of Hugging Face image data sets: columns are found by its metadata, or
                by name (`image`, `img` or `jpg`; `label`, `labels` or `fine_label`; `mask` or `annotation` for an
                image of masks);
            `array_record:LOCATION`, records that are image files, or tf.train.Examples with `image` or
                `image/encoded`, and optionally `label` or `image/class/label`.
            `{split}` in LOCATION is replaced by the split's name. Without it the split is the folder LOCATION/SPLIT,
            or the files LOCATION/SPLIT-* and LOCATION/SPLIT.*; `all` is everything in LOCATION. Glob patterns (`*`)
            and fsspec URLs (`gs://`) are allowed; ArrayRecord files must be local. The class names of tar and
            ArrayRecord files are the lines of `classes.txt` in the same folder, or numbers.
        split: a split, slices of splits or sums of them, in TFDS syntax: `train`, `train[:90%]`, `train[1000:]+test`.
        data_dir: the TFDS data directory; by default `$TFDS_DATA_DIR`, or `~/tensorflow_datasets`.
        examples: use only this many examples, the same number of each class (see `balanced_subset`).
        seed: selects the examples of that subset.

    Raises:
        FileNotFoundError: LOCATION does not exist, a shard of a numbered set is missing, or a TFDS data set is not
            prepared under `data_dir`.
        OSError: a folder or file cannot be read.
        ValueError: unknown data set or split, no images, a format without random access, or too few images for
            `examples`.
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
    """The whole splits of a data set and the number of images in each. Arguments and errors as `open_source`.

    Files that are not divided into splits have one split, `all`.
    """
    raise_open_file_limit()
    kind, location = _kind(name)
    if kind is None:
        return tfds_splits(name, data_dir)
    return {split: len(kind.open_split(name, location, split)) for split in kind.split_names(location)}


def is_place(name: str) -> bool:
    """Whether `name` gives a location of files (`folder:/data/pets`) and not a TFDS data set."""
    return _kind(name)[0] is not None


def _kind(name: str):
    prefix, colon, location = name.partition(":")
    if not colon or prefix not in _KINDS:
        return None, ""
    if not location:
        raise ValueError(f"{name!r} has no location; write {prefix}:LOCATION, such as {prefix}:/data/images")
    return _KINDS[prefix], location
