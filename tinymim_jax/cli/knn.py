"""`tinymim knn`: k-nearest-neighbour accuracy of a checkpoint's features."""

import argparse

from tinymim_jax.cli.options import add_checkpoint, config_of, print_result, start_jax

HELP = "k-nearest-neighbour accuracy of a checkpoint's features, without training"


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Of the `knn` command."""
    add_checkpoint(command)
    command.add_argument(
        "--k", type=int, nargs="+", default=[10, 20, 100, 200], help="neighbours (default 10 20 100 200)"
    )
    command.add_argument(
        "--temperature", type=float, default=0.07, help="weight exp(cosine / it) (default 0.07, as DINO)"
    )
    command.add_argument("--pool", default="mean", help="features: mean of the patch tokens, or cls (default mean)")


def run(options: argparse.Namespace) -> int:
    """Prints the figures as one line of JSON."""
    config = config_of(options)
    start_jax(options)
    from tinymim_jax.evaluation.knn import evaluate_knn

    chosen = {"neighbors": options.k, "temperature": options.temperature, "pool": options.pool}
    where = {"data_dir": options.data_dir, "workers": options.workers}
    print_result(evaluate_knn(config, options.checkpoint, **where, **chosen))
    return 0
