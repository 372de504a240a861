"""What `tinymim distill` settles before the first long step: checks, measurements, and the resulting trainings."""

import dataclasses
import json
import logging
import pathlib
import re
import time
from collections.abc import Mapping
from typing import Any

from tinymim_jax.config import load_config
from tinymim_jax.runtime.files import write_json
from tinymim_jax.starter import choices as choosing
from tinymim_jax.starter.choices import CLASSIFIER, STUDENT, Choice, Hardware, Measured
from tinymim_jax.starter.data import Data, find_data
from tinymim_jax.starter.helpers import Helpers
from tinymim_jax.starter.preparing import Verdict, judge
from tinymim_jax.starter.request import CHOICES, Request, arguments_of, read_choices
from tinymim_jax.starter.space import check_space
from tinymim_jax.starter.teacher import Teacher, find_teacher
from tinymim_jax.starter.timing import step_time
from tinymim_jax.sweeps.checks import check_points
from tinymim_jax.sweeps.points import Point, Run, Stage, make_runs

log = logging.getLogger(__name__)

_MOST_NEIGHBORED = 20_000  # training images in which k-NN seeks neighbors


@dataclasses.dataclass(frozen=True)
class Decided:
    """Everything that is settled before the first long step. It is kept in choices.json for the next call.

    stages: for each training [name, config, overrides], including the user's overrides.
    choices: for each chosen value [stage, key, value, why].
    teacher: path of the run or converted checkpoint.
    prepared: name of the converted data set; "" if the original images are read.
    short_side: of the converted images, in pixels.
    source: data.source of the original images.
    neighbors: k of k-NN; 0 without labels.
    workers: processes that decode images.
    hours: expected duration of all trainings.
    knn: overrides of the config when k-NN is measured, for "both" networks and for the "teacher" alone.
    eval_images: number of evaluation images.
    probe_images: the student's train.probe_images.
    step_seconds, timed_by: duration of a step of the student, and how it was found (choices.Measured.by).
    preset_steps: number of steps in the student's preset.
    """

    stages: list[list[Any]]
    choices: list[list[Any]]
    teacher: str
    prepared: str
    short_side: int
    source: str
    neighbors: int
    workers: int
    hours: float
    knn: dict[str, Any]
    eval_images: int
    probe_images: int
    step_seconds: float
    preset_steps: int
    timed_by: str = "measured"


def decided_for(output: pathlib.Path, request: Request, helpers: Helpers, *, keep: bool = True) -> Decided:
    """The decisions of an earlier call (choices.json), or new ones, which are written there if `keep`.

    If `request.workers` is given, it replaces the earlier number, which does not change the result.
    """
    kept = read_choices(output)
    if kept:
        log.info("%s: continuing with the choices in %s", output, CHOICES)
        decided = Decided(**kept["decided"])
        return decided if request.workers is None else dataclasses.replace(decided, workers=request.workers)
    decided = _decide(output, request, helpers)
    if keep:
        write_json(output / CHOICES, {"arguments": arguments_of(request), "decided": dataclasses.asdict(decided)})
    return decided


def _decide(output: pathlib.Path, request: Request, helpers: Helpers) -> Decided:
    """Checks images, teacher, disk and memory, measures, and decides. Errors in the request are raised here."""
    data = find_data(request.data, data_dir=request.data_dir, labels=request.labels, overrides=request.overrides)
    teacher = find_teacher(request.teacher, output / "teacher")
    student = choosing.find_student(request.student)
    preset = request.preset or choosing.nearest_preset(data.train_images)
    specs = choosing.config_specs(student, preset, data)
    if not request.finetune:
        specs.pop(CLASSIFIER, None)
    hardware = Hardware(**helpers.compute("hardware"))
    log.info("training on %s", hardware.describe())
    workers = request.workers if request.workers is not None else helpers.workers(hardware.platform)
    hours = request.hours or request.default_hours[hardware.platform != "cpu"]
    chosen = choosing.choose(data, teacher, hardware, {stage: load_config(spec) for stage, spec in specs.items()})
    runs = runs_of(output, specs, chosen, request.overrides)
    check_points([Point("", 0, None, {}, {}, runs)], data_dir=request.data_dir)
    measured, lost = {}, 0.0
    for run in runs:
        began = time.monotonic()
        config = load_config(run.config, [*run.overrides, *(["init="] if run.name == CLASSIFIER else [])])
        measured[run.name] = step_time(helpers, run.name, config, hardware, request.data_dir, workers)
        lost += 2 * (time.monotonic() - began) / 3600  # the training itself starts and compiles once more
    lost, spent = (0.0 if request.training_hours else lost), 0.0
    for run in runs:
        more, takes = _fitted(run, request, data, measured[run.name], hours, lost, len(runs) == 1)
        chosen += more
        spent += takes
    runs = runs_of(output, specs, chosen, request.overrides)
    check_points([Point("", 0, None, {}, {}, runs)], data_dir=request.data_dir)
    configs = {run.name: load_config(run.config, run.overrides) for run in runs}
    if larger := choosing.larger_student(teacher, configs[STUDENT]):
        log.warning("%s", larger)
    verdict = _whether_to_prepare(request, data, configs, measured)
    check_space(output, [(measured[name], config.checkpoint.keep) for name, config in configs.items()], verdict.needed)
    prepared = f"images_{verdict.short_side}" if verdict.pays else ""
    rows = [dataclasses.astuple(choice) for choice in chosen if _stands(choice, configs)]
    rows += [("all", "prepare", prepared or "no", verdict.why)]
    if preset != request.preset:
        rows.insert(0, ("all", "preset", preset, f"the nearest to {data.train_images} images"))
    if hours != request.hours:
        rows.insert(0, ("all", "hours", hours, f"on {hardware.platform}, unless --hours is given"))
    return Decided(
        stages=[[run.name, run.config, list(run.overrides)] for run in runs],
        choices=[list(row) for row in rows],
        teacher=teacher.path,
        prepared=prepared,
        short_side=verdict.short_side,
        source=data.source,
        neighbors=max(1, min(20, data.per_class)) if data.class_names else 0,
        workers=workers,
        hours=spent,
        knn=_for_knn(data, teacher, configs[STUDENT].train.probe_images if request.probes else _MOST_NEIGHBORED),
        eval_images=data.eval_images,
        probe_images=configs[STUDENT].train.probe_images,
        step_seconds=measured[STUDENT].seconds,
        timed_by=measured[STUDENT].by,
        preset_steps=measured[STUDENT].steps,
    )


