"""The training state, its creation on a mesh, and the training and evaluation steps."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from tinymim_jax import optim
from tinymim_jax.metrics import Averages, Metric, averages, merge, reduce_batch
from tinymim_jax.ops.placement import splitting_batches
from tinymim_jax.sharding import replicated, state_sharding
from tinymim_jax.tasks.task import RUNNING, Batch, Losses, Params, Task, losses_of_phases, phase_at


@flax.struct.dataclass
class TrainState:
    """The training state, a pytree; all of it is checkpointed.

    step: int32, steps done so far, skipped updates included; it is also the position in the data.
    params: all parameters, nested by name, including running statistics.
    opt_state: optimizer state of the trained parameters; running statistics are not among them.
    extra: {"ema": exponential moving average of the trained parameters} or {}.
    skipped: int32, number of updates skipped because the loss or the gradient was not finite.
    skipped_in_a_row: int32, how many of the latest steps were skipped in a row.
    """

    step: jax.Array
    params: Params
    opt_state: Any
    extra: Params
    skipped: jax.Array
    skipped_in_a_row: jax.Array


def trained_paths(task: Task, frozen: Params, batch: Batch) -> frozenset[optim.Path]:
    """Paths of the parameters that get a gradient from the task's loss, in any of its phases; found by tracing."""
    params = jax.eval_shape(task.init, jax.random.key(0))

    def paths(losses: Losses) -> frozenset[optim.Path]:
        def loss(params: Params, frozen: Params, batch: Batch) -> jax.Array:
            return losses(params, frozen, batch, jax.random.key(0), True)["loss"]

        return optim.params_with_gradient(loss, params, frozen, batch)

    return frozenset().union(*map(paths, losses_of_phases(task)))


def new_state(
    params: Params, optimizer: optax.GradientTransformationExtraArgs, paths: frozenset, *, ema: float
) -> TrainState:
    """The state before the first step."""
    trained, _ = optim.split(params, paths)
    zero = jnp.zeros((), jnp.int32)
    extra = {"ema": jax.tree.map(jnp.copy, trained)} if ema else {}
    return TrainState(zero, params, optimizer.init(trained), extra, zero, zero)


def init_state(
    task: Task,
    optimizer: optax.GradientTransformation,
    paths: frozenset,
    mesh: Mesh,
    key: jax.Array,
    *,
    ema: float,
) -> tuple[TrainState, Callable[[], TrainState]]:
    """(shapes and shardings of the state, a function that creates it on the mesh).

    Nothing is computed until the function is called, so a checkpoint can be restored instead.
    """

    def make(key: jax.Array) -> TrainState:
        return new_state(task.init(key), optimizer, paths, ema=ema)

    shapes = jax.eval_shape(make, key)
    shardings = state_sharding(mesh, shapes)
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def fresh() -> TrainState:
        if task.start is None:
            return jax.jit(make, out_shardings=shardings)(key)
        params = task.start(jax.device_get(task.init(key)))
        place = jax.jit(lambda p: new_state(p, optimizer, paths, ema=ema), out_shardings=shardings)
        return place(params)

    return abstract, fresh


def evaluated_params(state: TrainState) -> Params:
    """The parameters to evaluate and export: the moving average if there is one."""
    if "ema" not in state.extra:
        return state.params
    return optim.join(state.params, state.extra["ema"])


def make_train_step(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    paths: frozenset,
    mesh: Mesh,
    *,
    accumulate: int = 1,
    ema: float = 0.0,
) -> Callable[[TrainState, Averages, Params, Batch, jax.Array], tuple[TrainState, Averages, jax.Array]]:
    """The jitted step `(state, averages, frozen, batch, root key) -> (state, averages, skipped in a row)`.

    The first two arguments are donated. The third result is a copy that the host can read while the next step runs.

    Args:
      accumulate: the batch is split into this many micro-batches, run one after another to save memory; the update is
        that of the whole batch.
      ema: decay of the moving average; 0 disables it.
    """

    gradients = _gradients(task, mesh, accumulate)

    def step(state: TrainState, recorded: Averages, frozen: Params, batch: Batch, root: jax.Array):
        key = jax.random.fold_in(root, state.step)
        trained, fixed = optim.split(state.params, paths)
        values, new_fixed, grads = gradients(state.step, trained, fixed, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, trained, step=state.step)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(jnp.mean(values["loss"])) & jnp.isfinite(norm)
        new_trained = _where(finite, optax.apply_updates(trained, updates), trained)
        extra = {}
        if ema:
            averaged = jax.tree.map(lambda e, p: ema * e + (1 - ema) * p, state.extra["ema"], new_trained)
            extra["ema"] = _where(finite, averaged, state.extra["ema"])
        state = TrainState(
            step=state.step + 1,
            params=optim.join(new_trained, _where(finite, new_fixed, fixed)),
            opt_state=_where(finite, opt_state, state.opt_state),
            extra=extra,
            skipped=state.skipped + ~finite,
            skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
        )
        counted = jnp.broadcast_to(finite, values["loss"].shape)
        new = averages(values, counted) | averages({"gradient_norm": norm[None]}, finite[None])
        recorded = merge(recorded, new)
        # Without this the compiler may choose other output shardings, and the next step would be compiled again.
        layout = state_sharding(mesh, (state, recorded))
        state, recorded = jax.lax.with_sharding_constraint((state, recorded), layout)
        return state, recorded, state.skipped_in_a_row

    return jax.jit(step, donate_argnums=(0, 1))


