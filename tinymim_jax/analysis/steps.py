"""One training step in detail: pictures of its batch, the loss of each image, and the gradient of each layer."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from tinymim_jax.checkpoints.format import leaves_by_name
from tinymim_jax.data.draws import ShuffledIndices
from tinymim_jax.data.pipeline import Batch
from tinymim_jax.experiment import Experiment, training_batches
from tinymim_jax.pages.charts import Series, line_chart
from tinymim_jax.pages.colours import data_uri, pixels_of
from tinymim_jax.pages.page import details, figure, grid, page, paragraph, picture, table
from tinymim_jax.runtime.files import write_json, write_text
from tinymim_jax.sharding import place_batch
from tinymim_jax.state import make_gradients, micro_batch, micro_batch_key
from tinymim_jax.tasks.task import Params, pictures

_PICTURES = 48
_NAMED = 3


@dataclasses.dataclass(frozen=True)
class Step:
    """The batch, losses and gradients of a training step.

    number: counted from 1.
    losses: float [batch] by name.
    records: a description of the record in each row of the batch.
    layers: for each module with trained parameters its name and the norms of its gradient and weights; a norm is not
      finite if one of its values is not.
    tiles: pictures of some rows: {"row", "seen": {network: data URI}}, the largest losses first.
    lr: the learning rate.
    repeated: number of steps that were computed to reach this one from a checkpoint (or from the start).
    """

    number: int
    losses: dict[str, np.ndarray]
    records: list[str]
    layers: list[dict[str, Any]]
    tiles: list[dict[str, Any]]
    lr: float
    repeated: int = 0

    @property
    def bad_rows(self) -> list[int]:
        """Rows of the batch whose loss is not finite."""
        return np.flatnonzero(~np.isfinite(self.losses["loss"])).tolist()

    @property
    def bad_layers(self) -> list[str]:
        """Layers whose gradient is not finite."""
        return [layer["name"] for layer in self.layers if not np.isfinite(layer["gradient"])]

    @property
    def gradient_norm(self) -> float:
        """Of all layers together."""
        return float(np.sqrt(np.sum(np.square([layer["gradient"] for layer in self.layers]))))


def look_at_step(
    experiment: Experiment,
    mesh: Mesh,
    params: Params,
    frozen: Params,
    paths: frozenset,
    *,
    number: int,
    accumulate: int,
    workers: int = 0,
) -> Step:
    """Computes losses and gradients of training step `number` (from 1) at `params`. For jobs of one process.

    Args:
      params, frozen: placed on `mesh`; params before the step.
      accumulate: number of micro-batches.
    """
    with training_batches(experiment, start_step=number - 1, workers=workers) as batches:
        batch = next(batches)
    root = jax.random.key(experiment.config.seed)
    key = jax.random.fold_in(root, number - 1)
    compute = make_gradients(experiment.task, paths, mesh, accumulate=accumulate)
    losses, gradients = compute(params, frozen, place_batch(mesh, batch), root, number - 1)
    losses = {name: np.asarray(values, np.float64) for name, values in losses.items()}
    order = np.argsort(-np.nan_to_num(losses["loss"], nan=np.inf), kind="stable")[:_PICTURES]
    return Step(
        number=number,
        losses=losses,
        records=_records(experiment, number),
        layers=_layers(gradients, params),
        tiles=_tiles(experiment, batch, key, accumulate, [int(row) for row in order]),
        lr=float(jax.jit(experiment.schedule)(number - 1)),
    )


def describe_step(step: Step) -> str:
    """A line that says what is not finite in the step; if everything is finite, its loss and gradient norm."""
    rows, layers = step.bad_rows, step.bad_layers
    if not rows and not layers:
        return f"step {step.number}: loss {step.losses['loss'].mean():.4g}, gradient norm {step.gradient_norm:.4g}"
    parts = []
    if rows:
        named = "; ".join(f"row {row}: {step.records[row]}" for row in rows[:_NAMED])
        parts.append(
            f"the loss of {len(rows)} of {len(step.records)} images is not finite ({named}{'; ...' * (len(rows) > 3)})"
        )
    else:
        parts.append("the loss of every image is finite")
    if layers:
        some = ", ".join(layers[:_NAMED]) + ", ..." * (len(layers) > _NAMED)
        parts.append(f"the gradient is not finite in {len(layers)} of {len(step.layers)} layers ({some})")
    wrong = [layer["name"] for layer in step.layers if not np.isfinite(layer["weights"])]
    if wrong:
        parts.append(f"the weights of {', '.join(wrong[:_NAMED])} are not finite")
    return f"in step {step.number} " + ", and ".join(parts)


def write_step(step: Step, folder: epath.Path, title: str) -> epath.Path:
    """Writes step_N.html and step_N.json into `folder`; returns the path of the former."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step_{step.number}"
    record = {
        "step": step.number,
        "lr": step.lr,
        "repeated": step.repeated,
        "loss": _number(step.losses["loss"].mean()),
        "gradient_norm": _number(step.gradient_norm),
        "losses": {key: [_number(value) for value in values] for key, values in step.losses.items()},
        "records": step.records,
        "layers": [{key: _plain(value) for key, value in layer.items()} for layer in step.layers],
    }
    write_json(folder / f"{name}.json", record)
    write_text(folder / f"{name}.html", _html(step, title))
    return folder / f"{name}.html"


