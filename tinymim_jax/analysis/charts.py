"""The charts of an analysis."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from tinymim_jax.pages.charts import Series, heat_map, line_chart


class Chart(NamedTuple):
    """An SVG with its file name (without .svg), title, and a line that explains it."""

    name: str
    title: str
    svg: str
    note: str


def analysis_charts(analysis: Mapping[str, Any], *, inside: bool = False) -> list[Chart]:
    """The charts of a result of analyze.analyze, without those that have no data.

    Args:
      inside: draw the names of curves into the picture, for separate files.
    """
    networks = analysis["networks"]
    charts = []
    for pair, matrix in analysis["cka"].items():
        first, second = pair.split("|")
        note = f"Rows: blocks of the {first}; columns: blocks of the {second}. 1: equal up to rotation and scale."
        marked = [tuple(blocks) for blocks in analysis.get("compared", [])] if first != second else []
        title = f"CKA, {first} and {second}" if first != second else f"CKA within the {first}"
        labels = {"row_label": f"{first} block", "column_label": f"{second} block"}
        lowest = np.floor(10 * np.min(matrix)) / 10
        svg = heat_map(title, matrix, **labels, marked=marked, limits=(min(float(lowest), 0.9), 1.0))
        charts.append(Chart(f"cka_{first}_{second}", title, svg, note + (" Framed: trained on." if marked else "")))
    for key, title, label, note in (
        ("attention_distance", "Attention distance", "pixels", "A dot for each head: mean distance of query and key."),
        ("attention_entropy", "Attention entropy", "nats", "A dot for each head: 0 is attention to a single token."),
    ):
        series = [
            Series(
                name,
                [block["block"] for block in found["blocks"] for _ in block[key]],
                [value for block in found["blocks"] for value in block[key]],
            )
            for name, found in networks.items()
            if key in found["blocks"][0]  # not of convolutional networks
        ]
        svg = line_chart(title, series, x_label="block", y_label=label, dots=True, inside=inside)
        charts.append(Chart(key, title, svg, note))
    for key, title, note in (
        ("knn", "k-NN accuracy of each block", "On the mean of the patch tokens."),
        ("linear", "Linear accuracy of each block", "Ridge regression on the mean of the patch tokens."),
        ("effective_rank", "Effective rank of each block", "exp(entropy of the singular values) of the features."),
    ):
        series = [
            Series(name, [block["block"] for block in found["blocks"]], [block.get(key) for block in found["blocks"]])
            for name, found in networks.items()
        ]
        svg = line_chart(title, series, x_label="block", inside=inside)
        charts.append(Chart(key, title, svg, note))
    charts += _relation_charts(analysis, inside)
    return [chart for chart in charts if chart.svg]


def block_rows(analysis: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """(head, rows) of a table with a row for each block of each network; attention figures are means over heads."""
    head = ["network", "block", "heads", "distance, pixels", "entropy, nats", "effective rank", "k-NN", "linear"]
    rows = []
    for name, network in analysis["networks"].items():
        for block in network["blocks"]:
            heads = [block.get(key) for key in ("attention_distance", "attention_entropy")]
            figures = [None if values is None else float(np.mean(values)) for values in heads]
            figures += [block.get(key) for key in ("effective_rank", "knn", "linear")]
            rows.append([name, block["block"], len(heads[0]) if heads[0] else None, *figures])
    return head, rows


def _relation_charts(analysis: Mapping[str, Any], inside: bool) -> list[Chart]:
    charts, compared = [], analysis.get("compared", [])
    for relation, values in analysis.get("relation_kl", {}).items():
        kl = np.asarray(values)  # [student blocks, teacher blocks, heads]
        title = f"{relation.upper()} relation KL, mean over heads"
        svg = heat_map(
            title,
            kl.mean(-1),
            row_label="student block",
            column_label="teacher block",
            marked=[tuple(blocks) for blocks in compared],
        )
        charts.append(Chart(f"kl_{relation}", title, svg, "KL(teacher || student) of the softmaxes; low: alike."))
        student = compared[0][0] if compared else len(kl)
        blocks = list(range(1, kl.shape[1] + 1))
        series = [Series(f"head {h + 1}", blocks, list(kl[student - 1, :, h])) for h in range(kl.shape[2])]
        title = f"{relation.upper()} relation KL of student block {student}, by head"
        svg = line_chart(title, series, x_label="teacher block", y_label="nats", inside=inside)
        charts.append(Chart(f"kl_{relation}_heads", title, svg, ""))
    return charts