def runs_of(
    output: pathlib.Path, specs: Mapping[str, str], chosen: list[Choice], overrides: Mapping
) -> tuple[Run, ...]:
    """The trainings, with the chosen values and then the user's, which take precedence."""
    values: dict[str, dict[str, Any]] = {stage: {} for stage in specs}
    if CLASSIFIER in values:
        values[CLASSIFIER]["init"] = f"{{{STUDENT}}}"
    for choice in chosen:
        if choice.stage in values:
            values[choice.stage][choice.key] = choice.value
    stages = [Stage(stage, spec, values[stage]) for stage, spec in specs.items()]
    return make_runs(stages, output, overrides)


def runs_to_do(output: pathlib.Path, decided: Decided) -> list[Run]:
    """The trainings of `decided`; they read the converted images if there are any."""
    runs = []
    for name, config, overrides in decided.stages:
        words = list(overrides)
        if decided.prepared:
            words = [word for word in words if not word.startswith("data.source=")]
            # A source without splits becomes one whose only split is train.
            words = [re.sub(r"^(data\.\w+_split=)all(?=\[|$)", r"\1train", word) for word in words]
            words.append(f"data.source={decided.prepared}")
        runs.append(Run(name, config, tuple(words), output / name))
    return runs


def _fitted(
    run: Run, request: Request, data: Data, measured: Measured, hours: float | None, lost: float, alone: bool
) -> tuple[list[Choice], float]:
    """(choices that follow from the measurements of a training, hours that it takes); see choices.fit_hours."""
    config = load_config(run.config, run.overrides)
    chosen, takes = choosing.fit_hours(run.name, config, measured, hours, alone=alone, lost=lost)
    steps = round(3600 * takes / measured.seconds)
    if run.name == CLASSIFIER:
        chosen += choosing.short_finetuning(data, config, steps)
    else:
        chosen += choosing.probes(data, config, steps, request.probes)
    return chosen, takes


def _whether_to_prepare(request: Request, data: Data, configs: Mapping, measured: Mapping[str, Measured]) -> Verdict:
    config = configs[STUDENT]
    size, resize = tuple(config.model.image_size), config.data.eval_resize
    views = 0
    for name, each in configs.items():
        steps = int(each.train.duration.split()[0]) if "step" in each.train.duration else measured[name].steps
        views += steps * each.train.batch_size // each.data.crops
    if request.prepare == "never":
        return Verdict(False, resize, "--prepare never", 0)
    verdict = judge(data.sample, data.train_images + data.eval_images, views, size, resize)
    if request.prepare == "always":
        needed = verdict.needed or sum(map(len, data.sample)) * data.train_images // len(data.sample)
        return dataclasses.replace(verdict, pays=True, why=f"--prepare always; {verdict.why}", needed=needed)
    return verdict


def _for_knn(data: Data, teacher: Teacher, limit: int) -> dict[str, Any]:
    """Decided.knn: at most `limit` training images, and the teacher's own mean and std."""
    bounded = {"data.examples": limit} if data.train_images > limit else {}
    preprocessing = teacher.record.get("preprocessing", {})
    theirs = {f"data.{key}": list(preprocessing[key]) for key in ("mean", "std") if key in preprocessing}
    return {"both": bounded, "teacher": theirs}


def _stands(choice: Choice, configs: Mapping[str, Any]) -> bool:
    """Whether the training has the chosen value; False if the user gave another one."""
    if choice.stage not in configs:
        return False
    value = configs[choice.stage]
    for part in choice.key.split("."):
        value = value[part]
    return json.dumps(value) == json.dumps(choice.value)
