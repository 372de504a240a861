"""Measures a run's networks on a few images for its report: views, relation maps, layers, classes."""

import functools
import json
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from tinymim_jax.analysis.analyze import analyze, write_analysis
from tinymim_jax.analysis.images import batches_of, some_of
from tinymim_jax.analysis.networks import Network, Networks, find_networks
from tinymim_jax.analysis.relations import RELATIONS, relation_map
from tinymim_jax.config import from_json
from tinymim_jax.data.pipeline import train_batches
from tinymim_jax.data.sources.labels import labelled
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.evaluation.suites.classifier import SuiteClassifier
from tinymim_jax.evaluation.suites.scores import score
from tinymim_jax.experiment import build_experiment
from tinymim_jax.pages.colours import coloured, data_uri, pixels_of
from tinymim_jax.runtime.files import write_json
from tinymim_jax.runtime.runs import newest_checkpoint
from tinymim_jax.runtime.workdir import ANALYSIS
from tinymim_jax.tasks.task import pictures

log = logging.getLogger(__name__)

_SAMPLES, _MAPS = 8, 4
_ANALYZED, _LABELLED, _CLASSIFIED = 64, 600, 2000
_TILE = 96  # pixels to which small images are enlarged, so that the frame of a query patch is thin


def look_at(run: epath.Path, *, data_dir: str | None = None, workers: int = 0) -> None:
    """Writes RUN/analysis/{pictures,analysis,scores}.json for the newest checkpoint, unless they exist for it.

    If one of them fails, because the teacher or the data are gone, that is logged and the others are still written.
    """
    saved = newest_checkpoint(run)
    if saved is None:
        log.info("%s has no checkpoint yet: its networks are not analyzed", run)
        return
    config = from_json(json.loads((run / "config.json").read_text()))
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "pictures": lambda: _pictures(config, str(run), data_dir, workers),
        "analysis": lambda: analyze(
            str(run), config, images=_ANALYZED, labelled=_LABELLED, data_dir=data_dir, workers=workers
        ),
        "scores": lambda: _scores(config, str(run), data_dir, workers),
    }
    for name, make in parts.items():
        path = run / ANALYSIS / f"{name}.json"
        if _step_of(path) == saved["step"]:
            continue
        try:
            found = make()
        except Exception as error:  # a failure here must not prevent the report
            log.warning("%s: no %s in the report: %s: %s", run, name, type(error).__name__, error)
            continue
        if not found:
            continue
        (run / ANALYSIS).mkdir(parents=True, exist_ok=True)
        if name == "analysis":
            write_analysis(found, run / ANALYSIS)
        else:
            write_json(path, found | {"step": saved["step"]})


def _step_of(path: epath.Path) -> int | None:
    try:
        return json.loads(path.read_text()).get("step")
    except (OSError, ValueError):
        return None


def _pictures(config: ConfigDict, run: str, data_dir: str | None, workers: int) -> dict[str, Any]:
    networks = find_networks(run, image_size=tuple(config.model.image_size))
    found, note = _relation_maps(config, networks, data_dir, workers)
    return {
        "samples": samples(config, data_dir),
        "samples_note": "Training images after augmentation. Hidden patches are grey.",
        "relations": found,
        "relations_note": note,
    }


def samples(config: ConfigDict, data_dir: str | None) -> list[dict[str, Any]]:
    """Eight training images as each network is shown them: {"label": name, "seen": {network: data URI}}."""
    experiment = build_experiment(config, data_dir=data_dir)
    size = _SAMPLES * config.data.crops
    with train_batches(
        experiment.train_source,
        augment=experiment.views.train,
        batch_size=size,
        seed=config.seed,
        crops=config.data.crops,
        upright=config.data.upright,
    ) as batches:
        batch = next(batches)
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    seen = jax.device_get(jax.jit(functools.partial(pictures, experiment.task))(batch, key))
    return _as_tiles(seen, batch, experiment)[:: config.data.crops]


def _as_tiles(seen: dict[str, np.ndarray], batch: dict[str, np.ndarray], experiment: Any) -> list[dict[str, Any]]:
    """For each image {"label": class name or "", "seen": {network: data URI}}, from tasks.task.pictures."""
    names = experiment.train_source.class_names
    found = []
    for i, label in enumerate(batch["label"]):
        tiles = {name: data_uri(pixels_of(images[i])) for name, images in seen.items()}
        found.append({"label": names[label] if 0 <= label < len(names) else "", "seen": tiles})
    return found


