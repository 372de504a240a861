"""The step on a task of one parameter: what a skipped update changes, and what not."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax import optim
from tinymim_jax.metrics import compute, no_averages
from tinymim_jax.sharding import make_mesh, place_batch
from tinymim_jax.state import init_state, make_train_step, trained_paths
from tinymim_jax.tasks.task import Task

RATES = (1.0, 0.5, 0.25, 0.125)
NAN = float("nan")


def losses(params, frozen, batch, key, train):
    """Its gradient by w is the mean of x."""
    del frozen, key, train
    return {"loss": params["w"] * batch["x"]}


TASK = Task(model={}, init=lambda key: {"w": jnp.float32(10)}, losses=losses, names=("loss",))


def run_task(gradients, *, ema=0.0):
    """States before the first and after every step, whose batches of two have the means `gradients`."""
    mesh = make_mesh(devices=jax.devices()[:1])
    paths = trained_paths(TASK, {}, {"x": jnp.ones(2)})
    params = jax.eval_shape(TASK.init, jax.random.key(0))
    schedule = functools.partial(jnp.take, jnp.asarray(RATES))
    optimizer = optim.make_optimizer("sgd", schedule, params, momentum=0.0, weight_decay=0.0)
    _, fresh = init_state(TASK, optimizer, paths, mesh, jax.random.key(0), ema=ema)
    step = make_train_step(TASK, optimizer, paths, mesh, ema=ema)
    state = fresh()
    states, recorded = [jax.device_get(state)], jax.device_put(no_averages(("loss", "gradient_norm")))
    for gradient in gradients:
        batch = place_batch(mesh, {"x": np.array([gradient - 1, gradient + 1], np.float32)})
        state, recorded, _ = step(state, recorded, {}, batch, jax.random.key(0))
        states.append(jax.device_get(state))
    return states, compute(recorded)


def test_the_learning_rate_is_that_of_the_step_after_a_skipped_update():
    """The logged learning rate is schedule(step - 1): so must be the one that is used."""
    states, _ = run_task([1.0, NAN, 2.0, 1.0])
    want = 10 - np.cumsum([RATES[0] * 1.0, 0.0, RATES[2] * 2.0, RATES[3] * 1.0])
    np.testing.assert_allclose([state.params["w"] for state in states[1:]], want, rtol=1e-6)
    assert [int(state.step) for state in states] == [0, 1, 2, 3, 4]
    assert [int(state.skipped) for state in states] == [0, 0, 1, 1, 1]
    assert [int(state.skipped_in_a_row) for state in states] == [0, 0, 1, 0, 0]


def test_nothing_moves_in_a_skipped_update():
    states, recorded = run_task([1.0, NAN, 1.0], ema=0.5)
    _, before, after, last = states
    for name in ("params", "opt_state", "extra"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(before, name))
    assert float(before.extra["ema"]["w"]) == 0.5 * 10 + 0.5 * 9  # not yet the parameter: it would have moved
    assert float(last.extra["ema"]["w"]) == 0.5 * 9.5 + 0.5 * (9 - RATES[2])
    # Means over the two updates that were made: losses 10 and 9, gradients of 1.
    assert recorded == {"loss": 9.5, "gradient_norm": 1.0}
