"""`tinymim demo`: compares a distilled student with one pre-trained by itself and one that was not pre-trained.

On handwritten digits, a teacher is pre-trained by MAE and distilled into a student of a tenth of its size. Three equal
students are then fine-tuned on few labels: from scratch, pre-trained directly by MAE, and distilled (TinyMIM), with the
same recipe, learning rates and seeds. The rate of each is chosen on held-out training images; results are those of the
test split.
"""

import concurrent.futures
import importlib.util
import json
import multiprocessing
import os
import pathlib
import time

import numpy as np
from clu import parameter_overview

from tinymim_jax.checkpoints.params import load_params
from tinymim_jax.config import SHIPPED, load_config
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.demo.pictures import draw_losses, draw_relations
from tinymim_jax.evaluation.evaluate import evaluate_checkpoint
from tinymim_jax.runtime.startup import start_logging, use_compile_cache
from tinymim_jax.train import train

CONFIG = SHIPPED / "digits.py"
ARMS = {"from scratch": "", "MAE directly": "mae_student", "TinyMIM": "tinymim"}
LEARNING_RATES = (1.6e-2, 3.2e-2)


def demo(workdir: str | pathlib.Path, *, seeds: int = 3, compile_cache: str = "") -> dict:
    """Runs what is not finished in `workdir`, prints the table, and writes result.json and, with matplotlib, two
    pictures.

    Models this small use little of a processor, so several trainings run at once in separate processes.
    """
    workdir = pathlib.Path(workdir).expanduser()
    open_source("digits", split="test")  # prepared once, before several processes need it
    spawn = multiprocessing.get_context("spawn")
    processes = min(4, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(processes, spawn, use_compile_cache, (compile_cache,)) as pool:
        teacher = pool.submit(_run, workdir / "teacher", "mae_teacher")
        direct = pool.submit(_run, workdir / "mae_student", "mae_student")
        arms = {"": _submit_arm(pool, workdir, "", seeds)}
        seconds = {"teacher": teacher.result()}
        distilled = pool.submit(_run, workdir / "tinymim", "distill", f"distill.teacher.path={workdir / 'teacher'}")
        seconds["mae_student"] = direct.result()
        arms["mae_student"] = _submit_arm(pool, workdir, "mae_student", seeds)
        seconds["tinymim"] = distilled.result()
        arms["tinymim"] = _submit_arm(pool, workdir, "tinymim", seeds)
        finetuned = {arm: {key: future.result() for key, future in runs.items()} for arm, runs in arms.items()}
    result = {
        "rows": [_row(workdir, name, arm, finetuned[arm], seeds, seconds) for name, arm in ARMS.items()],
        "teacher": {"parameters": _encoder_size(workdir / "teacher"), "seconds": round(seconds["teacher"], 1)},
        "seeds": seeds,
        "learning_rates": LEARNING_RATES,
    }
    (workdir / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    written = [workdir / "result.json"]
    if importlib.util.find_spec("matplotlib"):
        written += [draw_losses(workdir), draw_relations(workdir)]
    print(_table(result, written))
    if len(written) == 1:
        print("Without matplotlib no pictures are drawn: pip install 'tinymim-jax[demo]', and run the command again")
    return result


def _submit_arm(pool: concurrent.futures.Executor, workdir: pathlib.Path, arm: str, seeds: int) -> dict:
    """Starts the fine-tuning of one kind of student with every rate and seed."""
    init = f"init={workdir / arm}" if arm else "init="
    return {
        (rate, seed): pool.submit(
            _run, _finetuned(workdir, arm, rate, seed), "finetune", init, f"optim.base_lr={rate}", f"seed={seed}"
        )
        for rate in LEARNING_RATES
        for seed in range(seeds)
    }


def _row(workdir: pathlib.Path, name: str, arm: str, spent: dict, seeds: int, seconds: dict[str, float]) -> dict:
    """The table row of one kind of student, with test accuracy at the rate that is best on held-out images."""
    validation = {}
    for rate in LEARNING_RATES:
        runs = [_finetuned(workdir, arm, rate, seed) for seed in range(seeds)]
        validation[rate] = float(np.mean([json.loads((run / "result.json").read_text())["top1"] for run in runs]))
    best = max(validation, key=validation.__getitem__)
    test = [100 * _test_accuracy(_finetuned(workdir, arm, best, seed)) for seed in range(seeds)]
    return {
        "arm": name,
        "top1": round(float(np.mean(test)), 1),
        "spread": round(float(np.std(test, ddof=1)), 1) if seeds > 1 else None,
        "test": [round(value, 1) for value in test],
        "validation": {str(rate): round(100 * value, 1) for rate, value in validation.items()},
        "learning_rate": best,
        "parameters": _encoder_size(_finetuned(workdir, arm, best, 0)),
        "pretrain_seconds": round(seconds.get(arm, 0.0), 1),
        "finetune_seconds": round(float(np.mean(list(spent.values()))), 1),
    }


def _run(workdir: pathlib.Path, experiment: str, *overrides: str) -> float:
    """Trains unless that is done, and returns the seconds that it took, which a file records."""
    clock = workdir / "seconds.txt"
    if not clock.exists():
        start_logging(f"{workdir.name:<22} ")
        began = time.perf_counter()
        train(load_config(f"{CONFIG}:{experiment}", overrides), workdir)
        clock.write_text(f"{time.perf_counter() - began:.2f}\n")
    return float(clock.read_text())


def _finetuned(workdir: pathlib.Path, pretrained: str, rate: float, seed: int) -> pathlib.Path:
    return workdir / "finetuned" / f"{pretrained or 'scratch'}_lr{rate}_seed{seed}"


def _test_accuracy(run: pathlib.Path) -> float:
    config = load_config(f"{CONFIG}:finetune", ["data.eval_split=test"])
    return evaluate_checkpoint(config, run)["top1"]


def _encoder_size(run: pathlib.Path) -> int:
    return int(parameter_overview.count_parameters(load_params(run)[1]["encoder"]))


def _table(result: dict, written: list[pathlib.Path]) -> str:
    lines = [
        "",
        "| student, fine-tuned on 100 labels | top-1 | spread | parameters | pre-training | fine-tuning |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        spread = "-" if row["spread"] is None else f"{row['spread']:.1f}"
        pretraining = f"{row['pretrain_seconds']:.0f} s" if row["pretrain_seconds"] else "-"
        lines.append(
            f"| {row['arm']} | {row['top1']:.1f} | {spread} | {row['parameters']:,} | {pretraining} | "
            f"{row['finetune_seconds']:.0f} s |"
        )
    teacher = result["teacher"]
    lines += [
        "",
        f"Top-1 on the 500 test digits, mean and standard deviation over {result['seeds']} seeds. The teacher has "
        f"{teacher['parameters']:,} parameters and took {teacher['seconds']:.0f} s.",
        ", ".join(map(str, written)),
    ]
    return "\n".join(lines)
