"""Results of suites as Markdown: a table beside the paper's figures, weakest classes, confusions, missing sets."""

from collections.abc import Mapping
from typing import Any

from tinymim_jax.evaluation.suites.registry import PAPER_MODELS, SUITES
from tinymim_jax.markdown import markdown_table

_NAMED = 5
_HEAD = ("suite", "images", "classes", "top-1", "top-5", "ECE", "mCE")


def markdown(results: Mapping[str, Any], data_dir: str | None = None) -> str:
    """The results of `run.evaluate_suites`, in per cent.

    Args:
      data_dir: where data sets were looked for.
    """
    suites, width = results["suites"], results["model"]["embed_dim"]
    head, rows = [*_HEAD], [_row(suite, found) for suite, found in suites.items()]
    if width in PAPER_MODELS:
        head.append(f"{PAPER_MODELS[width]}, paper")
        for suite, row in zip(suites, rows):
            figure = SUITES[suite].paper.get(width) if suite in SUITES else None
            row.append("-" if figure is None else f"{figure:.1f}")
    parts = [_description(results), markdown_table(head, rows)]
    for suite, found in suites.items():
        if "top1" in found and "sets" in found:
            paper = "; the paper's figure is the mCE" if "mce" in found else ""
            parts.append(f"Of {suite}: top-1, top-5 and ECE are means over its sets{paper}.")
    parts += [
        f"Of {suite}: {found['substituted']} images could not be decoded, and others were counted in their place."
        for suite, found in suites.items()
        if found.get("substituted")
    ]
    parts += _listed("Weakest classes (top-1, images):", {suite: _weakest(found) for suite, found in suites.items()})
    parts += _listed(
        "Most confused (of a class's images):", {suite: _confused(found) for suite, found in suites.items()}
    )
    absent = [line for suite, found in suites.items() for line in _absent(suite, found)]
    place = data_dir or "$TFDS_DATA_DIR or ~/tensorflow_datasets"
    parts += ["\n".join([f"Not evaluated (DATA_DIR: {place}):", *absent])] if absent else []
    return "\n\n".join(parts)


def _description(results: Mapping[str, Any]) -> str:
    model, speed = results["model"], results["throughput"]
    return (
        f"{results['checkpoint']}: width {model['embed_dim']}, {model['depth']} blocks, {model['classes']} classes; "
        f"{model['parameters'] / 1e6:.4g} M parameters, {model['forward_flops'] / 2e9:.4g} G multiply-adds an image\n"
        f"{speed['images_per_second']:,.1f} images/s, forward alone, {speed['dtype']}, batches of "
        f"{speed['batch_size']} on {speed['devices']} x {speed['device']}"
    )


def _row(suite: str, found: Mapping[str, Any]) -> list[str]:
    if "top1" not in found:
        return [suite, found["status"], *["-"] * (len(_HEAD) - 2)]
    status = "" if found["status"] == "evaluated" else f" ({found['status']})"
    mce = found.get("mce")
    return [
        suite,
        f"{found['examples']:,}{status}",
        str(found["classes"]),
        *(_percent(found[key]) for key in ("top1", "top5", "ece")),
        "-" if mce is None else _percent(mce),
    ]


def _listed(title: str, found: Mapping[str, list[str]]) -> list[str]:
    lines = [f"- {suite}: {', '.join(some)}" for suite, some in found.items() if some]
    return ["\n".join([title, *lines])] if lines else []


def _weakest(found: Mapping[str, Any]) -> list[str]:
    ordered = sorted(found.get("per_class", []), key=lambda each: each["top1"])
    return [f"{each['name']} {each['top1']:.0%} ({each['examples']})" for each in ordered[:_NAMED]]


def _confused(found: Mapping[str, Any]) -> list[str]:
    return [
        f"{pair['true']} taken for {pair['predicted']} {pair['count']} ({pair['share']:.0%})"
        for pair in found.get("confusions", [])[:_NAMED]
    ]


def _absent(suite: str, found: Mapping[str, Any]) -> list[str]:
    if "sets" not in found:
        if found["status"] == "missing" and suite in SUITES:
            return [f"- {suite}, missing: {SUITES[suite].remedy}"]
        return [] if found["status"] == "evaluated" else [f"- {suite}, {found['status']}: {found['reason']}"]
    lines = [f"- {suite}/{part}, failed: {each['reason']}" for part, each in found["sets"].items() if _failed(each)]
    missing = [part for part, each in found["sets"].items() if each["status"] == "missing"]
    if missing:
        some = ", ".join(missing[:3]) + ", ..." * (len(missing) > 3)
        lines.append(f"- {suite}, {len(missing)} sets missing ({some}): {SUITES[suite].remedy}")
    return lines


def _failed(found: Mapping[str, Any]) -> bool:
    return found["status"] == "failed"


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"
