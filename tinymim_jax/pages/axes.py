"""The plot area of a chart: its place in the drawing, scales with ticks, and axes."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from tinymim_jax.pages.svg import short_number, text_at, text_turned

WIDTH, HEIGHT = 420, 250
"""Size of a chart in units of the drawing."""
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 36
"""Margins between its border and the plot."""


class Scale(NamedTuple):
    """A mapping of values to 0..1, and the values at which the axis has labels."""

    low: float
    high: float
    log: bool
    ticks: tuple[float, ...]

    def place(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = math.log(value) if self.log else value
        return (value - low) / (high - low)


def make_scale(values: Sequence[float], *, log: bool, tight: bool) -> Scale:
    """A scale with about five ticks for finite values. tight: it ends at the outermost values, not at ticks."""
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
    """The smallest of 1, 2, 2.5, 5 or 10 times a power of ten that is at least as large."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= step * (1 - 1e-9))


def draw_axes(x: Scale, y: Scale, x_label: str, y_label: str) -> str:
    """Axes with labels at their ticks and a grid line for each tick of y."""
    parts = []
    for value in y.ticks:
        at = down(y.place(value))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(text_at(LEFT - 6, at + 4, short_number(value), "end"))
    for value in x.ticks:
        at = across(x.place(value))
        parts.append(text_at(min(at, WIDTH - 14), HEIGHT - BOTTOM + 15, short_number(value), "middle"))
    base = HEIGHT - BOTTOM
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    parts.append(text_at((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_label, "middle"))
    return "".join(parts) + (text_turned(y_label, (TOP + base) / 2) if y_label else "")


def across(share: float) -> float:
    """x of a share 0..1 of the plot's width."""
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def down(share: float) -> float:
    """y of a share 0..1 of the plot's height, counted from below."""
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)
