"""Results on test suites, and tables of classes and confusions, as sections of a report."""

from collections.abc import Mapping
from typing import Any

from tinymim_jax.evaluation.suites.registry import PAPER_MODELS, SUITES
from tinymim_jax.pages.charts import Series, line_chart
from tinymim_jax.pages.page import details, figure, grid, paragraph, table

_PAIRS, _OPEN_CLASSES = 15, 20


def suites_section(name: str, results: Mapping[str, Any]) -> str:
    """A table of the suites beside the paper's figures, then classes and confusions of each suite.

    Args:
      name: of the file.
      results: from evaluation.suites.run.evaluate_suites.
    """
    width = results["model"]["embed_dim"]
    paper = PAPER_MODELS.get(width)
    rows = []
    for suite, found in results["suites"].items():
        published = SUITES[suite].paper.get(width) if suite in SUITES else None
        figures = [_percent(found.get(key)) for key in ("top1", "top5", "ece", "mce")]
        rows.append([suite, found["status"], found.get("examples"), *figures, *([published] if paper else [])])
    head = ["suite", "status", "images", "top-1", "top-5", "ECE", "mCE", *([f"{paper}, paper"] if paper else [])]
    speed = results["throughput"]
    said = (
        f"{results['checkpoint']}: {results['model']['parameters'] / 1e6:.4g} M parameters, "
        f"{results['model']['forward_flops'] / 2e9:.4g} G multiply-adds an image, {speed['images_per_second']:,.1f} "
        f"images/s on {speed['devices']} x {speed['device']}."
    )
    reasons = [f"{suite}: {found['reason']}" for suite, found in results["suites"].items() if "reason" in found]
    parts = [paragraph(said), table(head, rows, f"{name}, in per cent; the paper's figure of c is the mCE")]
    parts += [paragraph(reason) for reason in reasons]
    for suite, found in results["suites"].items():
        if found.get("per_class"):
            parts.append(details(f"Classes of {suite}", class_tables(found)))
    return "".join(parts)


def class_tables(scores: Mapping[str, Any]) -> str:
    """Confused pairs, accuracy of each class with the weakest first, and calibration, from scores.score."""
    said = f"Top-1 {scores['top1']:.2%} and top-5 {scores['top5']:.2%} of {scores['examples']:,} images"
    said += f" ({scores['note']})." if scores.get("note") else "."
    pairs = [
        [pair["true"], pair["predicted"], pair["count"], f"{pair['share']:.1%}"]
        for pair in scores.get("confusions", [])[:_PAIRS]
    ]
    classes = sorted(scores.get("per_class", []), key=lambda each: (each["top1"], each["name"]))
    rows = [[each["name"], each["examples"], f"{each['top1']:.1%}"] for each in classes]
    per_class = table(["class", "images", "top-1"], rows, "accuracy by class, weakest first")
    if len(rows) > _OPEN_CLASSES:
        weakest = table(["class", "images", "top-1"], rows[:_OPEN_CLASSES], f"the {_OPEN_CLASSES} weakest classes")
        per_class = weakest + details(f"All {len(rows)} classes", per_class)
    confused = table(["class", "taken for", "images", "of its images"], pairs, "confused pairs, most frequent first")
    figures = [figure("Confused pairs", confused), figure("Classes", per_class), figure("Calibration", _bins(scores))]
    return paragraph(said) + grid(figures)


def _bins(scores: Mapping[str, Any]) -> str:
    bins = [each for each in scores.get("calibration", []) if each["examples"]]
    if not bins:
        return ""
    sure = [each["confidence"] for each in bins]
    series = [Series("accuracy", sure, [each["top1"] for each in bins]), Series("if calibrated", [0, 1], [0, 1])]
    return line_chart("Accuracy by confidence", series, x_label="confidence", y_label="accuracy")


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 2)
