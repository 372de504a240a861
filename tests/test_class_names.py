"""Which class of a classifier each class of a data set is."""

import logging
import unicodedata

import numpy as np
import pytest

from tinymim_jax.class_names import ClassMismatch, describe_difference, match_classes, same_names
from tinymim_jax.data.sources.imagenet import imagenet_classes

PETS = ("cat", "dog", "emu")


def test_equal_names_keep_their_order(caplog):
    with caplog.at_level(logging.INFO):
        assert match_classes(PETS, PETS).tolist() == [0, 1, 2]
        assert match_classes(["crane", "crane", "x"], ["crane", "crane", "x"]).tolist() == [0, 1, 2]
    assert not caplog.text


def test_another_order_is_a_permutation():
    assert match_classes(PETS, ("emu", "cat", "dog")).tolist() == [2, 0, 1]
    rng = np.random.default_rng(0)
    known = [f"class {i}" for i in range(30)]
    order = rng.permutation(30)
    assert match_classes(known, [known[i] for i in order]).tolist() == order.tolist()


def test_numbers_match_by_number():
    padded = [f"{i:02d}" for i in range(12)]
    as_words = sorted(map(str, range(12)))  # 0, 1, 10, 11, 2, ...: the order of folders
    assert match_classes(list(map(str, range(12))), padded).tolist() == list(range(12))
    assert match_classes(padded, as_words).tolist() == [0, 1, 10, 11, 2, 3, 4, 5, 6, 7, 8, 9]
    assert same_names(["0", "1"], ["00", "01"])
    with pytest.raises(ClassMismatch, match="does not know 1 of the 3 classes of the data set: '3'"):
        match_classes(["0", "1", "2"], ["1", "2", "3"])


def test_accents_match_in_every_unicode_form():
    composed, apart = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
    assert composed != apart
    assert match_classes([composed, "tea"], ["tea", apart]).tolist() == [1, 0]


def test_other_names_are_an_error_that_lists_both():
    with pytest.raises(ClassMismatch) as caught:
        match_classes(PETS, ("cat", "dog", "gnu"), classifier="runs/pets", data="'folder:/data/zoo'")
    text = str(caught.value)
    assert "runs/pets does not know 1 of the 3 classes of 'folder:/data/zoo': 'gnu'" in text
    assert "'folder:/data/zoo' lacks 1 of them: 'emu'" in text
    assert "model.json" in text
    with pytest.raises(ClassMismatch):  # names that are not numbers are not taken by position
        match_classes(["0", "1", "2"], PETS)
    with pytest.raises(ClassMismatch):
        match_classes(PETS, ["0", "1", "2"])
    many = [f"class {i}" for i in range(1000)]
    with pytest.raises(ClassMismatch, match="'class 4' and 995 more") as caught:
        match_classes(PETS, many)
    assert len(str(caught.value)) < 1500


def test_a_part_of_the_classes_only_where_the_caller_says_so():
    assert match_classes(PETS, ("emu", "cat"), subset=True).tolist() == [2, 0]
    with pytest.raises(ClassMismatch, match="the data set lacks 1 of the 3 classes of the checkpoint: 'dog'"):
        match_classes(PETS, ("emu", "cat"))
    with pytest.raises(ClassMismatch, match="does not know 1 of the 2 classes"):
        match_classes(PETS, ("emu", "gnu"), subset=True)


def test_names_that_occur_twice_cannot_be_matched_in_another_order():
    with pytest.raises(ClassMismatch, match="several classes called 'crane'"):
        match_classes(["crane", "crane", "x"], ["x", "crane", "crane"])
    with pytest.raises(ClassMismatch, match="several classes called '01'"):
        match_classes(["0", "1"], ["1", "01"])


def test_a_classifier_without_names_is_matched_by_position_and_says_so(caplog):
    with caplog.at_level(logging.INFO):
        assert match_classes([], PETS, classes=3, classifier="deit", data="pets").tolist() == [0, 1, 2]
    assert [record.getMessage() for record in caplog.records] == [
        "deit does not name its classes: they are matched with those of pets by position"
    ]
    with pytest.raises(ClassMismatch, match="the data set has 3 classes and the checkpoint, which does not name"):
        match_classes([], PETS, classes=2)
    with pytest.raises(ClassMismatch, match="has 4 outputs but names 3 classes"):
        match_classes(PETS, PETS, classes=4)


def test_a_classifier_without_names_and_numbers(caplog):
    with caplog.at_level(logging.INFO):
        assert match_classes([], ["0", "1", "10", "2"], classes=11, subset=True).tolist() == [0, 1, 10, 2]
    assert "taken as output indices" in caplog.text
    assert match_classes([], ["1", "2", "3"], classes=3).tolist() == [0, 1, 2]  # not from 0: by position
    with pytest.raises(ClassMismatch, match="lacks 7 of the 11 classes of the checkpoint: '3', '4'"):
        match_classes([], ["0", "1", "10", "2"], classes=11)


def test_imagenets_numbers_as_indices():
    # ImageNet-V2's folders are numbers, which sort as words.
    indices = match_classes(imagenet_classes(), ["0", "1", "10", "2"], numbers_are_indices=True, subset=True)
    assert indices.tolist() == [0, 1, 10, 2]


def test_numbers_as_indices_of_a_classifier_that_has_names():
    assert match_classes(PETS, ["2", "0"], numbers_are_indices=True, subset=True).tolist() == [2, 0]
    with pytest.raises(ClassMismatch):
        match_classes(PETS, ["2", "3"], numbers_are_indices=True, subset=True)


def test_differences_in_words():
    assert describe_difference(PETS, PETS) == ""
    assert describe_difference(["0", "1"], ["00", "01"]) == ""
    assert describe_difference(PETS, ("cat", "emu", "gnu")) == "only there: 'dog'; only here: 'gnu'"
    assert describe_difference(PETS, ("cat", "emu", "dog")) == "the order: class 1 is 'dog' there and 'emu' here"
    assert describe_difference(["a", "a"], ["a"]) == "2 names there, 1 here; some occur more than once"
