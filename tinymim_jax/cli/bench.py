"""`tinymim bench`: how fast a checkpoint runs on this machine, and in how much memory."""

import argparse
import os
import sys

HELP = "latency, throughput, size and memory of a checkpoint in jax, onnxruntime, LiteRT and OpenVINO, on the CPU"

# The keys of evaluation.bench.RUNTIMES, which takes seconds to import.
RUNTIMES = ("jax", "onnx", "litert", "openvino")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of the `bench` command."""
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.epilog = (
        "Each runtime is measured in a process of its own with one thread and with all cores. Leave the machine alone\n"
        "meanwhile; where that is impossible, CPU ms (processor time of a call) depends least on what else runs.\n\n"
        "  tinymim bench runs/b_finetuned --int8\n"
        "  tinymim bench runs/b_finetuned --runtime jax,onnx --batch 1 32 --json speed.json"
    )
    command.add_argument("checkpoint", help="workdir of a run, a student in it, or what `tinymim convert` wrote")
    command.add_argument(
        "--runtime",
        metavar="NAMES",
        help=f"some of {','.join(RUNTIMES)}, separated by commas (default: those that are installed)",
    )
    command.add_argument("--int8", action="store_true", help="also int8 weights, in onnx and litert")
    command.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="N", help="sizes (default 1 8)")
    command.add_argument(
        "--seconds", type=float, default=2.0, metavar="S", help="of measuring, for each table cell (default 2)"
    )
    command.add_argument("--json", metavar="FILE", help="also write the figures there")


def run(options: argparse.Namespace) -> int:
    """Prints the table."""
    from tinymim_jax.evaluation.bench import bench, table
    from tinymim_jax.runtime.files import write_json
    from tinymim_jax.runtime.paths import check_output_file

    file = check_output_file(options.json, "--json") if options.json else None
    if min(options.batch) < 1 or options.seconds <= 0:
        raise ValueError(f"--batch {options.batch} and --seconds {options.seconds}: give numbers above 0")
    runtimes = options.runtime.split(",") if options.runtime else None
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    print(f"{cores} cores, load average {load:.1f} before measuring", flush=True)
    if load > cores / 4:
        print(
            "WARNING: other programs are running; milliseconds and images/s will be worse than they could be, above "
            "all with all cores",
            file=sys.stderr,
        )
    rows = bench(
        options.checkpoint, runtimes=runtimes, int8=options.int8, batches=options.batch, seconds=options.seconds
    )
    print(table(rows))
    if file is not None:
        write_json(file, rows)
    return 0
