"""Golden files of semantic segmentation: $TINYMIM_SEGMENTATION, or tests/golden/segmentation."""

import json
import os
import pathlib
from typing import Any

import numpy as np


def segmentation_dir() -> pathlib.Path:
    """The folder of the golden files."""
    return pathlib.Path(
        os.environ.get("TINYMIM_SEGMENTATION") or pathlib.Path(__file__).parent / "golden" / "segmentation"
    )


def segmentation_golden(name: str) -> Any:
    """The arrays of an .npz file, by name, or the content of a .json file."""
    path = segmentation_dir() / name
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as arrays:
        return dict(arrays)
