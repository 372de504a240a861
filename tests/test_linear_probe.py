"""The probe on cached features: against scikit-learn's logistic regression, and end to end on the digits."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import probe_config

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.cli.main import main
from tinymim_jax.evaluation import linear_probe
from tinymim_jax.evaluation.evaluate import evaluate_checkpoint
from tinymim_jax.evaluation.linear_probe import evaluate_probe, fit_heads, head_figures
from tinymim_jax.models.vit import ViT
from tinymim_jax.sharding import make_mesh

linear_model = pytest.importorskip("sklearn.linear_model")


def clouds(seed: int, count: int, spread: float, classes: int = 4, dim: int = 6):
    """Points around one centre for each class, on axes of very different scale."""
    centres = np.random.default_rng(0).normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    points = centres[labels] + spread * rng.normal(size=(count, dim))
    return (points * np.logspace(-2, 2, dim) + 5).astype(np.float32), labels.astype(np.int32)


def fit(features, labels, base_lrs, devices=1, **changes):
    settings = {"classes": 4, "epochs": 60, "batch_size": 100, "seed": 0} | changes
    return fit_heads(features, labels, base_lrs=base_lrs, mesh=make_mesh(1, jax.devices()[:devices]), **settings)


def test_the_optimum_is_scikit_learns():
    (x, y), (new_x, _) = clouds(1, 1000, 1.0), clouds(2, 333, 1.0)
    heads = fit(x, y, (0.3,))
    mean, scale = x.mean(axis=0), x.std(axis=0)
    theirs = linear_model.LogisticRegression(C=1e6, max_iter=1000).fit((x - mean) / scale, y)
    log_p = theirs.predict_log_proba((x - mean) / scale)
    least = -log_p[np.arange(len(y)), y].mean()
    ours = head_figures(heads, x, y)
    # Convex, and the rate falls to 0: what is left is the last steps' noise. C leaves a little regularisation.
    assert least * 0.999 < ours["loss"][0] < least * 1.01
    logits = new_x @ heads["kernel"][0] + heads["bias"][0]
    assert (logits.argmax(axis=1) == theirs.predict((new_x - mean) / scale)).mean() > 0.98


def test_a_separable_problem_is_solved():
    (x, y), (eval_x, eval_y) = clouds(1, 400, 0.1), clouds(2, 100, 0.1)
    assert head_figures(fit(x, y, (1.0,)), eval_x, eval_y)["top1"] == 1


def test_heads_side_by_side_are_those_trained_alone():
    """More rates than devices, and a number that devices do not divide."""
    x, y = clouds(1, 250, 1.0)
    rates = tuple(np.linspace(0.01, 1.0, 11))
    together = fit(x, y, rates, devices=8, epochs=3)
    assert together["kernel"].shape == (11, 6, 4)
    for i in (0, 10):
        alone = fit(x, y, rates[i : i + 1], epochs=3)
        np.testing.assert_allclose(together["kernel"][i], alone["kernel"][0], rtol=1e-4, atol=1e-6)


def test_each_example_is_evaluated_once(monkeypatch):
    monkeypatch.setattr(linear_probe, "_ROWS", 64)
    x, y = clouds(3, 150, 1.0, classes=8)
    rng = np.random.default_rng(0)
    heads = {"kernel": rng.normal(size=(2, 6, 8)).astype(np.float32), "bias": np.zeros((2, 8), np.float32)}
    got = head_figures(heads, x, y)
    for i in range(2):
        logits = (x @ heads["kernel"][i]).astype(np.float64)
        shifted = logits - logits.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        assert got["loss"][i] == pytest.approx(-log_p[np.arange(150), y].mean(), rel=1e-5)
        assert got["top1"][i] == pytest.approx((logits.argmax(axis=1) == y).mean())
        assert got["top5"][i] == pytest.approx((np.argsort(-logits)[:, :5] == y[:, None]).any(axis=1).mean())


DIGITS = (
    "model.image_size=(16,16)",
    "model.dtype=float32",
    "data.source=digits",
    "data.eval_resize=16",
    "data.eval_split=test",
    "data.mean=(0.5,0.5,0.5)",
    "data.std=(0.5,0.5,0.5)",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An encoder of random weights, whose features tell digits apart as well as many."""
    folder = tmp_path_factory.mktemp("encoder") / "vit"
    vit = ViT(embed_dim=16, depth=1, heads=4, patch_size=4, image_size=(16, 16))
    params = jax.jit(vit.init)(jax.random.key(3), jnp.zeros((1, 16, 16, 3)))["params"]
    save_params(folder, {"encoder": params}, {"encoder": vit.record()})
    return folder


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_command_leaves_a_classifier(checkpoint, data_dir, tmp_path, pool, capsys):
    arguments = ["--pool", pool, "--base_lr", "0.03", "0.3", "--epochs", "15", "--batch_size", "128"]
    places = ["--data_dir", data_dir, "--output", str(tmp_path / "out"), "--compile_cache", ""]
    with pytest.raises(SystemExit) as exit_:
        main(["probe", str(checkpoint), "--config", "configs/linprobe.py", *arguments, *places, *DIGITS])
    assert exit_.value.code == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])  # after the log
    assert result == json.loads((tmp_path / "out" / "result.json").read_text())
    assert set(result["held_out_top1"]) == {"0.03", "0.3"}
    assert result["held_out_top1"][f"{result['base_lr']:g}"] == max(result["held_out_top1"].values())
    assert result["examples"] == 500
    assert result["top1"] > 0.3  # chance is 0.1
    # The folder is evaluated like any classifier: from images, through the network and its head.
    config = probe_config(f"probe.pool={pool}", "data.eval_split=test", "train.batch_size=48")
    again = evaluate_checkpoint(config, tmp_path / "out", data_dir=data_dir)
    assert again["top1"] == pytest.approx(result["top1"], abs=0.0021)  # one image, whose two best classes are equal
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-3)
    model, _ = load_params(tmp_path / "out")
    assert model["preprocessing"]["class_names"] == [str(i) for i in range(10)]
    with pytest.raises(CheckpointError, match="holds an export already"):
        evaluate_probe(config, checkpoint, output=tmp_path / "out", data_dir=data_dir)


def test_mistakes_are_told(checkpoint, data_dir, tmp_path):
    config = probe_config()
    for mistake in ({"base_lrs": ()}, {"base_lrs": (0.1, 0.0)}, {"epochs": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="choose rates above 0, the others from 1"):
            evaluate_probe(config, checkpoint, data_dir=data_dir, **mistake)
    with pytest.raises(ValueError, match=r"pool='max' is unknown"):
        evaluate_probe(config, checkpoint, pool="max", data_dir=data_dir)
