"""`tinymim evaluate CHECKPOINT --suite ...`: a classifier on ImageNet's test sets, or on labelled sets of the user."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tinymim_jax.evaluation.suites.registry import SUITES, parse_suites
from tinymim_jax.runtime import exits
from tinymim_jax.runtime.files import write_text
from tinymim_jax.runtime.paths import check_output_file

_OPTIONS = ("output", "batch_size", "dtype")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `evaluate --suite`. Their defaults are None, so that `check` sees which were given."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = _epilog({name: suite.about for name, suite in SUITES.items()})
    options = command.add_argument_group("suites")
    options.add_argument(
        "--suite", nargs="+", metavar="NAME", help="evaluate on these test sets instead; no config is needed"
    )
    options.add_argument("--output", metavar="FILE.json", help="write all results there, after each set")
    options.add_argument(
        "--batch_size", type=int, metavar="N", help="over all devices (default: 256 for each device, 64 on CPUs)"
    )
    options.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation (default float32)")


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for options that do not go together; called before anything is computed."""
    if options.suite is None:
        given = [key for key in _OPTIONS if getattr(options, key) is not None]
        if given:
            raise ValueError(f"--{given[0]} needs --suite NAME; see tinymim evaluate --help")
        return
    if options.config or options.overrides:
        what = "--config" if options.config else options.overrides[0]
        raise ValueError(f"{what}: a --suite is evaluated without a config, as the checkpoint's own record says")
    if options.output is not None:
        check_output_file(options.output, "--output")


def run(options: argparse.Namespace) -> int:
    """Prints the table and returns the exit status: 1 where a set failed, or none was found."""
    import jax

    from tinymim_jax.evaluation.suites.classifier import SuiteClassifier
    from tinymim_jax.evaluation.suites.report import markdown
    from tinymim_jax.evaluation.suites.run import evaluate_suites

    suites = parse_suites(options.suite)
    model = SuiteClassifier(
        options.checkpoint,
        batch_size=options.batch_size,
        dtype=options.dtype or "float32",
        workers=options.workers,
    )
    results: dict[str, Any] = {}
    keep = _keeper(options.output if jax.process_index() == 0 else None, results)
    status = 0
    try:
        evaluate_suites(model, suites, data_dir=options.data_dir, on_result=keep)
    except KeyboardInterrupt:
        status = exits.INTERRUPTED
    if results and jax.process_index() == 0:
        print(markdown(results, options.data_dir))
    return status or _status(results)


def _keeper(output: str | None, results: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """A function that copies the results so far to `results`, and to the file `output` if there is one."""

    def keep(found: dict[str, Any]) -> None:
        results.update(found)
        if output is None:
            return
        write_text(Path(output).expanduser(), json.dumps(found, indent=1, allow_nan=False) + "\n")

    return keep


def _status(results: dict[str, Any]) -> int:
    found = results["suites"].values()
    failed = any(each["status"] == "failed" for suite in found for each in (suite, *suite.get("sets", {}).values()))
    return exits.ERROR if failed or not any("top1" in suite for suite in found) else 0


def _epilog(about: dict[str, str]) -> str:
    names = "\n".join(f"  {name:10}{line}" for name, line in about.items())
    return f"""\
Without --suite: losses and accuracies on the evaluation split of the experiment, as one line of JSON.

With --suite: top-1 and top-5, accuracy by class, calibration (ECE with 15 bins), the most frequent confusions,
images/s, parameters and FLOPs: in a table beside the paper's figures, and in full in --output. Missing sets are listed
with what to do; the others are evaluated all the same.

Classes are matched by name: those of the data must be classes of the checkpoint. A checkpoint without class names (a
converted file) is matched by position. "substituted" counts images that could not be decoded, so that another one was
used in their place; more than 0.1 % of them are an error.

{names}
  {"all":10}all of these
  NAME@SPLIT a labelled set of your own with some or all of the checkpoint's classes: folder:/data/pets@test

  tinymim evaluate runs/b_finetuned --suite all --workers 8 --output results.json
  tinymim evaluate converted/deit_s --suite imagenet a r
  tinymim evaluate runs/pets --suite folder:/data/pets@test
"""
