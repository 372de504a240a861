"""Writes the tables of docs/plan.md: every shipped config on common hardware, and the scaling of one config.

    python benchmarks/plan_table.py            # compiles what is not in the cache: hours
    python benchmarks/plan_table.py --kept     # uses the cache only
    python benchmarks/plan_table.py --configs distill_s mae_b --topologies v5e-16 v6e-16   # compiles these rows

A row whose step was not compiled is scaled from a program for the same kind of chip with another batch (marked ~), or
else estimated from the program of another TPU (marked ≈), or else left as it is in the document.
"""

import argparse
import sys
from collections.abc import Collection
from pathlib import Path

import jax

sys.path.insert(0, str(Path(__file__).parents[1]))

from tinymim_jax.config import load_config
from tinymim_jax.plan.build import Planned, changed, plan_experiment
from tinymim_jax.plan.chips import GIB
from tinymim_jax.plan.compiled import CACHE, compile_step, kept_result
from tinymim_jax.plan.extrapolate import extrapolate, same_program
from tinymim_jax.plan.plan import Plan, read_plan
from tinymim_jax.plan.topology import parse_topology

DOCS = Path(__file__).parents[1] / "docs" / "plan.md"
CONFIGS = (
    "distill_t", "distill_s", "distill_b", "distill_t_star", "finetune_t", "finetune_s", "finetune_b",
    "finetune_t_star", "own_images", "linprobe", "mae_b", "mae_l", "segment_t", "segment_s", "segment_b",
    "segment_star_t", "segment_linear", "segment_own",
)  # fmt: skip
TOPOLOGIES = (
    "v4-32", "v5e-16", "v5e-64", "v5e-256", "v5p-32", "v6e-16", "v6e-64", "tpu7x-32", "a100x8", "h100x8", "b200x8",
    "h200x1",
)  # fmt: skip
SCALING, SCALING_IMAGES = "mae_l", 64
SCALING_CHIPS = (8, 16, 32, 64, 128, 256)
_SIGNS = {"scaled": "~", "guessed": "≈"}  # by the first word of Plan.compiler
_HEAD = "| topology | images on a chip | memory, GiB | fits | step, ms | images/s | bound | run | chip-hours |"


class Table:
    """Plans by config and topology: compiled, from the cache, or extrapolated from those."""

    def __init__(self, cache: str, configs: Collection[str], topologies: Collection[str]):
        """`configs`, `topologies`: the rows that may be compiled."""
        self._cache, self._configs, self._topologies = cache, configs, topologies
        self._planned: dict[tuple[str, int], Planned] = {}
        self._plans: dict[tuple[str, str, int], Plan] = {}

    @property
    def empty(self) -> bool:
        """Whether no program has been found or compiled."""
        return not self._plans

    def compiled(self, name: str, topology: str, batch: int | None = None, *, only_kept: bool = False) -> Plan | None:
        """The plan from a program compiled for it; None if it is not cached and must not be compiled, or fails."""
        planned, place = self.planned(name, batch), parse_topology(topology)
        config = planned.config
        key = (name, topology, config.train.batch_size)
        if key in self._plans:
            return self._plans[key]
        if only_kept or name not in self._configs or topology not in self._topologies:
            result = kept_result(config, place, cache=self._cache)
        else:
            print(f"{name} on {topology}", file=sys.stderr, flush=True)
            try:
                result = compile_step(config, place, cache=self._cache)
            except RuntimeError as error:  # the other programs are still compiled
                print(f"{name} on {topology}: {error}", file=sys.stderr, flush=True)
                result = None
        if result is None:
            return None
        return self._plans.setdefault(key, read_plan(planned, place, 1, result))

    def planned(self, name: str, batch: int | None = None) -> Planned:
        config = load_config(str(DOCS.parents[1] / "configs" / f"{name}.py"))
        batch = batch or config.train.batch_size
        if (name, batch) not in self._planned:
            self._planned[name, batch] = plan_experiment(changed(config, {"train.batch_size": batch}))
        return self._planned[name, batch]

    def estimated(self, name: str, topology: str, *, guess: bool) -> Plan | None:
        """A plan extrapolated from a compiled one that fits, for chips that run the same programs.

        With `guess`, a program of another TPU is used if there is no such plan. Of several plans, that with the nearest
        number of images per chip is used.
        """
        place, batch = parse_topology(topology), self.planned(name).experiment.batch_size
        guess = guess and place.chip.platform == "tpu"

        def unlike(plan: Plan) -> tuple[bool, float]:
            images = plan.batch / plan.topology.chips - batch / place.chips
            return not same_program(plan.topology.kind, place.kind), abs(images)

        kept = (self.compiled(name, other, only_kept=True) for other in TOPOLOGIES)
        sources = [
            plan
            for plan in kept
            if plan is not None and plan.fits
            if same_program(plan.topology.kind, place.kind) or (guess and plan.topology.chip.platform == "tpu")
        ]
        return extrapolate(min(sources, key=unlike), place, other_program=guess) if sources else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", action="store_true", help="use the cache only; compile nothing")
    for what, every in (("configs", CONFIGS), ("topologies", TOPOLOGIES)):
        parser.add_argument(
            f"--{what}", nargs="+", choices=every, default=every, metavar="NAME", help=f"compile for these {what} only"
        )
    parser.add_argument("--cache", default=CACHE, metavar="DIR", help=f"compiled steps (default {CACHE})")
    options = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    table = Table(options.cache, () if options.kept else options.configs, options.topologies)
    text = DOCS.read_text(encoding="utf-8")
    text = _replaced(text, "configs", "\n\n".join(config_table(table, name, text) for name in CONFIGS))
    text = _replaced(text, "scaling", scaling_table(table))
    if table.empty:
        parser.error(f"{options.cache} contains no compiled step: the tables were not changed")
    DOCS.write_text(text, encoding="utf-8")