def _relation_maps(
    config: ConfigDict, networks: Networks, data_dir: str | None, workers: int
) -> tuple[list[dict[str, Any]], str]:
    """Of four evaluation images the relations of their most varied patch to all, in each network's compared block.

    Convolutional networks have none.
    """
    source = open_source(config.data.source, split=config.data.eval_split, data_dir=data_dir)
    with batches_of(some_of(source, _MAPS, seed=config.seed), config, _MAPS, workers=workers) as batches:
        batch = next(batches)
    images = batch["image"][batch["valid"]]
    student, teacher = networks.student, networks.teacher
    blocks = {student.name: student.vit.depth}
    if teacher is not None and teacher.attends:
        blocks[teacher.name] = teacher.vit.depth
    if networks.compared:
        blocks = {name: block for name, block in zip((student.name, "teacher"), networks.compared[0]) if name in blocks}
    maps = [{"image": "", "maps": {}} for _ in images]
    places = [_varied_patch(image, student.vit.grid) for image in images]
    for i, (image, place) in enumerate(zip(images, places)):
        maps[i]["image"] = data_uri(_framed(image, place, student.vit.grid))
    for one in reversed([one for one in networks.members if one.name in blocks]):
        grid = one.vit.grid
        queries = np.asarray([int(row * grid[0]) * grid[1] + int(column * grid[1]) for row, column in places])
        found = jax.device_get(jax.jit(_maps_of(one, blocks[one.name]))(one.params, images, queries))
        for i in range(len(images)):
            drawn = {name: _enlarged(coloured(values[i].reshape(grid))) for name, values in found.items()}
            maps[i]["maps"][one.name] = {name: data_uri(pixels) for name, pixels in drawn.items()}
    said = ", ".join(f"block {block} of the {name}" for name, block in blocks.items())
    return maps, f"Softmax of the products of one patch with all patches, mean over heads; {said}. Brighter: larger."


def _maps_of(network: Network, block: int) -> Callable[[Any, jax.Array, jax.Array], dict[str, jax.Array]]:
    def maps(params: Any, images: jax.Array, queries: jax.Array) -> dict[str, jax.Array]:
        (tap,) = network.taps(params, images, [block])
        return {name.upper(): relation_map(tap, name, network, queries) for name in RELATIONS}

    return maps


def _varied_patch(image: np.ndarray, grid: tuple[int, int]) -> tuple[float, float]:
    """The centre of the patch with the largest variance, as shares of height and width."""
    rows, columns = grid
    height, width = image.shape[0] // rows, image.shape[1] // columns
    cut = image[: rows * height, : columns * width].astype(np.float64).mean(-1)
    varied = cut.reshape(rows, height, columns, width).std(axis=(1, 3))
    r, c = np.unravel_index(np.argmax(varied), varied.shape)
    return (r + 0.5) / rows, (c + 0.5) / columns


def _framed(image: np.ndarray, place: tuple[float, float], grid: tuple[int, int]) -> np.ndarray:
    """The image, enlarged if it is small, with a red frame around the patch at `place`."""
    drawn = _enlarged(image)
    side = drawn.shape[0] / grid[0], drawn.shape[1] / grid[1]
    top, left = int(place[0] * grid[0]) * side[0], int(place[1] * grid[1]) * side[1]
    box = [round(top), round(top + side[0]) - 1, round(left), round(left + side[1]) - 1]
    wide = max(1, drawn.shape[0] // 64)
    red = np.array([255, 40, 40], np.uint8)
    drawn = drawn.copy()
    for edge in range(wide):
        drawn[[box[0] + edge, box[1] - edge], box[2] : box[3] + 1] = red
        drawn[box[0] : box[1] + 1, [box[2] + edge, box[3] - edge]] = red
    return drawn


def _enlarged(image: np.ndarray) -> np.ndarray:
    times = max(1, _TILE // max(image.shape[:2]))
    return image.repeat(times, axis=0).repeat(times, axis=1)


def _scores(config: ConfigDict, run: str, data_dir: str | None, workers: int) -> dict[str, Any]:
    """Accuracy by class and confusions of a classifier on at most 2,000 evaluation images; {} for other runs."""
    record = json.loads((epath.Path(run) / "model.json").read_text())
    if "classifier" not in record:
        return {}
    model = SuiteClassifier(run, workers=workers)
    whole = labelled(open_source(config.data.source, split=config.data.eval_split, data_dir=data_dir), "of a report")
    source = some_of(whole, _CLASSIFIED, seed=config.seed)
    answers, _ = model.answers(source)
    names = list(source.class_names)
    note = f"split {config.data.eval_split}"
    note += "" if source is whole else f", {len(source):,} of its {len(whole):,} images, drawn at random"
    return score(answers, names) | {"note": note}
