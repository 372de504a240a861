"""Every point of every study can be built, at full size and at the small scale."""

import pathlib

import jax
import numpy as np
import pytest

from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.sweeps.checks import check_points
from tinymim_jax.sweeps.sweep import read_points

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
STUDIES = [
    (name, argument, sweep)
    for name, sweeps in {
        "targets": ["sweep"],
        "relation_family": ["sweep"],
        "several_teachers": ["sweep"],
        "losses": ["sweep", "features"],
        "tapped_block": ["sweep"],
        "masked_input": ["sweep"],
        "auxiliary_loss": ["sweep"],
        "drop_path": ["sweep"],
        "heads": ["sweep", "last_block"],
        "sequential": ["sweep"],
    }.items()
    for sweep in sweeps
    for argument in ("", "small")
]
STUDIES += [("sequential", "t", "t")]
STUDIES += [
    ("baselines", f"{scale}{way}", "sweep") for scale in ("", "small_") for way in ("tinymim", "mae", "scratch")
]


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)
    for network in (ViT, Classifier):  # equal networks of different points are traced once
        monkeypatch.setattr(network, "init", jax.jit(network.init, static_argnums=0))


def teacher(path: str, *, cnn: bool = False):
    """The architecture that a study expects at `path`, with zeros that take no memory as weights."""
    sizes = {
        "teachers/mae_vit_base": {"embed_dim": 768, "depth": 12, "heads": 12},
        "teachers/mae_vit_large": {"embed_dim": 1024, "depth": 24, "heads": 16},
        "runs/study/chain/b": {"embed_dim": 768, "depth": 12, "heads": (12,) * 11 + (16,)},
        "runs/study/chain/s": {"embed_dim": 384, "depth": 12, "heads": (6,) * 11 + (16,)},
        "runs/study/teacher": {"embed_dim": 128, "depth": 6, "heads": 4},
        "runs/study/between": {"embed_dim": 96, "depth": 4, "heads": 4},
    }
    small = path in ("runs/study/teacher", "runs/study/between")
    image = {"image_size": (32, 32), "patch_size": 4} if small else {"image_size": (224, 224)}
    vit = ViT(**sizes[path], **image)
    images = np.zeros((1, *image["image_size"], 3), np.float32)
    shapes = jax.eval_shape(vit.init, jax.random.key(0), images)["params"]
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    return {"encoder": vit.record()}, {"encoder": zeros}


def points(name, argument, sweep, workdir):
    spec = f"configs/study/{name}.py" + (f":{argument}" if argument else "")
    given = "runs/study/teacher" if "small" in argument else "teachers/mae_vit_large"
    chosen = name == "sequential" or argument in ("tinymim", "mae", "scratch", "small_mae", "small_scratch")
    words = {"model.scan": True, "model.dtype": "float32"}  # one block is traced instead of 12; no teacher is cast
    if not chosen:
        words |= {"distill.teacher.path": given}
    if name == "several_teachers":
        words |= {"distill.teachers.second.path": "runs/study/between" if argument else "teachers/mae_vit_base"}
    return read_points(spec, sweep, workdir / name, words)


@pytest.mark.parametrize("scale", ["full", "small"])
def test_every_point_of_every_study_builds(scale, monkeypatch, tmp_path):
    monkeypatch.setattr("tinymim_jax.tasks.pretrained.load_params", teacher)
    every = []
    for study in STUDIES:
        if ("small" in study[1]) == (scale == "small"):
            own = points(*study, tmp_path)
            assert len(own) >= 2, study
            assert all(point.runs[-1].name == "classifier" for point in own)
            every += own
    check_points(every, data_dir=str(tmp_path), need_data=False)


def test_every_study_is_tested():
    files = {path.stem for path in (ROOT / "configs" / "study").glob("*.py")} - {"__init__", "pipeline"}
    assert files - {"at_once"} == {name for name, _, _ in STUDIES}  # test_at_once.py has the one that is no sweep
