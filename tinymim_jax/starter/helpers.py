"""The child processes that `tinymim distill` runs one after another; they are stopped when it is."""

import importlib.util
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from tinymim_jax.errors import unknown
from tinymim_jax.resume import as_json
from tinymim_jax.runtime.exits import DONE, INTERRUPTED, PREEMPTED
from tinymim_jax.runtime.files import write_json
from tinymim_jax.sweeps.children import Children, failure_reason
from tinymim_jax.sweeps.points import LOG, Point, Run

log = logging.getLogger(__name__)

EXPORTS = {"onnx": "model.onnx", "litert": "model.tflite", "stablehlo": "model.stablehlo", "hub": "model"}
"""Formats of the exported model, and the file or folder that it is written to."""

# Optional packages that a format needs.
_NEEDED = {"onnx": "onnx", "litert": "litert_converter", "stablehlo": "flatbuffers"}
WORK = "work"
_MOST_WORKERS = 16


class Failed(Exception):
    """A child process failed; the message says which and why."""


class Stopped(Exception):
    """Ctrl-C or SIGTERM; finished work is kept."""


class Helpers:
    """Runs child processes with results in OUTPUT/work and a log in OUTPUT/log.txt. Use it as a context manager.

    Methods that run a process raise Failed if it fails, and Stopped if it was asked to stop.
    """

    def __init__(self, output: pathlib.Path, compile_cache: str):
        self._output, self._compile_cache = output, compile_cache
        self._children = Children()

    def __enter__(self) -> "Helpers":
        self._children.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self._children.__exit__(*error)

    def compute(self, function: str, name: str = "", **arguments: Any) -> dict[str, Any]:
        """Runs a function of starter/child.py and returns its result, which is kept in work/NAME.json."""
        work = self._output / WORK
        work.mkdir(parents=True, exist_ok=True)
        name = name or function
        request, result = work / f"{name}.request.json", work / f"{name}.json"
        result.unlink(missing_ok=True)
        write_json(request, arguments | {"compile_cache": self._compile_cache})
        words = ["tinymim_jax.starter.child", function, str(request), str(result)]
        self._run(words, name.replace("_", " "))
        return json.loads(result.read_text())

    def measure(self, name: str, config: ConfigDict, data_dir: str | None, workers: int) -> dict[str, Any]:
        """See child.measure."""
        log.info("measuring a step of the %s", name)
        arguments = {"config": as_json(config), "data_dir": data_dir, "workers": workers}
        return self.compute("measure", f"measure_{name}", **arguments)

    def knn(
        self,
        name: str,
        config: ConfigDict,
        checkpoint: str,
        neighbors: int,
        data_dir: str | None,
        workers: int,
        initial: str = "",
    ) -> dict[str, Any]:
        """See child.knn. An earlier result of that name is returned at once."""
        known = self._output / WORK / f"knn_{name}.json"
        if known.exists():
            return json.loads(known.read_text())
        return self.compute(
            "knn",
            f"knn_{name}",
            config=as_json(config),
            checkpoint=checkpoint,
            neighbors=neighbors,
            data_dir=data_dir,
            workers=workers,
            initial=initial,
        )

    def prepare(self, source: str, folder: pathlib.Path, name: str, short_side: int, data_dir: str | None) -> None:
        """Converts the images; returns at once if that is done."""
        words = ["prepare", source, "--output", str(folder), "--name", name, "--short_side", str(short_side)]
        words += ["--upright", *(["--data_dir", data_dir] if data_dir else [])]
        self._run(["tinymim_jax", *words], "prepare")

    def train(self, run: Run, options: Sequence[str]) -> None:
        """Trains to the end; returns at once if that is done."""
        self._children.options = tuple(options)
        state = self._children.run_point(Point("", 0, None, {}, {}, (run,)))
        if self._children.stopping or state.name == "interrupted":
            raise Stopped
        if state.name != "finished":
            reason = _explained(state.detail, self._output)
            raise Failed(f"{run.name} {state.name}: {reason}\nThe log is {run.workdir / LOG}")

    def export(self, checkpoint: pathlib.Path, output: pathlib.Path, to: str, *, logits: bool) -> str:
        """Exports the checkpoint and returns the path; "" for `to`='none'."""
        if to == "none":
            return ""
        to = export_format(to)
        path = output / EXPORTS[to]
        if not path.exists():
            words = ["export", str(checkpoint), "--to", to, "--output", str(path)]
            self._run(["tinymim_jax", *words, *([] if logits else ["--features", "mean"])], "export")
        return str(path)

    def report(self, output: pathlib.Path, data_dir: str | None) -> str:
        """Writes report.html. A failure is only logged, since all other results exist."""
        words = ["report", str(output), *(["--data_dir", data_dir] if data_dir else [])]
        try:
            self._run(["tinymim_jax", *words, "--compile_cache", self._compile_cache], "report")
        except Failed as error:
            log.warning("%s", error)
            return ""
        return str(output / "report.html")

    def plan(
        self, topology: str, config: ConfigDict, data_dir: str | None, *, name: str = "", memory: int | None = None
    ) -> dict[str, Any]:
        """See child.plan."""
        log.info("planning%s for %s: compiling takes minutes", name.replace("plan_", " the "), topology)
        name = name or f"plan_{re.sub(r'[^a-z0-9]+', '-', topology)}"
        arguments = {"config": as_json(config), "topology": topology, "data_dir": data_dir, "memory": memory}
        return self.compute("plan", name, **arguments)

    def reading(self, name: str, config: ConfigDict, data_dir: str | None, workers: int) -> float:
        """Seconds to read and augment a batch; see child.read."""
        arguments = {"config": as_json(config), "data_dir": data_dir, "workers": workers}
        return self.compute("read", f"read_{name}", **arguments)["seconds"]

    def training_words(self, data_dir: str | None, workers: int) -> list[str]:
        """Options of every `tinymim train`."""
        words = ["--workers", str(workers), "--compile_cache", self._compile_cache]
        return [*words, *(["--data_dir", data_dir] if data_dir else [])]

    def workers(self, platform: str) -> int:
        """Number of processes that decode images; 0 where the CPU trains, since threads of that process do as well."""
        return 0 if platform == "cpu" else min(_MOST_WORKERS, max(1, (os.cpu_count() or 1) - 1))

    def _run(self, words: Sequence[str], name: str) -> None:
        code, tail = self._children.run_words(words, self._output / LOG, prefix=f"{name} | ")
        if self._children.stopping or code in (INTERRUPTED, PREEMPTED):
            raise Stopped
        if code != DONE:
            raise Failed(f"{name}: {_explained(failure_reason(tail, code), self._output)}")


