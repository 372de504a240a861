"""Opens and prepares TFDS data sets, stored as ArrayRecord; `digits` is prepared on first use.

Reading never imports TensorFlow; preparing needs it for some data sets.
"""

import contextlib
import difflib
import functools
import io
import json
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from tinymim_jax.data.masks.class_files import CLASS_FILES, read_classes
from tinymim_jax.data.sources.examples import Example, Source
from tinymim_jax.data.sources.files import raise_open_file_limit

log = logging.getLogger(__name__)

_INFO_FILE = "dataset_info.json"  # TFDS writes it when a directory is complete
_MASKS = ("segmentation_mask", "segmentation_label")
_LABELS = ("label", "original_label")  # the latter in ImageNet ReaL, beside the multi-label `real_label`
_MULTI_LABEL = "real_label"
_SAMPLED = 16  # at most this many records are read to find out whether a split is labelled


def open_tfds(name: str, split: str, data_dir: str | os.PathLike | None = None) -> Source:
    """Opens a prepared data set; `digits` is prepared if necessary. Errors as `sources.open_source`."""
    return TfdsSource(name, _prepared(name, data_dir), split)


def tfds_splits(name: str, data_dir: str | os.PathLike | None = None) -> dict[str, int]:
    """The splits of a prepared data set and their sizes, by name; `digits` is prepared if necessary."""
    builder: Any = tfds.builder_from_directory(_prepared(name, data_dir))
    return {key: builder.info.splits[key].num_examples for key in sorted(builder.info.splits)}


def prepare(name: str, *, data_dir: str | os.PathLike | None = None) -> Path:
    """Downloads a data set (if TFDS can), writes it as ArrayRecord and returns its directory.

    Does nothing if it is already prepared.

    Raises:
        ValueError: unknown data set, one without images, or already stored in a format without random access.
        ImportError: a package needed for preparing is missing; the message names it.
    """
    root = _data_root(data_dir)
    raise_open_file_limit()
    if name == "digits":
        return _prepare_digits(root)
    try:
        builder = tfds.builder(name, data_dir=root, file_format="array_record")
        _check_images(name, builder)
        builder.download_and_prepare()
    except tfds.core.DatasetNotFoundError as error:
        raise _unknown(name, root) from error
    except ImportError as error:
        if "tensorflow" not in str(error).lower():
            raise
        raise ImportError(
            f"TFDS needs TensorFlow to prepare {name!r} (but not to read it); "
            "run: pip install tensorflow-cpu, then the same command again"
        ) from error
    directory = Path(builder.data_dir)
    _check_random_access(name, tfds.builder_from_directory(directory), directory)
    return directory


class TfdsSource(Source):
    """One split of a data set prepared by TFDS in `directory`, read without its builder code.

    Records of segmentation sets have `mask`, those of ImageNet ReaL have `labels`. Only labels of type ClassLabel are
    used.
    """

    def __init__(self, name: str, directory: str | os.PathLike, split: str):
        builder: Any = tfds.builder_from_directory(directory)
        _check_images(name, builder)
        _check_random_access(name, builder, Path(directory))
        _check_split(name, builder, split)
        _check_shards(name, builder, split)
        features = builder.info.features
        self.name = name
        self.split = split
        self._label = next((key for key in _LABELS if _has(features, key, tfds.features.ClassLabel)), None)
        self._directory = Path(directory)
        self._has_file_names = "file_name" in features
        self._mask = next((key for key in _MASKS if _has(features, key, tfds.features.Image)), None)
        self._has_multi_label = _has(features, _MULTI_LABEL, tfds.features.Sequence)
        # Other features are not decoded, because that may need TensorFlow.
        served = ["image"] + [self._label] * (self._label is not None) + [self._mask] * bool(self._mask)
        served += ["file_name"] * self._has_file_names + [_MULTI_LABEL] * self._has_multi_label
        self._features = tfds.features.FeaturesDict({key: features[key] for key in served})
        self._decoders = {key: tfds.decode.SkipDecoding() for key in ("image", self._mask) if key in served}
        raw = tfds.decode.DeserializeMethod.RAW_BYTES
        self._records = builder.as_data_source(split, deserialize_method=raw)
        if self._label and self._is_unlabelled():
            self.label_problem = f"all of {min(_SAMPLED, len(self))} records checked have label -1"
            self._label = None
        self.class_names = tuple(features[self._label].names) if self._label else ()
        named = Path(directory) / CLASS_FILES[0]  # written by `tinymim prepare`
        self.mask_classes = read_classes(str(named)) if self._mask and named.is_file() else ()

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}/{self.split} has records 0 to {len(self) - 1}, got {index}")
        record = self._record(index)
        example: Example = {"image": record["image"], "label": int(record[self._label]) if self._label else -1}
        if self._mask:
            example["mask"] = record[self._mask]
        if self._has_multi_label:
            example["labels"] = tuple(map(int, record[_MULTI_LABEL]))
        return example

    def describe(self, index: int) -> str:
        described = super().describe(index)
        if self._has_file_names:
            with contextlib.suppress(Exception):  # the record itself may be damaged
                described += f" ({self._record(index)['file_name'].decode()})"
        return described

    def _is_unlabelled(self) -> bool:
        """Whether all labels are -1 (as in unlabelled TFDS test splits), judged by a sample of records."""
        read = 0
        for index in np.linspace(0, len(self) - 1, min(_SAMPLED, len(self))).astype(int).tolist():
            with contextlib.suppress(Exception):  # skip damaged records
                if self._record(index)[self._label] != -1:
                    return False
                read += 1
        return read > 0

    def _record(self, index: int) -> Any:
        return self._features.deserialize_example_np(self._records[index], decoders=self._decoders)

    def __reduce__(self):
        # Worker processes reopen the data set, which is cheaper than pickling the TFDS builder.
        return TfdsSource, (self.name, self._directory, self.split)


