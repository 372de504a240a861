"""Evaluates a classifier on test suites: one forward pass of each image, all figures from its predictions."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from tinymim_jax.class_names import match_classes
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.sources.imagenet import WORDNET_ID, imagenet_classes
from tinymim_jax.data.sources.labels import labelled
from tinymim_jax.data.sources.sources import open_source, splits
from tinymim_jax.evaluation.suites.classifier import SuiteClassifier
from tinymim_jax.evaluation.suites.registry import Suite, corruption_errors
from tinymim_jax.evaluation.suites.scores import score
from tinymim_jax.runtime.progress import format_seconds

log = logging.getLogger(__name__)


def evaluate_suites(
    model: SuiteClassifier,
    suites: Mapping[str, Suite],
    *,
    data_dir: str | None = None,
    on_result: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """The results of `model` on `suites` as plain JSON: `SuiteClassifier.describe`, and under "suites" one by name.

    Each suite has a `status`: 'evaluated', with the figures of `scores.score` and "substituted" (images that could not
    be decoded, so that another one was used); 'missing' or 'failed', with a `reason`; or 'incomplete', where some of
    its sets are missing or failed. The other suites are evaluated all the same.

    Args:
      on_result: called after each set with the results so far.

    Raises ValueError for one of ImageNet's suites and a model that has not 1,000 classes.
    """
    imagenet = [name for name, suite in suites.items() if suite.imagenet]
    if imagenet and model.classes != len(imagenet_classes()):
        raise ValueError(
            f"{model.checkpoint} has {model.classes} classes, but --suite {' '.join(imagenet)} has ImageNet's "
            f"{len(imagenet_classes()):,}: give a checkpoint that was fine-tuned on ImageNet, or a set of your own, "
            "such as --suite folder:/data/pets@test"
        )
    if imagenet and model.class_names and not _imagenet_names(model):
        named = ", ".join(model.class_names[:2])
        log.warning("%s calls its classes %s, ...: they are assumed to be in ImageNet's order", model.checkpoint, named)
    results = model.describe() | {"suites": {}}
    for name, suite in suites.items():
        parts: dict[str, dict[str, Any]] = {}
        for part in suite.sets:
            parts[part] = _part(model, suite, part, data_dir)
            results["suites"][name] = parts[""] if "" in parts else _combined(suite, parts)
            on_result(results)
    return results


def _part(model: SuiteClassifier, suite: Suite, part: str, data_dir: str | None) -> dict[str, Any]:
    began = time.perf_counter()
    try:
        source = _open(suite, part, data_dir)
    except FileNotFoundError as error:
        return {"status": "missing", "reason": str(error)}
    except (ValueError, OSError) as error:
        return _failed(error)
    try:
        figures = _figures(model, suite, source)
    except (ValueError, OSError, RuntimeError) as error:
        # Errors of the device are not the set's. And with several hosts the others may be waiting in a collective
        # operation for this one, so it cannot go on with the next set.
        if type(error).__name__ == "JaxRuntimeError" or jax.process_count() > 1:
            raise
        return _failed(error)
    seconds = time.perf_counter() - began
    log.info(
        "%s, split %s: top-1 %.2f %% of %d images, in %s",
        source.name,
        source.split,
        100 * figures["top1"],
        figures["examples"],
        format_seconds(seconds),
    )
    return {"status": "evaluated", "set": source.name, "split": source.split, "seconds": round(seconds, 2)} | figures


def _find(suite: Suite, part: str, data_dir: str | None) -> tuple[str, str]:
    """(name, split) of the first set that exists. Raises FileNotFoundError if none does."""
    missing = None
    for name in suite.sets[part]:
        if not suite.imagenet and suite.split:
            return name, suite.split  # may be a slice of a split, which only opening it can check
        try:
            return name, _split(name, suite.split, splits(name, data_dir))
        except FileNotFoundError as error:
            missing = missing or error
    raise missing or FileNotFoundError(f"no set called {suite.sets[part]}")


def _split(name: str, wanted: str | None, offered: Mapping[str, int]) -> str:
    """`wanted` if the set offers it, else its test or validation split, else its only one; otherwise ValueError."""
    usual = (wanted, "test", "validation", "val")
    split = next((each for each in usual if each in offered), None)
    if split is None and len(offered) == 1:
        split = next(iter(offered))
    if split is None:
        raise ValueError(f"{name!r} has the splits {', '.join(map(repr, offered))}: name one, {name}@SPLIT")
    return split


def _open(suite: Suite, part: str, data_dir: str | None) -> Source:
    """The data set of a part. With several hosts all of them open it, or an error is raised on all."""
    source, error = None, None
    try:
        name, split = _find(suite, part, data_dir)
        source = open_source(name, split=split, data_dir=data_dir)
    except (ValueError, OSError) as caught:
        error = caught
    if jax.process_count() > 1:
        length = np.int32(len(source) if source else -1)
        multihost_utils.assert_equal(length, f"the hosts do not find the same set: {suite.sets[part]}")
    if source is None:
        assert error is not None
        raise error
    return source


def _failed(error: Exception) -> dict[str, Any]:
    log.error("%s", error)
    return {"status": "failed", "reason": str(error)}


def _figures(model: SuiteClassifier, suite: Suite, source: Source) -> dict[str, Any]:
    source = labelled(source, "a suite is evaluated by them")
    known = _class_names(model, suite)
    indices = match_classes(
        known,
        source.class_names,
        classes=model.classes,
        subset=True,
        numbers_are_indices=suite.imagenet,  # ImageNet-V2's folders are numbers
        classifier=model.checkpoint,
        data=f"{source.name}@{source.split}",
    )
    allowed = _subset(suite, source, indices, model.classes) if suite.subset else None
    answers, substituted = model.answers(source, allowed=allowed, whole=suite.whole)
    names = list(known) or [str(index) for index in range(model.classes)]
    if not known:
        for index, name in zip(indices, source.class_names):
            names[index] = name
    several = None
    if "labels" in source[0]:
        several = [[int(indices[label]) for label in source[i].get("labels", ())] for i in range(len(source))]
    figures = score(answers._replace(label=indices[answers.label]), names, several=several)
    return figures | {"substituted": substituted}


def _class_names(model: SuiteClassifier, suite: Suite) -> tuple[str, ...]:
    """The model's class names; for ImageNet's suites WordNet ids, in ImageNet's order where they are not known."""
    return (_imagenet_names(model) or imagenet_classes()) if suite.imagenet else model.class_names


