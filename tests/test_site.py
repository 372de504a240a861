"""The documentation as a site: every page is in its navigation, no link is broken, nothing is loaded from elsewhere."""

import html.parser
import os
import subprocess
import sys

import pytest
import yaml
from commands import ROOT

pytestmark = pytest.mark.slow


class Loaded(html.parser.HTMLParser):
    """Addresses that a browser fetches while it shows a page; links that a reader may follow are left out."""

    def __init__(self):
        super().__init__()
        self.addresses = []
        self.pictures_without_text = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source"):
            self.addresses.append(given.get("src") or "")
        if tag == "link" and given.get("rel") in ("stylesheet", "preload", "icon", "preconnect"):
            self.addresses.append(given.get("href") or "")
        if tag == "img" and not given.get("alt"):
            self.pictures_without_text.append(given.get("src"))


def test_the_site_is_built_without_warnings(tmp_path):
    pytest.importorskip("material", reason="pip install -e '.[docs]'")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = sorted((ROOT / "docs").glob("*.md"))
    assert {path.stem for path in tmp_path.glob("*.html")} == {path.stem for path in pages} | {"404"}
    for path in tmp_path.glob("*.html"):
        page = Loaded()
        page.feed(path.read_text())
        assert len(page.addresses) > 2
        assert not [address for address in page.addresses if "//" in address.partition("?")[0]], path.name
        assert page.pictures_without_text == [], path.name


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    shown = [page for entry in yaml.safe_load(text)["nav"] for page in entry.values()]
    assert sorted(shown) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    readme = (ROOT / "README.md").read_text()
    assert [page for page in shown if page != "index.md" and f"(docs/{page})" not in readme] == []
