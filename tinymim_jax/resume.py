"""Whether a run may be resumed: compares its original config and inputs with the present ones."""

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.params import STUDENTS
from tinymim_jax.class_names import describe_difference
from tinymim_jax.config import from_json
from tinymim_jax.metrics import LINES
from tinymim_jax.runtime.exits import is_first
from tinymim_jax.runtime.files import read_json, write_json
from tinymim_jax.runtime.progress import steps
from tinymim_jax.runtime.workdir import CONFIG, RESULT
from tinymim_jax.tasks import TASKS

# Keys that say how a run is carried out and not what is trained. They may differ when it is resumed, and config.json
# is then updated. Everything else needs another workdir.
MAY_CHANGE: dict[str, str] = {
    "train.log_every": "how often the log is written",
    "train.eval_every": "evaluation leaves the training as it is",
    "train.probe_every": "probes leave the training as it is",
    "train.probe_images": "probes leave the training as it is",
    "train.max_skipped": "when to give up",
    "train.accumulate": "the update is the same up to rounding, for another amount of memory",
    "checkpoint.every_minutes": "how often the state is saved",
    "checkpoint.keep": "how many states are kept",
    "model.scan": "the same computation, compiled differently",
    "model.remat": "the same computation, for another amount of memory",
    "model.attention": "the same computation by another kernel",
    "distill.relation_form": "the same computation by another kernel",
}

# Keys of MAY_CHANGE that may not where batch norm averages over a micro-batch (TaskType.batch_norm).
_FIXED_BY_BATCH_NORM = ("train.accumulate",)

# Places: the content counts, and is compared by what resume.json records. A data set may move, but not change its kind.
_PLACES = re.compile(r"data\.source|.*\bteacher\.path|distill\.teachers\.\w+\.path")
_DURATION = "train.duration"
_RECORD = "resume.json"

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run is trained with, beside its config.

    frozen: digest of the frozen weights: the teacher's, or of the encoder below a probe.
    class_names: of the training data.
    train_images, eval_images: how many there are.
    micro_batches: of a step, where train.accumulate=0 had them found; not compared, but used again: what is drawn at
      random depends on it.
    """

    frozen: str
    class_names: tuple[str, ...]
    train_images: int
    eval_images: int
    micro_batches: int = 0


def recorded_micro_batches(workdir: epath.Path) -> int:
    """The number of micro-batches that was found when the run was begun; 0 where there is none."""
    return int(_recorded(workdir).get("micro_batches", 0))


def check_same(workdir: epath.Path, config: ConfigDict, *, extend: bool = False) -> dict[str, tuple[Any, Any]]:
    """The keys in which `config` differs from that of the run in `workdir`, with both values; {} for a new workdir.

    Where nothing was trained, because the first command had a mistake, all keys may differ.

    Args:
      extend: a longer train.duration is accepted. Whether it is longer is checked by `accept`.

    Raises ValueError if a key differs that makes it another experiment.
    """
    path = epath.Path(workdir) / CONFIG
    if not path.exists():
        return {}
    stored = read_json(path)
    there, here = flat(as_json(from_json(stored))), flat(as_json(config))
    changes = {key: (there.get(key), here.get(key)) for key in sorted(there | here) if there.get(key) != here.get(key)}
    recorded = (epath.Path(workdir) / _RECORD).exists()
    fixed = _FIXED_BY_BATCH_NORM if config.task in TASKS and TASKS[config.task].batch_norm else ()
    refused = [
        key for key in changes if key in fixed or not (_may_change(key, *changes[key], recorded) or key == _DURATION)
    ]
    if (refused or _DURATION in changes) and not _was_trained(workdir):
        return changes
    if refused:
        why = "\nBatch norm averages over a micro-batch, so their number changes what is trained" if fixed else ""
        raise ValueError(
            f"{workdir} holds another experiment:\n{_listed({key: changes[key] for key in refused})}"
            f"{why if set(refused) & set(fixed) else ''}\n"
            "Choose another --workdir, or delete it. Keys that may change: "
            f"{', '.join(key for key in MAY_CHANGE if key not in fixed)}"
        )
    if _DURATION in changes and not extend:
        old, new = changes[_DURATION]
        raise ValueError(
            f"{workdir} was begun with train.duration={old!r}, and {new!r} is asked for. With --extend a run continues "
            "for longer: the learning rate then follows the cosine of the new length from the step that was reached. "
            "Otherwise choose another --workdir, or delete it"
        )
    return changes


def check_inputs(workdir: epath.Path, inputs: Inputs, *, frozen_before: str | None = None) -> None:
    """Raises ValueError, naming each with both values, if the run was begun with other inputs than these.

    Args:
      frozen_before: the digest of the frozen weights in the newest checkpoint; for runs without a record.
    """
    before = _recorded(workdir)
    if not before and frozen_before is not None:
        log.info("%s does not record its class names and numbers of images: they are not compared", workdir)
        before = {"frozen": frozen_before}
    if rows := _differences(before, inputs):
        raise ValueError(
            f"{workdir} was trained with other inputs, although its config is the same:\n" + "\n".join(rows) + "\n"
            "Put back what the run was begun with, or choose another --workdir"
        )


def accept(
    workdir: epath.Path,
    config: ConfigDict,
    inputs: Inputs,
    changes: Mapping[str, tuple[Any, Any]],
) -> None:
    """Records inputs and config in the workdir; call it when all checks have passed.

    A finished run that is extended loses its result.json.

    Args:
      changes: from `check_same`.

    Raises ValueError for a duration that is not longer.
    """
    trained = _was_trained(workdir)
    if changes and not trained:
        log.info("%s has another config but no checkpoint: it starts again with this config", workdir)
    if _DURATION in changes and trained:
        old, new = (
            steps(duration, examples=inputs.train_images, batch_size=config.train.batch_size, name=_DURATION)
            for duration in changes[_DURATION]
        )
        if new <= old:
            raise ValueError(
                f"--extend needs a longer train.duration: {new} steps are asked for, and {old} were before"
            )
        log.info("train.duration: %d steps in place of %d; the learning rate follows the new schedule", new, old)
    for key, (old, new) in changes.items():
        log.info("%s was %r and is now %r", key, old, new)
    if not is_first():
        return
    if _DURATION in changes and trained:
        (workdir / RESULT).unlink(missing_ok=True)
    if changes:
        write_json(workdir / CONFIG, as_json(config))
    if changes and not trained and (students := workdir / STUDENTS).exists():
        students.rmtree()  # descriptions of the students of the other config
    record = dataclasses.asdict(inputs) | {"class_names": list(inputs.class_names)}
    if record != _recorded(workdir):
        write_json(workdir / _RECORD, record)


def as_json(config: ConfigDict) -> dict[str, Any]:
    """A config as config.json holds it."""
    return json.loads(json.dumps(config.to_dict()))


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: {"model": {"depth": 4}} -> {"model.depth": 4}."""
    rows = {}
    for key, value in tree.items():
        rows |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows


