"""Averages over training steps, metrics over an evaluation split, and the files that both are written to."""

import contextlib
import dataclasses
import json
import logging
import pathlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics as clu_metrics
from etils import epath

from tinymim_jax.runtime.files import with_retries, write_text

_log = logging.getLogger(__name__)

LINES, _EVENTS = "metrics.jsonl", "tensorboard"
_COPY_SECONDS = 60.0

# Averages by name; a pytree, so it lives in the step and is merged on the device.
Averages = dict[str, clu_metrics.Average]


def averages(values: Mapping[str, jax.Array], counted: jax.Array) -> Averages:
    """Averages of `values` (each [n]) over the entries where `counted` (bool [n]) is True; the others may be NaN."""
    for name, value in values.items():
        # clu ignores a mask of another shape silently.
        if value.shape != counted.shape:
            raise ValueError(f"metric {name!r} has shape {value.shape}, but its mask has {counted.shape}")
    return {
        name: clu_metrics.Average.from_model_output(jnp.where(counted, value, 0).astype(jnp.float32), mask=counted)
        for name, value in values.items()
    }


def no_averages(names: tuple[str, ...]) -> Averages:
    """The averages of no values, to start from."""
    return {name: clu_metrics.Average.empty() for name in names}


def merge(first: Averages, second: Averages) -> Averages:
    """Averages over the values of both."""
    return {name: first[name].merge(second[name]) for name in second}


def compute(values: Averages) -> dict[str, float]:
    """Averages as floats, read from the device; NaN where nothing was counted."""
    host = jax.device_get(values)
    return {name: float(v.total) / float(v.count) if v.count else float("nan") for name, v in host.items()}


@dataclasses.dataclass(frozen=True)
class Metric:
    """How a split is evaluated: arrays for each example, their sums over the split, and figures computed from those.

    values: (params, frozen, batch, key) -> arrays [batch, ...] by name. Runs under jit, on all devices. Rows of padding
      may hold anything, even NaN: they are left out.
    result: (arrays by name, number of examples) -> figures by name, on the host, once at the end. Each array is the
      sum of `values` over all examples of the split without the batch axis: float64, or int64 where `values` gives
      integers or booleans. So a mean is `sums["loss"] / examples`, and a confusion matrix [batch, classes, classes]
      arrives as int64 [classes, classes]. A figure with a slash in its name ("iou/wall") is recorded but not logged.
    gathered: names in `values` that are not summed: `result` gets the rows of all examples [examples, ...], in the
      order of the split. For figures that need every prediction at once, such as detection's average precision.
    """

    values: Callable[[Any, Any, dict[str, Any], jax.Array], Mapping[str, jax.Array]]
    result: Callable[[dict[str, np.ndarray], int], dict[str, float]]
    gathered: tuple[str, ...] = ()


def means(sums: Mapping[str, np.ndarray], examples: int) -> dict[str, float]:
    """The `result` of a Metric whose figures are plain averages of its values."""
    return {name: float(total) / examples for name, total in sums.items()}


def reduce_batch(metric: Metric, values: Mapping[str, jax.Array], valid: jax.Array) -> dict[str, jax.Array]:
    """Sums over the valid rows of one batch, or the rows themselves where they are gathered; pure, for use under jit.

    Args:
      values: from `metric.values`.
      valid: bool [batch], False for padding.
    """
    reduced = {}
    for name, value in values.items():
        if value.shape[:1] != valid.shape:
            raise ValueError(f"metric {name!r} has shape {value.shape}: its first axis must be the batch, {len(valid)}")
        if name not in metric.gathered:
            rows = valid.reshape(-1, *[1] * (value.ndim - 1))
            dtype = jnp.float32 if jnp.issubdtype(value.dtype, jnp.floating) else jnp.int32
            value = jnp.sum(jnp.where(rows, value, 0), axis=0, dtype=dtype)
        reduced[name] = value
    return reduced


