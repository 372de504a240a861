"""Sources: the digits against scikit-learn's arrays, balanced subsets, and error messages."""

import collections
import io
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tomllib

import numpy as np
import pytest
import tensorflow_datasets as tfds
from commands import ROOT
from PIL import Image

from tinymim_jax.data.builders import digits
from tinymim_jax.data.sources import files, sources
from tinymim_jax.data.sources import tfds as tfds_source
from tinymim_jax.data.sources.examples import Source, balanced_subset
from tinymim_jax.data.sources.sources import open_source, prepare

sklearn_datasets = pytest.importorskip("sklearn.datasets")

UNWANTED = ("tensorflow", "jax", "torch")
READ_DIGITS = f"""
import sys
from tinymim_jax.data.sources.sources import open_source
source = open_source("digits", split="train", data_dir=sys.argv[1])
assert source[len(source) - 1]["label"] in range(10)
print(len(source), [name for name in {UNWANTED} if name in sys.modules])
"""


@pytest.fixture(scope="module")
def racing(tmp_path_factory) -> tuple[str, list[str]]:
    """A data_dir in which two processes prepared the digits at the same time, and what they printed."""
    data_dir = str(tmp_path_factory.mktemp("tfds") / "new" / "dir")
    # Empty modules stand in for what must not be imported, so that each of them can be.
    stand_ins = tmp_path_factory.mktemp("stand_ins")
    for name in UNWANTED:
        (stand_ins / f"{name}.py").touch()
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["env"] = os.environ | {"PYTHONPATH": str(stand_ins)}
    command = [sys.executable, "-c", READ_DIGITS, data_dir]
    outputs = []
    for process in [subprocess.Popen(command, **options) for _ in range(2)]:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        outputs.append(out.strip())
    return data_dir, outputs


@pytest.fixture(scope="module")
def data_dir(racing) -> str:
    return racing[0]


class Labels(Source):
    """Records without images, which counts how many were read."""

    def __init__(self, labels, classes: int):
        self.name, self.split = "labels", "train"
        self.class_names = tuple(f"class{index}" for index in range(classes))
        self.labels = list(labels)
        self.reads = 0

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        self.reads += 1
        return {"image": b"", "label": self.labels[index]}