def _prepared(name: str, data_dir: str | os.PathLike | None) -> Path:
    root = _data_root(data_dir)
    directory = _find(name, root)
    if directory is None and name == "digits":
        directory = prepare(name, data_dir=root)
    if directory is None:
        raise _missing(name, root)
    return directory


def _data_root(data_dir: str | os.PathLike | None) -> Path:
    chosen = os.fspath(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    if "://" in chosen:
        raise ValueError(f"data_dir={chosen!r} is not a local path; mount the bucket and use that path")
    return Path(chosen).expanduser().absolute()


def _find(name: str, root: Path) -> Path | None:
    """The directory of the newest prepared version, or None.

    Not found through TFDS, which would import the builder code and, for some data sets, TensorFlow.
    """
    path, _, version = name.partition(":")
    directory = root / path
    default = directory / ".config" / "metadata.json"
    if default.is_file():  # written by TFDS: the config to use if none is given
        directory /= json.loads(default.read_text())["default_config_name"]
    prepared = [file.parent for file in directory.glob(f"{version or '*'}/{_INFO_FILE}")]
    numbered = [found for found in prepared if re.fullmatch(r"\d+\.\d+\.\d+", found.name)]
    return max(numbered, key=lambda found: [int(part) for part in found.name.split(".")], default=None)


def _prepare_digits(root: Path) -> Path:
    if (directory := _find("digits", root)) is not None:
        return directory
    from tinymim_jax.data.builders.digits import Digits

    log.info("preparing 'digits' under %s", root)
    # Written to a temporary folder, then renamed: if several processes start at once, the first rename wins and
    # none of them sees a partial data set.
    try:
        root.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(prefix=".digits-", dir=root)
    except OSError as error:
        raise OSError(
            f"'digits' cannot be written to {root} ({error.strerror}): choose another folder by --data_dir, or by "
            "the environment variable TFDS_DATA_DIR"
        ) from error
    with folder as scratch:
        builder = Digits(data_dir=scratch, file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder.download_and_prepare()  # takes a second: no progress bars needed
        directory = root / "digits" / str(builder.version)
        directory.parent.mkdir(exist_ok=True)
        try:
            os.rename(builder.data_dir, directory)
        except OSError:
            if _find("digits", root) is None:
                raise
    return directory


def _check_images(name: str, builder: tfds.core.DatasetBuilder) -> None:
    features: Any = builder.info.features
    if not (isinstance(features, dict | tfds.features.FeaturesDict) and _has(features, "image", tfds.features.Image)):
        raise ValueError(
            f"{name!r} cannot be used: it has {sorted(features)}; expected 'image' (Image) and optionally 'label' "
            "(ClassLabel) and 'segmentation_mask' (Image)"
        )


def _has(features: Any, key: str, kind: type) -> bool:
    return key in features and isinstance(features[key], kind)


def _check_random_access(name: str, builder: tfds.core.DatasetBuilder, directory: Path) -> None:
    formats = builder.info.available_file_formats()
    if not formats & tfds.core.FileFormat.with_random_access():
        found = ", ".join(sorted(stored.value for stored in formats))
        raise ValueError(
            f"{name!r} in {directory} is stored as {found}, which has no random access; "
            f"remove it or choose another DIR, then run: tinymim prepare {name} --data_dir DIR"
        )


def _check_split(name: str, builder: tfds.core.DatasetBuilder, split: str) -> None:
    splits = builder.info.splits
    choices = ", ".join(f"{key} ({splits[key].num_examples:,})" for key in sorted(splits))
    try:
        count = splits[split].num_examples
    except (KeyError, ValueError, AssertionError) as error:
        raise ValueError(
            f"split={split!r} is not a split of {name!r}; choices: {choices}, or a part such as 'train[:90%]'"
        ) from error
    if count == 0:
        raise ValueError(f"split={split!r} of {name!r} holds no examples; choices: {choices}")


def _check_shards(name: str, builder: tfds.core.DatasetBuilder, split: str) -> None:
    """Raises FileNotFoundError if a shard is missing or unreadable; TFDS would only notice on first reading it."""
    paths = [Path(part.filename) for part in builder.info.splits[split].file_instructions]
    lost = [path for path in paths if not path.is_file() or not os.access(path, os.R_OK)]
    if lost:
        raise FileNotFoundError(
            f"{len(lost)} of the {len(paths)} files of split {split!r} of {name!r} are missing or unreadable: "
            f"{lost[0]}{' and others' if len(lost) > 1 else ''}; copy them again, or remove the data set "
            "and prepare it again"
        )


def _missing(name: str, root: Path) -> Exception:
    if _base_name(name) not in _known_sets() and not (root / _base_name(name)).is_dir():
        return _unknown(name, root)
    return FileNotFoundError(f"{name!r} is not prepared under {root}; run: tinymim prepare {name} --data_dir {root}")


def _unknown(name: str, root: Path) -> ValueError:
    near = difflib.get_close_matches(_base_name(name), sorted(_known_sets()))
    guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    return ValueError(
        f"{name!r} is unknown: {guess}choices: 'digits', a TFDS data set, one prepared under {root}, "
        "or your own files: 'folder:', 'tar:', 'parquet:' or 'array_record:' followed by their location"
    )


def _base_name(name: str) -> str:
    return name.split(":")[0].split("/")[0]


@functools.cache
def _known_sets() -> set[str]:
    return {"digits", *tfds.list_builders(with_community_datasets=False)}
