"""Injects random faults into trainings for as long as asked, and compares the results with an undisturbed run.

    python tests/soak.py --minutes 60 --seed 1
    python tests/soak.py --runs 1 --faults kill term hang

A disturbed run is the same command, started again until the run is finished; every attempt but the last has a fault.
Its last checkpoint, optimizer included, must be bit-identical to the undisturbed run's. Prints one JSON record at the
end or at Ctrl-C. Exit status 0 means that there were runs, all were identical, and every attempt ended as expected.
"""

import argparse
import contextlib
import json
import os
import pathlib
import shutil
import signal
import statistics
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from jobs import Job, final_bits, saved_steps, tiny  # noqa: E402
from saved_states import empty_step, flip_bit, truncate  # noqa: E402

# kind: (exit statuses of the process with the fault, of the others, words in the log of one of them)
FAULTS = {
    "kill": ({-9}, {1, -6}, ""),  # SIGKILL at a random moment; checkpoints are written in the background all the time
    "term": ({75}, {75}, "all saved: run the same command again"),
    "raise": ({1}, {1}, "has ended, so this one ends too"),
    "hang": ({86}, {86}, "nothing was finished for"),
    "worker": ({1}, {1}, "an input worker died before step"),
    "full": ({1}, {1, -6}, "free some space"),  # no space left, for process 0
    "clock": ({75}, {75}, ""),  # the clock set back by a day, then SIGTERM
    "second": ({75}, {75}, ""),  # a second process in the same workdir, which must be refused; then SIGTERM
    "damage": ({75}, {75}, ""),  # SIGTERM, and afterwards damage to the newest checkpoint
}
_DAMAGES = {"truncated": truncate, "a bit flipped": flip_bit, "emptied": empty_step}
_INSIDE = ("raise", "hang", "worker", "full", "clock")


class Soak:
    """An undisturbed run in `folder`/undisturbed, and disturbed runs in other folders of `folder`."""

    def __init__(self, folder, data_dir, *, steps, seed=0, processes=2, devices=4):
        self.folder, self._data_dir, self._steps = pathlib.Path(folder), data_dir, steps
        self._layout = {"processes": processes, "devices": devices}
        self._rng = np.random.default_rng(seed)
        self.attempts = []
        """One record per attempt of the disturbed runs."""

    def undisturbed(self):
        """Runs it; returns the log of each process."""
        with self._job(self.folder / "undisturbed") as job:
            codes, _ = job.ended(timeout=900)
            logs = [job.text(p) for p in range(len(codes))]
        if any(codes):
            raise RuntimeError("\n".join(f"{code}: {log}" for code, log in zip(codes, logs)))
        self.bits = final_bits(self.folder / "undisturbed")
        return logs

    def disturbed(self, name, faults):
        """One attempt for each fault, then one to the end; whether the result is identical to the undisturbed run's."""
        workdir = self.folder / name
        for fault in faults:
            self.attempts.append(self.attempt(workdir, fault))
        with self._job(workdir) as job:
            codes, _ = job.ended(timeout=900)
            record = {"run": name, "fault": "none", "codes": codes, "as_expected": not any(codes), "log": job.text()}
        self.attempts.append(record)
        return not any(codes) and final_bits(workdir) == self.bits

    def attempt(self, workdir, fault):
        """One attempt that ends by a fault; returns its record."""
        processes = self._layout["processes"]
        hurt = 0 if fault == "full" else int(self._rng.integers(processes))
        first = max(saved_steps(workdir), default=0) + 1
        after = int(self._rng.integers(2, 5))
        inside = f"{fault}:{after + 1}:{hurt}" if fault in _INSIDE else ""
        words = ["--workers", "1"] if fault == "worker" else []
        began = time.monotonic()
        record = {"run": workdir.name, "fault": fault, "process": hurt, "first": first}
        with self._job(workdir, *words, fault=inside) as job:
            reached = job.wait_for("first step after", timeout=900)
            record["seconds_to_first_step"] = round(time.monotonic() - began, 1)
            if reached and not inside:
                reached = job.wait_for(f"step {first + after}/", timeout=900)
            elif reached:
                reached = job.wait_for("FAULT", process=hurt, timeout=900)
            if fault == "second":
                record["second"] = self._second(workdir)
            if fault in ("kill", "term", "clock", "second", "damage"):
                time.sleep(self._rng.uniform(0, 0.5))
                job.send(signal.SIGKILL if fault == "kill" else signal.SIGTERM, hurt)
            codes, seconds = job.ended(timeout=900)
            record |= {"codes": codes, "seconds_to_exit": round(seconds, 1), "reached": reached}
            record["log"] = "\n".join(job.text(p) for p in range(processes))
        own, others, said = FAULTS[fault]
        record["saved"] = saved_steps(workdir)
        record["as_expected"] = (
            reached
            and codes[hurt] in own
            and all(code in others for p, code in enumerate(codes) if p != hurt)
            and said in record["log"]
            and record.get("second", True)
        )
        if fault == "damage" and len(record["saved"]) > 1:
            record["damage"] = str(self._rng.choice(list(_DAMAGES)))
            _DAMAGES[record["damage"]](workdir / "checkpoints" / str(record["saved"][-1]))
        return record

    def random_faults(self, kinds):
        """One to four of `kinds`."""
        return [str(kind) for kind in self._rng.choice(kinds, size=self._rng.integers(1, 5))]

    def _second(self, workdir):
        with self._job(workdir, processes=1) as job:
            codes, _ = job.ended()
            return codes == [1] and "is in use by process" in job.text()

    def _job(self, workdir, *words, **options):
        return Job(
            workdir, self._data_dir, *words, *tiny(f"train.duration={self._steps} steps"), **self._layout | options
        )


