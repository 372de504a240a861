"""The `tinymim` command."""

import argparse
import json
import logging
import re
import sys
import traceback

from ml_collections import ConfigDict

from tinymim_jax import (
    chain,
    convert_command,
    exits,
    features_command,
    prepare_command,
    status,
    suite_command,
    sweep,
)
from tinymim_jax.plan import command as plan_command
from tinymim_jax.startup import quiet_unless_first, start_logging, use_compile_cache

# What a user can mend: shown as one message without a traceback.
_USER_ERRORS = (ValueError, TypeError, OSError, FloatingPointError, ImportError, RuntimeError)

_DESCRIPTION = """\
Distil a masked-image-modelling ViT into a small one by its token relations (TinyMIM, arXiv 2301.01296).

  tinymim prepare imagenet2012
  tinymim convert --from mae --input mae_pretrain_vit_large.pth --output teachers/mae_vit_large
  tinymim train --config configs/distill_b.py --workdir runs/b distill.teacher.path=teachers/mae_vit_large
  tinymim train --config configs/finetune_b.py --workdir runs/b_finetuned init=runs/b
"""


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and exits: 0 done, 1 error, 75 preempted after saving, 86 stalled, 130 interrupted."""
    options = _parse(sys.argv[1:] if arguments is None else arguments)
    start_logging()
    why = ""
    try:
        code = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        code, why = exits.INTERRUPTED, "Ctrl-C, twice"
    except _USER_ERRORS as error:
        code, why = exits.ERROR, f"{type(error).__name__}: {error}"
        if isinstance(error, BrokenPipeError) and exits.nobody_reads():
            pass
        # XLA's errors are RuntimeErrors too, but there the traceback is what helps.
        elif options.debug or type(error).__name__ == "JaxRuntimeError":
            traceback.print_exc()
            if exits.who():
                print(
                    f"tinymim {options.command}{exits.who()}: see above; if a peer has ended, see its log",
                    file=sys.stderr,
                )
        else:
            print(f"tinymim {options.command}{exits.who()}: {error}", file=sys.stderr)
    exits.leave(code, why)


def _parse(words: list[str]) -> argparse.Namespace:
    """argparse takes positional words in one run only; people write key=value between flags as well."""
    overrides = [word for word in words if re.match(r"[A-Za-z_][\w.]*=", word)]
    parser = _parser()
    options = parser.parse_args([word for word in words if word not in overrides])
    if overrides and not hasattr(options, "overrides"):
        parser.error(f"{options.command} takes no KEY=VALUE: {' '.join(overrides)}")
    if overrides:
        options.overrides = [*options.overrides, *overrides]
    return options


def _train(options: argparse.Namespace) -> int:
    from tinymim_jax.config import load_config

    config = load_config(options.config, options.overrides)
    _start_jax(options)
    from tinymim_jax.train import train

    where = {"data_dir": options.data_dir, "workers": options.workers, "fsdp": options.fsdp}
    try:
        train(config, options.workdir, stall_minutes=options.stall_minutes, **where)
    except exits.Interrupted as stop:
        if exits.is_first():
            logging.getLogger("tinymim_jax").warning("%s", stop)
        return exits.PREEMPTED
    return exits.DONE


def _evaluate(options: argparse.Namespace) -> int:
    suite_command.check(options)
    if options.suite:
        _start_jax(options)
        return suite_command.run(options)
    config = _config_of(options)
    _start_jax(options)
    from tinymim_jax.evaluate import evaluate_checkpoint

    result = evaluate_checkpoint(config, options.checkpoint, data_dir=options.data_dir, workers=options.workers)
    _print_result(result)
    return 0


def _judge_features(run):
    """(options) -> exit status, of `run(config, options)`, which gives the figures."""

    def judge(options: argparse.Namespace) -> int:
        config = _config_of(options)
        _start_jax(options)
        _print_result(run(config, options))
        return 0

    return judge


def _print_result(result: dict) -> None:
    if exits.is_first():
        print(json.dumps(result))


def _predict(options: argparse.Namespace) -> int:
    use_compile_cache(options.compile_cache)
    from tinymim_jax.inference import load

    model = load(options.checkpoint)
    for image, predictions in zip(options.images, model.classify(options.images, top=options.top)):
        if options.json:
            print(json.dumps({"image": image, "predictions": [each._asdict() for each in predictions]}))
        else:
            print(f"{image}: " + ", ".join(f"{each.name} {each.probability:.1%}" for each in predictions))
    return 0


def _config_of(options: argparse.Namespace) -> ConfigDict:
    """The experiment of --config, or that of the run whose checkpoint it is."""
    from etils import epath

    from tinymim_jax.config import apply_overrides, from_json, load_config

    if options.config:
        return load_config(options.config, options.overrides)
    path = epath.Path(options.checkpoint).expanduser() / "config.json"
    if not path.exists():
        suites = ", or test sets with --suite" if options.command == "evaluate" else ""
        raise FileNotFoundError(
            f"{path} does not exist: name the experiment with --config{suites}, or give the workdir of a run"
        )
    config = from_json(json.loads(path.read_text()))
    apply_overrides(config, options.overrides)
    return config


def _sweep(options: argparse.Namespace) -> int:
    return sweep.run(options, _train)


def _demo(options: argparse.Namespace) -> int:
    from tinymim_jax.demo import demo

    use_compile_cache(options.compile_cache)
    demo(options.workdir, seeds=options.seeds, compile_cache=options.compile_cache)
    return 0


def _start_jax(options: argparse.Namespace) -> None:
    """Joins the other processes and turns on the compile cache, before anything touches a device."""
    from tinymim_jax.sharding import initialize_distributed

    initialize_distributed()
    quiet_unless_first()
    use_compile_cache(options.compile_cache)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tinymim", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = _command(commands, "train", _train, "run an experiment; run the same command again to resume it")
    train.add_argument(
        "--config", required=True, metavar="FILE[:ARGUMENT]", help="experiment, such as configs/distill_b.py"
    )
    train.add_argument("--workdir", required=True, help="where everything about this run is kept")
    _training(train)

    stages = _command(commands, "chain", chain.run, "train several stages in a row; run it again to go on")
    chain.add_arguments(stages)
    _training(stages)

    points = _command(commands, "sweep", _sweep, "train the points that a config file yields; run it again to go on")
    sweep.add_arguments(points)
    _training(points)

    seen = _command(commands, "status", status.run, "how far a run, or each of a sweep or chain, has come")
    status.add_arguments(seen)

    plan = _command(commands, "plan", plan_command.run, "what a training needs on hardware that is not here")
    plan_command.add_arguments(plan)
    _overrides(plan)

    evaluate = _command(commands, "evaluate", _evaluate, "figures of a checkpoint, on its run's data or on test suites")
    _judged(evaluate)
    suite_command.add_arguments(evaluate)

    knn = _command(
        commands,
        "knn",
        _judge_features(features_command.knn),
        "k-nearest-neighbour accuracy of a checkpoint's features, without training",
    )
    features_command.add_knn_arguments(knn)
    _judged(knn)

    probe = _command(
        commands,
        "probe",
        _judge_features(features_command.probe),
        "accuracy of a linear classifier on a checkpoint's features",
    )
    features_command.add_probe_arguments(probe)
    _judged(probe)

    predict = _command(commands, "predict", _predict, "the classes that a fine-tuned checkpoint sees in images")
    predict.add_argument("checkpoint", help="workdir of a run, or what `tinymim convert` wrote")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="image files")
    predict.add_argument("--top", type=int, default=5, metavar="N", help="classes to name for each (default 5)")
    predict.add_argument("--json", action="store_true", help="one JSON line for each image")
    _compile_cache(predict)

    convert = _command(
        commands,
        "convert",
        convert_command.convert,
        "read a PyTorch checkpoint (.pth or .safetensors), without PyTorch",
    )
    convert_command.add_convert_arguments(convert)

    export = _command(
        commands, "export", convert_command.export, "write a checkpoint with PyTorch's names, as .safetensors"
    )
    convert_command.add_export_arguments(export)

    prepare = _command(commands, "prepare", prepare_command.run, "write a data set as ArrayRecord, once")
    prepare_command.add_arguments(prepare)

    demo = _command(commands, "demo", _demo, "the whole method on handwritten digits, in minutes on two cores")
    demo.add_argument("--workdir", default="runs/demo", help="where it is kept (default runs/demo)")
    demo.add_argument("--seeds", type=int, default=3, help="runs of each fine-tuning (default 3)")
    _compile_cache(demo)
    return parser


def _command(commands, name: str, run, description: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=description, description=description[0].upper() + description[1:] + ".")
    command.set_defaults(run=run)
    return command


def _training(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--fsdp", type=int, default=1, metavar="N", help="split large parameters over N devices (default 1)"
    )
    command.add_argument(
        "--stall_minutes",
        type=float,
        default=exits.STALL_MINUTES,
        metavar="N",
        help="end with status 86 when nothing was finished for so long: no step, no batch of an evaluation "
        f"(default {exits.STALL_MINUTES:g}; 0: wait for ever)",
    )
    _runtime(command)
    _overrides(command)


def _judged(command: argparse.ArgumentParser) -> None:
    """A checkpoint, and the experiment that says on what it is judged."""
    command.add_argument("checkpoint", help="workdir of a run, or what `tinymim convert` wrote")
    command.add_argument("--config", metavar="FILE[:ARGUMENT]", help="experiment (default: the run's own config.json)")
    _runtime(command)
    _overrides(command)


def _runtime(command: argparse.ArgumentParser) -> None:
    command.add_argument("--data_dir", help="where data sets lie (default: $TFDS_DATA_DIR or ~/tensorflow_datasets)")
    command.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes that decode images; 0: none extra"
    )
    _compile_cache(command)


def _compile_cache(command: argparse.ArgumentParser) -> None:
    cache = "~/.cache/tinymim_jax"
    command.add_argument(
        "--compile_cache", default=cache, metavar="DIR", help=f"compiled steps (default {cache}; '' for none)"
    )


def _overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="changes of the config: optim.base_lr=1e-3")
