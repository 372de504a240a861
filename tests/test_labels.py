"""Labels that are missing or no class stop what learns from labels, with their number and place, and nothing else."""

import io
import logging
import pickle
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from imagenet_sets import pictures, write_set
from labelled_files import IMAGES, NAMES, write_array_records, write_parquet
from runs import probe_config, small_config

from tinymim_jax.data.pipeline import eval_batches, train_batches
from tinymim_jax.data.sources.examples import Source, balanced_subset
from tinymim_jax.data.sources.labels import LabelError, class_summary, labelled
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.data.views.transforms import EvalView
from tinymim_jax.evaluation.features import labelled_splits
from tinymim_jax.experiment import build_experiment, training_batches


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TINYMIM_CACHE", str(tmp_path_factory.mktemp("cache")))


def write_tar(root, split, labels, order=lambda members: members):
    root.mkdir(parents=True, exist_ok=True)
    (root / "classes.txt").write_text("\n".join(NAMES))
    members = []
    for number, label in enumerate(labels):
        members.append((f"{number:02d}.png", IMAGES[number]))
        if label is not None:
            members.append((f"{number:02d}.cls", str(label).encode()))
    with tarfile.open(root / f"{split}-0.tar", "w") as tar:
        for name, content in order(members):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


WRITERS = {"tar": write_tar, "parquet": write_parquet, "array_record": write_array_records}


@pytest.fixture(params=sorted(WRITERS))
def kind(request) -> str:
    return request.param


def opened(kind: str, root, labels, split: str = "train", **options) -> Source:
    WRITERS[kind](root, split.split("[")[0], labels, **options)
    return open_source(f"{kind}:{root}", split=split)


def first_batch(source: Source) -> dict[str, np.ndarray]:
    with eval_batches(source, view=EvalView(8, 8), batch_size=12) as batches:
        return next(batches)


GOOD = [0, 1, 2] * 4


def test_good_labels_pass(kind, tmp_path, caplog):
    source = opened(kind, tmp_path, GOOD)
    assert [example["label"] for example in labelled(source)] == GOOD
    known = source.known_labels()
    assert known is None if kind == "array_record" else known.tolist() == GOOD
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("labels", "counts", "first"),
    [
        ([0, 1, 2, -1, 0, -1, None, 1], "3 of 8 examples of split 'train' .* have label -1", 3),
        ([0, 1, 2, 0, 7, 1, 9, 1], "2 of 8 examples of split 'train' .* none of the 3 classes", 4),
        ([0, 1, 2, 0, 1, -3], "1 of 6 examples of split 'train' .* none of the 3 classes", 5),
    ],
)
def test_some_bad_labels_are_counted_and_the_first_is_named(kind, labels, counts, first, tmp_path):
    if kind == "tar":  # in which a number below -1 is no label
        labels = [None if label == -3 else label for label in labels]
        counts = counts.replace("none of the 3 classes", "(none of|have label)") if None in labels else counts
    options = {"names": ()} if kind == "array_record" and -1 in labels else {}
    source = opened(kind, tmp_path, labels, **options)
    assert source.classes == 3
    if kind == "array_record" and not options:  # labels are not known before they are read
        counts = "has label"
    with pytest.raises(LabelError, match=f"{counts}.*; label them, remove them") as caught:
        labelled(source)
    assert source.describe(first) in str(caught.value)


@pytest.mark.parametrize("labels", [[-1] * 6, [None] * 6])
def test_all_labels_missing_is_a_set_without_labels(kind, labels, tmp_path):
    options = {"names": ()} if kind == "array_record" else {}
    source = opened(kind, tmp_path, labels, **options)
    assert (source.classes, class_summary(source)) == (0, "no labels")
    with pytest.raises(LabelError, match=f"split 'train' of '{kind}:.* has no labels.*: why; choose a labelled set"):
        labelled(source, "why")
    assert first_batch(source)["label"].tolist() == [-1] * 6 + [0] * 6


def test_bad_labels_stop_nothing_that_needs_none(kind, tmp_path):
    batch = first_batch(opened(kind, tmp_path, [0, -1, None, 7, 2, 10**6]))
    assert batch["valid"].sum() == 6
    assert batch["label"][:6].tolist() == [0, -1, -1, -1, 2, -1]


def test_a_label_that_is_not_known_before_is_named_when_it_is_read(tmp_path):
    labels = GOOD[:]
    names = [str(number) for number in range(3)]
    source = opened("array_record", tmp_path, labels, names=names)
    long = _Long(source, 1000, bad={997: -1})
    checked = pickle.loads(pickle.dumps(labelled(long)))  # 997 is not among those that are looked at first
    with eval_batches(checked, view=EvalView(8, 8), batch_size=500, workers=1) as batches:
        next(batches)
        with pytest.raises(LabelError, match=r"^record \d+ of .* has label -1 \(no label\); label them, remove them"):
            next(batches)
    with train_batches(long, augment=EvalView(8, 8), batch_size=500, seed=0) as batches:
        assert sum((next(batches)["label"] == -1).sum() for _ in range(2)) == 1
    with pytest.raises(LabelError, match=r"record 0 of .* has label 5, none of the 3 classes"):
        labelled(_Long(source, 1000, bad={0: 5}))


class _Long(Source):
    """`source` repeated, with the labels of `bad` records replaced."""

    def __init__(self, source, length, bad):
        self.name, self.split, self.class_names = source.name, source.split, source.class_names
        self._source, self._length, self._bad = source, length, bad

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        example = self._source[index % len(self._source)]
        return {"image": example["image"], "label": self._bad.get(index, example["label"])}


