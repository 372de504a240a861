"""Checks of HTML pages without a browser."""

import collections
import html.parser
import re
import xml.etree.ElementTree as ET

VOID = {"meta", "img", "br", "link", "input", "hr"}
ADDRESS = re.compile(r"""(?:https?:)?//[\w.-]+""")


class Page(html.parser.HTMLParser):
    """The elements of a page. Raises AssertionError where a tag is not closed in order.

    elements: (tag, attributes) in order; texts: the text inside each element of a tag, by tag.
    """

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = collections.defaultdict(list)
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {self._open}"

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
            self.texts[tag].append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag):
        assert self._open, f"</{tag}> closes nothing"
        assert self._open[-1] == tag, f"</{tag}> closes <{self._open[-1]}>"
        self._open.pop()

    def handle_data(self, data):
        for tag in self._open:
            self.texts[tag][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        """The attributes of each element of a tag."""
        return [attributes for name, attributes in self.elements if name == tag]


def check_page(text: str) -> Page:
    """A well-formed page that loads nothing, whose pictures have texts, and whose ids are unique; parsed."""
    page = Page(text)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "data", "action", "poster", "xlink:href"):
            value = attributes.get(name, "")
            local = value.startswith(("#", "data:image/")) or (tag == "a" and not ADDRESS.match(value))
            assert not value or local, f"<{tag} {name}={value[:60]!r}>"
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    styles = " ".join(page.texts["style"]) + " ".join(a.get("style", "") for _, a in page.elements)
    assert "url(" not in styles
    assert "@import" not in styles
    scripts = " ".join(page.texts["script"])
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket|eval\(", scripts)
    ids = [attributes["id"] for _, attributes in page.elements if attributes.get("id")]
    assert len(ids) == len(set(ids)), [name for name, count in collections.Counter(ids).items() if count > 1]
    for attributes in page.all("img"):
        assert len(attributes["alt"]) > 5, attributes
    for attributes in page.all("svg"):
        if "aria-hidden" in attributes:
            continue
        assert attributes["role"] == "img"
        assert all(name in ids for name in attributes["aria-labelledby"].split())
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")
    assert any(a.get("name") == "viewport" for a in page.all("meta"))
    anchors = [a["href"][1:] for a in page.all("a") if a["href"].startswith("#")]
    assert set(anchors) <= set(ids)
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)
    return page
