"""A self-contained HTML file with style, script, charts and pictures. It makes no network requests."""

import html
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

_FOLDER = pathlib.Path(__file__).parent
# Nothing may be loaded from anywhere; a browser refuses it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(title: str, sections: Sequence[tuple[str, str]], *, intro: str = "") -> str:
    """The HTML of a page.

    Args:
      sections: (heading, HTML of the body), in order; those with an empty body are left out.
      intro: HTML between the title and the first section.
    """
    shown = [(heading, body) for heading, body in sections if body]
    links = "".join(f'<a href="#{_anchor(heading)}">{html.escape(heading)}</a>' for heading, _ in shown)
    bodies = "".join(
        f'<section id="{_anchor(heading)}"><h2>{html.escape(heading)}</h2>{body}</section>' for heading, body in shown
    )
    style, script = ((_FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{html.escape(title)}</title><style>{style}</style></head><body>"
        f'<header><h1>{html.escape(title)}</h1>{intro}<nav aria-label="Sections">{links}</nav></header>'
        f"<main>{bodies}</main><script>{script}</script></body></html>\n"
    )


def figure(caption: str, body: str, note: str = "") -> str:
    """A titled figure; "" if the body is empty. `note` is a line of text below it."""
    below = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<figure><figcaption>{html.escape(caption)}</figcaption>{body}{below}</figure>" if body else ""


def grid(figures: Iterable[str]) -> str:
    """Figures side by side, as many as fit."""
    found = "".join(figures)
    return f'<div class="grid">{found}</div>' if found else ""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> str:
    """An HTML table; "" without rows. Cells are text, except those of type Raw. Numbers are aligned to the right."""
    body = [list(row) for row in rows]
    if not body:
        return ""
    heads = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in head)
    lines = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in body)
    said = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    label = f' aria-label="{html.escape(caption or "table")}"'
    # A table that is wider than the screen scrolls by itself, also by the keyboard.
    return (
        f'<div class="scroll" tabindex="0" role="region"{label}><table>{said}<thead><tr>{heads}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


class Raw(str):
    """HTML for a cell of a table."""


def picture(uri: str, alt: str, caption: str = "") -> str:
    """An image from a data URI, with an alternative text."""
    below = f"<span>{html.escape(caption)}</span>" if caption else ""
    return f'<span class="tile"><img src="{uri}" alt="{html.escape(alt)}">{below}</span>'


def details(summary: str, body: str) -> str:
    """A section that opens when it is clicked; "" if the body is empty."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>" if body else ""


def paragraph(text: str) -> str:
    """A paragraph of plain text; "" for none."""
    return f"<p>{html.escape(text)}</p>" if text else ""


def number(value: Any) -> str:
    """A number for a table: four significant digits, thousands separated; "-" for None."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int) or (float(value).is_integer() and abs(value) >= 1000):
        return f"{int(value):,}"
    return f"{value:.4g}"


def _cell(cell: Any) -> str:
    if isinstance(cell, Raw):
        return f"<td>{cell}</td>"
    kind = ' class="number"' if isinstance(cell, int | float) and not isinstance(cell, bool) else ""
    return f"<td{kind}>{html.escape(number(cell))}</td>"


def _anchor(heading: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in heading.lower())
