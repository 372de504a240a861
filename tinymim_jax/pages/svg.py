"""Parts of SVG drawings: the element with its title, texts, lines and dots. page.css has their colours."""

import html
import itertools
from collections.abc import Sequence

_numbers = itertools.count()


def drawing(title: str, description: str, body: str, width: float, height: float, kind: str, attributes: str) -> str:
    """An SVG element with a title and, unless it is "", a description for screen readers.

    Args:
      kind: its class, see page.css.
      attributes: further attributes as text, each with a space before it.
    """
    number = next(_numbers)
    described = f'<desc id="d{number}">{html.escape(description)}</desc>' if description else ""
    labelled = f"t{number} d{number}" if description else f"t{number}"
    return (
        f'<svg class="{kind}" role="img" aria-labelledby="{labelled}" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'xmlns="http://www.w3.org/2000/svg"{attributes}><title id="t{number}">{html.escape(title)}</title>'
        f"{described}{body}</svg>"
    )


def text_at(x: float, y: float, text: str, anchor: str) -> str:
    """A line of text whose `anchor` (start, middle, end) is at (x, y)."""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def text_turned(text: str, y: float) -> str:
    """The label of a vertical axis, its middle at y."""
    return f'<text transform="translate(12 {y:.1f}) rotate(-90)" text-anchor="middle">{html.escape(text)}</text>'


def short_number(value: float) -> str:
    """A number with 4 significant digits, or 3 and an exponent if it is very small or large."""
    value = float(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e5):
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{value:.4g}"


def line_path(number: int, places: Sequence[tuple[float, float] | None]) -> str:
    """A line with gaps. An isolated point is a dot, since a path of one point is invisible."""
    commands, alone, pen = [], [], False
    for i, place in enumerate(places):
        if place is None:
            pen = False
            continue
        commands.append(f"{'L' if pen else 'M'}{place[0]:.1f} {place[1]:.1f}")
        if not pen and (i + 1 == len(places) or places[i + 1] is None):
            alone.append(place)
        pen = True
    return f'<path class="line s{number % 8}" d="{"".join(commands)}"/>' + dot_marks(number, alone)


def dot_marks(number: int, places: Sequence[tuple[float, float] | None]) -> str:
    """A dot at each point, in the colour of curve `number`."""
    return "".join(
        f'<circle class="dot s{number % 8}" cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="3"/>' for p in places if p is not None
    )
