"""Charts as SVG: lines, dots, stacked bars, heat maps. page.css gives the colours of light and dark themes.

Every chart carries a title and a description for screen readers, and its values for the pointer (page.js).
"""

import html
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tinymim_jax.pages.axes import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, across, down, draw_axes, make_scale
from tinymim_jax.pages.colours import viridis
from tinymim_jax.pages.svg import dot_marks, drawing, line_path, short_number, text_at, text_turned

_BAR = 80  # of a heat map: its colour bar with two figures
_MOST_POINTS = 400  # of a line; more than pixels would show nothing more


class Series(NamedTuple):
    """Named points. Where y is None or not finite, the line has a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str = "step",
    y_label: str = "",
    dots: bool = False,
    log: bool = False,
    inside: bool = False,
) -> str:
    """An SVG of lines or dots, with a legend if there are several; "" if no series has a finite point.

    Args:
      log: the y axis is logarithmic if all values are positive and the largest is more than 100 times the smallest.
      inside: the legend is a part of the SVG, below the axes, and not HTML before it.
    """
    cleaned = [(one.name, _finite(one)) for one in series]
    drawn = [(name, points if dots else _thinned(points)) for name, points in cleaned if points]
    every = [point for _, points in drawn for point in points if point]
    if not every:
        return ""
    x_scale = make_scale([x for x, _ in every], log=False, tight=True)
    values = [y for _, y in every]
    y_scale = make_scale(values, log=log and min(values) > 0 and max(values) > 100 * min(values), tight=False)
    parts = [draw_axes(x_scale, y_scale, x_label, y_label)]
    for number, (_, points) in enumerate(drawn):
        places = [p and (across(x_scale.place(p[0])), down(y_scale.place(p[1]))) for p in points]
        parts.append(dot_marks(number, places) if dots else line_path(number, places))
    data = [[name, [[_short(p[0]), _short(p[1])] for p in points if p]] for name, points in drawn]
    frame = {"x": [x_scale.low, x_scale.high], "left": LEFT, "right": WIDTH - RIGHT, "label": x_label}
    attributes = f" data-series='{html.escape(json.dumps(data))}' data-frame='{html.escape(json.dumps(frame))}'"
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>')
    names = [name for name, _ in drawn] if len(drawn) > 1 else []
    height = HEIGHT
    if inside:
        parts += [_key(number, name) for number, name in enumerate(names)]
        height += 16 * len(names)
    svg = drawing(title, _describe(series, x_label), "".join(parts), WIDTH, height, "chart", attributes)
    return legend(names, filled=dots) + svg if names and not inside else svg


def heat_map(
    title: str,
    matrix: Sequence[Sequence[float]],
    *,
    row_label: str,
    column_label: str,
    marked: Sequence[tuple[int, int]] = (),
    limits: tuple[float, float] | None = None,
) -> str:
    """An SVG of coloured cells [rows, columns], rows and columns counted from 1, the first row on top.

    Args:
      marked: (row, column) of cells that get a frame.
      limits: values of the two ends of the colour scale; None: the smallest and largest value.
    """
    values = np.asarray(matrix, np.float64)
    finite = values[np.isfinite(values)]
    if not finite.size:
        return ""
    low, high = limits or (float(finite.min()), float(finite.max()))
    rows, columns = values.shape
    side = min((WIDTH - LEFT - _BAR) / columns, 22.0 if rows > 12 else 26.0)
    # As wide as line charts, so that text has the same size in both.
    width, height = WIDTH, TOP + side * rows + BOTTOM
    parts = []
    for r, c in np.ndindex(rows, columns):
        value = float(values[r, c])
        share = (value - low) / (high - low or 1.0)
        fill = viridis(share) if np.isfinite(value) else "none"
        parts.append(
            f'<rect x="{LEFT + c * side:.1f}" y="{TOP + r * side:.1f}" width="{side:.2f}" height="{side:.2f}" '
            f'fill="{fill}"><title>{html.escape(row_label)} {r + 1}, {html.escape(column_label)} {c + 1}: '
            f"{short_number(value)}</title></rect>"
        )
    for r, c in marked:
        parts.append(
            f'<rect class="marked" x="{LEFT + (c - 1) * side:.1f}" y="{TOP + (r - 1) * side:.1f}" '
            f'width="{side:.2f}" height="{side:.2f}"/>'
        )
    every = max(1, math.ceil(16 / side))
    for r in range(0, rows, every):
        parts.append(text_at(LEFT - 6, TOP + (r + 0.5) * side + 4, str(r + 1), "end"))
    for c in range(0, columns, every):
        parts.append(text_at(LEFT + (c + 0.5) * side, TOP + rows * side + 14, str(c + 1), "middle"))
    parts.append(text_at(LEFT + columns * side / 2, TOP + rows * side + 30, column_label, "middle"))
    parts.append(text_turned(row_label, TOP + rows * side / 2))
    parts.append(_colour_bar(LEFT + side * columns + 14, low, high, min(side * rows, 160.0)))
    place = np.unravel_index(np.nanargmax(values), values.shape)
    description = (
        f"{rows} rows ({row_label}) and {columns} columns ({column_label}); values from "
        f"{short_number(finite.min())} to {short_number(finite.max())}, the largest in row {place[0] + 1}, "
        f"column {place[1] + 1}."
    )
    return drawing(title, description, "".join(parts), width, height, "map", "")


def stacked_bar(title: str, shares: Mapping[str, float]) -> str:
    """A horizontal bar with a legend. The widths of its parts are `shares`, which sum to 1."""
    parts, left = [], 0.0
    for number, (name, share) in enumerate(shares.items()):
        parts.append(
            f'<rect class="fill s{number % 8}" x="{left:.1f}" y="0" width="{share * 1000:.1f}" height="26">'
            f"<title>{html.escape(name)}: {share:.1%}</title></rect>"
        )
        left += share * 1000
    description = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return drawing(title, description, "".join(parts), 1000, 26, "bar", ' preserveAspectRatio="none"') + legend(
        [f"{name} {share:.1%}" for name, share in shares.items()], filled=True
    )


def interval(value: float, spread: float, low: float, high: float, text: str) -> str:
    """A small SVG for a cell of a table: a dot at `value` with a line of +- `spread`, on the scale low..high."""
    span = high - low or 1.0

    def at(number: float) -> float:
        return 6 + 148 * min(max((number - low) / span, 0.0), 1.0)

    body = '<line class="axis" x1="6" x2="154" y1="9" y2="9"/>'
    body += f'<line class="line s0" x1="{at(value - spread):.1f}" x2="{at(value + spread):.1f}" y1="9" y2="9"/>'
    body += f'<circle class="fill s0" cx="{at(value):.1f}" cy="9" r="4"/>'
    return drawing(text, "", body, 160, 18, "mini", "")


def legend(names: Sequence[str], *, filled: bool = False) -> str:
    """A legend: names with the colours and dashes of their lines or bars."""
    drawn = []
    for number, name in enumerate(names):
        key = (
            f'<rect class="fill s{number % 8}" width="18" height="8" y="2"/>'
            if filled
            else f'<line class="line s{number % 8}" x1="0" x2="18" y1="6" y2="6"/>'
        )
        drawn.append(f'<span><svg width="18" height="12" aria-hidden="true">{key}</svg> {html.escape(name)}</span>')
    return f'<div class="legend">{"".join(drawn)}</div>'


def standalone(svg: str) -> str:
    """The SVG as a complete file with style and background."""
    style = (pathlib.Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    head, rest = svg.split(">", 1)
    style += " svg { background: var(--back) }"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}><style>{style}</style>{rest}\n'


def _key(number: int, name: str) -> str:
    y = HEIGHT + 16 * number + 6
    line = f'<line class="line s{number % 8}" x1="{LEFT}" x2="{LEFT + 24}" y1="{y}" y2="{y}"/>'
    return line + text_at(LEFT + 30, y + 4, name, "start")


def _finite(series: Series) -> list[tuple[float, float] | None]:
    """Points in their order, None for gaps; [] if nothing is finite."""
    points = [
        (float(x), float(y)) if y is not None and math.isfinite(y) else None
        for x, y in zip(series.x, series.y, strict=True)
    ]
    return points if any(points) else []


def _thinned(points: list[tuple[float, float] | None]) -> list[tuple[float, float] | None]:
    """About _MOST_POINTS of the points: the lowest and the highest of each section, so that spikes remain."""
    if len(points) <= _MOST_POINTS:
        return points
    kept: list[tuple[float, float] | None] = []
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    for start in range(0, len(points), size):
        some = [point for point in points[start : start + size] if point]
        if not some:
            kept.append(None)
            continue
        ends = {min(some, key=lambda p: p[1]), max(some, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _colour_bar(left: float, low: float, high: float, height: float) -> str:
    steps = 24
    parts = [
        f'<rect x="{left:.1f}" y="{TOP + height * (1 - (i + 1) / steps):.2f}" width="10" '
        f'height="{height / steps + 0.3:.2f}" fill="{viridis((i + 0.5) / steps)}"/>'
        for i in range(steps)
    ]
    parts.append(text_at(left + 13, TOP + 10, short_number(high), "start"))
    parts.append(text_at(left + 13, TOP + height, short_number(low), "start"))
    return "".join(parts)


def _describe(series: Sequence[Series], x_label: str) -> str:
    said = []
    for one in series:
        points = [point for point in _finite(one) if point]
        if not points:
            continue
        values = [y for _, y in points]
        (x0, y0), (x1, y1) = ([short_number(value) for value in points[i]] for i in (0, -1))
        missing = len(one.x) - len(points)
        said.append(
            f"{one.name}: {y0} at {x_label} {x0}, {y1} at {x_label} {x1}, between {short_number(min(values))} and "
            f"{short_number(max(values))}" + (f"; {missing} values are not finite" if missing else "")
        )
    return "; ".join(said) + "."


def _short(value: float) -> float:
    return float(f"{value:.5g}")
