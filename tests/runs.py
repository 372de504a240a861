"""Small experiments for tests of training."""

import jax
import numpy as np

from tinymim_jax.config import load_config
from tinymim_jax.experiment import batch_shapes, build_experiment, build_optimizer, training_batches
from tinymim_jax.metrics import compute, no_averages
from tinymim_jax.sharding import place_batch
from tinymim_jax.state import init_state, make_train_step, place_frozen, trained_paths

DIGITS = tuple(map(str, range(10)))  # class names

# Two blocks of width 16 on digits of 16 x 16 pixels: seconds, including compilation.
SMALL = (
    "model.embed_dim=16",
    "model.depth=2",
    "model.heads=2",
    "model.patch_size=8",
    "model.image_size=(16,16)",
    "data.eval_resize=16",
    "data.eval_split=test[:13]",
    "train.batch_size=8",
    "train.duration=4 steps",
    "train.log_every=1",
    "optim.warmup=1 steps",
    "checkpoint.every_minutes=0.0",
)

# A linear probe on the same digits, for encoders with patches of 8.
PROBE = (
    "model.image_size=(16,16)",
    "model.dtype=float32",
    "data.source=digits",
    "data.eval_resize=16",
    "data.eval_split=test[:13]",
    "data.mean=(0.5,0.5,0.5)",
    "data.std=(0.5,0.5,0.5)",
    "train.batch_size=16",
    "train.duration=4 steps",
    "train.log_every=1",
    "train.eval_every=0 steps",
    "optim.warmup=1 steps",
    "checkpoint.every_minutes=0.0",
)


def small_config(experiment: str, *overrides: str):
    """configs/digits.py:`experiment` with small models and few steps."""
    words = [*SMALL, *overrides]
    if experiment.startswith("mae"):
        words = ["mae.decoder_dim=8", "mae.decoder_depth=1", "mae.decoder_heads=2", *words]
    if experiment == "distill":
        words = ["distill.teacher.tap=None", *words]
    return load_config(f"configs/digits.py:{experiment}", words)


def probe_config(*overrides: str):
    """configs/linprobe.py on digits, with few steps. Give `init=` among the overrides."""
    return load_config("configs/linprobe.py", [*PROBE, *overrides])


def run_steps(config, data_dir, mesh, steps: int, states: list | None = None):
    """Runs the training step on the experiment's batches.

    Returns the state, the loss of each step, and the frozen weights before and after. Copies of the state, before the
    first step and after each, are appended to `states`.
    """
    experiment = build_experiment(config, data_dir=data_dir)
    task = experiment.task
    frozen = place_frozen(task.load_frozen(), mesh)
    before = jax.device_get(frozen)
    paths = trained_paths(task, frozen, batch_shapes(experiment))
    optimizer = build_optimizer(experiment, paths)
    root = jax.random.key(config.seed)
    _, fresh = init_state(task, optimizer, paths, mesh, root, ema=config.train.ema)
    step = make_train_step(task, optimizer, paths, mesh, accumulate=config.train.accumulate, ema=config.train.ema)
    state, losses = fresh(), []
    if states is not None:
        states.append(jax.device_get(state))
    with training_batches(experiment, start_step=0, workers=0) as batches:
        for _ in range(steps):
            recorded = no_averages((*task.names, "gradient_norm"))
            state, recorded, _ = step(state, recorded, frozen, place_batch(mesh, next(batches)), root)
            losses.append(compute(recorded)["loss"])
            if states is not None:
                states.append(jax.device_get(state))
    return state, np.array(losses), before, jax.device_get(frozen)


def same_bits(first, second) -> bool:
    """Whether two trees have equal structures and bit-identical arrays."""
    leaves = zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)
    return jax.tree.structure(first) == jax.tree.structure(second) and all(
        np.asarray(a).tobytes() == np.asarray(b).tobytes() for a, b in leaves
    )
