"""With parameters split over devices (--fsdp), activations stay split over the batch alone."""

import contextlib
import re

import jax
import numpy as np
import pytest

from tinymim_jax.config import load_config
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.placement import splitting_batches
from tinymim_jax.plan.build import plan_experiment
from tinymim_jax.sharding import batch_sharding, make_mesh, state_sharding

# 25 patches, of which 6 are visible: 7 tokens in the encoder, 26 in the decoder. No size of a parameter is divisible
# by 7 or 13.
OVERRIDES = (
    "model.image_size=(40,40)", "model.patch_size=8", "model.embed_dim=512", "model.depth=3", "model.heads=8",
    "mae.decoder_dim=512", "mae.decoder_depth=2", "mae.decoder_heads=8",
)  # fmt: skip


def collectives(text: str) -> list[tuple[str, list[int]]]:
    """(kind, dimensions of an array that it moves) of each collective of a compiled program."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = []
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) ({kinds})(?:-start)?\(", line):
            for dimensions in re.findall(r"\[([\d,]*)\]", match[1]):
                found.append((match[2], [int(n) for n in dimensions.split(",") if n]))
    return found


def moved_activations(scan: bool, remat: str, batch: int = 4096) -> list[tuple[str, list[int]]]:
    words = [f"model.scan={scan}", f"model.remat={remat}", f"train.batch_size={batch}"]
    config = load_config("configs/mae_b.py", [*OVERRIDES, *words])
    step, arguments = plan_experiment(config).step(make_mesh(2))
    moved = collectives(step.lower(*arguments).compile().as_text())
    assert any(512 in shape for _, shape in moved), "parameters are split"
    return [(kind, shape) for kind, shape in moved if any(n % 7 == 0 or n % 13 == 0 for n in shape)]


@pytest.mark.parametrize(
    ("scan", "remat", "batch"), [(True, "dots", 4096), (False, "none", 4096), (False, "none", 8), (True, "dots", 8)]
)
def test_no_collective_moves_an_activation(scan, remat, batch):
    """Nor where activations are smaller than parameters, as with one image on each device."""
    assert moved_activations(scan, remat, batch) == []


def test_without_the_constraint_activations_are_moved(monkeypatch):
    """The test above can fail: this is what the compiler chooses for itself."""
    monkeypatch.setattr("tinymim_jax.state.splitting_batches", lambda mesh: contextlib.nullcontext())
    assert moved_activations(True, "dots")


def test_values_are_those_of_one_device():
    encoder = ViT(embed_dim=64, depth=2, heads=4, patch_size=8, image_size=(32, 32), scan=True)
    images = np.random.default_rng(0).normal(size=(16, 32, 32, 3)).astype(np.float32)
    params = jax.jit(encoder.init)(jax.random.key(0), images)["params"]
    wanted = jax.jit(lambda p, x: encoder.apply({"params": p}, x))(params, images)
    mesh = make_mesh(4)

    def split(params, images):
        with splitting_batches(mesh):
            return encoder.apply({"params": params}, images)

    placed = jax.device_put(params, state_sharding(mesh, params, min_size=1024))
    got = jax.jit(split)(placed, jax.device_put(images, batch_sharding(mesh)))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=2e-5)
    assert got.sharding.is_equivalent_to(batch_sharding(mesh), got.ndim)
