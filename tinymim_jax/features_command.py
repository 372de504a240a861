"""`tinymim knn` and `tinymim probe`: a checkpoint judged by its features."""

import argparse
from typing import Any

from ml_collections import ConfigDict

_PROBE = """\
Features of both splits are extracted once, without augmentation; then linear classifiers are trained on them, one for
each --base_lr, all at a time (SGD, momentum 0.9, cosine). The rate that is best on a held-out tenth of the training
split is used on the whole of it, and the figures are those of the evaluation split.

  tinymim probe runs/b --config configs/linprobe.py --output runs/b_probe
  tinymim predict runs/b_probe cat.jpg

The published probe of MAE (LARS, batch norm, each image cropped and flipped anew in each of 90 epochs) is a training:

  tinymim train --config configs/linprobe.py --workdir runs/b_linprobe init=runs/b
"""


def add_knn_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--k", type=int, nargs="+", default=[10, 20, 100, 200], help="neighbours (default 10 20 100 200)"
    )
    command.add_argument(
        "--temperature", type=float, default=0.07, help="weight exp(cosine / it) (default 0.07, as DINO)"
    )
    command.add_argument("--pool", default="mean", help="features: mean of the patch tokens, or cls (default mean)")


def add_probe_arguments(command: argparse.ArgumentParser) -> None:
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, _PROBE
    rates = [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0]
    command.add_argument(
        "--base_lr",
        type=float,
        nargs="+",
        default=rates,
        metavar="LR",
        help="rates at 256 examples (default 0.001 to 3)",
    )
    command.add_argument("--epochs", type=int, default=90, help="of the classifier's training (default 90)")
    command.add_argument("--batch_size", type=int, default=1024, help="of the classifier's training (default 1024)")
    command.add_argument(
        "--pool", default="cls", help="features: cls token, or mean of the patch tokens (default cls, as MAE)"
    )
    command.add_argument(
        "--output", metavar="DIR", help="keep encoder and classifier, for predict, evaluate and export"
    )


def knn(config: ConfigDict, options: argparse.Namespace) -> dict[str, Any]:
    from tinymim_jax.knn import evaluate_knn

    chosen = {"neighbors": options.k, "temperature": options.temperature, "pool": options.pool}
    return evaluate_knn(config, options.checkpoint, data_dir=options.data_dir, workers=options.workers, **chosen)


def probe(config: ConfigDict, options: argparse.Namespace) -> dict[str, Any]:
    from tinymim_jax.linear_probe import evaluate_probe

    chosen = {name: getattr(options, name) for name in ("pool", "base_lr", "epochs", "batch_size", "output")}
    chosen["base_lrs"] = chosen.pop("base_lr")
    return evaluate_probe(config, options.checkpoint, data_dir=options.data_dir, workers=options.workers, **chosen)
