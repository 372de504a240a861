"""Charts as SVG: lines, dots, stacked bars, heat maps. page.css gives the colours of light and dark themes.

Every chart carries a title and a description for screen readers, and its values for the pointer (page.js).
"""

import html
import itertools
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from tinymim_jax.pages.colours import viridis

_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 8, 36
_BAR = 80  # of a heat map: its colour bar with two figures
_MOST_POINTS = 400  # of a line; more than pixels would show nothing more
_numbers = itertools.count()


class Series(NamedTuple):
    """Points with a name. y may hold None or values that are not finite: there the line has a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]


class Scale(NamedTuple):
    """Maps values to 0..1, and the values at which the axis has labels."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = math.log(value) if self.log else value
        return (value - low) / (high - low)


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
    """An SVG of lines, or of dots, below a legend of several; "" where no series has a finite point.

    Args:
      log: the y axis is logarithmic if all values are positive and the largest is more than 100 times the smallest.
      inside: the legend is a part of the SVG, below the axes, and not HTML before it.
    """
    cleaned = [(one.name, _finite(one)) for one in series]
    drawn = [(name, points if dots else _thinned(points)) for name, points in cleaned if points]
    every = [point for _, points in drawn for point in points if point]
    if not every:
        return ""
    x_scale = _scale([x for x, _ in every], log=False, tight=True)
    values = [y for _, y in every]
    y_scale = _scale(values, log=log and min(values) > 0 and max(values) > 100 * min(values), tight=False)
    parts = [_axes(x_scale, y_scale, x_label, y_label)]
    for number, (_, points) in enumerate(drawn):
        places = [p and (_across(x_scale.place(p[0])), _down(y_scale.place(p[1]))) for p in points]
        parts.append(_dots(number, places) if dots else _path(number, places))
    data = [[name, [[_short(p[0]), _short(p[1])] for p in points if p]] for name, points in drawn]
    frame = {"x": [x_scale.low, x_scale.high], "left": _LEFT, "right": _WIDTH - _RIGHT, "label": x_label}
    attributes = f" data-series='{html.escape(json.dumps(data))}' data-frame='{html.escape(json.dumps(frame))}'"
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" visibility="hidden"/>')
    names = [name for name, _ in drawn] if len(drawn) > 1 else []
    height = _HEIGHT
    if inside:
        parts += [_key(number, name) for number, name in enumerate(names)]
        height += 16 * len(names)
    svg = _svg(title, _describe(series, x_label), "".join(parts), _WIDTH, height, "chart", attributes)
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
    side = min((_WIDTH - _LEFT - _BAR) / columns, 22.0 if rows > 12 else 26.0)
    # As wide as line charts, so that text has the same size in both.
    width, height = _WIDTH, _TOP + side * rows + _BOTTOM
    parts = []
    for r, c in np.ndindex(rows, columns):
        value = float(values[r, c])
        share = (value - low) / (high - low or 1.0)
        fill = viridis(share) if np.isfinite(value) else "none"
        parts.append(
            f'<rect x="{_LEFT + c * side:.1f}" y="{_TOP + r * side:.1f}" width="{side:.2f}" height="{side:.2f}" '
            f'fill="{fill}"><title>{html.escape(row_label)} {r + 1}, {html.escape(column_label)} {c + 1}: '
            f"{_text(value)}</title></rect>"
        )
    for r, c in marked:
        parts.append(
            f'<rect class="marked" x="{_LEFT + (c - 1) * side:.1f}" y="{_TOP + (r - 1) * side:.1f}" '
            f'width="{side:.2f}" height="{side:.2f}"/>'
        )
    every = max(1, math.ceil(16 / side))
    for r in range(0, rows, every):
        parts.append(_label(_LEFT - 6, _TOP + (r + 0.5) * side + 4, str(r + 1), "end"))
    for c in range(0, columns, every):
        parts.append(_label(_LEFT + (c + 0.5) * side, _TOP + rows * side + 14, str(c + 1), "middle"))
    parts.append(_label(_LEFT + columns * side / 2, _TOP + rows * side + 30, column_label, "middle"))
    parts.append(_turned(row_label, _TOP + rows * side / 2))
    parts.append(_colour_bar(_LEFT + side * columns + 14, low, high, min(side * rows, 160.0)))
    place = np.unravel_index(np.nanargmax(values), values.shape)
    description = (
        f"{rows} rows ({row_label}) and {columns} columns ({column_label}); values from {_text(finite.min())} to "
        f"{_text(finite.max())}, the largest in row {place[0] + 1}, column {place[1] + 1}."
    )
    return _svg(title, description, "".join(parts), width, height, "map", "")


