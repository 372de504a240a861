"""`tinymim plan`: what a training would need on hardware that is not here."""

import argparse
import json
import logging

from tinymim_jax.cli.options import add_overrides
from tinymim_jax.plan.compiled import CACHE

HELP = "what a training needs on hardware that is not here"

_EPILOG = """\
The step that training runs is compiled for the named chips by their own compiler, on this machine's CPU, and what comes
out is read: memory, traffic, collectives. Neither chips nor data nor checkpoints are needed.

  tinymim plan --config configs/distill_b.py --topology v5e-64
  tinymim plan --config configs/mae_l.py --topology h100x8 --json train.batch_size=2048

topologies:
  v5e-64, v6e-64       so many TPU chips
  v4-32, v5p-32        so many cores, half as many chips, as Google counts them
  v5e:8x8, v4:2x2x4    the shape of a slice; --slices 2 for two of them
  a100x8, h100x8x4     so many GPUs in a node, in each of so many nodes; also a100-40, h200
  cpux8                fake devices of this machine: a rehearsal with no compiler to install

TPUs need `pip install 'tinymim-jax[plan]'`, GPUs 'tinymim-jax[plan-cuda]'. A compilation takes one to several minutes
and is kept; the search for the largest batch and for what to change takes three or more of them. docs/plan.md has
the shipped configs on usual hardware.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Of the `plan` command."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = _EPILOG
    command.add_argument(
        "--config", required=True, metavar="FILE[:ARGUMENT]", help="experiment: a file or a shipped name"
    )
    command.add_argument("--topology", required=True, metavar="NAME", help="such as v5e-64 or h100x8, see below")
    command.add_argument("--slices", type=int, default=1, metavar="N", help="so many of that TPU slice (default 1)")
    command.add_argument("--fsdp", type=int, default=1, metavar="N", help="as for train (default 1)")
    command.add_argument("--data_dir", help="where data sets are looked for; without them ImageNet's size is taken")
    command.add_argument("--quick", action="store_true", help="do not search for the largest batch and for a remedy")
    command.add_argument("--json", action="store_true", help="all figures as one JSON object")
    command.add_argument("--cache", default=CACHE, metavar="DIR", help=f"compiled steps (default {CACHE}; '' for none)")
    add_overrides(command)


def run(options: argparse.Namespace) -> int:
    """Prints the plan; exit status 0 where the step fits, 1 where it does not."""
    import jax

    from tinymim_jax.config import load_config

    if options.json:  # standard output is for the figures alone
        logging.getLogger("tinymim_jax").setLevel(logging.WARNING)

    config = load_config(options.config, options.overrides)
    # A device of this machine may be at work, and is not asked.
    jax.config.update("jax_platforms", "cpu")
    from tinymim_jax.plan.plan import make_plan
    from tinymim_jax.plan.report import as_json, as_text
    from tinymim_jax.plan.topology import parse_topology

    topology = parse_topology(options.topology, slices=options.slices)
    settings = {"fsdp": options.fsdp, "cache": options.cache, "data_dir": options.data_dir}
    plan = make_plan(config, topology, search=not options.quick, **settings)
    print(json.dumps(as_json(plan), indent=2) if options.json else as_text(plan))
    return 0 if plan.fits else 1
