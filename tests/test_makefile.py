"""`make setup` and the virtual environments that it finds, with stand-ins for Python and pip."""

import pathlib
import shutil
import subprocess

import pytest
from scripts import ROOT, environment, program

# Answers what the Makefile asks of an interpreter; `-m venv` installs a copy of itself.
PYTHON = """#!/bin/sh
case "$*" in
  *sys.exit*) [ {supported} = 1 ] || {{ echo "Python 3.11 to 3.13 is needed" >&2; exit 1; }} ;;
  *version_info*) echo {version} ;;
  "-m venv "*) rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "venv {version}" >> made ;;
  "-m pip install "*) echo "installed by {version}" >> made ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A folder with the Makefile, and `python(version)` that makes a stand-in there."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)

    def python(version: str) -> pathlib.Path:
        supported = int((3, 11) <= tuple(map(int, version.split("."))) < (3, 14))
        return program(tmp_path / f"python{version}", PYTHON.format(version=version, supported=supported))

    return tmp_path, python


def make(folder: pathlib.Path, *words) -> subprocess.CompletedProcess:
    variables = {key: value for key, value in environment().items() if key not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", "setup", *words], cwd=folder, env=variables, capture_output=True, text=True)


def test_an_environment_of_another_python_is_neither_used_nor_overwritten(clone):
    folder, python = clone
    old, new = python("3.11"), python("3.12")
    assert make(folder, f"PYTHON={old}").returncode == 0
    made = (folder / "made").read_text()
    assert made == "venv 3.11\n" + 2 * "installed by 3.11\n"
    refused = make(folder, f"PYTHON={new}")
    assert refused.returncode != 0
    for words in (".venv was made with Python 3.11", f"PYTHON={new} is Python 3.12", "make clean"):
        assert words in refused.stderr
    assert (folder / "made").read_text() == made
    # Without PYTHON, or with the same version, .venv is used as it is.
    for words in ([], [f"PYTHON={old}"]):
        assert make(folder, *words).returncode == 0
    assert (folder / "made").read_text() == made
    subprocess.run(["make", "clean"], cwd=folder, check=True, capture_output=True)
    assert make(folder, f"PYTHON={new}").returncode == 0
    assert "venv 3.12" in (folder / "made").read_text()


def test_a_changed_lock_is_installed_by_the_python_of_the_environment(clone):
    folder, python = clone
    assert make(folder, f"PYTHON={python('3.12')}").returncode == 0
    (folder / ".venv" / "installed").unlink()  # what a newer requirements.txt amounts to
    assert make(folder).returncode == 0
    assert (folder / "made").read_text() == "venv 3.12\n" + 4 * "installed by 3.12\n"


def test_a_broken_environment_is_made_again_and_an_unsupported_python_is_refused(clone):
    folder, python = clone
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "python").symlink_to(folder / "removed")
    assert make(folder, f"PYTHON={python('3.13')}").returncode == 0
    assert "venv 3.13" in (folder / "made").read_text()
    shutil.rmtree(folder / ".venv")
    refused = make(folder, f"PYTHON={python('3.10')}")
    assert refused.returncode != 0
    assert "Python 3.11 to 3.13 is needed" in refused.stderr
