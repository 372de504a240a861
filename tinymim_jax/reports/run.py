"""The sections of one run's report."""

import html
import json
from collections.abc import Mapping
from typing import Any

from tinymim_jax.evaluation.suites.registry import PAPER_MODELS, SUITES
from tinymim_jax.pages.charts import stacked_bar
from tinymim_jax.pages.page import Raw, details, number, paragraph, picture, table
from tinymim_jax.reports.analysis import analysis_section
from tinymim_jax.reports.curves import curves
from tinymim_jax.reports.record import RunRecord, by_student
from tinymim_jax.reports.suites import class_tables, suites_section
from tinymim_jax.runtime.progress import format_seconds

_IMAGENET = "imagenet2012"


def run_sections(run: RunRecord) -> list[tuple[str, str]]:
    """(heading, HTML) of all sections about a run."""
    return [
        ("Curves", curves(run.rows, run.students)),
        ("Result", _result(run)),
        ("Replayed steps", _replays(run)),
        ("Images as the networks see them", _samples(run.pictures)),
        ("Relations", _relations(run.pictures)),
        ("Layers", analysis_section(run.analysis)),
        ("Classes", class_tables(run.scores) if run.scores else ""),
        ("Test suites", "".join(suites_section(name, found) for name, found in run.suites.items())),
        ("Time", _time(run)),
        ("Commands and versions", _commands(run)),
        ("Configuration", _configuration(run)),
    ]


def run_intro(run: RunRecord) -> str:
    """The facts at the top of the page, and the error if the run did not finish."""
    known, facts = run.known, {"state": run.known["stage"]}
    facts |= {"task": run.config.get("task")}
    if "step" in known:
        facts["step"] = f"{known['step']:,}" + (f" of {known['total_steps']:,}" if "total_steps" in known else "")
    figures, _ = by_student(run.figures, run.students)
    facts |= {name: number(value) for name, value in list(figures.items())[:4]}
    if run.seconds:
        facts["time"] = format_seconds(run.seconds)
    if known.get("images_per_second"):
        facts["speed"] = f"{known['images_per_second']:,.0f} images/s"
    if "goodput" in known:
        facts["goodput"] = f"{known['goodput']:.1%}"
    facts |= {"network": _network(run.model.get("encoder", {}))}
    facts["students"] = f"{len(run.students)}" if run.students else ""
    if known.get("skipped"):
        facts["skipped updates"] = f"{known['skipped']:,}"
    body = "".join(f"<div><dt>{name}</dt><dd>{_escaped(value)}</dd></div>" for name, value in facts.items() if value)
    error = f'<pre class="failed">{_escaped(known["error"])}</pre>' if known.get("error") else ""
    return f'<dl class="facts">{body}</dl>{error}'


def _result(run: RunRecord) -> str:
    evaluated = run.evaluated
    plain = {name: value for name, value in evaluated.items() if "/" not in name}
    common, own = by_student(plain, run.students)
    parts = [table(list(common), [list(common.values())], "last evaluation")] if common else []
    names = list(dict.fromkeys(name for figures in own.values() for name in figures))
    rows = [[student, *(figures.get(name) for name in names)] for student, figures in own.items()]
    parts.append(table(["student", *names], rows, "last evaluation of each student"))
    by_class: dict[str, dict[str, Any]] = {}
    for name, value in evaluated.items():
        if "/" in name:
            figure, _, member = name.partition("/")
            by_class.setdefault(member, {})[figure] = value
    names = list(dict.fromkeys(figure for figures in by_class.values() for figure in figures))
    rows = [[member, *(figures.get(name) for name in names)] for member, figures in by_class.items()]
    parts.append(details("Figures of each class", table(["class", *names], rows)))
    return "".join(parts) + (_paper(run, plain) if plain else "")


def _paper(run: RunRecord, figures: Mapping[str, Any]) -> str:
    """The paper's top-1 of the model of this width, beside ours if the data are the same."""
    width = run.model.get("encoder", {}).get("embed_dim")
    if "top1" not in figures or width not in PAPER_MODELS:
        return ""
    data = run.config.get("data", {})
    same = str(data.get("source", "")).split(":")[0] == _IMAGENET and data.get("eval_split") == "validation"
    ours = f"{100 * figures['top1']:.1f}" if same and figures["top1"] is not None else "other data"
    rows = [
        [suite, ours if name == "imagenet" else "tinymim evaluate --suite", SUITES[name].paper[width]]
        for name, suite in (("imagenet", "ImageNet-1K, top-1"), ("a", "ImageNet-A"), ("r", "ImageNet-R"))
    ]
    return table(["in per cent", "this run", f"{PAPER_MODELS[width]}, paper"], rows, "the paper's figures")


