"""train.probe_every: k-NN accuracy and effective rank during training, which must not change the training."""

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from runs import same_bits, small_config

import tinymim_jax
from tinymim_jax.checkpoints.params import load_params
from tinymim_jax.config import load_config
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.data.views.decoding import decode
from tinymim_jax.evaluation.live_probe import LiveProbe
from tinymim_jax.experiment import build_experiment
from tinymim_jax.flops import matmul_flops
from tinymim_jax.metrics import read
from tinymim_jax.models.vit import ViT
from tinymim_jax.plan.build import plan_experiment
from tinymim_jax.runtime.runs import read_run
from tinymim_jax.sharding import make_mesh
from tinymim_jax.train import train

WORDS = ("train.probe_every=2 steps", "train.probe_images=40", "data.eval_split=test[:30]")


@pytest.fixture(scope="module")
def probed(tmp_path_factory, data_dir):
    """A run of four steps with probes after the second and the fourth."""
    workdir = tmp_path_factory.mktemp("probed") / "run"
    train(small_config("mae_student", *WORDS), workdir, data_dir=data_dir)
    return workdir


def rows(workdir):
    return [row for row in read(workdir / "metrics.jsonl") if "probe/knn" in row]


def test_probes_are_recorded_and_the_training_is_the_same_without_them(probed, data_dir, tmp_path):
    assert [row["step"] for row in rows(probed)] == [2, 4]
    assert read_run(probed)["probe"] == {key: rows(probed)[-1][key] for key in ("probe/effective_rank", "probe/knn")}
    train(small_config("mae_student", "data.eval_split=test[:30]"), tmp_path / "run", data_dir=data_dir)
    assert not rows(tmp_path / "run")
    assert same_bits(load_params(probed)[1], load_params(tmp_path / "run")[1])
    lines = [read(run / "metrics.jsonl") for run in (probed, tmp_path / "run")]
    losses = [[row["train/loss"] for row in each if "train/loss" in row] for each in lines]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]


def test_figures_are_those_of_numpy(probed, data_dir):
    """Features from the predictor, neighbors and singular values by numpy."""
    model = tinymim_jax.load(str(probed))
    parts = []
    for split, count in (("train", 40), ("test[:30]", 20)):
        source = open_source("digits", split=split, data_dir=data_dir)
        examples = [source[int(i)] for i in np.linspace(0, len(source) - 1, count).astype(int)]
        features = model.embed([decode(example["image"]) for example in examples]).astype(np.float64)
        parts.append((features, np.array([example["label"] for example in examples])))
    (bank, labels), (queries, wanted) = parts
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries)]
    similarity = unit[1] @ unit[0].T
    k = 40 // 10
    votes = np.zeros((20, 10))
    for i, row in enumerate(similarity):
        for j in np.argsort(-row)[:k]:
            votes[i, labels[j]] += np.exp(row[j] / 0.07)
    assert rows(probed)[-1]["probe/knn"] == pytest.approx((votes.argmax(1) == wanted).mean(), abs=1e-6)
    values = np.linalg.svd(queries, compute_uv=False)
    shares = values / values.sum()
    rank = np.exp(-(shares * np.log(shares)).sum())
    # The predictor computes the same network in float32 in another order.
    assert rows(probed)[-1]["probe/effective_rank"] == pytest.approx(rank, rel=1e-4)


def test_training_ends_when_nothing_rises_and_does_so_again_after_a_kill(data_dir, tmp_path):
    words = [*WORDS, "train.probe_patience=1", "optim.base_lr=0.0", "train.duration=9 steps", "optim.weight_decay=0.0"]
    config, workdir = small_config("mae_student", *words), tmp_path / "run"
    result = train(config, workdir, data_dir=data_dir)
    assert [row["step"] for row in rows(workdir)] == [2, 4]
    params = load_params(workdir)[1]
    for lost in ((), ("checkpoints/4",)):  # killed before result.json was written; and before the last save too
        (workdir / "result.json").unlink()
        for name in lost:
            shutil.rmtree(workdir / name)
        assert train(config, workdir, data_dir=data_dir) == result
        assert [row["step"] for row in rows(workdir)] == [2, 4]
        assert same_bits(load_params(workdir)[1], params)
    assert json.loads((workdir / "status.json").read_text())["step"] == 4


@pytest.mark.parametrize(
    ("history", "patience", "ends"),
    [
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.5], 1, True),
        ([0.5, 0.4, 0.6], 2, False),
        ([0.5, 0.4, 0.5], 2, True),
        ([0.6, 0.5, 0.4], 3, False),
        ([0.6, 0.5, 0.4], 0, False),
    ],
)
def test_patience(history, patience, ends, data_dir):
    experiment = build_experiment(small_config("mae_student", f"train.probe_patience={patience}"), data_dir=data_dir)
    assert LiveProbe(experiment, make_mesh(), history=history).enough() == ends


# Shares of the FLOPs between two probes that docs/distill.md names.
SHARES = {"distill_t": 2e-5, "distill_s": 5e-5, "distill_b": 5e-5, "mae_b": 2e-4}


@pytest.mark.parametrize("name", SHARES)
def test_probes_of_the_shipped_configs_take_next_to_nothing(name):
    """A forward pass of each image, and the similarities, against the training steps from one probe to the next."""
    planned = plan_experiment(load_config(name, ["train.batch_size=4"]))
    experiment = planned.experiment
    epoch = len(experiment.train_source)
    assert epoch > 1_281_000  # ImageNet, or its stand-in
    assert experiment.probe_every * 4 == pytest.approx(5 * epoch, rel=1e-3)
    images = experiment.config.train.probe_images
    vit = ViT.from_record(experiment.task.model["encoder"])
    pixels = jax.ShapeDtypeStruct((1, *vit.image_size, 3), np.float32)
    forward = matmul_flops(lambda params, x: vit.apply({"params": params}, x), planned.params()["encoder"], pixels)
    probe = 1.5 * images * forward + 2 * vit.embed_dim * images * (images // 2)
    share = probe / (experiment.probe_every * planned.flops[0])
    assert 0 < share < SHARES[name] < 0.02


def test_all_processes_end_where_the_first_one_does(data_dir, monkeypatch):
    """Another process may have read metrics.jsonl before process 0 removed the lines of steps that are repeated."""
    experiment = build_experiment(small_config("mae_student", "train.probe_patience=1"), data_dir=data_dir)
    probe, heard = LiveProbe(experiment, make_mesh(), history=[0.5, 0.4]), []

    def said_by_process_0(own):
        heard.append(bool(own))
        return np.array(False)

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr("tinymim_jax.evaluation.live_probe.multihost_utils.broadcast_one_to_all", said_by_process_0)
    assert not probe.enough()
    assert heard == [True]


def test_mistakes(data_dir, tmp_path, photo):
    for number in range(4):
        Image.fromarray(photo[:32, number : number + 32]).save(tmp_path / f"{number}.png")
    words = (f"data.source=folder:{tmp_path}", "data.train_split=all", "data.eval_split=all", "train.probe_patience=1")
    with pytest.raises(ValueError, match="needs labels"):
        LiveProbe(build_experiment(small_config("mae_student", *words)), make_mesh())
    with pytest.raises(ValueError, match="at least 2 images"):
        LiveProbe(build_experiment(small_config("mae_student", "train.probe_images=1"), data_dir=data_dir), make_mesh())
