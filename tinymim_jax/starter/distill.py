"""From a folder of images and a teacher to a small network: checks, choices, and a chain of ordinary trainings."""

import dataclasses
import json
import logging
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from tinymim_jax.config import load_config
from tinymim_jax.markdown import markdown_table
from tinymim_jax.runtime.exits import DONE, ERROR, PREEMPTED
from tinymim_jax.runtime.files import write_json
from tinymim_jax.runtime.locks import LOCK, locked
from tinymim_jax.runtime.progress import format_seconds
from tinymim_jax.runtime.startup import print_line
from tinymim_jax.runtime.workdir import read_result
from tinymim_jax.starter import choices as choosing
from tinymim_jax.starter.choices import CLASSIFIER, STUDENT, Choice, Hardware, Measured
from tinymim_jax.starter.data import Data, find_data, source_name
from tinymim_jax.starter.helpers import WORK, Failed, Helpers, Stopped, check_export
from tinymim_jax.starter.preparing import Verdict, judge
from tinymim_jax.starter.space import check_space
from tinymim_jax.starter.teacher import Teacher, find_teacher
from tinymim_jax.starter.timing import real_step, step_time
from tinymim_jax.sweeps.checks import check_points
from tinymim_jax.sweeps.points import LOG, Point, Run, Stage, make_runs
from tinymim_jax.sweeps.running import ONE_BY_ONE, require_one_process

log = logging.getLogger(__name__)

CHOICES, SUMMARY = "choices.json", "summary.json"
_MOST_NEIGHBORED = 20_000  # training images in which k-NN seeks neighbors
_OURS = {LOCK, LOG, WORK, "teacher", "teacher.json"}  # what a command that was refused or stopped at its start leaves


@dataclasses.dataclass(frozen=True)
class Request:
    """What the user asked for; the fields of EXPERIMENT decide what is trained.

    output: folder of everything.
    hours: for all of it; None: what the preset takes, or CPU_HOURS on a CPU.
    labels, finetune: False ignores labels, or leaves fine-tuning out.
    export: a key of helpers.EXPORTS; "auto": onnx where it is installed, else hub; "none".
    prepare: auto, always or never.
    default_hours: `hours` on a CPU and elsewhere, where none are given.
    probes: how often k-NN accuracy is measured during the distillation; None: so often that it takes below 2 %.
    overrides: keys of the configs, or STAGE.KEY, with values.
    """

    data: str
    teacher: str
    student: str
    output: str
    hours: float | None = None
    preset: str | None = None
    labels: bool = True
    finetune: bool = True
    export: str = "auto"
    prepare: str = "auto"
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    data_dir: str | None = None
    workers: int | None = None
    compile_cache: str = ""
    default_hours: tuple[float | None, float | None] = (choosing.CPU_HOURS, None)
    probes: int | None = None


EXPERIMENT = ("data", "teacher", "student", "hours", "preset", "labels", "finetune", "prepare", "overrides")


