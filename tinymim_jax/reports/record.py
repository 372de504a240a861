"""The contents of a run's files, read once for its report."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from tinymim_jax.config import completed, defaults
from tinymim_jax.metrics import read
from tinymim_jax.runtime.heartbeat import read_status
from tinymim_jax.runtime.runs import read_run
from tinymim_jax.runtime.workdir import ANALYSIS, CONFIG, REPLAY


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """The contents of a run's files; missing and unreadable files are empty.

    known: from runtime.runs.read_run: stage, step, goodput, last figures.
    status: status.json; config: config.json with defaults filled in; model: model.json; inputs: resume.json.
    rows: the lines of metrics.jsonl.
    analysis, pictures, scores: results of `tinymim_jax.analysis` in the folder ANALYSIS.
    suites: results of `tinymim evaluate --suite ... --output` in the workdir, by file name.
    replays: results of `tinymim replay`, in the order of their steps.
    """

    name: str
    folder: epath.Path
    known: Mapping[str, Any]
    status: Mapping[str, Any]
    config: Mapping[str, Any]
    model: Mapping[str, Any]
    inputs: Mapping[str, Any]
    rows: list[dict[str, Any]]
    analysis: Mapping[str, Any]
    pictures: Mapping[str, Any]
    scores: Mapping[str, Any]
    suites: Mapping[str, Mapping[str, Any]]
    replays: list[dict[str, Any]]

    @property
    def changed(self) -> dict[str, tuple[Any, Any]]:
        """The config's keys that differ from the defaults of its task: (value, default)."""
        here, there = _flat(self.config), _flat(_as_json(defaults(str(self.config.get("task")))))
        return {key: (value, there.get(key)) for key, value in here.items() if value != there.get(key)}

    @property
    def evaluated(self) -> dict[str, Any]:
        """The figures of the last evaluation; those of single classes have names with a slash ("iou/wall")."""
        return {name.removeprefix("eval/"): value for name, value in self.known.get("eval", {}).items()}

    @property
    def figures(self) -> dict[str, Any]:
        """The figures of the last evaluation without those of single classes and without counts."""
        counts = ("examples", "substituted")
        return {name: value for name, value in self.evaluated.items() if "/" not in name and name not in counts}

    @property
    def students(self) -> tuple[str, ...]:
        """The students of a distillation with several, by which its figures are named; () for other runs."""
        section = self.config.get(str(self.config.get("task"))) or {}
        return ("student", *section["students"]) if section.get("students") else ()

    @property
    def seconds(self) -> float:
        """Time of all attempts together."""
        return float(sum((self.status.get("seconds") or {}).values()))


def by_student(figures: Mapping[str, Any], students: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(figures of all, figures of each student by name) of figures that are called STUDENT or STUDENT_FIGURE.

    A student's loss, which has its name alone, is called "loss".
    """
    common, own = {}, {}
    for name, value in figures.items():
        if owners := [each for each in students if name == each or name.startswith(f"{each}_")]:
            owner = max(owners, key=len)
            own.setdefault(owner, {})[name.removeprefix(owner).removeprefix("_") or "loss"] = value
        else:
            common[name] = value
    return common, own


def read_record(folder: epath.PathLike, name: str = "") -> RunRecord:
    """The record of the run in `folder`, called `name` or as the folder."""
    folder = epath.Path(folder)
    config = read_json(folder / CONFIG)
    rows = []
    with contextlib.suppress(OSError):
        rows = read(folder / "metrics.jsonl")
    found = {part: read_json(folder / ANALYSIS / f"{part}.json") for part in ("analysis", "pictures", "scores")}
    return RunRecord(
        name=name or folder.name,
        folder=folder,
        known=read_run(folder),
        status=read_status(folder),
        config=_as_json(completed(config)) if config.get("task") else config,
        model=read_json(folder / "model.json"),
        inputs=read_json(folder / "resume.json"),
        rows=rows,
        suites=find_suites(folder),
        replays=sorted(
            filter(None, map(read_json, (folder / REPLAY).glob("step_*.json"))), key=lambda found: found["step"]
        ),
        **found,
    )


def find_suites(folder: epath.Path) -> dict[str, dict[str, Any]]:
    """Results of test suites among the JSON files of a folder, by file name."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        if is_suites(content):
            found[path.name] = content
    return found


def is_suites(content: Mapping[str, Any]) -> bool:
    """Whether a JSON object is what `tinymim evaluate --suite ... --output` writes."""
    return {"checkpoint", "model", "suites", "throughput"} <= content.keys()


def read_json(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file; {} if there is none, or it is unreadable or no object."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        return content if isinstance(content, dict) else {}
    return {}


def _as_json(config: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(config, default=str))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return rows
