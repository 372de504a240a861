"""Measures the blocks of a network and its teacher on some images: CKA, attention, relations, accuracies."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from tinymim_jax.analysis.charts import analysis_charts
from tinymim_jax.analysis.images import batches_of, rows_of, some_of
from tinymim_jax.analysis.networks import Network, Networks, find_networks
from tinymim_jax.analysis.relations import common_heads, relation_kl_of_blocks
from tinymim_jax.analysis.tap import last_stage, suggest_tap
from tinymim_jax.data.sources.labels import LabelError
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.evaluation.features import labelled_splits
from tinymim_jax.evaluation.similarity import (
    attention_distance,
    attention_entropy,
    cka,
    effective_rank,
    gram,
    knn_accuracy,
    linear_accuracy,
)
from tinymim_jax.pages.charts import standalone
from tinymim_jax.runtime.files import write_json, write_text
from tinymim_jax.runtime.runs import newest_checkpoint

log = logging.getLogger(__name__)

IMAGES, LABELLED = 256, 2000
_BATCH, _RELATION_BATCH = 32, 4
_LEAST = 20  # labelled images and neighbors that k-NN needs


def analyze(
    checkpoint: str,
    config: ConfigDict,
    *,
    images: int = IMAGES,
    labelled: int = LABELLED,
    teacher: str | None = None,
    data_dir: str | None = None,
    workers: int = 0,
) -> dict[str, Any]:
    """All measurements of one checkpoint and its teacher, as plain JSON.

    networks: by name ("student" and "teacher", or "encoder"): embed_dim, depth, and a list of blocks (stages of a
      convolutional network). Each has effective_rank; with attention also attention_distance (pixels) and
      attention_entropy (nats) of each head; with labels also the top-1 of k-NN and of a linear classifier.
    cka: by "first|second" the matrix [blocks, blocks].
    relation_kl: by relation [student blocks][teacher blocks][heads]; only if the teacher has attention.
    compared: the pairs of blocks that the checkpoint was trained on.
    tap: the suggested block of the teacher (or encoder) to distil from; see tap.suggest_tap.
    step: step of the checkpoint; None for a converted one.

    Args:
      checkpoint: a run, or what `tinymim convert` wrote.
      config: its data, image size and seed are used.
      images: number of evaluation images for CKA and attention; relations are measured on an eighth of them.
      labelled: number of training images for k-NN and the linear classifier; half as many evaluation images are
        classified. 0: no accuracies.
      teacher: a checkpoint to compare with in place of the recorded teacher.

    Raises ValueError for less than 4 images.
    """
    if images < 4 or labelled < 0:
        raise ValueError(f"images={images}, labelled={labelled}: CKA needs at least 4 images; choose labelled from 0")
    networks = find_networks(checkpoint, image_size=tuple(config.model.image_size), teacher=teacher)
    source = some_of(
        open_source(config.data.source, split=config.data.eval_split, data_dir=data_dir), images, seed=config.seed
    )
    if len(source) < 4:
        raise ValueError(f"split {config.data.eval_split!r} has {len(source)} images, and CKA needs 4")
    batch = min(_BATCH, len(source))
    used = len(source) // batch * batch
    measured = _measured(networks, some_of(source, used), config, batch, workers)
    found: dict[str, Any] = {
        "checkpoint": checkpoint,
        "step": (newest_checkpoint(epath.Path(checkpoint).expanduser()) or {}).get("step"),
        "images": used,
        "compared": [list(pair) for pair in networks.compared],
        "networks": {one.name: _described(one, measured[one.name]) for one in networks.members},
        "cka": _similarities(networks, measured),
    }
    if networks.teacher is not None and networks.teacher.attends:
        some = some_of(source, max(4, used // 8), seed=1)
        found |= _relations(networks, some, config, workers)
        found["relation_images"] = len(some)
    found |= _accuracies(networks, found["networks"], config, labelled, data_dir, workers)
    last = networks.members[-1]
    suggest = suggest_tap if last.attends else last_stage
    found["tap"] = suggest(found["networks"][last.name]["blocks"], last.name, found["labelled"]["queries"])
    found["note"] = _note(found, config, networks)
    return found


def write_analysis(found: dict[str, Any], folder: epath.Path) -> list[str]:
    """Writes analysis.json and each chart as an SVG file into `folder`; returns their names."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "analysis.json", found)
    charts = analysis_charts(found, inside=True)
    for chart in charts:
        write_text(folder / f"{chart.name}.svg", standalone(chart.svg))
    return ["analysis.json", *(f"{chart.name}.svg" for chart in charts)]


def _measured(networks: Networks, source: Any, config: ConfigDict, size: int, workers: int) -> dict[str, Any]:
    """For each network its Gram matrices [batches, blocks, n, n], and the attention figures [heads] of each block."""
    steps = {one.name: jax.jit(_measures(one)) for one in networks.members}
    found: dict[str, list] = {one.name: [] for one in networks.members}
    with batches_of(source, config, size, workers=workers) as batches:
        for batch in batches:
            for one in networks.members:
                found[one.name].append(jax.device_get(steps[one.name](one.params, jnp.asarray(batch["image"]))))
    result = {}
    for name, each in found.items():
        grams = np.stack([values["gram"] for values in each])
        heads = {
            key: [np.mean([values[key][b] for values in each], axis=0) for b in range(grams.shape[1])]
            for key in each[0].keys() - {"gram"}
        }
        result[name] = {"gram": grams} | heads
    return result


