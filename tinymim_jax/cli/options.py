"""Options that several commands share, and the start of jax according to them."""

import argparse
import json
import os
from typing import Any

from ml_collections import ConfigDict

from tinymim_jax.runtime import exits
from tinymim_jax.runtime.startup import quiet_unless_first, use_compile_cache


def add_training(command: argparse.ArgumentParser) -> None:
    """Adds how a training runs: devices, data workers, the stall limit, --extend, and KEY=VALUE."""
    command.add_argument(
        "--fsdp", type=int, default=1, metavar="N", help="split large parameters over N devices (default 1)"
    )
    command.add_argument(
        "--stall_minutes",
        type=float,
        default=exits.STALL_MINUTES,
        metavar="N",
        help="exit with status 86 when nothing was finished for so long: no step, no batch of an evaluation "
        f"(default {exits.STALL_MINUTES:g}; 0: never)",
    )
    command.add_argument(
        "--extend",
        action="store_true",
        help="accept a longer train.duration than the workdir was begun with; the learning rate then follows the "
        "schedule of the new length",
    )
    command.add_argument(
        "--log",
        type=_loggers,
        default=(),
        metavar="NAMES",
        help="send the figures to wandb, mlflow or both (wandb,mlflow) as well; their own environment variables say "
        "where to, and WANDB_MODE=offline works without a network",
    )
    add_runtime(command)
    add_overrides(command)


def training_words(options: argparse.Namespace) -> list[str]:
    """The options of `add_training`, except KEY=VALUE, as command-line words for `tinymim train`."""
    words = ["--workers", str(options.workers), "--fsdp", str(options.fsdp), "--compile_cache", options.compile_cache]
    words += ["--stall_minutes", str(options.stall_minutes)]
    words += ["--data_dir", options.data_dir] if options.data_dir else []
    words += ["--log", ",".join(options.log)] if options.log else []
    return [*words, "--extend"] if options.extend else words


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    """Adds a checkpoint to evaluate, and the experiment that names its data."""
    command.add_argument("checkpoint", help="workdir of a run, a student in it, or what `tinymim convert` wrote")
    command.add_argument(
        "--config",
        metavar="FILE[:ARGUMENT]",
        help="experiment: a file or a shipped name (default: the run's own config.json)",
    )
    add_runtime(command)
    add_overrides(command)


def add_runtime(command: argparse.ArgumentParser) -> None:
    """Adds where data sets are, how many processes decode images, and the compile cache."""
    command.add_argument(
        "--data_dir",
        type=os.path.expanduser,
        help="where data sets are (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)",
    )
    command.add_argument(
        "--workers", type=int, default=0, metavar="N", help="extra processes that decode images (default 0)"
    )
    add_compile_cache(command)


def add_compile_cache(command: argparse.ArgumentParser) -> None:
    """Adds where compiled programs are kept. By default a cache that the user has given to JAX stays as it is."""
    variable, cache = "JAX_COMPILATION_CACHE_DIR", "~/.cache/tinymim_jax"
    command.add_argument(
        "--compile_cache",
        default="" if os.environ.get(variable) else cache,
        metavar="DIR",
        help=f"keep compiled programs here (default ${variable}, otherwise {cache}; '' for none)",
    )


def add_overrides(command: argparse.ArgumentParser) -> None:
    """Adds KEY=VALUE words, which change the config."""
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the config: optim.base_lr=1e-3")


def config_of(options: argparse.Namespace) -> ConfigDict:
    """The experiment of --config or, without it, the one in the config.json beside the checkpoint.

    Raises FileNotFoundError if neither is there.
    """
    from etils import epath

    from tinymim_jax.config import apply_overrides, from_json, load_config
    from tinymim_jax.runtime.files import read_json

    if options.config:
        return load_config(options.config, options.overrides)
    path = epath.Path(options.checkpoint).expanduser() / "config.json"
    if not path.exists():
        suites = ", or test sets with --suite" if options.command == "evaluate" else ""
        raise FileNotFoundError(
            f"{path} does not exist: name the experiment with --config{suites}, or give the workdir of a run"
        )
    config = from_json(read_json(path))
    apply_overrides(config, options.overrides)
    return config


def start_jax(options: argparse.Namespace, *, resumable: bool = False) -> None:
    """Joins the other processes of the job and turns on the compile cache; call it before anything uses a device.

    On SIGTERM or SIGHUP a `resumable` command, a training, saves its state and stops; any other ends at once.
    """
    from tinymim_jax.runtime.distributed import initialize_distributed

    initialize_distributed()
    if resumable:
        exits.treat_sighup_as_sigterm()
    else:
        exits.end_on_sigterm()
    quiet_unless_first()
    use_compile_cache(options.compile_cache)


def _loggers(text: str) -> tuple[str, ...]:
    from tinymim_jax.loggers import parse

    try:
        return parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def print_result(result: dict[str, Any]) -> None:
    """Prints one line of JSON, in the first process of a job."""
    if exits.is_first():
        print(json.dumps(result))
