"""Schedules, decay rules and the optimizer against the golden values and numpy."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from tinymim_jax import optim


@pytest.fixture(scope="module")
def recipe(golden):
    return json.loads(golden.path("recipe.json").read_text())


def test_cosine_schedule(recipe):
    want = recipe["cosine_schedule"]
    schedule = optim.warmup_cosine(want["lr"], want["warmup_epochs"], want["epochs"], want["min_lr"])
    for epoch, lr in want["epoch_to_lr"].items():
        # The published schedule takes fractions of an epoch; so does ours, an epoch for a step; float32.
        np.testing.assert_allclose(schedule(jnp.float32(float(epoch))), lr, rtol=2e-5, atol=1e-12)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"shorten optim\.warmup"):
        optim.warmup_cosine(1e-3, 10, 10)
