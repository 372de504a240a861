"""Opens a page in headless Chromium, where there is one, and says what happened."""

import html
import json
import pathlib
import re
import shutil
import subprocess
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

_BEFORE = """<script>
window.errors = [];
addEventListener("error", (event) => errors.push(String(event.message)));
addEventListener("securitypolicyviolation", (event) => errors.push("blocked " + event.blockedURI));
</script>"""

# Moves the pointer over each chart, opens what is closed, looks at each picture, and measures the texts of charts.
_AFTER = """<script>
for (const part of document.querySelectorAll("details")) part.open = true;
for (const chart of document.querySelectorAll("svg.chart")) {
  const area = chart.getBoundingClientRect();
  const middle = {clientX: area.left + area.width / 2, clientY: area.top};
  chart.dispatchEvent(new PointerEvent("pointermove", middle));
  if (document.getElementById("pointer").hidden) errors.push("no values at the pointer");
  chart.dispatchEvent(new PointerEvent("pointerleave"));
}
for (const image of document.images) {
  if (!image.complete || !image.naturalWidth) errors.push("broken picture: " + image.alt);
}
window.textHeight = 1000;
for (const text of document.querySelectorAll("svg.chart text")) {
  const box = text.getBoundingClientRect();
  textHeight = Math.min(textHeight, Math.max(box.height, box.width && box.height));
}
</script>"""


def open_page(page: pathlib.Path, folder: pathlib.Path, width: int, *, dark: bool = False) -> dict[str, Any]:
    """{"errors": of scripts and pictures, "asked": addresses, "wide": width of the content, "text": the smallest height
    of a chart's text} of a page in a frame `width` pixels wide. A frame, as a browser's window has a least width.

    Args:
      folder: for the browser's files.
    """
    inner = page.read_text().replace("<head>", "<head>" + _BEFORE).replace("</body>", _AFTER + "</body>")
    content = json.dumps(inner).replace("</", "<\\/")
    outer = folder / "outer.html"
    outer.write_text(
        f'<body style="margin:0"><iframe id="frame" style="width:{width}px;height:3000px;border:0"></iframe><script>'
        f'const frame = document.getElementById("frame"); frame.srcdoc = {content}; frame.onload = () => {{'
        "const inside = frame.contentWindow; document.title = JSON.stringify({errors: inside.errors, "
        "wide: inside.document.documentElement.scrollWidth, text: inside.textHeight}); };</script></body>"
    )
    log = folder / "network.json"
    words = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    words += ["--disable-background-networking", "--disable-component-update", "--virtual-time-budget=5000"]
    words += [f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}", f"--window-size={width + 20},3000"]
    words += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run([*words, "--dump-dom", f"file://{outer}"], capture_output=True, text=True, timeout=120)
    title = re.search(r"<title>(\{.*?\})</title>", done.stdout)
    assert title, done.stdout[-500:] + done.stderr[-2000:]
    return json.loads(html.unescape(title[1])) | {"asked": sorted(_asked(json.loads(log.read_text())))}


def _asked(network: dict[str, Any]) -> set[str]:
    """Addresses that a page asked for. A browser asks its maker for updates as well, which has no page as initiator."""
    found = set()
    for event in network["events"]:
        parameters = event.get("params", {})
        address, initiator = str(parameters.get("url", "")), parameters.get("initiator", "not an origin")
        if re.match(r"(https?|wss?):", address) and initiator != "not an origin":
            found.add(address)
    return found
