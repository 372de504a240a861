"""Results of suites as people read them: a Markdown table against the paper's figures, and what is missing."""

from collections.abc import Mapping
from typing import Any

from tinymim_jax.suites import PAPER, SUITES

_CONFUSIONS = 5
_HEAD = ("suite", "images", "classes", "top-1", "top-5", "ECE", "mCE")


def markdown(results: Mapping[str, Any], data_dir: str | None = None) -> str:
    """The table of what `suite_run.evaluate_suites` gave, in per cent. `data_dir` is where sets were looked for."""
    suites = results["suites"]
    name, figures = PAPER.get(results["model"]["embed_dim"], ("", {}))
    compared = [suite for suite in suites if suite in figures]
    head = [*_HEAD, *([name] if compared else [])]
    lines = [head, ["---"] * len(head)]
    lines += [_row(suite, found) + ([_paper(suite, figures)] if compared else []) for suite, found in suites.items()]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
    parts = [_description(results), table]
    if compared:
        parts.append(f"Last column: {name} in the paper, top-1, of c the mCE.")
    if "top1" in suites.get("c", {}):
        parts.append("Of c, top-1, top-5 and ECE are means over its sets.")
    confused = [line for suite, found in suites.items() for line in _confused(suite, found)]
    parts += ["Most confused (true class, answer, of all its images):\n" + "\n".join(confused)] if confused else []
    absent = [line for suite, found in suites.items() for line in _absent(suite, found)]
    place = data_dir or "$TFDS_DATA_DIR or ~/tensorflow_datasets"
    parts += [f"Not evaluated (DATA_DIR: {place}):\n" + "\n".join(absent)] if absent else []
    return "\n\n".join(parts)


def _description(results: Mapping[str, Any]) -> str:
    model, speed = results["model"], results["throughput"]
    return (
        f"{results['checkpoint']}: width {model['embed_dim']}, {model['depth']} blocks, {model['classes']} classes; "
        f"{model['parameters'] / 1e6:.4g} M parameters, {model['forward_flops'] / 1e9:.4g} GFLOPs an image\n"
        f"{speed['images_per_second']:,.4g} images/s, forward alone, {speed['dtype']}, batches of "
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


def _paper(suite: str, figures: Mapping[str, float]) -> str:
    return f"{figures[suite]:.1f}" if suite in figures else "-"


def _confused(suite: str, found: Mapping[str, Any]) -> list[str]:
    return [
        f"- {suite}: {pair['true']}, {pair['predicted']}: {pair['count']} ({pair['share']:.0%})"
        for pair in found.get("confusions", [])[:_CONFUSIONS]
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
