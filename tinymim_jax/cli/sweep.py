"""`tinymim sweep`: trains the points that a config file yields."""

import argparse
import pathlib

from tinymim_jax.cli import train
from tinymim_jax.cli.options import add_training, training_words

HELP = "train the points that a config file yields; run the same command again to resume"

_EPILOG = """\
A sweep is a generator in a config file, beside its get_config() (or get_chain(), see `tinymim chain --help`):

  def sweep():
      for lr in (1e-3, 2e-3):
          for drop_path in (0.0, 0.1):
              yield {"optim.base_lr": lr, "model.drop_path": drop_path}

More sweeps of a file are called sweep_<NAME> and chosen with --sweep NAME. A sweep with a parameter gets the ARGUMENT.
A key that begins with "note." is a column of the table instead of an override: {"model.depth": 12, "note.paper": 83.0}.
KEY=VALUE applies to all points; in a chain, STAGE.KEY applies to one stage.

  tinymim sweep configs/my.py --workdir runs/my --list
  tinymim sweep configs/my.py --workdir runs/my --run local --seeds 3 --jobs 2
  sbatch --array=0-11 launch/slurm.sbatch sweep configs/my.py --workdir runs/my --seeds 3

All points are checked before anything starts. With the same command again, finished points are skipped, interrupted
ones resume, and failed ones are tried again. The table (table.md, .csv, .json and .png in --workdir) is written at the
end of --run and by --list. Exit status: 0 all finished, 1 error or some failed, 75 stopped with everything saved.

With Optuna (pip install 'tinymim-jax[optuna]') the file has `def study(trial): return {"optim.base_lr":
trial.suggest_float("lr", 1e-4, 1e-2, log=True)}`, or functions called study_<NAME>:

  tinymim sweep configs/my.py --workdir runs/my_study --study study --trials 20

Trials whose evaluations along the way (train.eval_every) fall behind the median of the others are stopped.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of the `sweep` command."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = _EPILOG
    command.add_argument(
        "file", metavar="FILE[:ARGUMENT]", help="file with get_config() or get_chain(), or a shipped name"
    )
    command.add_argument("--sweep", default="sweep", metavar="NAME", help="which sweep of the file (default: sweep)")
    command.add_argument("--workdir", required=True, metavar="DIR", help="each point has a folder here")
    mode = command.add_mutually_exclusive_group(required=True)
    mode.add_argument("--list", action="store_true", help="print points, states and results; write the table")
    mode.add_argument("--run", dest="where", choices=("local",), help="run all points on this machine")
    mode.add_argument("--index", type=int, metavar="N", help="run one point, for job arrays; exit status as of train")
    mode.add_argument("--study", metavar="NAME", help="let Optuna choose the points")
    command.add_argument("--trials", type=int, default=20, metavar="N", help="of --study, in total (default 20)")
    command.add_argument("--seeds", type=int, metavar="N", help="run each point with seed=0 to N-1")
    command.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="points at a time, on the same CPUs or GPU (default 1)"
    )
    command.add_argument("--metric", metavar="NAME", help="figure to sort by (default top1, or else loss)")
    command.add_argument(
        "--direction", choices=("max", "min"), help="which is better (default: min for losses, max for others)"
    )
    add_training(command)


def run(options: argparse.Namespace) -> int:
    """Returns the exit status: 0 all finished, 1 some failed, 75 stopped with everything saved; of --index, train's."""
    from tinymim_jax.sweeps import sweep
    from tinymim_jax.sweeps.points import parse_overrides
    from tinymim_jax.sweeps.running import require_folder, require_one_process

    if options.jobs < 1 or (options.seeds is not None and options.seeds < 1):
        raise ValueError("--jobs and --seeds are counted from 1")
    if options.index is None and not options.list:
        remedy = "run its points one by one with --index N, each of them over all processes"
        require_one_process("--study" if options.study is not None else "--run local", options.workdir, remedy)
    require_folder("a sweep", options.workdir)
    overrides = parse_overrides(options.overrides)
    settings = sweep.Settings(
        pathlib.Path(options.workdir).expanduser(),
        child_options=training_words(options),
        data_dir=options.data_dir,
        jobs=options.jobs,
        metric=options.metric,
        direction=options.direction,
    )
    if options.study is not None:
        if options.seeds:
            raise ValueError("--study runs each point once: leave --seeds out, or yield the best points in a sweep")
        from tinymim_jax.sweeps.optuna_study import run_optuna_study

        return run_optuna_study(options.file, options.study, overrides, settings, trials=options.trials)
    points = sweep.read_points(options.file, options.sweep, settings.workdir, overrides, options.seeds)
    if options.list:
        return sweep.list_points(points, settings)
    if options.index is None:
        return sweep.run_all(points, settings)

    def train_here(run: sweep.Run) -> int:
        changed = {"config": run.config, "overrides": run.overrides, "workdir": str(run.workdir)}
        return train.run(argparse.Namespace(**vars(options) | changed))

    return sweep.run_index(points, options.index, settings, train_here)
