"""Running `tinymim` inside the test process, and the commands that documents show."""

import ast
import pathlib
import re
import shlex

import pytest

from tinymim_jax.cli import main as cli

ROOT = pathlib.Path(__file__).parents[1]
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))),
)
_PROGRAMS = ("tinymim", "sbatch", "python", "launch/", "sky")


def run(capsys, *words) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one `tinymim` command."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def shown_in(document: str) -> list[str]:
    """The command lines of a document: fenced blocks of Markdown, indented lines in the strings of a Python file.

    Comments and redirections are left out.
    """
    text = (ROOT / document).read_text()
    if document.endswith(".py"):
        strings = (node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant))
        lines = [line for string in strings if isinstance(string, str) for line in _joined(string)]
        return [
            line.split(" > ")[0].strip()
            for line in lines
            if line.startswith(tuple(f"  {program}" for program in _PROGRAMS))
        ]
    blocks = re.findall(r"^ *```(\w*)\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    lines = [
        line.split(" #")[0].split(" > ")[0].strip()
        for language, block in blocks
        if not language
        for line in _joined(block)
    ]
    return [line for line in lines if line]


def documented_words(document: str, *wanted: str) -> list[str]:
    """The words behind `tinymim` of the only command of `document` that contains all of these."""
    commands = [shlex.split(line) for line in shown_in(document)]
    (words,) = [words for words in commands if all(any(w in word for word in words) for w in wanted)]
    return words[1:]


def _joined(text: str) -> list[str]:
    """Lines, with those that end in a backslash joined to the next."""
    return re.sub(r" *\\\n *", " ", text).splitlines()