def _imagenet_names(model: SuiteClassifier) -> tuple[str, ...]:
    """WordNet ids of the model's classes where its class names are these, or numbers from 0 to 999; else ()."""
    names, classes = model.class_names, imagenet_classes()
    if names and all(WORDNET_ID.fullmatch(name) for name in names):
        return names
    if all(name.isdecimal() for name in names) and sorted(map(int, names)) == list(range(len(classes))):
        return tuple(classes[int(name)] for name in names)  # sorted as words: 0, 1, 10, 100, 101
    return ()


def _subset(suite: Suite, source: Source, indices: np.ndarray, classes: int) -> np.ndarray:
    """bool `[classes]`: the classes that the set has images of. Reads all of its labels where that is needed."""
    if source.classes == suite.subset:
        present = indices
    else:
        present = indices[np.unique([source[i]["label"] for i in range(len(source))])]
    if len(present) != suite.subset:
        raise ValueError(
            f"{source.name!r}, split {source.split!r}, has images of {len(present)} classes, but the benchmark has "
            f"{suite.subset}: is the set complete?"
        )
    return np.isin(np.arange(classes), present)


def _combined(suite: Suite, parts: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The result of a suite of several sets: means of their figures, and the figures by set without those by class.

    Of `corruptions`, also the corruption errors of those with all severities, and the mCE once all sets are done.
    """
    done = {part: found for part, found in parts.items() if found["status"] == "evaluated"}
    omitted = {"per_class", "confusions"}
    statuses = [found["status"] for found in parts.values()]
    nothing = "failed" if "failed" in statuses else "missing"
    whole: dict[str, Any] = {
        "status": "evaluated" if len(done) == len(suite.sets) else "incomplete" if done else nothing,
        "sets": {part: {key: v for key, v in found.items() if key not in omitted} for part, found in parts.items()},
    }
    if suite.corruptions:
        whole["mce"] = None
    if not done:
        return whole | {"reason": next(iter(parts.values()))["reason"]}
    for key in ("top1", "top5", "ece"):
        whole[key] = float(np.mean([found[key] for found in done.values()]))
    for key in ("examples", "substituted"):
        whole[key] = sum(found[key] for found in done.values())
    whole["classes"] = max(found["classes"] for found in done.values())
    if suite.corruptions:
        whole["corruption_errors"] = _corruption_errors(suite, done)
        if len(done) == len(suite.sets):
            whole["mce"] = float(np.mean(list(whole["corruption_errors"].values())))
    return whole


def _corruption_errors(suite: Suite, done: Mapping[str, dict[str, Any]]) -> dict[str, float]:
    """Of the corruptions whose severities are all done."""
    errors: dict[str, list[float]] = {}
    for part, found in done.items():
        errors.setdefault(part.split("/")[0], []).append(1 - found["top1"])
    severities = [part.split("/")[0] for part in suite.sets]
    return corruption_errors({name: each for name, each in errors.items() if len(each) == severities.count(name)})