def stacked_bar(title: str, shares: Mapping[str, float]) -> str:
    """One horizontal bar whose parts have the widths of `shares`, which sum to 1, and its legend."""
    parts, left = [], 0.0
    for number, (name, share) in enumerate(shares.items()):
        parts.append(
            f'<rect class="fill s{number % 8}" x="{left:.1f}" y="0" width="{share * 1000:.1f}" height="26">'
            f"<title>{html.escape(name)}: {share:.1%}</title></rect>"
        )
        left += share * 1000
    description = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
    return _svg(title, description, "".join(parts), 1000, 26, "bar", ' preserveAspectRatio="none"') + legend(
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
    return _svg(text, "", body, 160, 18, "mini", "")


def legend(names: Sequence[str], *, filled: bool = False) -> str:
    """Names with the colours and dashes of their lines, or of their bars."""
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
    """The SVG as a file of its own, with its style and a background."""
    style = (pathlib.Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    head, rest = svg.split(">", 1)
    style += " svg { background: var(--back) }"
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}><style>{style}</style>{rest}\n'


def _key(number: int, name: str) -> str:
    y = _HEIGHT + 16 * number + 6
    line = f'<line class="line s{number % 8}" x1="{_LEFT}" x2="{_LEFT + 24}" y1="{y}" y2="{y}"/>'
    return line + _label(_LEFT + 30, y + 4, name, "start")


def _finite(series: Series) -> list[tuple[float, float] | None]:
    """Points in their order, None for gaps; [] where nothing is finite."""
    points = [
        (float(x), float(y)) if y is not None and math.isfinite(y) else None
        for x, y in zip(series.x, series.y, strict=True)
    ]
    return points if any(points) else []


def _thinned(points: list[tuple[float, float] | None]) -> list[tuple[float, float] | None]:
    """At most about _MOST_POINTS: of each stretch its lowest and its highest point, so that spikes remain."""
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


def _scale(values: Sequence[float], *, log: bool, tight: bool) -> Scale:
    low, high = min(values), max(values)
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = max(1, math.ceil(len(powers) / 6))
        ticks = tuple(10.0**power for power in powers[::every])
        return Scale(min(low, 10.0 ** powers[0]), max(high, 10.0 ** powers[-1]), True, ticks)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        low, high = (low, low + 1.0) if tight else (low - room, high + room)
    step = _nice((high - low) / 5)
    if tight and all(float(value).is_integer() for value in values):
        step = max(1.0, math.ceil(step))  # no half steps of a training, no half blocks
    if not tight:
        low, high = math.floor(low / step) * step, math.ceil(high / step) * step
    first = math.ceil(low / step - 1e-9)
    count = math.floor((high - low) / step + 1e-9) + 1
    ticks = tuple(round((first + i) * step, 12) for i in range(count) if (first + i) * step <= high + step * 1e-6)
    return Scale(low, high, False, ticks)


def _nice(step: float) -> float:
    """The nearest of 1, 2, 2.5, 5 or 10 times a power of ten that is not smaller."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> str:
    parts = []
    for value in y.ticks:
        at = _down(y.place(value))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(_label(_LEFT - 6, at + 4, _text(value), "end"))
    for value in x.ticks:
        at = _across(x.place(value))
        parts.append(_label(min(at, _WIDTH - 14), _HEIGHT - _BOTTOM + 15, _text(value), "middle"))
    base = _HEIGHT - _BOTTOM
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(_label((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 5, x_label, "middle"))
    return "".join(parts) + (_turned(y_label, (_TOP + base) / 2) if y_label else "")


def _path(number: int, places: Sequence[tuple[float, float] | None]) -> str:
    """A line with gaps; a point without neighbours is a dot, since a path of one point draws nothing."""
    commands, alone, pen = [], [], False
    for i, place in enumerate(places):
        if place is None:
            pen = False
            continue
        commands.append(f"{'L' if pen else 'M'}{place[0]:.1f} {place[1]:.1f}")
        if not pen and (i + 1 == len(places) or places[i + 1] is None):
            alone.append(place)
        pen = True
    return f'<path class="line s{number % 8}" d="{"".join(commands)}"/>' + _dots(number, alone)


def _dots(number: int, places: Sequence[tuple[float, float] | None]) -> str:
    return "".join(
        f'<circle class="dot s{number % 8}" cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="3"/>' for p in places if p is not None
    )


def _colour_bar(left: float, low: float, high: float, height: float) -> str:
    steps = 24
    parts = [
        f'<rect x="{left:.1f}" y="{_TOP + height * (1 - (i + 1) / steps):.2f}" width="10" '
        f'height="{height / steps + 0.3:.2f}" fill="{viridis((i + 0.5) / steps)}"/>'
        for i in range(steps)
    ]
    parts.append(_label(left + 13, _TOP + 10, _text(high), "start"))
    parts.append(_label(left + 13, _TOP + height, _text(low), "start"))
    return "".join(parts)


def _svg(title: str, description: str, body: str, width: float, height: float, kind: str, attributes: str) -> str:
    number = next(_numbers)
    described = f'<desc id="d{number}">{html.escape(description)}</desc>' if description else ""
    labelled = f"t{number} d{number}" if description else f"t{number}"
    return (
        f'<svg class="{kind}" role="img" aria-labelledby="{labelled}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'xmlns="http://www.w3.org/2000/svg"{attributes}><title id="t{number}">{html.escape(title)}</title>'
        f"{described}{body}</svg>"
    )


def _describe(series: Sequence[Series], x_label: str) -> str:
    said = []
    for one in series:
        points = [point for point in _finite(one) if point]
        if not points:
            continue
        (first_x, first), (last_x, last) = points[0], points[-1]
        low, high = min(y for _, y in points), max(y for _, y in points)
        missing = len(one.x) - len(points)
        said.append(
            f"{one.name}: {_text(first)} at {x_label} {_text(first_x)}, {_text(last)} at {x_label} {_text(last_x)}, "
            f"between {_text(low)} and {_text(high)}" + (f"; {missing} values are not finite" if missing else "")
        )
    return "; ".join(said) + "."


def _label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _turned(text: str, y: float) -> str:
    return f'<text transform="translate(12 {y:.1f}) rotate(-90)" text-anchor="middle">{html.escape(text)}</text>'


def _across(share: float) -> float:
    return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)


def _down(share: float) -> float:
    return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _text(value: float) -> str:
    value = float(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"
