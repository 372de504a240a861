"""The demo of segmentation, and the configs of small segmentation sets."""

import json

import numpy as np
import pytest
from PIL import Image

from configs import base
from tinymim_jax.config import SHIPPED, load_config
from tinymim_jax.data.builders.shapes import CLASSES, IGNORED, SPLITS, scene, write_shapes
from tinymim_jax.data.sources.sources import open_source, splits
from tinymim_jax.demo.segment import demo_segment


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TINYMIM_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_generated_pictures_and_masks_agree(tmp_path):
    picture, mask = scene(3)
    again = scene(3)
    np.testing.assert_array_equal(picture, again[0])
    np.testing.assert_array_equal(mask, again[1])
    assert picture.shape[:2] == mask.shape
    masks = [scene(number)[1] for number in range(60)]
    assert {int(value) for each in masks for value in np.unique(each)} == {0, 1, 2, 3, IGNORED}
    # A shape has one colour and noise of +-12; its pixels lie inside of the ignored border.
    for number in range(20):
        picture, mask = scene(number)
        inside = (mask > 0) & (mask < 4)
        steps = np.abs(np.diff(picture.astype(int), axis=1)).max(-1)[inside[:, 1:] & inside[:, :-1]]
        assert (steps <= 24).mean() > 0.95  # shapes that overlap touch each other
    write_shapes(tmp_path)
    assert splits(f"pairs:{tmp_path}") == SPLITS
    source = open_source(f"pairs:{tmp_path}", split="val")
    assert {each.name: each.colour for each in source.mask_classes} == CLASSES


def test_the_demo_trains_scores_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tinymim_jax.data.builders.shapes.SPLITS", {"train": 16, "val": 3})
    small = ("train.duration=4 steps", "optim.warmup=1 steps", "model.depth=1", "model.embed_dim=16")
    result = demo_segment(tmp_path, [*small, "train.batch_size=8"])
    assert json.loads((tmp_path / "result.json").read_text()) == result
    assert result["examples"] == 3
    # The most frequent class everywhere: its IoU is its share, and those of the other classes are 0.
    assert result["majority"]["mIoU"] == pytest.approx(result["majority"]["aAcc"] / 4)
    sheet = np.asarray(Image.open(tmp_path / "examples.png"))
    assert {tuple(CLASSES["background"])} <= {tuple(colour) for colour in sheet.reshape(-1, 3).tolist()}
    assert "most frequent class everywhere" in capsys.readouterr().out


@pytest.mark.parametrize("spec", ["camvid.py:linear", "camvid.py:upernet", "camvid.py:mae", "shapes.py"])
def test_small_configs_have_the_keys_of_their_task(spec):
    config = load_config(str(SHIPPED / spec))
    assert config.to_dict().keys() == getattr(base, config.task)().to_dict().keys()
    with pytest.raises(ValueError, match="choices: mae, linear, upernet"):
        load_config(str(SHIPPED / "camvid.py:light"))
