"""Golden files of semantic segmentation.

They lie in $TINYMIM_SEGMENTATION, or else in $TINYMIM_GOLDEN/segmentation where that exists, or in
tests/golden/segmentation.
"""

import json
import os
import pathlib
from typing import Any

import numpy as np


def segmentation_dir() -> pathlib.Path:
    """The folder of the golden files."""
    if given := os.environ.get("TINYMIM_SEGMENTATION"):
        return pathlib.Path(given)
    beside = pathlib.Path(os.environ.get("TINYMIM_GOLDEN") or ".") / "segmentation"
    if os.environ.get("TINYMIM_GOLDEN") and beside.is_dir():
        return beside
    return pathlib.Path(__file__).parent / "golden" / "segmentation"


def segmentation_golden(name: str) -> Any:
    """The arrays of an .npz file, by name, or the content of a .json file."""
    path = segmentation_dir() / name
    if path.suffix == ".json":
        return json.loads(path.read_text())
    with np.load(path) as arrays:
        return dict(arrays)
