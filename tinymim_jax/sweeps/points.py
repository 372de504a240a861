"""What sweeps and chains run: the stages of a file, the overrides and workdir of each, and its state."""

import dataclasses
import hashlib
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tinymim_jax.config import find_file, flat_names, has_key, key_names, load_config, load_file, parse
from tinymim_jax.errors import unknown
from tinymim_jax.runtime.workdir import RunState, read_state

LOG = "log.txt"

_NAME_LENGTH = 120


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training of a config file; `name` is "" if the file holds a single experiment.

    config: FILE.py[:ARGUMENT].
    overrides: by dotted key; the value "{b}" is the workdir of the earlier stage b, "{b}/students/ti" the student ti of
      it.
    """

    name: str
    config: str
    overrides: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One `tinymim train`: its config, the KEY=VALUE overrides on its command line, and its workdir."""

    name: str
    config: str
    overrides: tuple[str, ...]
    workdir: pathlib.Path


@dataclasses.dataclass(frozen=True)
class Point:
    """One set of overrides, and its trainings in order.

    number: position in the sweep; the points of one number differ in their seed alone.
    notes: columns of the table that are no overrides, such as a published figure.
    """

    name: str
    number: int
    seed: int | None
    overrides: Mapping[str, Any]
    notes: Mapping[str, Any]
    runs: tuple[Run, ...]


def read_stages(spec: str) -> list[Stage]:
    """The stages of FILE[:ARGUMENT] or NAME[:ARGUMENT]: what get_chain() lists, or the experiment of get_config()."""
    module, argument = load_file(spec)
    if not hasattr(module, "get_chain"):
        return [Stage("", spec, {})]
    folder = find_file(spec)[0].parent
    stages = []
    for name, config, overrides in module.get_chain(argument) if argument else module.get_chain():
        config = str(folder / config)
        sections = {key.split(".")[0] for key in flat_names(load_config(config))}
        if not re.fullmatch(r"\w+", name) or name in sections or any(name == stage.name for stage in stages):
            raise ValueError(
                f"{spec}: a stage cannot be called {name!r}: choose letters and digits that no other stage and no key "
                f"of a config begins with ({', '.join(sorted(sections))})"
            )
        stages.append(Stage(name, config, overrides))
    return stages


def make_runs(stages: Iterable[Stage], workdir: pathlib.Path, *changes: Mapping[str, Any]) -> tuple[Run, ...]:
    """One run for each stage, in workdir/NAME, with `changes` applied one after another.

    A key (`optim.base_lr`) goes to every stage that has it, except where the stage takes it from an earlier stage;
    with a stage's name before it (`b.optim.base_lr`) to that one alone.

    Raises ValueError for a key that no stage has, naming the nearest one.
    """
    stages = list(stages)
    keys = {stage.name: key_names(load_config(stage.config)) for stage in stages}
    values = {stage.name: dict(stage.overrides) for stage in stages}
    links = {(stage.name, key) for stage in stages for key, value in stage.overrides.items() if _link(value)}
    for change in changes:
        for key, value in change.items():
            for name, own in _addressed(key, keys):
                if own != key or (name, own) not in links:
                    values[name][own] = value
    runs, folders = [], {}
    for stage in stages:
        words = [format_override(key, _resolved(key, value, folders)) for key, value in values[stage.name].items()]
        folders[stage.name] = workdir / stage.name
        runs.append(Run(stage.name, stage.config, tuple(words), folders[stage.name]))
    return tuple(runs)


def format_override(key: str, value: Any) -> str:
    """KEY=VALUE, such that `parse_overrides` gives the same value again."""
    value = value.item() if hasattr(value, "item") else value  # numpy's numbers
    if isinstance(value, str) and parse(value) == value:
        return f"{key}={value}"
    return f"{key}={value!r}"


def parse_overrides(words: Iterable[str]) -> dict[str, Any]:
    """Overrides from KEY=VALUE words. Raises ValueError for a word without "="."""
    values = {}
    for text in words:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"{text!r} is not an override: write key=value, for example optim.base_lr=1e-3")
        values[key] = parse(value)
    return values


def folder_name(number: int, overrides: Mapping[str, Any], seed: int | None = None) -> str:
    """A name such as 003_base_lr=0.001_drop_path=0.1_seed=0: readable, and safe on every file system.

    It depends on this point alone, so that points and seeds may be added to a sweep that has run.
    """
    labels = short_names(overrides)
    parts = [f"{labels[key]}={_safe(value)}" for key, value in overrides.items()]
    parts += [] if seed is None else [f"seed={seed}"]
    name = "_".join([f"{number:03d}", *parts])
    if len(name) > _NAME_LENGTH:
        name = f"{name[: _NAME_LENGTH - 9]}_{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    return name


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """A short name for each dotted key: its last part, or as many parts as distinguish it from the other keys."""
    keys = list(keys)
    short = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[i:]) for i in reversed(range(len(parts)))]
        others = [other for other in keys if other != key]
        short[key] = next((e for e in endings if not any(f".{other}".endswith(f".{e}") for other in others)), key)
    return short


def state_of(point: Point) -> RunState:
    """How far a point has come: that of its first run which is not finished, or of its last one."""
    for run in point.runs:
        state = read_state(run.workdir)
        if state.name == "not started" and run is not point.runs[0]:
            return RunState("interrupted", f"before {run.name}")
        if state.name != "finished":
            return RunState(state.name, ": ".join(filter(None, (run.name, state.detail))))
    return state


def _addressed(key: str, keys: Mapping[str, list[str]]) -> list[tuple[str, str]]:
    """The (stage, key of its config) pairs that an override applies to."""
    stage, _, rest = key.partition(".")
    if stage in keys and rest:
        if not has_key(keys[stage], rest):
            raise unknown(f"override of stage {stage!r}", rest, keys[stage])
        return [(stage, rest)]
    found = [(name, key) for name, own in keys.items() if has_key(own, key)]
    if not found:
        everywhere = dict.fromkeys(k for own in keys.values() for k in own)
        raise unknown("override", key, [*everywhere, *(f"{name}.KEY" for name in keys if name)])
    return found


def _link(value: Any) -> str:
    match = re.fullmatch(r"\{(\w+)\}(/.*)?", value) if isinstance(value, str) else None
    return match[1] if match else ""


def _resolved(key: str, value: Any, folders: Mapping[str, pathlib.Path]) -> Any:
    name = _link(value)
    if not name:
        return value
    if name not in folders:
        raise unknown(f"{key}={value!r}: stage", name, folders)
    return value.replace(f"{{{name}}}", str(folders[name]), 1)


def _safe(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        text = ",".join(map(str, value))
    else:
        text = str(value.item() if hasattr(value, "item") else value)
    text = re.sub(r"[][(){}'\"]", "", text).replace("\\", "/").rstrip("/").split("/")[-1]
    return re.sub(r"[^\w.,+-]+", "-", text) or "empty"
