"""Schedules, decay rules and the optimizer against the golden values and numpy."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from tinymim_jax import optim
from tinymim_jax.convert import to_torch
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT


@pytest.fixture(scope="module")
def recipe(golden):
    return json.loads(golden.path("recipe.json").read_text())


def test_cosine_schedule(recipe):
    want = recipe["cosine_schedule"]
    schedule = optim.warmup_cosine(want["lr"], want["warmup_epochs"], want["epochs"], want["min_lr"])
    for epoch, lr in want["epoch_to_lr"].items():
        # The published schedule takes fractions of an epoch; so does ours, an epoch for a step. Relative to the peak
        # 1e-5: near the end float32 subtracts two nearly equal numbers.
        np.testing.assert_allclose(schedule(jnp.float32(float(epoch))), lr, rtol=1e-5, atol=1e-5 * want["lr"])


def test_warmup_starts_at_exactly_zero_and_the_cosine_ends_at_its_final_value():
    schedule = optim.warmup_cosine(1.0, 4, 12, 0.25)
    np.testing.assert_allclose([schedule(s) for s in (0, 1, 4, 8, 12)], [0, 0.25, 1, 0.625, 0.25], atol=1e-6)


def test_warmup_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"shorten optim\.warmup"):
        optim.warmup_cosine(1e-3, 10, 10)


def test_layer_decay_and_weight_decay_of_every_parameter(recipe):
    """Learning-rate factor and decay of each of ViT-B's parameters, by the authors' names."""
    want = recipe["layer_decay_0.65_depth12"]
    encoder = ViT(embed_dim=32, depth=12, heads=2, image_size=(32, 32), pos_embed="learned", final_norm=False)
    network = Classifier(encoder, classes=4)
    params = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    scales = optim.layer_scales(params, 0.65, encoder.depth)
    decayed = optim.decay_mask(params, "finetune")
    model = {"encoder": encoder.record(), "classifier": {"classes": 4, "pool": "mean"}}

    def by_torch_name(values):
        filled = jax.tree.map(lambda value, leaf: np.full(leaf.shape, value, np.float32), values, params)
        return {name: array.flat[0] for name, array in to_torch("vit", model, filled).items()}

    scales, decayed = by_torch_name(scales), by_torch_name(decayed)
    assert set(scales) == set(want)
    for name, (scale, weight_decay) in want.items():
        np.testing.assert_allclose(scales[name], scale, rtol=1e-6, err_msg=name)
        assert decayed[name] * 0.05 == pytest.approx(weight_decay), name


def test_pretraining_decays_the_cls_token_but_no_vector():
    params = {"encoder": {"cls_token": jnp.ones((1, 1, 4)), "norm": {"scale": jnp.ones(4)}, "k": jnp.ones((4, 4))}}
    mask = optim.decay_mask(params, "pretrain")
    assert mask == {"encoder": {"cls_token": True, "norm": {"scale": False}, "k": True}}


def test_adamw_in_numpy():
    """Two steps with decay, layer decay and clipping, written out."""
    rng = np.random.default_rng(0)
    encoder = {"blocks_0": {"k": jnp.asarray(rng.normal(size=(3, 2)), jnp.float32)}}
    params = {"encoder": encoder, "head": {"k": jnp.ones((2, 2))}}
    settings = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.1, "layer_decay": 0.5, "depth": 1, "clip_norm": 1.0}
    optimizer = optim.make_optimizer("adamw", lambda step: 0.01 * (step + 1), params, **settings)
    state, want = optimizer.init(params), {k: np.asarray(v) for k, v in flatten_dict(params).items()}
    first, second = ({k: np.zeros_like(v) for k, v in want.items()} for _ in range(2))
    for step in range(2):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape).astype(np.float32)), params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        flat = {k: np.asarray(v) for k, v in flatten_dict(grads).items()}
        norm = np.sqrt(sum((g**2).sum() for g in flat.values()))
        for k, g in flat.items():
            g = g / max(norm, 1.0)
            first[k] = 0.9 * first[k] + 0.1 * g
            second[k] = 0.99 * second[k] + 0.01 * g**2
            adam = first[k] / (1 - 0.9 ** (step + 1)) / (np.sqrt(second[k] / (1 - 0.99 ** (step + 1))) + 1e-8)
            lr = 0.01 * (step + 1) * (0.5 if k[0] == "encoder" else 1.0)
            want[k] = want[k] - lr * (adam + 0.1 * want[k])
    for k, value in flatten_dict(params).items():
        np.testing.assert_allclose(value, want[k], rtol=1e-5)


def numpy_sgd(value, gradient, memory, lr, *, decay, nesterov):
    """torch.optim.SGD with momentum 0.9."""
    gradient = gradient + decay * value
    memory = 0.9 * memory + gradient
    return value - lr * (gradient + 0.9 * memory if nesterov else memory), memory


def numpy_lars(value, gradient, memory, lr, *, decay):
    """util/lars.py of the MAE release, with its 0.9 and 0.001."""
    if value.ndim > 1:
        gradient = gradient + decay * value
        norms = np.linalg.norm(value), np.linalg.norm(gradient)
        gradient = gradient * (0.001 * norms[0] / norms[1] if min(norms) > 0 else 1.0)
    memory = 0.9 * memory + gradient
    return value - lr * memory, memory


RULES = {
    "sgd": ({"weight_decay": 0.1}, lambda *x, decay: numpy_sgd(*x, decay=decay, nesterov=False)),
    "nesterov": ({"weight_decay": 0.1, "nesterov": True}, lambda *x, decay: numpy_sgd(*x, decay=decay, nesterov=True)),
    "lars": ({"weight_decay": 0.1}, numpy_lars),
    "lars_without_decay": ({"weight_decay": 0.0}, numpy_lars),
}


@pytest.mark.parametrize("rule", RULES)
def test_sgd_and_lars_in_numpy(rule):
    """Five steps under a learning rate that rises and falls; one kernel is zero, the gradient of another is."""
    settings, want_of = RULES[rule]
    rng = np.random.default_rng(1)
    head = {"kernel": rng.normal(size=(4, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}
    params = {"head": head, "zero": {"kernel": np.zeros((2, 2), np.float32)}, "still": {"kernel": np.ones((2, 2))}}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    rates = jnp.asarray([0.0, 2.0, 4.0, 1.0, 0.5])
    name = {"nesterov": "sgd", "lars_without_decay": "lars"}.get(rule, rule)
    optimizer = optim.make_optimizer(name, lambda step: rates[step], params, **settings)
    state, want = optimizer.init(params), {k: np.asarray(v, np.float64) for k, v in flatten_dict(params).items()}
    memory = {k: np.zeros_like(v) for k, v in want.items()}
    for step in range(5):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), params)
        grads["still"] = jax.tree.map(jnp.zeros_like, grads["still"])
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        for k, g in flatten_dict(grads).items():
            decay = settings["weight_decay"] if g.ndim > 1 else 0.0
            want[k], memory[k] = want_of(want[k], np.asarray(g, np.float64), memory[k], float(rates[step]), decay=decay)
    for k, value in flatten_dict(params).items():
        np.testing.assert_allclose(value, want[k], rtol=2e-5, atol=1e-6, err_msg=str(k))


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"optim\.name='adam' is unknown; did you mean 'adamw'\? Choices: .*'lars'"):
        optim.make_optimizer("adam", lambda _: 0.1, {"k": jnp.ones(1)}, weight_decay=0.0)


def test_reached_parameters():
    params = {"used": {"a": jnp.ones(2), "b": jnp.ones(2)}, "dead": jnp.ones(2), "unused": jnp.ones(2)}

    def function(params, x):
        dead = jax.jit(jnp.exp)(params["dead"])  # computed, but nothing depends on it
        del dead
        y, _ = jax.lax.scan(lambda c, _: (c * params["used"]["a"], None), x, length=3)
        return jnp.sum(y * jax.checkpoint(jnp.sin)(params["used"]["b"]))

    assert optim.params_with_gradient(function, params, jax.ShapeDtypeStruct((2,), jnp.float32)) == {
        ("used", "a"),
        ("used", "b"),
    }


def test_split_and_join():
    params = {"a": {"x": 1, "y": 2}, "b": 3}
    chosen, rest = optim.split(params, {("a", "x")})
    assert (chosen, rest) == ({"a": {"x": 1}}, {"a": {"y": 2}, "b": 3})
    assert optim.join(chosen, rest) == params