def make_gradients(
    task: Task, paths: frozenset, mesh: Mesh, *, accumulate: int = 1
) -> Callable[[Params, Params, Batch, jax.Array, int], tuple[dict[str, jax.Array], Params]]:
    """A function that computes the losses and gradients of a training step without its update, for inspection.

    The jitted `(params, frozen, batch, root key, step) -> (losses float32 [batch] by name, in the order of the batch,
    gradients of the trained parameters)`; `step` steps were done before it.
    """
    gradients = _gradients(task, mesh, accumulate)

    def look(params: Params, frozen: Params, batch: Batch, root: jax.Array, step: jax.Array):
        trained, fixed = optim.split(params, paths)
        key = jax.random.fold_in(root, step)
        values, _, grads = gradients(step, trained, fixed, frozen, batch, key)
        return {name: value.reshape(accumulate, -1).T.reshape(-1) for name, value in values.items()}, grads

    return jax.jit(look, out_shardings=replicated(mesh))


def micro_batch(batch: Batch, parts: int, index: int) -> Batch:
    """Rows `index`, `index + parts`, ... of each array: the micro-batch `index` of `parts`.

    Strided, so that each micro-batch takes rows of every device and no rows move between devices.
    """
    return jax.tree.map(lambda x: x[index::parts], batch)


def micro_batch_key(key: jax.Array, parts: int, index: int | jax.Array) -> jax.Array:
    """The key of micro-batch `index` within a step whose key is `key`."""
    return key if parts == 1 else jax.random.fold_in(key, index)


def make_eval_step(
    metric: Metric, mesh: Mesh
) -> Callable[[Params, Params, Batch, jax.Array], tuple[dict[str, jax.Array], jax.Array]]:
    """The jitted `(params, frozen, batch, key) -> (reduced values, valid)`, the arguments of metrics.Tally.add."""

    def step(params: Params, frozen: Params, batch: Batch, key: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        valid = batch["valid"]
        with splitting_batches(mesh):
            values = metric.values(params, frozen, batch, key)
        return reduce_batch(metric, values, valid), valid

    # Replicated: every process reads the whole result and adds it up for itself.
    return jax.jit(step, out_shardings=replicated(mesh))


def place_frozen(frozen: Params, mesh: Mesh) -> Params:
    """Frozen host weights on the mesh, sharded like parameters of their shape."""
    return jax.device_put(frozen, state_sharding(mesh, frozen))


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _gradients(task: Task, mesh: Mesh, accumulate: int) -> Callable[..., tuple[dict, Params, Params]]:
    """(step, trained, fixed, frozen, batch, key) -> (losses of every example, the new `fixed`, mean gradient).

    The losses are those of the step's phase. All phases are in one program, of which one runs.
    """
    phases = [_gradients_of(losses, mesh, accumulate) for losses in losses_of_phases(task)]
    if len(phases) == 1:
        return lambda step, *arguments: phases[0](*arguments)
    return lambda step, *arguments: jax.lax.switch(phase_at(task, step), phases, *arguments)


def _gradients_of(losses: Losses, mesh: Mesh, accumulate: int) -> Callable[..., tuple[dict, Params, Params]]:
    def gradients(trained: Params, fixed: Params, frozen: Params, batch: Batch, key: jax.Array):
        def mean_loss(trained: Params) -> tuple[jax.Array, dict]:
            values = losses(optim.join(trained, fixed), frozen, batch, key, True)
            return jnp.mean(values["loss"]), values

        with splitting_batches(mesh):
            (_, values), grads = jax.value_and_grad(mean_loss, has_aux=True)(trained)
        return values, optim.join(fixed, values.pop(RUNNING, {})), grads

    if accumulate == 1:
        return gradients
    return lambda *arguments: _accumulated(gradients, accumulate, *arguments)


def _accumulated(gradients: Callable, parts: int, trained: Params, fixed: Params, frozen: Params, batch: Batch, key):
    """(values of every example, updated `fixed`, mean gradient), computed in `parts` micro-batches one after another.

    Running statistics are updated once for each micro-batch, as in PyTorch when gradients are accumulated.
    """

    # The slices of `micro_batch`, stacked.
    sliced = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch)

    def body(carried: tuple[Params, Params], inputs: tuple) -> tuple[tuple[Params, Params], dict]:
        (total, fixed), (part, index) = carried, inputs
        values, fixed, grads = gradients(trained, fixed, frozen, part, micro_batch_key(key, parts, index))
        return (jax.tree.map(lambda t, g: t + g / parts, total, grads), fixed), values

    zeros = jax.tree.map(jnp.zeros_like, trained)
    (grads, fixed), values = jax.lax.scan(body, (zeros, fixed), (sliced, jnp.arange(parts)))
    return {name: value.reshape(-1) for name, value in values.items()}, fixed, grads