def _records(experiment: Experiment, number: int) -> list[str]:
    source, crops = experiment.train_source, experiment.config.data.crops
    shuffled = ShuffledIndices(len(source), experiment.config.seed)
    first = (number - 1) * experiment.batch_size
    return [source.describe(shuffled[n // crops]) for n in range(first, first + experiment.batch_size)]


def _layers(gradients: Params, params: Params) -> list[dict[str, Any]]:
    squares: dict[str, list[float]] = {}
    weights = leaves_by_name(params)
    for path, leaf in leaves_by_name(gradients).items():
        layer = path.rpartition("/")[0] if path.count("/") > 1 else path
        sums = squares.setdefault(layer, [0.0, 0.0])
        for i, array in enumerate((leaf, weights[path])):
            sums[i] += float(np.sum(np.square(np.asarray(array, np.float64))))
    return [
        {"name": name, "gradient": float(np.sqrt(grad)), "weights": float(np.sqrt(weight))}
        for name, (grad, weight) in sorted(squares.items(), key=lambda item: _in_order(item[0]))
    ]


def _in_order(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts blocks_2 before blocks_10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"(\d+)", name)]


def _tiles(experiment: Experiment, batch: Batch, key: jax.Array, parts: int, rows: list[int]) -> list[dict[str, Any]]:
    """The rows of the batch as the networks are shown them, drawn with the keys of the step's micro-batches."""
    wanted: dict[int, dict[str, Any]] = {}
    for part in range(parts):
        own = [row for row in rows if row % parts == part]
        if not own:
            continue
        places = np.asarray([row // parts for row in own])
        some = {name: jnp.asarray(array) for name, array in micro_batch(batch, parts, part).items()}

        def show(some: Mapping[str, Any], key: jax.Array, places: Any) -> dict[str, jax.Array]:
            return {name: images[places] for name, images in pictures(experiment.task, dict(some), key).items()}

        seen = jax.device_get(jax.jit(show)(some, micro_batch_key(key, parts, part), places))
        for i, row in enumerate(own):
            wanted[row] = {name: data_uri(pixels_of(images[i])) for name, images in seen.items()}
    return [{"row": row, "seen": wanted[row]} for row in rows]


def _html(step: Step, title: str) -> str:
    loss = step.losses["loss"]
    facts = {"loss": loss.mean(), "gradient norm": step.gradient_norm, "learning rate": step.lr}
    intro = paragraph(describe_step(step)[:1].upper() + describe_step(step)[1:] + ".")
    intro += table(list(facts), [list(facts.values())])
    stacks = []
    for tile in step.tiles:
        row = tile["row"]
        images = "".join(
            picture(uri, f"row {row}, {step.records[row]}, as the {name} sees it, loss {loss[row]:.4g}", name)
            for name, uri in tile["seen"].items()
        )
        stacks.append(f'<div class="stack">{images}<span class="note">{row}: {loss[row]:.4g}</span></div>')
    shown = f"{len(stacks)} of {len(loss)} images, those with the largest losses first: row and loss."
    order = np.argsort(-np.nan_to_num(loss, nan=np.inf), kind="stable")
    ranks = list(range(1, len(loss) + 1))
    series = [Series(name, ranks, list(values[order])) for name, values in step.losses.items()]
    norms = [layer["gradient"] for layer in step.layers]
    numbers = list(range(1, len(norms) + 1))
    charts = [
        figure("Losses of the images", line_chart("Losses of the images", series, x_label="image, largest loss first")),
        figure(
            "Gradient norm of each layer",
            line_chart("Gradient norm", [Series("gradient norm", numbers, norms)], x_label="layer", log=True),
        ),
    ]
    rows = [[int(row), step.records[row], *(float(values[row]) for values in step.losses.values())] for row in order]
    layers = [
        [i, layer["name"], layer["gradient"], layer["weights"], _ratio(layer)] for i, layer in enumerate(step.layers, 1)
    ]
    sections = [
        ("Images", paragraph(shown) + f'<div class="tiles">{"".join(stacks)}</div>'),
        ("Losses and gradients", grid(charts)),
        ("Layers", table(["", "layer", "gradient norm", "weight norm", "ratio"], layers)),
        ("All images", details("Table", table(["row", "record", *step.losses], rows))),
    ]
    return page(f"{title}, step {step.number}", sections, intro=intro)


def _ratio(layer: Mapping[str, Any]) -> float | None:
    return layer["gradient"] / layer["weights"] if layer["weights"] else None


def _number(value: Any) -> float | None:
    value = float(value)
    return value if np.isfinite(value) else None


def _plain(value: Any) -> Any:
    return value if isinstance(value, str) else _number(value)
