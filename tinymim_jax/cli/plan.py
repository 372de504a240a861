"""`tinymim plan`: memory and time that a training would need on other hardware."""

import argparse
import json
import logging

from tinymim_jax.cli.options import add_overrides
from tinymim_jax.plan.compiled import CACHE

HELP = "memory and time that a training needs on other hardware"

_EPILOG = """\
The training step is compiled for the named chips by their own compiler, on this machine's CPU, and memory, traffic and
collectives are read off the compiled program. Neither chips nor data nor checkpoints are needed.

  tinymim plan --config configs/distill_b.py --topology v5e-64
  tinymim plan --config configs/mae_l.py --topology h100x8 --json train.batch_size=2048
  tinymim plan --config configs/distill_s.py --topology h100x8 --attention fused

topologies:
  v5e-64, v6e-64       64 TPU chips
  v4-32, v5p-32        32 cores, which are 16 chips: Google counts cores here
  tpu7x-32             the same; jax shows each of its chips as two devices, and figures are of one of them
  v5e:8x8, v4:2x2x4    the shape of a slice; --slices 2 for two of them
  a100x8, h100x8x4     8 GPUs in one node, 8 GPUs in each of 4 nodes; also a100-40, h200, b200
  cpux8                8 simulated devices of this machine, for a trial without another compiler

TPUs need `pip install 'tinymim-jax[plan]'`, GPUs 'tinymim-jax[plan-cuda]'. A compilation takes one to several minutes,
and its result is kept; searching for the largest batch and for a remedy takes three or more of them. docs/plan.md
lists the shipped configs on usual hardware. Exit status: 0 the step fits, 1 error or it does not fit.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of the `plan` command."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = _EPILOG
    command.add_argument(
        "--config", required=True, metavar="FILE[:ARGUMENT]", help="experiment: a file or a shipped name"
    )
    command.add_argument("--topology", required=True, metavar="NAME", help="such as v5e-64 or h100x8, see below")
    command.add_argument("--slices", type=int, default=1, metavar="N", help="number of such TPU slices (default 1)")
    command.add_argument("--fsdp", type=int, default=1, metavar="N", help="as for train (default 1)")
    command.add_argument(
        "--attention",
        choices=("auto", "dense", "fused"),
        help="attention and relation losses as kernels (fused) or left to the compiler (dense): short for "
        "model.attention and distill.relation_form",
    )
    command.add_argument("--data_dir", help="where data sets are; without them ImageNet's size is assumed")
    command.add_argument("--quick", action="store_true", help="do not search for the largest batch and for a remedy")
    command.add_argument("--json", action="store_true", help="all figures as one JSON object")
    command.add_argument(
        "--cache", default=CACHE, metavar="DIR", help=f"keep compiled steps here (default {CACHE}; '' for none)"
    )
    add_overrides(command)


def run(options: argparse.Namespace) -> int:
    """Prints the plan. Returns the exit status: 0 if the step fits, 1 if it does not."""
    import jax

    from tinymim_jax.config import load_config

    if options.json:  # standard output holds the figures only
        logging.getLogger("tinymim_jax").setLevel(logging.WARNING)

    config = load_config(options.config, options.overrides)
    # An accelerator of this machine may be in use, and is not needed.
    jax.config.update("jax_platforms", "cpu")
    from tinymim_jax.plan.build import with_attention
    from tinymim_jax.plan.plan import make_plan
    from tinymim_jax.plan.report import as_json, as_text
    from tinymim_jax.plan.topology import parse_topology

    if options.attention:
        config = with_attention(config, options.attention)
    topology = parse_topology(options.topology, slices=options.slices)
    settings = {"fsdp": options.fsdp, "cache": options.cache, "data_dir": options.data_dir}
    plan = make_plan(config, topology, search=not options.quick, **settings)
    print(json.dumps(as_json(plan), indent=2) if options.json else as_text(plan))
    return 0 if plan.fits else 1
