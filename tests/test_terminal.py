"""The progress bar: drawn on terminals only, and out of the way of log lines."""

import io
import logging
import sys

import pytest

from tinymim_jax.runtime import terminal
from tinymim_jax.runtime.startup import start_logging
from tinymim_jax.runtime.terminal import Bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def test_what_it_says(clock):
    bar = Bar(1000, 64)
    assert bar.text(250, 0.0) == "step 250/1000 [######------------------] 25%"
    bar._first = (200, 0.0)
    # 50 steps in 10 s are 5 a second: 320 images a second, and 750 steps take 150 s more.
    assert bar.text(250, 10.0).split(" | ")[1:] == ["320 images/s", "ETA 2m30s"]


def test_on_a_terminal_log_lines_appear_above_it(clock, monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", "xterm")
    before = logging.getLogger().handlers[:]
    try:
        start_logging()
        bar = Bar(10, 8)
        bar.update(1)
        bar.update(2)  # too soon after the one before
        clock[0] += 1
        bar.update(3)
        logging.getLogger("tinymim_jax.x").info("a line")
        bar.restart()
    finally:
        logging.getLogger().handlers[:] = before
    drawn = out.getvalue().split("\r\x1b[K")
    assert [text.split(" [")[0] for text in drawn[1:3]] == ["step 1/10", "step 3/10"]
    assert drawn[3].endswith("a line\n")  # the bar was erased before it
    assert len(drawn) == 4  # and not once more


@pytest.mark.parametrize("term", ["dumb", None])
def test_nothing_elsewhere(term, clock, monkeypatch):
    out = Terminal() if term else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("TERM", term or "xterm")
    Bar(10, 8).update(1)
    assert out.getvalue() == ""
