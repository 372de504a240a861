"""The step benchmark runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]


def test_the_benchmark_runs():
    words = ["--config", "configs/distill_t.py", "--batch", "8", "--steps", "1", "--repeat", "1"]
    small = [
        "model.embed_dim=24",
        "model.depth=2",
        "model.heads=2",
        "model.image_size=(32,32)",
        "distill.teacher.name=tinymim_vit_small",  # the smallest one, whose random weights are made and written
        "distill.teacher.tap=2",
    ]
    command = [sys.executable, "benchmarks/step.py", *words, *small]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout
    result = json.loads(output)
    assert result["images_per_second"] > 0
    assert result["planned_bytes"] > 0
    assert "ratio" not in result