def config_table(table: Table, name: str, before: str) -> str:
    """One config on every topology that divides its batch; rows without a program are taken from `before`."""
    planned = table.planned(name)
    needed, _ = planned.flops
    batch = planned.experiment.batch_size
    lines = [f"`configs/{name}.py`: batch {batch}, {planned.experiment.total_steps} steps, {needed / batch:.3g} FLOPs "]
    lines[0] += "an image\n"
    lines += [_HEAD, "|---|" + "---|" * 8]
    for topology in TOPOLOGIES:
        if batch % parse_topology(topology).chips:
            continue  # the chips cannot divide the batch
        plan = table.compiled(name, topology)
        if plan is None or plan.time is None:
            # If the compiler rejected the program, another chip's program is no substitute.
            plan = table.estimated(name, topology, guess=plan is None) or plan
        if plan is not None:
            lines.append(_row(plan))
        elif kept := [line for line in _section(before, name) if line.startswith(f"| {topology} |")]:
            lines += kept
    return "\n".join(lines)


def _section(text: str, name: str) -> list[str]:
    """The lines of a config's table in the document."""
    return text.partition(f"`configs/{name}.py`: batch ")[2].partition("`configs/")[0].splitlines()


def _row(plan: Plan) -> str:
    limit, images = plan.topology.chip.memory, plan.batch // plan.topology.chips
    sign = _SIGNS.get(plan.compiler.split()[0], "")
    size = f"{sign}{plan.needed / GIB:.1f} of {limit / GIB:.1f}" if plan.needed else f"more than {limit / GIB:.1f}"
    fits, note = plan.fits, "yes"
    if not fits and plan.time is not None:
        plan, note = _in_micro_batches(plan)
    elif not fits:
        note = "no"
    if plan.time is None:
        return f"| {plan.topology.name} | {images} | {size} | {note} | | | | | |"
    sign = sign or _SIGNS.get(plan.compiler.split()[0], "")
    figures = [
        f"{sign}{plan.seconds * 1e3:.0f}",
        f"{sign}{plan.batch / plan.seconds:,.0f}",
        plan.bound,
        f"{sign}{plan.hours:.1f} h" if plan.hours < 48 else f"{sign}{plan.hours / 24:.1f} days",
        f"{sign}{plan.chip_hours:,.0f}",
    ]
    return f"| {' | '.join([plan.topology.name, str(images), size, note, *figures])} |"


def _in_micro_batches(plan: Plan) -> tuple[Plan, str]:
    """The same batch in the smallest number of micro-batches that is estimated to fit, and a note."""
    images = plan.batch // plan.topology.chips
    for count in (n for n in range(2, images + 1) if images % n == 0):
        if (smaller := extrapolate(plan, plan.topology, accumulate=count)).fits:
            return smaller, f"no: ~`train.accumulate={count}`"
    return plan, "no"


def scaling_table(table: Table) -> str:
    """One config on 8 to 256 chips: with a constant number of images per chip, and with the config's batch."""
    plans = _scaling_plans(table)
    lines = [
        "| chips | by | GiB on a chip | traffic, GB | all-reduce, MB | network, ms | step, ms | speed-up of 8 chips | "
        "batch 4096: step, ms | of it network |",
        "|---|" + "---|" * 9,
    ]
    first = next(iter(plans.values()), None)
    for chips, plan in plans.items():
        assert first is not None
        assert first.time is not None
        assert plan.time is not None
        fixed = extrapolate(plan, plan.topology, batch=table.planned(SCALING).experiment.batch_size)
        assert fixed.time is not None
        sent = sum(row.bytes for row in plan.collectives) / 1e6
        ratio = chips / SCALING_CHIPS[0] * first.time.seconds / plan.time.seconds
        how = "scaled" if plan.compiler.startswith("scaled") else "compiled"
        lines.append(
            f"| {chips} | {how} | {plan.needed / GIB:.2f} | {plan.time.bytes / 1e9:.0f} | {sent:.0f} | "
            f"{plan.time.network * 1e3:.1f} | {plan.time.seconds * 1e3:.0f} | {ratio:.2f} of {chips // 8} | "
            f"{fixed.time.seconds * 1e3:.0f} | {fixed.time.network / fixed.time.seconds:.0%} |"
        )
    return "\n".join(lines)


def _scaling_plans(table: Table) -> dict[int, Plan]:
    found = {}
    for chips in SCALING_CHIPS:
        if (plan := table.compiled(SCALING, f"v5e-{chips}", SCALING_IMAGES * chips, only_kept=True)) is not None:
            found[chips] = plan
    if not found:
        return {}
    return {
        chips: found.get(chips)
        or extrapolate(
            min(found.values(), key=lambda plan: abs(plan.topology.chips - chips)),
            parse_topology(f"v5e-{chips}"),
            batch=SCALING_IMAGES * chips,
        )
        for chips in SCALING_CHIPS
    }


def _replaced(text: str, name: str, table: str) -> str:
    start, end = f"<!-- {name}: benchmarks/plan_table.py -->", f"<!-- end of {name} -->"
    before, rest = text.split(start)
    return f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"


if __name__ == "__main__":
    main()
