"""`tinymim demo --segment`: trains a segmentation on generated pictures, evaluates it and draws predictions."""

import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from tinymim_jax.config import SHIPPED, load_config
from tinymim_jax.data.builders.shapes import write_shapes
from tinymim_jax.data.masks.source import open_masks
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.data.whole import Scenes
from tinymim_jax.evaluation.predictor import load
from tinymim_jax.evaluation.segmentation import figures
from tinymim_jax.evaluation.segmented import Segmented
from tinymim_jax.train import train

CONFIG = SHIPPED / "shapes.py"
_SHOWN = 6  # pictures


def demo_segment(workdir: str | os.PathLike, overrides: Sequence[str] = ()) -> dict:
    """Trains in WORKDIR/run on pictures in WORKDIR/shapes; returns and writes WORKDIR/result.json, and examples.png.

    overrides: changes of configs/shapes.py, KEY=VALUE.
    """
    workdir = pathlib.Path(workdir)
    shapes = write_shapes(workdir / "shapes")
    config = load_config(str(CONFIG), [f"data.source=pairs:{shapes.absolute()}", *overrides])
    began = time.perf_counter()
    result: dict[str, Any] = dict(train(config, workdir / "run"))
    result["seconds"] = round(time.perf_counter() - began, 1)
    source = open_masks(open_source(config.data.source, split=config.data.eval_split))
    with Scenes(source, range(len(source))) as scenes:
        every = list(scenes)
    result["majority"] = _majority([scene.labels for scene in every], source.class_names)
    draw_examples(workdir / "examples.png", workdir / "run", every[:_SHOWN])
    (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    print(_table(result, workdir))
    return result


def draw_examples(path: pathlib.Path, run: pathlib.Path, scenes: Sequence) -> None:
    """A picture with a column for each scene: the image, its mask and what the checkpoint in `run` predicts."""
    model = load(run)
    cells = []
    for scene in scenes:
        found = model.segment(scene.pixels)
        colours = np.array([*found.colours, *[(255, 255, 255)] * (256 - len(found.colours))], np.uint8)
        truth = Segmented(scene.labels, found.class_names, tuple(map(tuple, colours.tolist())))
        cells.append([scene.pixels, colours[truth.labels], colours[found.labels]])
    height = max(cell.shape[0] for column in cells for cell in column)
    width = max(cell.shape[1] for column in cells for cell in column)
    sheet = np.full((3 * (height + 2), len(cells) * (width + 2), 3), 255, np.uint8)
    for number, column in enumerate(cells):
        for row, cell in enumerate(column):
            top, left = row * (height + 2), number * (width + 2)
            sheet[top : top + cell.shape[0], left : left + cell.shape[1]] = cell
    Image.fromarray(sheet).save(path)


def _majority(labels: Sequence[np.ndarray], names: Sequence[str]) -> dict[str, float]:
    """The scores of calling every pixel the most frequent class."""
    counts = sum(np.bincount(each.ravel(), minlength=256)[: len(names)] for each in labels)
    confusion = np.zeros((len(names), len(names)), np.int64)
    confusion[:, int(np.argmax(counts))] = counts
    return {name: value for name, value in figures(confusion, names).items() if name in ("mIoU", "aAcc")}


def _table(result: dict, workdir: pathlib.Path) -> str:
    majority = result["majority"]
    lines = ["", "| | mIoU | pixels right |", "|---|---|---|"]
    lines.append(f"| most frequent class everywhere | {majority['mIoU']:.3f} | {majority['aAcc']:.3f} |")
    lines.append(f"| trained for {result['seconds']:.0f} s | {result['mIoU']:.3f} | {result['aAcc']:.3f} |")
    each = ", ".join(f"{name[4:]} {value:.2f}" for name, value in result.items() if name.startswith("iou/"))
    lines += ["", f"IoU on {result['examples']} pictures: {each}", f"{workdir}/result.json, {workdir}/examples.png"]
    return "\n".join(lines)
