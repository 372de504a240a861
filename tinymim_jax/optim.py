"""Optimizers, the learning-rate schedule, and the weight decay and learning-rate scale of each parameter."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tinymim_jax.errors import unknown

Params = Any  # nested dicts of arrays
Path = tuple[str, ...]

OPTIMIZERS = ("adamw", "sgd", "lars")

# Parameters without weight decay besides 1-D ones (norms, biases). The published pre-training decays the CLS token.
# The authors' segmentation ("official") means to leave out those of fine-tuning, but compares names without the prefix
# `backbone.` that they have there, so all are decayed.
NO_DECAY = {
    "pretrain": (),
    "finetune": ("pos_embed", "cls_token", "dist_token", "registers", "relative_bias", "class_tokens"),
    "official": (),
}
SCHEDULES = ("cosine", "poly")


def warmup_cosine(peak: float, warmup_steps: int, total_steps: int, final: float = 0.0) -> optax.Schedule:
    """Linear from exactly 0 to `peak`, then half a cosine to `final` (MAE release, util/lr_sched.py), step by step."""
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(_too_long(warmup_steps, total_steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, total_steps, final)


def warmup_poly(peak: float, warmup_steps: int, total_steps: int, power: float = 1.0) -> optax.Schedule:
    """`peak (1 - step / total)^power` to 0, times a linear warm-up from 1e-6 to 1 (mmcv's poly policy)."""
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(_too_long(warmup_steps, total_steps))

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        # Differences of whole numbers are exact; 1 - step / total_steps would lose digits near the end.
        left = jnp.maximum(total_steps - step, 0) / total_steps
        done = jnp.minimum(step, warmup_steps) / warmup_steps if warmup_steps else 1.0
        return peak * left**power * (done + 1e-6 * (1 - done))

    return rate


def make_optimizer(
    name: str,
    schedule: optax.Schedule,
    params: Params,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    momentum: float = 0.9,
    nesterov: bool = False,
    trust: float = 0.001,
    weight_decay: float,
    no_decay: str = "pretrain",
    layer_decay: float = 1.0,
    depth: int = 0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW or SGD as in torch.optim, or LARS as in the MAE release (util/lars.py).

    `update(..., step=n)` takes the learning rate of step n; without `step` it takes that of the number of updates so
    far. The two differ once an update has been skipped.

    Args:
      name: one of OPTIMIZERS.
      schedule: step -> learning rate.
      params: the trained parameters or their shapes; only names and ranks are used.
      b1, b2, eps: for adamw.
      momentum: for sgd and lars. It accumulates updates before they are scaled by the learning rate, as in torch;
        optax.lars scales first.
      nesterov: for sgd.
      trust: for lars: the update of each parameter that is not 1-D is scaled to this fraction of the parameter's norm.
      weight_decay: decoupled for adamw; added to the gradient for sgd and lars.
      no_decay: a key of NO_DECAY.
      layer_decay: the learning rate of block i (from 0) is multiplied by layer_decay^(depth - i), see layer_scales.
      depth: blocks of the encoder; used by layer_decay only.
      clip_norm: gradients are clipped to this global norm; 0 disables clipping.
    """
    if name not in OPTIMIZERS:
        raise unknown("optim.name", name, OPTIMIZERS)
    if no_decay not in NO_DECAY:
        raise unknown("optim.no_decay", no_decay, NO_DECAY)
    decay = optax.add_decayed_weights(weight_decay, decay_mask(params, no_decay))
    steps = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    if name == "adamw":
        steps += [optax.scale_by_adam(b1, b2, eps), decay]
    elif name == "sgd":
        steps += [decay, optax.trace(momentum, nesterov)]
    else:
        no_vectors = jax.tree.map(lambda leaf: np.ndim(leaf) > 1, params)
        steps += [decay, optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), no_vectors)]
        steps += [optax.trace(momentum)]
    steps.append(_scale_by_learning_rate(schedule))
    if layer_decay != 1.0:
        scales = layer_scales(params, layer_decay, depth, official=no_decay == "official")
        steps.append(_scale_leaves(scales))
    return optax.with_extra_args_support(optax.chain(*steps))


def with_others(
    first: optax.GradientTransformationExtraArgs,
    others: Mapping[str, optax.GradientTransformationExtraArgs],
    key: str,
) -> optax.GradientTransformationExtraArgs:
    """`first` for all parameters but params[key][name], which are updated by `others[name]`; each sees its own alone.

    So models side by side are clipped, decayed and scaled as they would be without the others.
    """

    def apart(tree: Params) -> tuple[Params, Params]:
        return {name: own for name, own in tree.items() if name != key}, tree[key]

    def init(params: Params) -> Any:
        own, rest = apart(params)
        return first.init(own), {name: optimizer.init(rest[name]) for name, optimizer in others.items()}

    def update(updates: Params, state: Any, params: Params, **more: Any) -> tuple[Params, Any]:
        (own, rest), (own_params, rest_params) = apart(updates), apart(params)
        own, own_state = first.update(own, state[0], own_params, **more)
        new, states = {}, {}
        for name, optimizer in others.items():
            new[name], states[name] = optimizer.update(rest[name], state[1][name], rest_params[name], **more)
        return own | {key: new}, (own_state, states)

    return optax.GradientTransformationExtraArgs(init, update)


def decay_mask(params: Params, no_decay: str) -> Params:
    """True where weight decay applies: every parameter that is not 1-D, except the names of NO_DECAY[no_decay]."""
    names = NO_DECAY[no_decay]
    return _map_paths(lambda path, leaf: np.ndim(leaf) != 1 and path[-1] not in names, params)


def layer_scales(params: Params, decay: float, depth: int, *, official: bool = False) -> Params:
    """Learning-rate factor of each parameter: decay^(depth + 1 - i) (MAE release, util/lr_decay.py).

    i is 0 for the embeddings, k + 1 for block k; everything after the blocks has factor 1. So has, if `official`, the
    DIST token, which the authors' segmentation counts to no layer.
    """
    return _map_paths(lambda path, leaf: decay ** (depth + 1 - _layer(path, depth, official)), params)


def params_with_gradient(function: Callable, params: Params, *args) -> frozenset[Path]:
    """Paths of the parameters on which the value of `function(params, *args)` depends, except behind stop_gradient.

    The others have no gradient. An optimizer would still decay them (the MLP of a tapped block shrinks 270-fold in 300
    epochs), so they are excluded from it, as torch excludes parameters whose gradient is None.
    """
    flat = traverse.flatten_dict(params)
    jaxpr = jax.make_jaxpr(lambda leaves, *rest: function(traverse.unflatten_dict(leaves), *rest))(flat, *args).jaxpr
    live = {id(v) for v in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        stops = equation.primitive.name == "stop_gradient"
        if not stops and any(id(v) in live for v in equation.outvars):
            live.update(id(v) for v in equation.invars)
    # A dict is flattened in sorted order, so the leading inputs are the sorted paths.
    return frozenset(path for path, v in zip(sorted(flat), jaxpr.invars) if id(v) in live)


def split(params: Params, paths: Collection[Path]) -> tuple[Params, Params]:
    """(parameters at `paths`, the others), each a nested dict."""
    flat = traverse.flatten_dict(params)
    inside = {path: leaf for path, leaf in flat.items() if path in paths}
    outside = {path: leaf for path, leaf in flat.items() if path not in paths}
    return traverse.unflatten_dict(inside), traverse.unflatten_dict(outside)


def join(first: Params, second: Params) -> Params:
    """The inverse of `split`."""
    return traverse.unflatten_dict({**traverse.flatten_dict(first), **traverse.flatten_dict(second)})


def _too_long(warmup_steps: int, total_steps: int) -> str:
    return (
        f"a warm-up of {warmup_steps} steps does not fit into {total_steps} steps: shorten optim.warmup or "
        "lengthen train.duration"
    )


def _layer(path: Path, depth: int, official: bool) -> int:
    names = [name for name in path if name != "encoder"]
    if names[0] == "dist_token" and official:
        return depth + 1
    if names[0] in (
        "cls_token",
        "dist_token",
        "registers",
        "pos_embed",
        "patch_embed",
        "stem",
        "patch_norm",
        "pre_norm",
    ):
        return 0
    if names[0].startswith("blocks_"):
        return int(names[0].removeprefix("blocks_")) + 1
    # An encoder widens before its last block (distill.wide_last), a TinyMIM*-T's classifier or segmenter after it.
    return depth if path[:2] == ("encoder", "widen") else depth + 1


def _map_paths(function: Callable, params: Params) -> Params:
    return traverse.path_aware_map(function, params)


def _scale_by_learning_rate(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """optax.scale_by_learning_rate, at the given `step` instead of its own count of updates."""
    inner = optax.scale_by_learning_rate(schedule)

    def update(updates: Params, state: Any, params: Params = None, *, step: Any = None, **_: Any):
        return inner.update(updates, state if step is None else state._replace(count=step), params)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _scale_leaves(scales: Params) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: u * s, updates, scales))