def _recorded(workdir: epath.Path) -> dict[str, Any]:
    path = workdir / _RECORD
    if not path.exists() or not _was_trained(workdir):
        return {}
    return read_json(path)


def _was_trained(workdir: epath.Path) -> bool:
    """Whether the workdir has a result, figures of a step, or a checkpoint."""
    folder = epath.Path(workdir)
    return (
        (folder / RESULT).exists()
        or ((rows := folder / LINES).exists() and rows.stat().length > 0)
        or ((saved := folder / "checkpoints").exists() and any(saved.iterdir()))
    )


def _may_change(key: str, old: Any, new: Any, recorded: bool) -> bool:
    if key in MAY_CHANGE:
        return True
    if not (recorded and old and new and _PLACES.fullmatch(key)):
        return False
    # The order of the examples depends on how they are stored.
    return key != "data.source" or (":" in old and old.partition(":")[0] == new.partition(":")[0])


def _differences(before: Mapping[str, Any], inputs: Inputs) -> list[str]:
    rows = []
    if difference := describe_difference(before.get("class_names", inputs.class_names), inputs.class_names):
        rows.append(f"  class names: {difference}")
    named = {
        "train_images": "training images",
        "eval_images": "evaluation images",
        "frozen": "digest of the frozen weights (of the teacher, or below the probe)",
    }
    for key, name in named.items():
        old, new = before.get(key), getattr(inputs, key)
        if old is not None and old != new:
            rows.append(f"  {name}: {old} there, {new} here")
    return rows


def _listed(changes: Mapping[str, tuple[Any, Any]]) -> str:
    return "\n".join(f"  {key}: {old!r} there, {new!r} here" for key, (old, new) in changes.items())