def _measures(network: Network) -> Any:
    def step(params: Any, images: jax.Array) -> dict[str, Any]:
        taps, vit = network.taps(params, images), network.vit
        found: dict[str, Any] = {"gram": jnp.stack([gram(tap.output[:, vit.prefix :]) for tap in taps])}
        if network.attends:
            weights = network.attention(params, taps)
            found["attention_distance"] = [attention_distance(w, vit.grid, vit.patch_size).mean(0) for w in weights]
            found["attention_entropy"] = [attention_entropy(w).mean(0) for w in weights]
        return found

    return step


def _described(network: Network, measured: dict[str, Any]) -> dict[str, Any]:
    figures = sorted(measured.keys() - {"gram"})
    blocks = [{"block": b + 1} | {key: _rounded(measured[key][b]) for key in figures} for b in range(network.vit.depth)]
    return {"embed_dim": network.vit.embed_dim, "depth": network.vit.depth, "blocks": blocks}


def _similarities(networks: Networks, measured: dict[str, Any]) -> dict[str, Any]:
    names = [one.name for one in networks.members]
    pairs = [(first, second) for i, first in enumerate(names) for second in names[i:]]
    pairs.sort(key=lambda pair: pair[0] == pair[1])  # student and teacher first
    return {f"{a}|{b}": _rounded(cka(measured[a]["gram"], measured[b]["gram"])) for a, b in pairs}


def _relations(networks: Networks, source: Any, config: ConfigDict, workers: int) -> dict[str, Any]:
    student, teacher = networks.student, networks.teacher
    assert teacher is not None
    heads = common_heads(student, teacher, networks.compared)
    step = jax.jit(relation_kl_of_blocks(student, teacher, heads))
    batches = batches_of(source, config, min(_RELATION_BATCH, len(source)), workers=workers)
    rows = rows_of(lambda batch: step(student.params, teacher.params, jnp.asarray(batch["image"])), batches)
    return {
        "relation_heads": heads,
        "relation_kl": {name: _rounded(values.mean(axis=0, dtype=np.float64)) for name, values in rows.items()},
    }


def _accuracies(
    networks: Networks, described: dict[str, Any], config: ConfigDict, labelled: int, data_dir: str | None, workers: int
) -> dict[str, Any]:
    """Adds effective rank, k-NN and linear accuracy to `described`; returns the numbers of images."""
    try:
        splits = labelled_splits(config, data_dir=data_dir, purpose="k-NN and linear accuracy of blocks need them")
    except LabelError as error:
        log.info("no accuracies of blocks: %s", error)
        splits = None
    if splits is None:
        train = open_source(config.data.source, split=config.data.train_split, data_dir=data_dir)
    else:
        train = splits.train
    bank = some_of(train, max(labelled, _LEAST), seed=config.seed)
    enough = splits is not None and labelled > 0 and len(bank) >= _LEAST
    queries = some_of(splits.evaluated, max(labelled // 2, 1), seed=config.seed) if enough and splits else None
    for one in networks.members:
        step = jax.jit(_pooled(one))
        rows = []
        for source in (bank, queries):
            if source is None:
                continue
            batches = batches_of(source, config, min(_BATCH, len(source)), workers=workers)
            rows.append(
                rows_of(lambda b, one=one, step=step: (step(one.params, jnp.asarray(b["image"])), b["label"]), batches)
            )
        (features, labels), *others = rows
        for block, values in enumerate(described[one.name]["blocks"]):
            values["effective_rank"] = round(effective_rank(features[block]), 3)
            if splits is not None and others:
                asked, own = others[0][0][block], splits.class_order[others[0][1]]
                data = (features[block], labels, asked, own, splits.train.classes)
                values |= {"knn": knn_accuracy(*data), "linear": linear_accuracy(*data)}
    return {"labelled": {"bank": len(bank) if queries else 0, "queries": len(queries) if queries else 0}}


def _pooled(network: Network) -> Any:
    def step(params: Any, images: jax.Array) -> list[jax.Array]:
        prefix = network.vit.prefix
        # A list, since stages of a convolutional network differ in width.
        return [tap.output.astype(jnp.float32)[:, prefix:].mean(axis=1) for tap in network.taps(params, images)]

    return step


def _note(found: dict[str, Any], config: ConfigDict, networks: Networks) -> str:
    parts = [f"{found['images']} images of {config.data.source}, split {config.data.eval_split}"]
    if "relation_images" in found:
        parts.append(f"relations of {found['relation_images']} of them, in {found['relation_heads']} heads")
    if found["labelled"]["queries"]:
        parts.append(f"accuracies of {found['labelled']['queries']} images among {found['labelled']['bank']} labelled")
    for one in networks.members:
        if not one.attends:
            parts.append(f"the {one.name} is convolutional: its blocks are stages, without attention and relations")
    step = "" if found["step"] is None else f" Checkpoint of step {found['step']}."
    return "; ".join(parts) + "." + step


def _rounded(values: Any) -> Any:
    return np.asarray(np.vectorize(lambda value: float(f"{value:.5g}"))(np.asarray(values, np.float64))).tolist()
