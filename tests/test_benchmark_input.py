"""benchmarks/input_pipeline.py runs as its README shows, and its ratios follow from its rates."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    photo = Image.fromarray(pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg"))
    folder = tmp_path_factory.mktemp("photos")
    for number, width in enumerate((640, 500, 300)):
        photo.resize((width, width * 2 // 3)).save(folder / f"{number}.jpg", quality=90)
    command = [sys.executable, ROOT / "benchmarks" / "input_pipeline.py", "--data", folder, "--size", "96"]
    command += ["--images", "50", "--repeat", "1", "--memory_images", "1000"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def test_every_way_is_timed(result):
    rates = result["images_per_second"]
    names = {"bare_decode", "bare_decode_prepared", "published", "published_one_view", "ours", "ours_prepared"}
    faster = {"ours_cykooz", "ours_prepared_cykooz"}
    assert set(rates) == names | (faster if importlib.util.find_spec("cykooz_resizer") else set())
    assert all(rate > 0 for rate in rates.values())


def test_ratios_are_of_these_rates(result):
    rates, ratios = result["images_per_second"], result["ratios"]
    prepared = rates["ours_prepared"] / rates["bare_decode_prepared"]
    assert ratios["ours prepared / bare decode of the prepared"] == pytest.approx(prepared, rel=0.01)
    assert ratios["ours / published"] == pytest.approx(rates["ours"] / rates["published"], rel=0.01)
    assert not any("tf.data" in name or "torchvision" in name for name in ratios)  # not asked for


def test_workers_and_memory_are_measured(result):
    assert set(result["workers"]) == {"1", "2"}
    least, most = result["memory_bytes"]
    assert 2**26 < least <= most < 2**33
    assert result["memory_images"] == 1000
