"""Pictures of the demo: loss curves, and the relations of one token in teacher and student."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.checkpoints.params import load_params
from tinymim_jax.config import SHIPPED, load_config
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.data.views.decoding import decode
from tinymim_jax.data.views.transforms import EvalView
from tinymim_jax.metrics import read
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.ops.products import scaled_products

_CURVES = {"teacher": "MAE, teacher", "mae_student": "MAE, student", "tinymim": "TinyMIM, student"}


def draw_losses(workdir: pathlib.Path) -> pathlib.Path:
    """Draws WORKDIR/losses.png: the training loss of the three pre-trainings."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, len(_CURVES), figsize=(4 * len(_CURVES), 3), layout="constrained")
    for panel, (run, title) in zip(panels, _CURVES.items()):
        rows = [row for row in read(workdir / run / "metrics.jsonl") if "train/loss" in row]
        panel.plot([row["step"] for row in rows], [row["train/loss"] for row in rows])
        panel.set(title=title, xlabel="step", ylabel="training loss")
    return _save(plt, figure, workdir / "losses.png")


def draw_relations(workdir: pathlib.Path, *, example: int = 3, head: int = 0) -> pathlib.Path:
    """Draws WORKDIR/relations.png: the Q-K and V-V relations of one patch of a digit to all patches.

    Columns: the digit with the query marked, the teacher, the student before and after distillation.
    """
    plt = _pyplot()
    config = load_config(f"{SHIPPED / 'digits.py'}:distill")
    size = tuple(config.model.image_size)
    record = open_source(config.data.source, split=config.data.eval_split)[example]
    pixels = EvalView(size, config.data.eval_resize)(decode(record["image"]))
    images = normalize(jnp.asarray(pixels)[None], tuple(config.data.mean), tuple(config.data.std))

    teacher, teacher_params = _encoder(workdir / "teacher")
    student, student_params = _encoder(workdir / "tinymim")
    fresh = jax.jit(student.init)(jax.random.key(config.seed), images)["params"]
    rows, columns = student.grid
    # The query is the brightest patch, since the background has little structure.
    ink = np.asarray(pixels, np.float32).mean(-1).reshape(rows, size[0] // rows, columns, -1).mean((1, 3))
    query = int(np.argmax(ink))
    maps = {
        "teacher": _relations(teacher, teacher_params, images, query, head, config.distill.teacher.tap),
        "student before": _relations(student, fresh, images, query, head, student.depth),
        "student after": _relations(student, student_params, images, query, head, student.depth),
    }
    figure, panels = plt.subplots(2, 4, figsize=(9, 4.6), layout="constrained")
    for r, relation in enumerate(("Q-K", "V-V")):
        panels[r, 0].imshow(pixels)
        patch = size[0] // rows
        corner = (query % columns * patch - 0.5, query // columns * patch - 0.5)
        panels[r, 0].add_patch(plt.Rectangle(corner, patch, patch, fill=False, color="red"))
        panels[r, 0].set_ylabel(relation)
        for panel, (title, pair) in zip(panels[r, 1:], maps.items()):
            panel.imshow(pair[r].reshape(rows, columns), cmap="viridis")
            panel.set_title(title)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
    return _save(plt, figure, workdir / "relations.png")


def _encoder(run: pathlib.Path) -> tuple[ViT, dict]:
    model, params = load_params(run)
    return ViT.from_record(model["encoder"]), params["encoder"]


def _relations(encoder: ViT, params: Any, images: Any, query: int, head: int, block: int) -> list[np.ndarray]:
    def relations(params: Any, images: Any) -> list[jax.Array]:
        tap: Any = encoder.apply({"params": params}, images, tap=block, method="encode")
        pairs = ((tap.q, tap.k), (tap.v, tap.v))
        return [jax.nn.softmax(scaled_products(left, right), axis=-1) for left, right in pairs]

    # CLS is token 0.
    return [np.asarray(weights)[0, head, 1 + query, 1:] for weights in jax.jit(relations)(params, images)]


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the demo's pictures need matplotlib: pip install 'tinymim-jax[demo]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _save(plt: Any, figure: Any, path: pathlib.Path) -> pathlib.Path:
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
