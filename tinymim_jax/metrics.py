"""Numbers of a run: averages kept on the device, and where they are written."""

import json
import pathlib
import tempfile
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from clu import metrics as clu_metrics
from etils import epath

_LINES, _EVENTS = "metrics.jsonl", "tensorboard"
_COPY_SECONDS = 60.0

# Averages by name; a pytree, so it lives in the step and is merged on the device.
Averages = dict[str, clu_metrics.Average]


def averages(values: Mapping[str, jax.Array], counted: jax.Array) -> Averages:
    """Averages of `values` (each [n]) where `counted` (bool [n]) is True; the rest may even be NaN."""
    for name, value in values.items():
        # clu drops a mask of another shape without a word.
        if value.shape != counted.shape:
            raise ValueError(f"metric {name!r} has shape {value.shape}, but its mask has {counted.shape}")
    return {
        name: clu_metrics.Average.from_model_output(jnp.where(counted, value, 0).astype(jnp.float32), mask=counted)
        for name, value in values.items()
    }


def no_averages(names: tuple[str, ...]) -> Averages:
    """Averages over nothing yet."""
    return {name: clu_metrics.Average.empty() for name in names}


def merge(first: Averages, second: Averages) -> Averages:
    """Averages over both."""
    return {name: first[name].merge(second[name]) for name in second}


def compute(values: Averages) -> dict[str, float]:
    """Averages as floats; waits for the device. NaN where nothing was counted."""
    host = jax.device_get(values)
    return {name: float(v.total) / float(v.count) if v.count else float("nan") for name, v in host.items()}


class Writer:
    """Appends to WORKDIR/metrics.jsonl, one line a call, and to TensorBoard event files in WORKDIR/tensorboard.

    Only process 0 writes. Lines of steps that a killed run had reached beyond its last checkpoint go on resuming. To
    what lies in a bucket nothing can be appended: there both are written on this machine and copied every minute.
    """

    def __init__(self, workdir: epath.PathLike, *, start_step: int, active: bool):
        self._active = active
        if not active:
            return
        workdir = epath.Path(workdir)
        self._remote = workdir if "://" in str(workdir) else None
        local = pathlib.Path(workdir)
        if self._remote:
            self._scratch = tempfile.TemporaryDirectory(prefix="tinymim-metrics-")
            local = pathlib.Path(self._scratch.name)
            if (workdir / _LINES).exists():
                (workdir / _LINES).copy(local / _LINES)
        self._local = local
        if (local / _LINES).exists():
            _keep_until(local / _LINES, start_step)
        self._file = (local / _LINES).open("a", encoding="utf-8")
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
        if self._remote and time.monotonic() - self._copied_at > _COPY_SECONDS:
            self._events.flush()
            self._copy()

    def close(self) -> None:
        """Flushes and closes both."""
        if not self._active:
            return
        self._file.close()
        self._events.close()
        if self._remote:
            self._copy()
            self._scratch.cleanup()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _copy(self) -> None:
        assert self._remote is not None
        (self._remote / _EVENTS).mkdir(parents=True, exist_ok=True)
        for path in (self._local / _LINES, *(self._local / _EVENTS).iterdir()):
            epath.Path(path).copy(self._remote / path.relative_to(self._local), overwrite=True)
        self._copied_at = time.monotonic()


def read(path: epath.PathLike) -> list[dict]:
    """The lines of a metrics.jsonl; a last line cut short by a crash is left out."""
    rows = []
    for line in epath.Path(path).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def _keep_until(path: pathlib.Path, step: int) -> None:
    kept = [row for row in read(path) if row["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
    temporary.replace(path)


def _json_number(value: float) -> float | None:
    # JSON has no NaN; null is what readers of JSONL expect.
    value = float(value)
    return value if value - value == 0 else None
