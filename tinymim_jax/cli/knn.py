"""`tinymim knn`: k-nearest-neighbor accuracy of a checkpoint's features."""

import argparse

from tinymim_jax.cli.options import add_checkpoint, config_of, print_result, start_jax

HELP = "k-nearest-neighbor accuracy of a checkpoint's features, without training"


_EPILOG = """\
Features of both splits are extracted once, without augmentation. Each image of the evaluation split is classified by
the votes of its nearest neighbors in the training split. The result is one line of JSON: top-1 and top-5 for each k.

  tinymim knn runs/b --config configs/linprobe.py
  tinymim knn runs/pets --k 5 20
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `knn`."""
    add_checkpoint(command)
    command.formatter_class, command.epilog = argparse.RawDescriptionHelpFormatter, _EPILOG
    command.add_argument(
        "--k",
        type=int,
        nargs="+",
        default=[10, 20, 100, 200],
        metavar="K",
        help="numbers of neighbors (default 10 20 100 200)",
    )
    command.add_argument(
        "--temperature",
        type=float,
        default=0.07,
        help="neighbors weigh exp(cosine similarity / temperature) (default 0.07, as DINO)",
    )
    command.add_argument(
        "--pool", default="mean", help="features: mean of the patch tokens, or cls token (default mean)"
    )


def run(options: argparse.Namespace) -> int:
    """Prints the figures as one line of JSON."""
    config = config_of(options)
    start_jax(options)
    from tinymim_jax.evaluation.knn import evaluate_knn

    chosen = {"neighbors": options.k, "temperature": options.temperature, "pool": options.pool}
    where = {"data_dir": options.data_dir, "workers": options.workers}
    print_result(evaluate_knn(config, options.checkpoint, **where, **chosen))
    return 0
