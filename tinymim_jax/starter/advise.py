"""`tinymim advise`: predicts from a short distillation whether a whole one will help on given images."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from tinymim_jax.config import load_config
from tinymim_jax.markdown import markdown_table
from tinymim_jax.metrics import read
from tinymim_jax.runtime.exits import DONE, ERROR, PREEMPTED
from tinymim_jax.runtime.files import write_json
from tinymim_jax.runtime.locks import locked
from tinymim_jax.runtime.progress import format_seconds
from tinymim_jax.runtime.startup import print_line
from tinymim_jax.starter.choices import STUDENT
from tinymim_jax.starter.decisions import Decided, decided_for, runs_to_do
from tinymim_jax.starter.distill import RANDOM_TEACHER, measured_knn
from tinymim_jax.starter.forecast import FEWEST_POINTS, Forecast, forecast
from tinymim_jax.starter.helpers import Failed, Helpers, Stopped
from tinymim_jax.starter.request import Request, check_output, check_same
from tinymim_jax.sweeps.running import ONE_BY_ONE, require_one_process

ADVICE = "advice.json"
HOURS = (0.05, 0.25)
"""Default hours of the short distillation: on a CPU, and elsewhere."""
PROBES = 8
"""Number of accuracies that are measured during it."""

_CERTAIN = 2.0  # standard errors


@dataclasses.dataclass(frozen=True)
class Advice:
    """answer: "yes", "no" or "unclear". why: the reason, for the user."""

    answer: str
    why: str


def advise(request: Request, *, topologies: Sequence[str] = ()) -> int:
    """Measures the teacher, distils for a short time, prints the advice, and returns the exit status.

    Args:
      request: with finetune=False and prepare="never"; `hours` are those of the short distillation.
      topologies: names of hardware for which the whole distillation is planned.

    Raises ValueError for images without labels, and the errors of `run_distill`.
    """
    output = pathlib.Path(request.output).expanduser().absolute()
    require_one_process("tinymim advise", str(output), ONE_BY_ONE, option="--output")
    check_output(output, request)
    check_same(output, request)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output), Helpers(output, request.compile_cache) as helpers:
        try:
            decided = decided_for(output, request, helpers)
            if not decided.neighbors:
                raise ValueError(
                    f"{request.data} has no classes, and advice compares accuracies: give a folder with a folder for "
                    "each class; a tenth of the images, sorted, is enough. `tinymim distill` itself needs no labels"
                )
            found = _look(output, request, decided, helpers)
            whole = _whole(decided)
            found["plans"] = [_plan(helpers, name, whole, request.data_dir) for name in topologies]
            write_json(output / ADVICE, found)
            print_line(f"\n{as_text(found)}")
            return DONE
        except Stopped:
            print_line(f"stopped; finished work is kept in {output}: run the same command again to continue")
            return PREEMPTED
        except Failed as error:
            print_line(f"\ntinymim advise: {error}")
            return ERROR


def judge_teacher(*, teacher: float, teacher_random: float, before: float, examples: int) -> Advice | None:
    """A "no" if the teacher knows nothing of the images, from k-NN accuracies (0 to 1) on `examples` of them.

    A student of a teacher with random weights gets somewhat better, too, since such a network already groups images by
    color and brightness. So the teacher has to be better than its own architecture with random weights.

    Args:
      teacher, teacher_random: accuracies of the teacher, and of a network like it with random weights.
      before: accuracy of the untrained student.
    """
    for other, value in (("the same network with random weights", teacher_random), ("an untrained student", before)):
        margin = _margin(value, examples)
        if teacher <= value + margin:
            return Advice(
                "no",
                f"the teacher ({teacher:.1%}) is not better on your images than {other} ({value:.1%}; differences "
                f"below {margin:.1%} are noise): choose another teacher, and check that its file was converted with "
                "all its weights",
            )
    return None


def judge(*, teacher: float, before: float, expected: Forecast, examples: int) -> Advice:
    """The advice on a teacher that is good enough, from k-NN accuracies (0 to 1) on `examples` images.

    Args:
      teacher, before: accuracies of the teacher, and of the untrained student.
      expected: accuracy of the student after the whole distillation.
    """
    bar = before + _margin(before, examples)
    if expected.high <= bar:
        return Advice(
            "no",
            f"the student does not learn it: at most {expected.high:.1%} are expected, {before:.1%} without training. "
            "Try a larger --student, or more images",
        )
    if expected.low > bar:
        return Advice(
            "yes",
            f"{expected.value:.1%} are expected ({expected.low:.1%} to {expected.high:.1%}), against {before:.1%} "
            f"without training and {teacher:.1%} of the teacher",
        )
    return Advice(
        "unclear",
        f"{expected.low:.1%} to {expected.high:.1%} are expected, and {before:.1%} without training: more --hours or "
        "more evaluation images make the interval narrower",
    )


def _margin(accuracy: float, examples: int) -> float:
    """The difference from `accuracy` that may be chance."""
    return _CERTAIN * math.sqrt(max(accuracy * (1 - accuracy), 1 / examples) / examples)


def as_text(found: Mapping[str, Any]) -> str:
    """The content of advice.json as Markdown."""
    rows = [
        ["teacher", f"{found['teacher']:.1%}"],
        ["the same network with random weights", f"{found['teacher_random']:.1%}"],
        ["student, untrained", f"{found['before']:.1%}"],
    ]
    if expected := found.get("expected"):
        interval = f"{expected['low']:.1%} to {expected['high']:.1%}, 90 %"
        rows += [
            [f"student after {found['curve'][-1][0]} steps", f"{found['curve'][-1][1]:.1%}"],
            [f"student after the whole {found['steps']} steps, expected", f"{expected['value']:.1%} ({interval})"],
        ]
    costs = [[f"these devices, {found['timed']}", format_seconds(found["seconds"]), "-"]]
    for plan in found["plans"]:
        hours = plan.get("hours")
        time = format_seconds(3600 * hours) if hours is not None else plan["error"]
        costs.append(
            [f"{plan['topology']}, estimated", time, f"{plan['chip_hours']:.2f}" if hours is not None else "-"]
        )
    return "\n\n".join(
        [
            markdown_table([f"k-NN accuracy on {found['examples']} images", ""], rows),
            markdown_table(["the whole distillation on", "time", "chip hours"], costs),
            f"Will it help? {found['answer'].upper()}: {found['why']}",
        ]
    )


def _look(output: pathlib.Path, request: Request, decided: Decided, helpers: Helpers) -> dict[str, Any]:
    """What as_text shows, but for the plans. There is no trial if the teacher alone decides."""
    (run,) = runs_to_do(output, decided)
    known = {
        name: measured_knn(run, decided, helpers, name, request.data_dir)
        for name in ("teacher", RANDOM_TEACHER, "before")
    }
    found: dict[str, Any] = {
        **known,
        "steps": decided.preset_steps,
        "seconds": decided.preset_steps * decided.step_seconds,
        "timed": "planned" if decided.timed_by.startswith("planned") else "measured",
        "examples": decided.eval_images,
    }
    if advice := judge_teacher(**known, examples=decided.eval_images):
        return found | dataclasses.asdict(advice)
    helpers.train(run, helpers.training_words(request.data_dir, decided.workers))
    rows = [row for row in read(run.workdir / "metrics.jsonl") if row.get("probe/knn") is not None]
    curve = [(row["step"], row["probe/knn"]) for row in rows]
    if len(curve) < FEWEST_POINTS:
        raise ValueError(
            f"the trial has {len(curve)} probes of k-NN accuracy, and a curve needs {FEWEST_POINTS}: give it more "
            "steps, in another --output, and leave train.probe_every and train.probe_patience as they are"
        )
    steps = max(decided.preset_steps, curve[-1][0])
    expected = forecast(
        [step for step, _ in curve],
        [value for _, value in curve],
        at=steps,
        examples=min(decided.eval_images, decided.probe_images // 2),
        ceiling=known["teacher"],
    )
    advice = judge(teacher=known["teacher"], before=known["before"], expected=expected, examples=decided.eval_images)
    return found | {
        "curve": [list(point) for point in curve],
        "steps": steps,
        "seconds": steps * decided.step_seconds,
        "expected": dataclasses.asdict(expected),
        **dataclasses.asdict(advice),
    }


def _plan(helpers: Helpers, topology: str, config: ConfigDict, data_dir: str | None) -> dict[str, Any]:
    """See child.plan. {"topology", "error"} if planning fails, for example without the compiler for that hardware."""
    try:
        return helpers.plan(topology, config, data_dir)
    except Failed as error:
        return {"topology": topology, "error": str(error).splitlines()[0]}


def _whole(decided: Decided) -> ConfigDict:
    """The config of the whole distillation on an accelerator: with the batch size and duration of the preset."""
    (stage,) = [row for row in decided.stages if row[0] == STUDENT]
    kept = ("data.", "distill.", "model.image_size=", "model.patch_size=")
    return load_config(stage[1], [word for word in stage[2] if word.startswith(kept)])
