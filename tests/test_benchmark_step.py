"""The step benchmark: its FLOP count against the compiler's, and that it runs."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tinymim_jax.models.vit import ViT

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from step import needed_flops, step_flops  # noqa: E402


def test_needed_flops_are_the_compilers():
    encoder = ViT(embed_dim=64, depth=4, heads=2, patch_size=8, image_size=(64, 64))
    images = jnp.zeros((4, 64, 64, 3))
    params = jax.jit(encoder.init)(jax.random.key(0), images)["params"]

    def qkv(params, images):
        tap = encoder.apply({"params": params}, images, tap=3, method="encode")
        return tap.q, tap.k, tap.v

    analysis = jax.jit(qkv).lower(params, images).compile().cost_analysis()
    counted = (analysis[0] if isinstance(analysis, list) else analysis)["flops"] / 4
    # The compiler counts norms, softmax and GELU as well, which at this width are a noticeable part.
    assert needed_flops(encoder, 3) == pytest.approx(counted, rel=0.12)
    assert needed_flops(encoder, 3) < counted


def test_step_flops_of_vit_b_to_tiny():
    """Written out: eleven blocks and one qkv of each network, the student three times over."""
    teacher, student = ViT(768, 12, 12), ViT(192, 12, 6)

    def by_hand(d):
        n = 197
        return 2 * 196 * 768 * d + 11 * (24 * n * d * d + 4 * n * n * d) + 6 * n * d * d + 4 * n * n * d

    assert step_flops(student, 12, teacher, 12) == by_hand(768) + 3 * by_hand(192)


def test_the_benchmark_runs():
    words = ["--config", "configs/distill_t.py", "--batch", "8", "--steps", "1", "--repeat", "1"]
    small = [
        "model.embed_dim=24",
        "model.depth=2",
        "model.heads=2",
        "model.image_size=(32,32)",
        "distill.teacher.tap=2",
    ]
    command = [sys.executable, "benchmarks/step.py", *words, *small]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    result = json.loads(output)
    assert result["images_per_second"] > 0
    assert result["planned_bytes"] > 0
    assert "ratio" not in result