def _replays(run: RunRecord) -> str:
    rows = []
    for found in run.replays:
        bad = sum(value is None for value in found["losses"]["loss"])
        page = f"replay/step_{found['step']}.html"
        cell = Raw(f'<a href="{page}">{found["step"]}</a>') if (run.folder / page).exists() else found["step"]
        rows.append([cell, found["loss"], found["gradient_norm"], bad, len(found["losses"]["loss"])])
    return table(["step", "loss", "gradient norm", "not finite", "images"], rows, "tinymim replay")


def _samples(pictures: Mapping[str, Any]) -> str:
    samples = pictures.get("samples", [])
    if not samples:
        return ""
    stacks = []
    for i, sample in enumerate(samples):
        label = f", {sample['label']}" if sample.get("label") else ""
        tiles = [
            picture(uri, f"training image {i + 1}{label}, as the {name} sees it", name)
            for name, uri in sample["seen"].items()
        ]
        stacks.append(f'<div class="stack">{"".join(tiles)}{_small(sample.get("label", ""))}</div>')
    return paragraph(pictures.get("samples_note", "")) + f'<div class="tiles">{"".join(stacks)}</div>'


def _relations(pictures: Mapping[str, Any]) -> str:
    found = pictures.get("relations", [])
    parts = []
    for i, each in enumerate(found):
        tiles = [picture(each["image"], f"evaluation image {i + 1}, its query patch framed in red", "query patch")]
        for network, maps in each["maps"].items():
            for relation, uri in maps.items():
                said = f"{relation} relation of the query patch of image {i + 1} to all patches, in the {network}"
                tiles.append(picture(uri, said, f"{network}, {relation}"))
        parts.append(f'<div class="tiles">{"".join(tiles)}</div>')
    return paragraph(pictures.get("relations_note", "")) + "<br>".join(parts) if parts else ""


def _time(run: RunRecord) -> str:
    seconds = {name: value for name, value in (run.status.get("seconds") or {}).items() if value > 0}
    if not seconds:
        return ""
    total = sum(seconds.values())
    rows = [[name, format_seconds(value), f"{value / total:.1%}"] for name, value in seconds.items()]
    named = {("steps (goodput)" if name == "steps" else name): value / total for name, value in seconds.items()}
    attempts = run.status.get("attempts", 1)
    said = paragraph(f"{format_seconds(total)} in {attempts} attempt{'s' * (attempts > 1)}.")
    bar = stacked_bar("How the time was spent", named)
    return said + bar + details("Table", table(["spent on", "time", "share"], rows))


def _commands(run: RunRecord) -> str:
    parts = []
    if command := run.status.get("command"):
        parts.append(f"<pre>{_escaped(command)}</pre>")
    rows = [[name, value] for name, value in (run.status.get("versions") or {}).items()]
    for name in ("host", "processes", "devices"):
        if name in run.status:
            rows.append([name, run.status[name]])
    parts.append(table(["what", "version"], rows))
    return "".join(parts)


def _configuration(run: RunRecord) -> str:
    if not run.config:
        return ""
    changed = [[key, _value(value), _value(default)] for key, (value, default) in run.changed.items()]
    inputs = [[key, value] for key, value in run.inputs.items() if isinstance(value, int | float | str)]
    teachers = {key: run.model[key] for key in ("teacher", "teachers") if run.model.get(key)}
    return (
        table(["key", "value", "default"], changed, "keys that differ from the defaults of the task")
        + table(["input", "value"], inputs)
        + "".join(details(key.capitalize(), _as_json(value)) for key, value in teachers.items())
        + details("Whole config.json", _as_json(dict(run.config)))
    )


def _network(encoder: Mapping[str, Any]) -> str:
    if not encoder:
        return ""
    stem = ", convolutional stem" if encoder.get("switches", {}).get("stem") == "conv" else ""
    return f"{encoder['embed_dim']} x {encoder['depth']}, patch {encoder['patch_size']}{stem}"


def _as_json(value: Any) -> str:
    return f"<pre>{_escaped(json.dumps(value, indent=1))}</pre>"


def _value(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list) else str(value)


def _small(text: str) -> str:
    return f'<span class="note">{_escaped(text)}</span>' if text else ""


def _escaped(value: Any) -> str:
    return html.escape(str(value))
