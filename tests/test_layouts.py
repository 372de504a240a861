"""Folders of images as people have them: which are splits, which are classes, and which can be neither."""

import logging

import numpy as np
import pytest
from pictures import encoded

from tinymim_jax.data.sources.labels import LabelError, class_summary, labelled
from tinymim_jax.data.sources.sources import open_source, splits

IMAGE = encoded(np.zeros((4, 4, 3), np.uint8), "PNG")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TINYMIM_CACHE", str(tmp_path_factory.mktemp("cache")))


def put(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(IMAGE)


def classes(root, *names):
    put(root, *(f"{name}/{number}.png" for name in names for number in range(2)))


@pytest.mark.parametrize(
    ("folders", "asked"),
    [
        (("Training", "Testing"), ("Training", "training", "train")),
        (("Train", "Val", "Test"), ("Train", "train", "TRAIN")),
        (("TRAIN", "VALID"), ("train",)),
        (("train", "val"), ("train", "training")),
    ],
)
def test_names_of_splits_in_any_form(folders, asked, tmp_path):
    for number, folder in enumerate(folders):
        classes(tmp_path / folder, "cat", "dog", *["fox"] * (number == 0))
    assert splits(f"folder:{tmp_path}") == {name: 4 + 2 * (name == folders[0]) for name in folders}
    for name in asked:
        source = open_source(f"folder:{tmp_path}", split=f"{name}[1:]")
        assert (len(source), source.class_names) == (5, ("cat", "dog", "fox"))
    assert splits(f"folder:{tmp_path}/{{split}}") == splits(f"folder:{tmp_path}")


def test_two_folders_that_differ_in_capitals_are_not_confused(tmp_path):
    classes(tmp_path / "train", "cat", "dog")
    classes(tmp_path / "Train", "cat", "dog", "fox")
    assert open_source(f"folder:{tmp_path}", split="Train").classes == 3
    with pytest.raises(ValueError, match=r"split='TRAIN'.*choices: Train, train"):
        open_source(f"folder:{tmp_path}", split="TRAIN")


def test_folders_beside_splits_are_no_classes(tmp_path):
    for split in ("train", "val"):
        classes(tmp_path / split, "cat", "dog")
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances.json").write_text("{}")
    assert splits(f"folder:{tmp_path}") == {"train": 4, "val": 4}
    put(tmp_path, "previews/1.png")
    assert splits(f"folder:{tmp_path}") == {"train": 4, "val": 4}


def test_a_class_may_be_called_as_a_split(tmp_path):
    classes(tmp_path, "bus", "car", "train")
    assert splits(f"folder:{tmp_path}") == {"all": 6}
    assert labelled(open_source(f"folder:{tmp_path}", split="all")).class_names == ("bus", "car", "train")


def test_splits_some_levels_down_are_pointed_at(tmp_path):
    inner = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    for split in ("train", "val"):
        classes(inner / split, "n01", "n02")
    with pytest.raises(ValueError, match=f"Did you mean folder:{inner}, which has split folders"):
        open_source(f"folder:{tmp_path}", split="train")
    assert splits(f"folder:{tmp_path}/ILSVRC/Data/CLS-LOC") == {"train": 4, "val": 4}


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        (
            ("train/images/cat/1.png", "train/images/dog/1.png"),
            "train",
            r"only one class, 'images'.*use .*train/images",
        ),
        (("seg_train/seg_train/sea/1.png", "seg_train/seg_train/street/1.png"), "seg_train", "only one class, 'seg_"),
        (
            ("bottle/train/good/1.png", "bottle/test/broken/1.png", "cable/train/good/1.png", "cable/test/bent/1.png"),
            "all",
            r"contain the same folders \(test, train\)",
        ),
        (
            ("seg_train/seg_train/sea/1.png", "seg_test/seg_test/sea/1.png", "seg_test/seg_test/ice/1.png"),
            "all",
            "holds one folder of the same name with folders in it .seg_test/seg_test/ice",
        ),
        (("cat/train/1.png", "dog/train/1.png"), "all", r"contain the same folders \(train\)"),
    ],
)
def test_layouts_without_classes_show_the_tree(names, split, message, tmp_path, caplog):
    put(tmp_path, *names)
    source = open_source(f"folder:{tmp_path}", split=split)
    assert len(source) == len(names)  # which is enough for a task without labels
    with pytest.raises(LabelError, match=f"(?s){message}.*/\n +.*1 images") as caught:
        labelled(source)
    assert names[0].split("/")[-2] in str(caught.value)
    assert len(caught.value.args[0].splitlines()) < 15


def test_one_inner_folder_in_every_class_is_no_mistake(tmp_path):
    put(tmp_path, *(f"{name}/images/{number}.png" for name in ("n01", "n02") for number in range(2)))  # Tiny ImageNet
    assert labelled(open_source(f"folder:{tmp_path}", split="all")).class_names == ("n01", "n02")


def test_a_large_tree_is_shown_in_part(tmp_path):
    put(tmp_path, *(f"set/{name:03d}/1.png" for name in range(300)))
    with pytest.raises(LabelError, match="and 290 more folders") as caught:
        labelled(open_source(f"folder:{tmp_path}", split="all"))
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize("stray", ["__MACOSX", "@eaDir", "lost+found", ".ipynb_checkpoints", "$RECYCLE.BIN"])
def test_what_systems_leave_behind_is_no_class(stray, tmp_path):
    classes(tmp_path, "cat", "dog")
    put(tmp_path, f"{stray}/cat/1.png", f"cat/{stray}/2.png")
    source = open_source(f"folder:{tmp_path}", split="all")
    assert (len(source), class_summary(source)) == (4, "2 classes: cat, dog")


def test_files_that_are_left_out_are_counted_by_kind(tmp_path, caplog):
    for name in ("cat", "dog"):
        kinds = ("jpg", "JFIF", "jpe", "gif", "heic", "txt")
        put(tmp_path, *(f"{name}/1.{kind}" for kind in kinds), f"{name}/2.jp2", f"{name}/without")
    for _ in range(2):  # also where the index was there
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(open_source(f"folder:{tmp_path}", split="all")) == 6
        assert "2 .gif (such as cat/1.gif), 2 .heic (such as cat/1.heic)" in caplog.text
        assert "2 .jp2 (such as cat/2.jp2), 2 without an extension (such as cat/without)" in caplog.text
        assert ".txt" not in caplog.text
    put(tmp_path / "only", "cat/1.gif")
    with pytest.raises(ValueError, match=r"holds no image; looked for .*\.jfif.*there are 1 \.gif"):
        open_source(f"folder:{tmp_path}/only", split="all")


def test_an_empty_class_is_warned_of(tmp_path, caplog):
    classes(tmp_path, "cat", "dog")
    (tmp_path / "logs").mkdir()
    with caplog.at_level(logging.WARNING):
        labelled(open_source(f"folder:{tmp_path}", split="all"))
    assert "1 of the 3 classes of split 'all'" in caplog.text
    assert "have no image: logs" in caplog.text
