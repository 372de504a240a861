"""`tinymim probe`: accuracy of a linear classifier on a checkpoint's features."""

import argparse

from tinymim_jax.cli.options import add_checkpoint, config_of, print_result, start_jax

HELP = "accuracy of a linear classifier on a checkpoint's features"

_EPILOG = """\
Features of both splits are extracted once, without augmentation; then linear classifiers are trained on them, one for
each --base_lr, all at once (SGD, momentum 0.9, cosine schedule). The rate with the best top-1 on a held-out tenth of
the training split is used to train on all of it. The result is one line of JSON: loss, top-1 and top-5 on the
evaluation split.

  tinymim probe runs/b --config configs/linprobe.py --output runs/b_probe
  tinymim predict runs/b_probe cat.jpg

The published probe of MAE (LARS, batch norm, random crops and flips, 90 epochs) is a training:

  tinymim train --config configs/linprobe.py --workdir runs/b_linprobe init=runs/b
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `probe`."""
    add_checkpoint(command)
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, _EPILOG
    rates = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
    command.add_argument(
        "--base_lr",
        type=float,
        nargs="+",
        default=rates,
        metavar="LR",
        help="learning rates for a batch of 256 (default 0.001 to 3)",
    )
    command.add_argument("--epochs", type=int, default=90, help="of the classifier's training (default 90)")
    command.add_argument("--batch_size", type=int, default=1024, help="of the classifier's training (default 1024)")
    command.add_argument(
        "--pool", default="cls", help="features: cls token, or mean of the patch tokens (default cls, as MAE)"
    )
    command.add_argument(
        "--output", metavar="DIR", help="save encoder and classifier as a checkpoint for predict, evaluate and export"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the figures as one line of JSON."""
    config = config_of(options)
    start_jax(options)
    from tinymim_jax.evaluation.linear_probe import evaluate_probe

    chosen = {name: getattr(options, name) for name in ("pool", "epochs", "batch_size", "output")}
    where = {"data_dir": options.data_dir, "workers": options.workers}
    print_result(evaluate_probe(config, options.checkpoint, base_lrs=options.base_lr, **where, **chosen))
    return 0
