"""`tinymim distill`: a small network from a folder of images and a teacher, by a chain of ordinary commands."""

import pathlib
from collections.abc import Mapping
from typing import Any

from tinymim_jax.config import load_config
from tinymim_jax.markdown import markdown_table
from tinymim_jax.runtime.exits import DONE, ERROR, PREEMPTED
from tinymim_jax.runtime.files import write_json
from tinymim_jax.runtime.locks import locked
from tinymim_jax.runtime.progress import format_seconds
from tinymim_jax.runtime.startup import print_line
from tinymim_jax.runtime.workdir import read_result
from tinymim_jax.starter.choices import CLASSIFIER, STUDENT, find_student
from tinymim_jax.starter.decisions import Decided, decided_for, runs_to_do
from tinymim_jax.starter.helpers import Failed, Helpers, Stopped, check_export
from tinymim_jax.starter.request import Request, check_output, check_same
from tinymim_jax.starter.timing import real_step
from tinymim_jax.sweeps.points import Run
from tinymim_jax.sweeps.running import ONE_BY_ONE, require_one_process

SUMMARY = "summary.json"
RANDOM_TEACHER = "teacher_random"
"""Name of the k-NN accuracy of a network like the teacher with random weights."""


def run_distill(request: Request, *, dry_run: bool = False) -> int:
    """Does everything that is not done yet in `request.output`, and returns the exit status.

    Args:
      dry_run: print what would be done, and stop.

    Raises:
      ValueError, OSError: the request cannot be carried out; raised before long work begins.
      Busy: another command is working in the output folder.
    """
    output = pathlib.Path(request.output).expanduser().absolute()
    require_one_process("tinymim distill", str(output), ONE_BY_ONE, option="--output")
    check_export(request.export, find_student(request.student))
    check_output(output, request)
    check_same(output, request)
    output.mkdir(parents=True, exist_ok=True)
    with locked(output), Helpers(output, request.compile_cache) as helpers:
        try:
            decided = decided_for(output, request, helpers, keep=not dry_run)
            print_line(_table(decided))
            return DONE if dry_run else _work(output, request, decided, helpers)
        except Stopped:
            print_line(f"stopped; finished work is kept in {output}: run the same command again to continue")
            return PREEMPTED
        except Failed as error:
            print_line(f"\ntinymim distill: {error}")
            return ERROR


def _work(output: pathlib.Path, request: Request, decided: Decided, helpers: Helpers) -> int:
    """The long part: converts images, measures, trains, exports and reports. Finished parts are skipped."""
    data_dir, runs = request.data_dir, runs_to_do(output, decided)
    if decided.prepared:
        data_dir = str(output / "data")
        helpers.prepare(decided.source, output / "data", decided.prepared, decided.short_side, request.data_dir)
    summary: dict[str, Any] = {"teacher": decided.teacher, "knn": {}}
    if decided.neighbors:
        for name in ("teacher", "before"):
            summary["knn"][name] = measured_knn(runs[0], decided, helpers, name, data_dir)
    options = helpers.training_words(data_dir, decided.workers)
    for run in runs:
        helpers.train(run, options)
        summary[run.name] = dict(read_result(run.workdir) or {})
        if run.name == STUDENT and decided.neighbors:
            summary["knn"]["after"] = measured_knn(run, decided, helpers, "after", data_dir)
    summary["export"] = helpers.export(runs[-1].workdir, output, request.export, logits=runs[-1].name == CLASSIFIER)
    summary["step"] = {"expected": decided.step_seconds, "by": decided.timed_by, "took": real_step(runs[0].workdir)}
    write_json(output / SUMMARY, summary)
    summary["report"] = helpers.report(output, data_dir)
    write_json(output / SUMMARY, summary)
    print_line(f"\n{summary_table(summary)}")
    return DONE


def measured_knn(run: Run, decided: Decided, helpers: Helpers, name: str, data_dir: str | None) -> float:
    """The k-NN accuracy of a network.

    Args:
      run: the student's training, whose config says how images are read.
      name: "teacher", RANDOM_TEACHER, "before" (the untrained student) or "after"; names the files of the result.
    """
    checkpoint = {"teacher": decided.teacher, "after": str(run.workdir)}.get(name, f"random weights, {name}")
    initial = {"before": STUDENT, RANDOM_TEACHER: decided.teacher}.get(name, "")
    changes = decided.knn["both"] | (decided.knn["teacher"] if name in ("teacher", RANDOM_TEACHER) else {})
    config = load_config(run.config, run.overrides).copy_and_resolve_references().unlock()
    for key, value in changes.items():
        section, field = key.split(".")
        config[section][field] = tuple(value) if isinstance(value, list) else value
    figures = helpers.knn(name, config, checkpoint, decided.neighbors, data_dir, decided.workers, initial)
    return figures[f"knn{decided.neighbors}_top1"]


def summary_table(summary: Mapping[str, Any]) -> str:
    """The content of summary.json as a Markdown table."""
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