class ToyArrays(tfds.core.GeneratorBasedBuilder):
    """A set whose builder passes arrays to TFDS, which needs TensorFlow for them."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = None
    image = np.zeros((4, 4, 3), np.uint8)

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(4, 4, 3)),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "file_name": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(3):
            yield index, {"image": self.image, "label": index % 2, "file_name": f"{index}.png"}


class ToyFiles(ToyArrays):
    VERSION = tfds.core.Version("2.0.0")

    @property
    def image(self):
        return digits.png(np.zeros((4, 4), np.uint8) + 7)

    def _info(self):
        info = super()._info()
        features = dict(info.features) | {"image": tfds.features.Image(shape=(4, 4, 1))}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))


# ---------------------------------------------------------------------------------------------- digits


def test_two_processes_may_prepare_at_once(racing):
    data_dir, outputs = racing
    assert outputs == ["1297 []"] * 2  # and neither imported what it must not
    assert os.listdir(data_dir) == ["digits"]
    assert os.listdir(f"{data_dir}/digits") == ["1.0.0"]


def test_the_later_of_two_keeps_the_earlier_ones_set(data_dir, monkeypatch):
    directory = prepare("digits", data_dir=data_dir)
    before = directory.stat().st_ino
    find, looks = tfds_source._find, iter([False, True])  # nothing there yet, then the other process is done
    monkeypatch.setattr(tfds_source, "_find", lambda *args: find(*args) if next(looks) else None)
    assert prepare("digits", data_dir=data_dir) == directory
    assert directory.stat().st_ino == before
    assert os.listdir(data_dir) == ["digits"]


def test_digits_are_scikit_learns(data_dir):
    def key(pixels, label):
        return pixels.tobytes(), int(label)

    stored = collections.Counter()
    for split, count in (("train", 1297), ("test", 500)):
        source = open_source("digits", split=split, data_dir=data_dir)
        assert len(source) == count
        assert (source.classes, source.class_names[3]) == (10, "3")
        for example in source:
            assert example["image"].startswith(b"\x89PNG")
            stored[key(np.asarray(Image.open(io.BytesIO(example["image"]))), example["label"])] += 1
    original = sklearn_datasets.load_digits()
    assert original.images.max() == 16
    expected = collections.Counter(
        key((image * 255 / 16).round().astype(np.uint8), label)
        for image, label in zip(original.images, original.target)
    )
    assert stored == expected


def test_digits_splits_are_stratified(data_dir):
    total = np.bincount(sklearn_datasets.load_digits().target)
    test = np.bincount([example["label"] for example in open_source("digits", split="test", data_dir=data_dir)])
    assert np.max(np.abs(test - total * 500 / 1797)) < 1


def test_prepared_digits_are_left_alone(data_dir):
    directory = prepare("digits", data_dir=data_dir)
    before = directory.stat().st_mtime_ns
    assert prepare("digits", data_dir=data_dir) == directory
    assert directory.stat().st_mtime_ns == before


def test_digits_need_no_scikit_learn(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert len(open_source("digits", split="train", data_dir=tmp_path)) == 1297
    package_data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert package_data["tinymim_jax.data.builders"] == ["*.npz"]  # without it, wheels would lack the file


# ---------------------------------------------------------------------------------------------- any TFDS set


def test_prepare_and_open_any_set(tmp_path):
    assert prepare("toy_files", data_dir=tmp_path) == tmp_path / "toy_files" / "2.0.0"
    source = open_source("toy_files", split="train", data_dir=tmp_path)
    assert source.class_names == ("cat", "dog")
    assert sorted(example["label"] for example in source) == [0, 0, 1]
    assert re.fullmatch(r"record 1 of toy_files/train \([012]\.png\)", source.describe(1))
    assert source.describe(99) == "record 99 of toy_files/train"


def test_prepare_names_tensorflow_where_a_set_needs_it(tmp_path):
    try:
        prepare("toy_arrays", data_dir=tmp_path)
    except ImportError as error:
        assert "'toy_arrays'" in str(error)  # noqa: PT017  with TensorFlow installed it just succeeds
        assert "pip install tensorflow-cpu" in str(error)  # noqa: PT017


def test_source_is_a_sequence_that_pickles(data_dir):
    source = open_source("digits", split="train[:10%]", data_dir=data_dir)
    assert len(source) == 130
    for index in (-1, 130):
        with pytest.raises(IndexError, match="0 to 129"):
            source[index]
    copy = pickle.loads(pickle.dumps(source))
    assert (copy.name, copy.split, copy[7]) == (source.name, source.split, source[7])
    assert source.describe(7) == "record 7 of digits/train[:10%]"


def test_data_dir_comes_from_the_environment(monkeypatch, data_dir):
    monkeypatch.setenv("TFDS_DATA_DIR", data_dir)
    assert len(open_source("digits", split="test")) == 500
    monkeypatch.delenv("TFDS_DATA_DIR")
    monkeypatch.setenv("HOME", data_dir)
    with pytest.raises(FileNotFoundError, match=f"{data_dir}/tensorflow_datasets"):
        open_source("cifar10", split="test")


@pytest.mark.parametrize(
    ("name", "split", "error", "message"),
    [
        ("digits", "trian", ValueError, r"split='trian'.*choices: test \(500\), train \(1,297\)"),
        ("digits", "train[:x%]", ValueError, r"split='train\[:x%\]'"),
        ("digits", "train[:0%]", ValueError, "holds no example"),
        ("imagenet2012", "train", FileNotFoundError, "tinymim prepare imagenet2012 --data_dir /"),
        ("digits:9.0.0", "train", FileNotFoundError, "'digits:9.0.0' is not prepared"),
        ("imagenet2021", "train", ValueError, "unknown.*did you mean .*'imagenet2012'.*choices: 'digits'"),
        ("qqqq", "train", ValueError, "'qqqq' is unknown: choices"),
    ],
)
def test_mistakes_are_told_with_the_remedy(data_dir, name, split, error, message):
    with pytest.raises(error, match=message):
        open_source(name, split=split, data_dir=data_dir)


def test_prepare_refuses_an_unknown_set(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'cifar10"):
        prepare("cifar_10", data_dir=tmp_path)


def test_a_bucket_is_refused():
    with pytest.raises(ValueError, match=r"gs://sets.*mount"):
        open_source("digits", split="train", data_dir="gs://sets")


@pytest.fixture
def copied_digits(data_dir, tmp_path):
    directory = tmp_path / "digits" / "1.0.0"
    shutil.copytree(f"{data_dir}/digits/1.0.0", directory)
    return directory


def test_the_newest_version_of_the_default_config_is_opened(copied_digits):
    root = copied_digits.parent.parent
    for directory in ("set/small/1.9.0", "set/small/1.10.0", "set/large/2.0.0"):
        shutil.copytree(copied_digits, root / directory)
    (root / "set" / ".config").mkdir()
    (root / "set" / ".config" / "metadata.json").write_text('{"default_config_name": "small"}')
    for name, directory in (
        ("set", "set/small/1.10.0"),
        ("set/large", "set/large/2.0.0"),
        ("set/small:1.9.*", "set/small/1.9.0"),
        ("set/large:1.0.0", None),
    ):
        assert tfds_source._find(name, root) == (directory and root / directory), name


def test_a_set_in_another_format_is_refused(copied_digits):
    info = json.loads((copied_digits / "dataset_info.json").read_text())
    (copied_digits / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    root = copied_digits.parent.parent
    with pytest.raises(ValueError, match=r"stored as tfrecord.*tinymim prepare digits --data_dir DIR"):
        open_source("digits", split="train", data_dir=root)


def test_a_set_without_images_is_refused(copied_digits):
    stored = json.loads((copied_digits / "features.json").read_text())
    features = stored["featuresDict"]["features"]
    features["scan"] = features.pop("image")
    (copied_digits / "features.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=re.escape("it has ['label', 'scan']; expected 'image'")):
        open_source("digits", split="train", data_dir=copied_digits.parent.parent)


def test_a_lost_shard_is_missed_when_the_set_is_opened(copied_digits):
    root = copied_digits.parent.parent
    lost = next(copied_digits.glob("digits-train*"))
    lost.unlink()
    assert len(open_source("digits", split="test", data_dir=root)) == 500
    with pytest.raises(
        FileNotFoundError, match=f"1 of the 1 files of split 'train\\[:10\\]' of 'digits' are missing.*{lost.name}"
    ):
        open_source("digits", split="train[:10]", data_dir=root)


def test_a_set_without_labels_opens(copied_digits):
    features = (copied_digits / "features.json").read_text()
    (copied_digits / "features.json").write_text(features.replace('"label"', '"digit"'))
    source = open_source("digits", split="test", data_dir=copied_digits.parent.parent)
    assert (source.classes, source.class_names, source[3]["label"]) == (0, (), -1)
    assert source[3].keys() == {"image", "label"}


class ToyMasks(ToyFiles):
    """A segmentation set like CamVid, with boxes that must not be decoded."""

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "segmentation_mask": tfds.features.Image(shape=(None, None, 1)),
            "boxes": tfds.features.Sequence({"box": tfds.features.BBoxFeature()}),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self):
        for index in range(3):
            mask = digits.png(np.full((4, 4), index, np.uint8))
            yield index, {"image": self.image, "segmentation_mask": mask, "boxes": []}


def test_a_segmentation_set_serves_its_masks_as_stored(tmp_path):
    prepare("toy_masks", data_dir=tmp_path)
    source = open_source("toy_masks", split="train", data_dir=tmp_path)
    assert (source.class_names, [example["label"] for example in source]) == ((), [-1] * 3)
    masks = sorted(np.unique(np.asarray(Image.open(io.BytesIO(example["mask"])))).tolist() for example in source)
    assert masks == [[0], [1], [2]]
    assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_splits_of_a_set(data_dir):
    assert sources.splits("digits", data_dir) == {"test": 500, "train": 1297}


def test_open_file_limit_is_raised():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        files.raise_open_file_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# ---------------------------------------------------------------------------------------------- subsets


@pytest.mark.parametrize(("examples", "counts"), [(100, {10}), (103, {10, 11}), (3, {0, 1})])
def test_subset_is_balanced(data_dir, examples, counts):
    def opened(seed):
        return open_source("digits", split="train", data_dir=data_dir, examples=examples, seed=seed)

    subset, same, other = list(opened(0)), list(opened(0)), list(opened(1))
    per_class = np.bincount([example["label"] for example in subset], minlength=10)
    assert per_class.sum() == examples
    assert set(per_class.tolist()) == counts
    assert len({example["image"] for example in subset}) == examples
    assert subset == same
    assert subset != other


def test_subset_names_the_records_of_its_source(data_dir):
    whole = open_source("digits", split="train", data_dir=data_dir)
    subset = balanced_subset(whole, 10)
    original = int(re.fullmatch(r"record (\d+) of digits/train", subset.describe(4)).group(1))
    assert subset[4] == whole[original]
    with pytest.raises(IndexError):
        subset[10]


def test_subset_reads_no_more_than_it_needs():
    source = Labels(np.arange(20_000) % 20, classes=20)
    assert len(balanced_subset(source, 200)) == 200
    assert source.reads < 1000  # the last of 20 classes to fill up takes some 400 draws


@pytest.mark.parametrize(
    ("labels", "examples", "message"),
    [
        ([0, 1, 0, 1], 5, r"data.examples=5: .* has 4 images; choose 1 to that many, or 0 for all"),
        ([0, 1, 0, 1], 0, r"data.examples=0: .* has 4 images"),
        ([0] * 9 + [1], 6, "only 1 of class 'class1'; use at most 2"),
        ([0, -1], 2, r"record 1 of labels/train has no class \(label -1\)"),
    ],
)
def test_subset_refuses(labels, examples, message):
    with pytest.raises(ValueError, match=message):
        balanced_subset(Labels(labels, classes=2), examples)


def test_digits_where_nothing_can_be_written(monkeypatch):
    monkeypatch.setenv("HOME", "/proc/no_home")
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(
        OSError, match=r"/proc/no_home/tensorflow_datasets .*: choose another .* --data_dir, or .*TFDS_DATA_DIR"
    ):
        open_source("digits", split="train")