class Tally:
    """Adds up the batches of one evaluation on the host, in 64 bits."""

    def __init__(self, metric: Metric):
        self._metric = metric
        self._pending: tuple[Mapping[str, jax.Array], jax.Array] | None = None
        self._sums: dict[str, np.ndarray] = {}
        self._rows: dict[str, list[np.ndarray]] = {name: [] for name in metric.gathered}
        self._examples = 0

    def add(self, reduced: Mapping[str, jax.Array], valid: jax.Array) -> None:
        """Counts one more batch.

        Args:
          reduced: from `reduce_batch`, on the device; every process holds all of it. It is read by the next call, so
            that the device computes one batch while the host waits for the one before.
          valid: as given to `reduce_batch`.
        """
        before, self._pending = self._pending, (reduced, valid)
        self._read(before)

    def result(self) -> tuple[dict[str, float], int]:
        """(figures, number of examples counted); no figures where there was no example."""
        self._read(self._pending)
        self._pending = None
        if not self._examples:
            return {}, 0
        rows = {name: np.concatenate(parts) for name, parts in self._rows.items()}
        return self._metric.result(self._sums | rows, self._examples), self._examples

    def _read(self, batch: tuple[Mapping[str, jax.Array], jax.Array] | None) -> None:
        if batch is None:
            return
        reduced, valid = jax.device_get(batch)
        self._examples += int(np.sum(valid))
        for name, value in reduced.items():
            if name in self._rows:
                self._rows[name].append(value[valid])
            else:
                value = value.astype(np.float64 if np.issubdtype(value.dtype, np.floating) else np.int64)
                self._sums[name] = self._sums[name] + value if name in self._sums else value


class Writer:
    """Appends to WORKDIR/metrics.jsonl, one line a call, and to TensorBoard event files in WORKDIR/tensorboard.

    Only process 0 writes. When a run is resumed, lines of steps after its checkpoint are removed.
    Objects in a bucket cannot be appended to: for those, both are written on this machine and uploaded every minute.
    `others` is called with the same step and figures, for trackers such as those of `--log` (loggers.py).
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        start_step: int,
        active: bool,
        others: Callable[[int, Mapping[str, float]], None] | None = None,
    ):
        self._active, self._others = active, others
        if not active:
            return
        workdir = epath.Path(workdir)
        self._remote = workdir if "://" in str(workdir) else None
        local = pathlib.Path(workdir)
        if self._remote:
            self._scratch = tempfile.TemporaryDirectory(prefix="tinymim-metrics-")
            local = pathlib.Path(self._scratch.name)
            with contextlib.suppress(FileNotFoundError):
                text = with_retries((workdir / LINES).read_text, f"reading {workdir / LINES}")
                write_text(local / LINES, text)
        self._local = local
        if (local / LINES).exists():
            _keep_until(local / LINES, start_step)
        self._file = (local / LINES).open("a", encoding="utf-8")
        # Slow to import (a second), and only the writing process needs it.
        from tensorboardX import SummaryWriter

        self._events = SummaryWriter(str(local / _EVENTS), purge_step=start_step + 1)  # the first that is hidden
        self._copied_at = time.monotonic()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` at `step`; names may hold slashes ("train/loss")."""
        if not self._active:
            return
        line = {"step": step, "time": round(time.time(), 3)} | {k: _json_number(v) for k, v in values.items()}
        try:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(f"cannot write {self._file.name}: {error.strerror}; is the disk full?") from error
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        if self._others:
            self._others(step, values)
        if self._remote and time.monotonic() - self._copied_at > _COPY_SECONDS:
            self._events.flush()
            self._copied_at = time.monotonic()
            try:
                self._copy()
            except Exception as error:  # training does not depend on it, and in a minute it is tried again
                _log.warning("metrics could not be copied to %s, trying again later: %r", self._remote, error)

    def close(self) -> None:
        """Flushes and closes both."""
        if not self._active:
            return
        self._file.close()
        self._events.close()
        if not self._remote:
            return
        try:
            with_retries(self._copy, f"copying metrics to {self._remote}")
        except OSError as error:
            kept = pathlib.Path(tempfile.mkdtemp(prefix="tinymim-metrics-"))
            shutil.copytree(self._local, kept, dirs_exist_ok=True)
            _log.error("%s. They are kept in %s", error, kept)
        self._scratch.cleanup()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _copy(self) -> None:
        assert self._remote is not None
        (self._remote / _EVENTS).mkdir(parents=True, exist_ok=True)
        for path in (self._local / LINES, *(self._local / _EVENTS).iterdir()):
            epath.Path(path).copy(self._remote / path.relative_to(self._local), overwrite=True)


def read(path: epath.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl; a line that a crash cut short is left out."""
    rows = []
    for line in epath.Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _keep_until(path: pathlib.Path, step: int) -> None:
    kept = [row for row in read(path) if row["step"] <= step]
    write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def _json_number(value: float) -> float | None:
    # JSON has no NaN; null is what readers of JSONL expect.
    value = float(value)
    return value if value - value == 0 else None