def summary(soak, outcomes, seconds):
    """The record that is printed: counts, times of exits and starts, attempts that did not end as expected."""
    kinds = {}
    for attempt in soak.attempts:
        row = kinds.setdefault(attempt["fault"], {"attempts": 0, "as_expected": 0})
        row["attempts"] += 1
        row["as_expected"] += attempt["as_expected"]

    def spread(key, *faults):
        values = [a[key] for a in soak.attempts if key in a and (not faults or a["fault"] in faults)]
        return {"median": statistics.median(values), "most": max(values)} if values else None

    return {
        "runs": len(outcomes),
        "bitwise_equal": sum(outcomes),
        "faults": kinds,
        "seconds": round(seconds),
        "sigterm_to_exit_seconds": spread("seconds_to_exit", "term", "second", "damage", "clock"),
        "start_to_first_step_seconds": spread("seconds_to_first_step"),
        "unexpected": [a | {"log": a["log"][-4000:]} for a in soak.attempts if not a["as_expected"]],
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="start no new run after so long (default 10)")
    parser.add_argument("--runs", type=int, default=10**6, help="disturbed runs at most")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults: kinds, moments, processes")
    parser.add_argument(
        "--faults", nargs="+", choices=FAULTS, help="each of these once in every run (default: random ones)"
    )
    parser.add_argument("--steps", type=int, default=60, help="steps of each run (default 60)")
    parser.add_argument("--workdir", help="keep the runs here (default: they are deleted)")
    parser.add_argument("--data_dir", help="data folder with the digits (default: prepared in --workdir)")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tinymim-soak-") as scratch:
        folder = pathlib.Path(options.workdir or scratch).resolve()
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "compiled"))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        data = pathlib.Path(options.data_dir).resolve() if options.data_dir else folder / "data"
        soak = Soak(folder, data, steps=options.steps, seed=options.seed)
        outcomes = []
        with contextlib.suppress(KeyboardInterrupt):  # the record of what is done so far is printed
            soak.undisturbed()
            while len(outcomes) < options.runs and time.monotonic() - began < 60 * options.minutes:
                faults = options.faults or soak.random_faults(list(FAULTS))
                name = f"disturbed_{len(outcomes)}"
                shutil.rmtree(folder / name, ignore_errors=True)  # left by an earlier soak
                outcomes.append(soak.disturbed(name, faults))
                said = "equal" if outcomes[-1] else "DIFFERENT"
                print(f"{name}: {' '.join(faults)}: {said}", file=sys.stderr, flush=True)
                if outcomes[-1]:
                    shutil.rmtree(folder / name)
        record = summary(soak, outcomes, time.monotonic() - began)
    print(json.dumps(record, indent=2))
    return 0 if outcomes and all(outcomes) and not record["unexpected"] else 1


if __name__ == "__main__":
    sys.exit(main())