def export_format(given: str) -> str:
    """The format for a value of --export; "auto" is onnx if it is installed, else hub."""
    if given == "auto":
        return "onnx" if importlib.util.find_spec("onnx") else "hub"
    if given not in EXPORTS:
        raise unknown("--export", given, ("auto", "none", *EXPORTS))
    return given


def check_export(given: str, student: str) -> None:
    """Raises ValueError or ImportError if the student cannot be exported in the format. Call it before long work.

    Args:
      given: the value of --export.
      student: the value of --student.
    """
    if given == "none":
        return
    to = export_format(given)
    if to in _NEEDED and not importlib.util.find_spec(_NEEDED[to]):
        raise ImportError(f"--export {to} needs more packages: pip install 'tinymim-jax[{to}]'; or give another format")
    if to == "hub" and student == "hybrid":
        raise ValueError(
            "--student hybrid: a convolutional stem has no form in timm, which --export hub writes for: pip install "
            "'tinymim-jax[onnx]' and give --export onnx, or --export none"
        )


def _explained(reason: str, output: pathlib.Path) -> str:
    if re.match(r"killed by SIGKILL", reason):
        return (
            f"{reason}\nProbably the memory of this machine was exhausted: give a smaller train.batch_size, "
            "--workers 0 or a smaller --student"
        )
    if "No space left" in reason:
        return f"{reason}\n{shutil.disk_usage(output).free / 1e6:.0f} MB are free: make room and run the command again"
    return reason