@dataclasses.dataclass(frozen=True)
class Decided:
    """All that is settled before the first long step; kept in choices.json, so that the same line goes on with it.

    stages: of each training [name, config, values by key], values that the user gave included.
    choices: of each value that was chosen [stage, key, value, why].
    prepared: name of the converted set; "" where the images are read as they are.
    neighbors: k of k-NN; 0 without labels.
    hours: that the trainings take.
    knn: overrides of the config for k-NN, of "both" and of the "teacher".
    eval_images, probe_images: how many there are, and train.probe_images.
    step_seconds, timed_by, preset_steps: of the student: of a step, and how that was found, see choices.Measured; and
      how many the preset has.
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


def run_distill(request: Request, *, dry_run: bool = False) -> int:
    """Does what is not done yet in `request.output`, and returns the exit status.

    Args:
      dry_run: print what would be done, and stop.

    Raises ValueError or OSError, before long work has begun, for what cannot be done; Busy where another command works
    in the folder.
    """
    output = pathlib.Path(request.output).expanduser().absolute()
    require_one_process("tinymim distill", str(output), ONE_BY_ONE)
    check_export(request.export, choosing.find_student(request.student))
    check_same(output, request)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output), Helpers(output, request.compile_cache) as helpers:
        try:
            decided = decided_for(output, request, helpers, keep=not dry_run)
            print_line(_table(decided))
            return DONE if dry_run else _work(output, request, decided, helpers)
        except Stopped:
            print_line(f"stopped; what is done is kept in {output}: run the same command again to go on")
            return PREEMPTED
        except Failed as error:
            print_line(f"\ntinymim distill: {error}")
            return ERROR


def check_same(output: pathlib.Path, request: Request) -> None:
    """Raises ValueError, naming what differs, where `output` was begun with other arguments."""
    kept = _read(output / CHOICES)
    if not kept:
        strange = sorted({path.name for path in output.iterdir()} - _OURS) if output.exists() else []
        if strange:
            raise ValueError(
                f"--output {output} holds {strange[0]!r}, which this command has not made: choose another folder"
            )
        return
    there = kept["arguments"]
    rows = [
        f"  {key}: {there.get(key)!r} there, {value!r} here"
        for key, value in _arguments(request).items()
        if there.get(key) != value
    ]
    if rows:
        raise ValueError(
            f"--output {output} was begun with other arguments:\n" + "\n".join(rows) + "\nChoose another --output, or "
            "delete it. A single training can be continued for longer by `tinymim train --extend`"
        )


def decided_for(output: pathlib.Path, request: Request, helpers: Helpers, *, keep: bool = True) -> Decided:
    """What choices.json says, or else what is decided now, which is then kept there if `keep`.

    `request.workers` holds where it is given, as it says how and not what.
    """
    kept = _read(output / CHOICES)
    if kept:
        log.info("%s: going on with the choices of %s", output, CHOICES)
        decided = Decided(**kept["decided"])
        return decided if request.workers is None else dataclasses.replace(decided, workers=request.workers)
    decided = _decide(output, request, helpers)
    if keep:
        write_json(output / CHOICES, {"arguments": _arguments(request), "decided": dataclasses.asdict(decided)})
    return decided


def _decide(output: pathlib.Path, request: Request, helpers: Helpers) -> Decided:
    """Looks at everything, measures, and decides. Whatever can go wrong at the start goes wrong here."""
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
    measured, spent = {}, 0.0
    for run in runs:
        config = load_config(run.config, [*run.overrides, *(["init="] if run.name == CLASSIFIER else [])])
        measured[run.name] = step_time(helpers, run.name, config, hardware, request.data_dir, workers)
        config = load_config(run.config, run.overrides)
        more, takes = choosing.fit_hours(run.name, config, measured[run.name], hours, alone=len(runs) == 1)
        spent += takes
        steps = round(3600 * takes / measured[run.name].seconds)
        if run.name == CLASSIFIER:
            more += choosing.short_finetuning(data, config, steps)
        else:
            more += choosing.probes(data, config, measured[run.name], steps, request.probes)
        chosen += more
    runs = runs_of(output, specs, chosen, request.overrides)
    check_points([Point("", 0, None, {}, {}, runs)], data_dir=request.data_dir)
    configs = {run.name: load_config(run.config, run.overrides) for run in runs}
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
    """The trainings with what was chosen, and then what the user gave."""
    values: dict[str, dict[str, Any]] = {stage: {} for stage in specs}
    if CLASSIFIER in values:
        values[CLASSIFIER]["init"] = f"{{{STUDENT}}}"
    for choice in chosen:
        if choice.stage in values:
            values[choice.stage][choice.key] = choice.value
    stages = [Stage(stage, spec, values[stage]) for stage, spec in specs.items()]
    return make_runs(stages, output, overrides)


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
    """Overrides of the student's config for k-NN: a part of large sets; and what the teacher needs."""
    bounded = {"data.examples": limit} if data.train_images > limit else {}
    preprocessing = teacher.record.get("preprocessing", {})
    theirs = {f"data.{key}": list(preprocessing[key]) for key in ("mean", "std") if key in preprocessing}
    return {"both": bounded, "teacher": theirs}


def _stands(choice: Choice, configs: Mapping[str, Any]) -> bool:
    """Whether the config of the training has the chosen value; False where the user gave another."""
    if choice.stage not in configs:
        return False
    value = configs[choice.stage]
    for part in choice.key.split("."):
        value = value[part]
    return json.dumps(value) == json.dumps(choice.value)


