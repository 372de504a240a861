"""Writes report.html."""

import logging
import os

import jax
from etils import epath

from tinymim_jax.pages.page import page
from tinymim_jax.reports.folder import IN_FULL, folder_sections
from tinymim_jax.reports.record import find_suites, is_suites, read_json, read_record
from tinymim_jax.reports.run import run_intro, run_sections
from tinymim_jax.reports.suites import suites_section
from tinymim_jax.runtime.files import write_text
from tinymim_jax.runtime.runs import find_runs

log = logging.getLogger(__name__)

REPORT = "report.html"
# The report of a shorter run is made of its files only: measuring its networks compiles several programs and needs a
# thousand images, which may take as long as the run itself.
LOOKED_AT_SECONDS, LOOKED_AT_IMAGES = 60.0, 20_000


def write_report(
    path: str | os.PathLike,
    *,
    output: str | os.PathLike | None = None,
    look: bool = True,
    data_dir: str | None = None,
    workers: int = 0,
) -> epath.Path:
    """Writes the report on a run, a sweep, a chain, any folder with runs, or the results of test suites.

    Args:
      path: a workdir, a folder with workdirs up to two levels below, or a JSON file of `tinymim evaluate --suite`.
      output: the file; by default report.html in the folder, or beside the JSON file.
      look: first measure the networks of up to four runs, unless that was done for their newest checkpoint
        (analysis/look.py). If a measurement fails, that is logged and the report is written without it.

    Returns the file that was written. Raises FileNotFoundError if there is neither a run nor a result.
    """
    folder = epath.Path(path).expanduser()
    if folder.is_file():
        content = read_json(folder)
        if not is_suites(content):
            raise ValueError(f"{folder} is no result of `tinymim evaluate --suite ... --output FILE`: give such a file")
        text = page(f"Test suites, {content['checkpoint']}", [("Test suites", suites_section(folder.name, content))])
        return _written(epath.Path(output or folder.with_suffix(".html")), text)
    runs, suites = find_runs(folder), find_suites(folder) if folder.is_dir() else {}
    if not runs and not suites:
        raise FileNotFoundError(
            f"no run has begun in {folder}, and it holds no results of test suites: give the --workdir of a run, a "
            "sweep or a chain, or a file of `tinymim evaluate --suite ... --output FILE`"
        )
    if look and len(runs) <= IN_FULL:
        from tinymim_jax.analysis.look import look_at

        for run in runs:
            look_at(run, data_dir=data_dir, workers=workers)
    if [os.fspath(run) for run in runs] == [os.fspath(folder)]:
        record = read_record(folder)
        text = page(record.name, run_sections(record), intro=run_intro(record))
    else:
        records = [read_record(run, os.fspath(run)[len(os.fspath(folder)) :].strip("/")) for run in runs]
        records.sort(key=lambda record: record.status.get("first_began", record.status.get("began", 0.0)))
        sections = folder_sections(folder, records)
        sections += [("Test suites", "".join(suites_section(name, found) for name, found in suites.items()))]
        text = page(folder.resolve().name, sections)
    return _written(epath.Path(output or folder / REPORT), text)


def write_at_end(
    workdir: str | os.PathLike,
    *,
    seconds: float = 0.0,
    images: int = 0,
    data_dir: str | None = None,
    workers: int = 0,
) -> None:
    """Writes the report of a run, sweep or chain that has just ended. Errors are logged and not raised.

    Args:
      seconds, images: duration of a run, and number of images it trained on. Networks are measured only after runs of
        at least a minute and 20,000 images, in jobs of one process; `tinymim report` does it for the others.
    """
    look = seconds >= LOOKED_AT_SECONDS and images >= LOOKED_AT_IMAGES and jax.process_count() == 1
    try:
        path = write_report(workdir, look=look, data_dir=data_dir, workers=workers)
    except Exception as error:
        log.warning("the report could not be written: %s: %s", type(error).__name__, error)
        return
    more = "" if look else f"; `tinymim report {workdir}` adds pictures and measurements of the networks"
    log.info("%s%s", path, more)


def _written(path: epath.Path, text: str) -> epath.Path:
    write_text(path.expanduser(), text, sync=False)
    return path
