"""k-NN against scikit-learn's on the same features, and end to end on the digits."""

import json

import jax
import numpy as np
import pytest
from processes import output_of, run_python
from runs import small_config

from tinymim_jax.evaluation import knn
from tinymim_jax.evaluation.knn import evaluate_knn, knn_scores
from tinymim_jax.sharding import make_mesh
from tinymim_jax.train import train

neighbors = pytest.importorskip("sklearn.neighbors")


def clouds(seed: int, count: int, classes: int = 5, dim: int = 12):
    """Points around one centre per class, close enough that some are misclassified."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(classes, dim))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    points = centres[labels] + 1.2 * rng.normal(size=(count, dim))
    return (points * rng.uniform(0.1, 10, (count, 1))).astype(np.float32), labels.astype(np.int32)


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("rows", [65_536, 20])
def test_votes_are_scikit_learns(devices, rows, monkeypatch):
    monkeypatch.setattr(knn, "_BANK_ROWS", rows)
    monkeypatch.setattr(knn, "_QUERIES", 64)
    (bank, labels), (queries, truth) = clouds(1, 333), clouds(2, 150)
    mesh = make_mesh(1, jax.devices()[:devices])
    scores = knn_scores(bank, labels, queries, classes=5, neighbors=(1, 7, 40), temperature=0.07, mesh=mesh)
    assert list(scores) == [1, 7, 40]
    for k, votes in scores.items():
        theirs = neighbors.KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
        ).fit(bank, labels)
        shares = votes / votes.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(shares, theirs.predict_proba(queries), atol=2e-5)
        assert (votes.argmax(axis=1) == theirs.predict(queries)).mean() == 1
    assert 0.5 < (scores[7].argmax(axis=1) == truth).mean() < 1  # neither hopeless nor too easy


def test_small_temperatures_stay_finite():
    (bank, labels), (queries, _) = clouds(1, 50), clouds(2, 9)
    mesh = make_mesh(1, jax.devices()[:1])
    scores = knn_scores(bank, labels, queries, classes=5, neighbors=(1, 20), temperature=1e-3, mesh=mesh)
    assert np.isfinite(scores[20]).all()
    np.testing.assert_array_equal(scores[20].argmax(axis=1), scores[1].argmax(axis=1))  # only the nearest counts


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    workdir = tmp_path_factory.mktemp("mae")
    config = small_config("mae_teacher")
    train(config, workdir, data_dir=data_dir)
    return config, workdir


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_any_checkpoint_has_neighbours(run, pool, data_dir):
    config, workdir = run
    result = evaluate_knn(config, workdir, neighbors=(1, 10), pool=pool, data_dir=data_dir)
    assert set(result) == {"knn1_top1", "knn1_top5", "knn10_top1", "knn10_top5", "examples", "substituted"}
    assert result["examples"] == 13  # a ragged last batch, each example once
    if pool == "mean":
        assert result["knn10_top1"] > 0.5  # digits are told apart by almost any features; chance is 0.1


def test_mistakes_are_told(run, data_dir):
    config, workdir = run
    with pytest.raises(ValueError, match=r"pool='max' is unknown.*'mean'"):
        evaluate_knn(config, workdir, neighbors=(1,), pool="max", data_dir=data_dir)
    with pytest.raises(ValueError, match="k=2000: split 'train' has only 1297 images"):
        evaluate_knn(config, workdir, neighbors=(2000,), data_dir=data_dir)
    for mistake in ({"neighbors": (5, 0)}, {"neighbors": ()}, {"neighbors": (5,), "temperature": 0.0}):
        with pytest.raises(ValueError, match="choose k from 1 and a temperature above 0"):
            evaluate_knn(config, workdir, data_dir=data_dir, **mistake)


def test_standard_output_is_the_result_alone(mae_run, data_dir):
    """In a real process, since libraries that are not Python write there, too."""
    words = ["knn", str(mae_run), "--data_dir", data_dir, "--k", "3", "--compile_cache", ""]
    code, out, err = output_of(run_python(f"from tinymim_jax.cli.main import main; main({words!r})"))
    assert code == 0, err
    assert json.loads(out)["examples"] > 0
    assert "features of" in err