def test_parts_and_subsets_know_their_labels(tmp_path):
    write_parquet(tmp_path, "train", [0, 1, -1, 2, 0, 1, 2])
    write_parquet(tmp_path, "test", [-1] * 4)
    whole = f"parquet:{tmp_path}"
    assert open_source(whole, split="train[3:]").known_labels().tolist() == [2, 0, 1, 2]
    labelled(open_source(whole, split="train[3:]"))
    with pytest.raises(LabelError, match=r"1 of 4 examples of split 'train\[:4\]' .*row 2 of .*train.parquet"):
        labelled(open_source(whole, split="train[:4]"))
    both = open_source(whole, split="train+test")
    assert (both.classes, {example["label"] for example in both}) == (0, {-1})
    with pytest.raises(LabelError, match=r"'train\+test' of .* has no labels \(its part 'test' has none\)"):
        labelled(both)
    subset = balanced_subset(open_source(whole, split="train"), 6)  # the record without a label is not chosen
    assert subset.known_labels().tolist() == [example["label"] for example in subset]
    assert sorted(subset.known_labels()) == [0, 0, 1, 1, 2, 2]


def test_tfds_sets(tmp_path):
    drawn = pictures(1, 20, (8, 8))
    labels = {"train": [i % 3 for i in range(20)], "holes": [-1] + [0] * 19, "test": [-1] * 20}
    for split, theirs in labels.items():
        write_set(tmp_path / split, "toy_labels", drawn, theirs, split=split, classes=NAMES)

    def opened(split):
        return open_source("toy_labels", split=split, data_dir=tmp_path / split)

    assert sorted(example["label"] for example in labelled(opened("train"))) == sorted(labels["train"])
    assert opened("test").classes == 0
    with pytest.raises(
        LabelError, match=r"'test' of 'toy_labels' has no labels \(all of 16 records checked have label -1"
    ):
        labelled(opened("test"))
    with pytest.raises(LabelError, match=r"record \d+ of toy_labels/holes .* has label -1"):
        first_batch(labelled(opened("holes")))
    infos = tfds.builder_from_directory(next((tmp_path / "test").glob("*/*"))).info
    assert infos.features["label"].names == list(NAMES)


def test_every_command_that_counts_by_labels_refuses_and_pretraining_does_not(tmp_path):
    write_parquet(tmp_path, "train", GOOD)
    write_parquet(tmp_path, "holes", [0, 1, -1])
    place = f"data.source=parquet:{tmp_path}"

    def config(make, name, train, evaluated):
        words = (place, f"data.train_split={train}", f"data.eval_split={evaluated}", "data.examples=0")
        return make(*name, *words)

    for train, evaluated in (("holes", "train"), ("train", "holes")):
        with pytest.raises(LabelError, match="1 of 3 examples of split 'holes'"):
            build_experiment(config(small_config, ["finetune"], train, evaluated))
        with pytest.raises(LabelError, match="1 of 3 examples of split 'holes'"):
            build_experiment(config(probe_config, [], train, evaluated))
        with pytest.raises(LabelError, match="1 of 3 examples of split 'holes'"):
            labelled_splits(config(probe_config, [], train, evaluated), data_dir=None, purpose="k-NN counts by them")
    experiment = build_experiment(config(small_config, ["mae_student"], "holes", "holes"))
    with training_batches(experiment, start_step=0, workers=0) as batches:
        assert -1 in next(batches)["label"]


def test_classes_in_a_sentence_and_classes_without_an_image(tmp_path, caplog):
    source = opened("parquet", tmp_path, [0, 2, 2, 0])
    assert class_summary(source) == "3 classes: ant, bee, cow"
    with caplog.at_level(logging.WARNING):
        labelled(source)
    assert "1 of the 3 classes of split 'train' of 'parquet:" in caplog.text
    assert caplog.text.strip().endswith("have no image: bee")
    source.class_names = tuple(f"n{number:04d}" for number in range(1000))
    assert class_summary(source) == (
        "1,000 classes: n0000, n0001, n0002, n0003, n0004, n0005, n0006, n0007, n0008, ..., n0999"
    )


# ---------------------------------------------------------------------------------------------- tar


@pytest.mark.parametrize(
    "order",
    [lambda m: m[0::2] + m[1::2], lambda m: m[1::2] + m[0::2], lambda m: m[::2] + m[::-2][:1] + m[1:-1:2]],
    ids=["images first", "labels first", "mixed"],
)
def test_members_of_a_sample_need_not_lie_side_by_side(order, tmp_path):
    write_tar(tmp_path, "train", GOOD, order)
    source = open_source(f"tar:{tmp_path}", split="train")
    assert sorted((example["image"], example["label"]) for example in source) == sorted(zip(IMAGES, GOOD))


def test_text_labels_stop_only_what_needs_labels(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        source = opened("tar", tmp_path / "tar", ["cat", "dog", "cat"])
        assert "labels that are not integers: 3, first: 00.cls of" in caplog.text
    assert (len(source), source.classes) == (3, 0)
    with pytest.raises(LabelError, match=r"has no labels \(labels that are not integers: 3, first: 00.cls .*b'cat'"):
        labelled(source)
    table = pa.table({"image": IMAGES[:2], "label": ["cat", "dog"]})
    (tmp_path / "parquet").mkdir()
    pq.write_table(table, tmp_path / "parquet" / "train.parquet")
    source = open_source(f"parquet:{tmp_path}/parquet", split="train")
    assert (len(source), source.classes, source[1]["label"]) == (2, 0, -1)
    with pytest.raises(
        LabelError, match=r"has no labels \(column 'label' of .* holds string; expected integers from 0"
    ):
        labelled(source)
