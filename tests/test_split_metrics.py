"""Metrics over a split: sums and gathered rows over 8 devices and padded batches, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymim_jax.data.pipeline import eval_batches
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.data.views.transforms import EvalView
from tinymim_jax.evaluation.evaluate import evaluate
from tinymim_jax.metrics import Metric, Tally, means, reduce_batch
from tinymim_jax.sharding import make_mesh
from tinymim_jax.state import make_eval_step, place_frozen

CLASSES = 10


def predicted(params, images):
    """The class of each image by a linear model of its mean color."""
    pixels = images.astype(jnp.float32).mean(axis=(1, 2)) / 255
    return jnp.argmax(pixels @ params["kernel"], axis=1)


def confusion_values(params, frozen, batch, key):
    prediction = predicted(params, batch["image"])
    truth, guess = (jax.nn.one_hot(x, CLASSES, dtype=jnp.int32) for x in (batch["label"], prediction))
    # Padding must not count: where it is, nothing that is returned is a number.
    brightness = jnp.where(batch["valid"], batch["image"].astype(jnp.float32).mean(axis=(1, 2, 3)), jnp.nan)
    return {"confusion": truth[:, :, None] * guess[:, None, :], "brightness": brightness, "each": brightness}


def confusion_result(sums, examples):
    confusion = sums["confusion"]
    assert (confusion.dtype, sums["brightness"].dtype) == (np.int64, np.float64)
    hits, seen = np.diag(confusion), confusion.sum(axis=1)
    recall = {f"recall/{label}": float(hits[label] / max(seen[label], 1)) for label in range(CLASSES)}
    return {
        "top1": float(hits.sum() / examples),
        "brightness": float(sums["brightness"] / examples),
        "median": float(np.median(sums["each"])),
        "rows": float(len(sums["each"])),
        **recall,
    }


CONFUSION = Metric(confusion_values, confusion_result, gathered=("each",))


@pytest.fixture(scope="module")
def digits(data_dir):
    """The first 37 test digits, and their pixels and labels by numpy."""
    source = open_source("digits", split="test[:37]", data_dir=data_dir)
    view = EvalView(16, 16)
    from tinymim_jax.data.views.decoding import decode

    images = np.stack([view(decode(source[i]["image"])) for i in range(len(source))])
    return source, images, np.array([source[i]["label"] for i in range(len(source))])


@pytest.mark.parametrize("fsdp", [1, 4])
def test_sums_and_rows_over_devices_and_padding(digits, fsdp):
    source, images, labels = digits
    mesh = make_mesh(fsdp)
    assert mesh.size == 8
    params = {"kernel": np.random.default_rng(0).normal(size=(3, CLASSES)).astype(np.float32)}
    calls = []
    got = evaluate(
        make_eval_step(CONFUSION, mesh),
        CONFUSION,
        place_frozen(params, mesh),
        {},
        eval_batches(source, view=EvalView(16, 16), batch_size=16),  # 3 batches, 11 rows of padding
        mesh,
        examples=37,
        seed=0,
        on_batch=lambda: calls.append(1),
    )
    guess = (images.reshape(37, -1, 3).astype(np.float32).mean(axis=1) / 255 @ params["kernel"]).argmax(axis=1)
    assert (got["examples"], got["rows"], len(calls)) == (37, 37, 3)
    assert got["top1"] == pytest.approx((guess == labels).mean(), abs=1e-12)
    for label in range(CLASSES):
        want = (guess[labels == label] == label).mean() if (labels == label).any() else 0.0
        assert got[f"recall/{label}"] == pytest.approx(want, abs=1e-12)
    each = images.reshape(37, -1).mean(axis=1)
    # float32 means of 768 pixels
    assert got["brightness"] == pytest.approx(each.mean(), rel=1e-5)
    assert got["median"] == pytest.approx(np.median(each), rel=1e-5)


def test_counts_of_a_split_do_not_overflow_and_stay_exact():
    metric = Metric(lambda *_: {}, lambda sums, n: {"pixels": int(sums["pixels"]), "loss": sums["loss"] / n})
    valid, tally = jnp.array([True, True, False]), Tally(metric)
    pixels, loss = jnp.array([2**30 - 1, 2**30 - 1, 5]), jnp.array([1.0, 2.0, jnp.nan])
    for _ in range(4):
        tally.add(reduce_batch(metric, {"pixels": pixels, "loss": loss}, valid), valid)
    # More than int32 holds, and an odd number of it that float32 does not.
    assert tally.result() == ({"pixels": 8 * (2**30 - 1), "loss": 1.5}, 8)


def test_an_array_without_the_batch_axis_is_refused():
    with pytest.raises(ValueError, match=r"metric 'confusion' has shape \(10, 10\): .* must be the batch, 4"):
        reduce_batch(CONFUSION, {"confusion": jnp.zeros((10, 10))}, jnp.ones(4, bool))


def test_another_number_of_examples_is_an_error(digits):
    mesh, metric = make_mesh(), Metric(lambda p, f, batch, k: {"label": batch["label"]}, means)
    batches = eval_batches(digits[0], view=EvalView(16, 16), batch_size=8)
    with pytest.raises(RuntimeError, match=r"evaluation counted 37 examples, but the split has 38"):
        evaluate(make_eval_step(metric, mesh), metric, {}, {}, batches, mesh, examples=38, seed=0)