def _work(output: pathlib.Path, request: Request, decided: Decided, helpers: Helpers) -> int:
    """The long part. Each piece is skipped where it is done."""
    data_dir, runs = request.data_dir, runs_to_do(output, decided)
    if decided.prepared:
        data_dir = str(output / "data")
        helpers.prepare(decided.source, output / "data", decided.prepared, decided.short_side, request.data_dir)
    summary: dict[str, Any] = {"teacher": decided.teacher, "knn": {}}
    if decided.neighbors:
        for name, checkpoint in (("teacher", decided.teacher), ("before", str(output / "untrained"))):
            summary["knn"][name] = measured_knn(output, runs[0], decided, helpers, name, checkpoint, data_dir)
    options = helpers.training_words(data_dir, decided.workers)
    for run in runs:
        helpers.train(run, options)
        summary[run.name] = dict(read_result(run.workdir) or {})
        if run.name == STUDENT and decided.neighbors:
            summary["knn"]["after"] = measured_knn(output, run, decided, helpers, "after", str(run.workdir), data_dir)
    summary["export"] = helpers.export(runs[-1].workdir, output, request.export, logits=runs[-1].name == CLASSIFIER)
    summary["step"] = {"expected": decided.step_seconds, "by": decided.timed_by, "took": real_step(runs[0].workdir)}
    write_json(output / SUMMARY, summary)
    summary["report"] = helpers.report(output, data_dir)
    write_json(output / SUMMARY, summary)
    print_line(f"\n{summary_table(summary)}")
    return DONE


def measured_knn(
    output: pathlib.Path, run: Run, decided: Decided, helpers: Helpers, name: str, checkpoint: str, data_dir: str | None
) -> float:
    """k-NN accuracy of a checkpoint; `name` is teacher, before or after, and `run` that of the student."""
    changes = decided.knn["both"] | (decided.knn["teacher"] if name == "teacher" else {})
    config = load_config(run.config, run.overrides).copy_and_resolve_references().unlock()
    for key, value in changes.items():
        section, field = key.split(".")
        config[section][field] = tuple(value) if isinstance(value, list) else value
    figures = helpers.knn(name, config, checkpoint, decided.neighbors, data_dir, decided.workers)
    return figures[f"knn{decided.neighbors}_top1"]


def runs_to_do(output: pathlib.Path, decided: Decided) -> list[Run]:
    """The trainings, which read the converted images where there are any."""
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


def summary_table(summary: Mapping[str, Any]) -> str:
    """What came out, as Markdown."""
    rows = [[f"k-NN, {name}", f"{value:.1%}"] for name, value in summary["knn"].items()]
    if "top1" in summary.get(CLASSIFIER, {}):
        rows.append(["fine-tuned, top-1", f"{summary[CLASSIFIER]['top1']:.1%}"])
    if "loss" in summary.get(STUDENT, {}):
        rows.append(["loss of the distillation", f"{summary[STUDENT]['loss']:.4g}"])
    if (step := summary.get("step", {})).get("took"):
        expected = f"{step['expected']:.3g} s expected, {step['by']}"
        rows.append(["a step of the distillation", f"{step['took']:.3g} s ({expected})"])
    rows += [[name, summary[name]] for name in ("export", "report") if summary.get(name)]
    return markdown_table(["", "result"], rows)


def _table(decided: Decided) -> str:
    rows = [[stage, key, str(value), why] for stage, key, value, why in decided.choices]
    text = markdown_table(["training", "chosen", "value", "why"], rows)
    where = "; change any of them by KEY=VALUE, or STAGE.KEY=VALUE for one training"
    return f"\n{text}\n\ntraining takes about {format_seconds(3600 * decided.hours)} here{where}\n"


def _arguments(request: Request) -> dict[str, Any]:
    arguments = {name: getattr(request, name) for name in EXPERIMENT}
    arguments["data"] = source_name(request.data)
    arguments["teacher"] = str(pathlib.Path(request.teacher).expanduser().absolute())
    arguments["student"] = choosing.find_student(request.student)
    arguments["overrides"] = dict(request.overrides)
    return json.loads(json.dumps(arguments))


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
