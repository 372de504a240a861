"""Faults in a run of two processes with four devices each: exit statuses, logs, and that the result is not changed.

One run has several faults, one after another, and is compared with an undisturbed one; the tests look at the records of
both. tests/soak.py injects these faults and others at random, for as long as asked.
"""

import json
import shutil

import numpy as np
import pytest
from commands import run
from jobs import Job, tiny
from soak import Soak, summary

from tinymim_jax.metrics import read

pytestmark = pytest.mark.slow

STEPS = 24


@pytest.fixture(scope="module")
def soak(tmp_path_factory, data_dir):
    """The undisturbed and the disturbed run: `attempts` are those of the latter, `equal` tells whether both agree."""
    soak = Soak(tmp_path_factory.mktemp("soak"), data_dir, steps=STEPS, seed=3)
    soak.logs = soak.undisturbed()
    soak.equal = soak.disturbed("disturbed", ["raise", "hang", "full", "kill", "damage"])
    return soak


def attempt(soak, fault):
    (found,) = [attempt for attempt in soak.attempts if attempt["fault"] == fault]
    return found


def test_the_first_process_speaks_for_all(soak):
    first, second = soak.logs
    assert "This is process 0 of 2. Waiting up to 30 minutes for all 2 processes (JAX_NUM_PROCESSES)." in first
    assert "mesh {'data': 8, 'fsdp': 1} on cpu, 2 processes" in first
    assert f"step {STEPS}/{STEPS} | loss" in first
    assert "went into steps; lost to " in first  # to what most depends on the machine
    for words in ("| loss", "evaluation", "first step", "starting at", "went into", "parameters"):
        assert words in first
        assert words not in second
    rows = read(soak.folder / "undisturbed" / "metrics.jsonl")
    assert [row["step"] for row in rows if "lr" in row] == list(range(1, STEPS + 1))  # each of them once
    for row in rows:
        assert row["goodput"] + sum(v for k, v in row.items() if k.startswith("lost/")) == pytest.approx(1)


def test_an_error_on_one_process_ends_both_and_both_say_why(soak):
    found = attempt(soak, "raise")
    assert found["codes"] == [1, 1]
    assert "KeyError: 'a mistake on one host'" in found["log"]
    assert f"process {found['process']} of the job has ended, so this one ends too" in found["log"]
    assert "run the same command again to resume" in found["log"]


def test_a_stuck_process_ends_both_with_86_and_shows_where_it_was(soak):
    found = attempt(soak, "hang")
    assert found["codes"] == [86, 86]
    assert "nothing was finished for" in found["log"]
    assert "in place_batch" in found["log"]  # the stack of the thread that sleeps


def test_a_disk_that_is_full_for_one_process_ends_both_and_leaves_what_was_saved(soak):
    found = attempt(soak, "full")
    assert found["codes"] == [1, 1]
    assert "free some space" in found["log"]
    assert "What was saved before is intact" in found["log"]
    assert found["seconds_to_exit"] < 300  # Orbax would wait ten minutes for the other process


def test_a_killed_process_takes_the_other_with_it(soak):
    found = attempt(soak, "kill")
    assert found["codes"][found["process"]] == -9
    assert found["codes"][1 - found["process"]] in (1, -6)


def test_sigterm_to_one_saves_the_same_step_on_both(soak):
    found = attempt(soak, "damage")
    assert found["codes"] == [75, 75]
    stopped = int(found["log"].split("stopped after step ")[1].split(",")[0])
    assert stopped == found["saved"][-1]
    assert found["seconds_to_exit"] < 60  # 4 on an idle machine


def test_the_end_is_the_undisturbed_one_bit_by_bit(soak):
    assert [a["fault"] for a in soak.attempts if not a["as_expected"]] == []
    assert soak.equal
    last, damaged = soak.attempts[-1], attempt(soak, "damage")
    assert f"CHECKPOINT {damaged['saved'][-1]} IS DAMAGED, trying the one before it" in last["log"]
    assert (soak.folder / "disturbed" / "checkpoints" / f"{damaged['saved'][-1]}.damaged").exists()
    results = [json.loads((soak.folder / name / "result.json").read_text()) for name in ("undisturbed", "disturbed")]
    assert results[0] == results[1]
    counted = summary(soak, [soak.equal], 1.0)
    assert (counted["runs"], counted["bitwise_equal"], counted["faults"]["kill"]["as_expected"]) == (1, 1, 1)


def test_status_of_both(soak, capsys):
    code, out, _ = run(capsys, "status", soak.folder, "--json")
    assert code == 0
    disturbed, undisturbed = map(json.loads, out.splitlines())
    assert disturbed["workdir"].endswith("disturbed")
    assert (disturbed["stage"], disturbed["restarts"], undisturbed["restarts"]) == ("finished", 5, 0)
    assert disturbed["step"] == disturbed["checkpoint"]["step"] == STEPS
    assert disturbed["lost/redone"] > 0
    assert disturbed["lost/downtime"] > 0 == undisturbed["lost/downtime"]
    assert disturbed["eval"]["eval/examples"] == 13


def test_one_process_with_other_devices_and_workers_goes_on_with_the_same_examples(soak, tmp_path, data_dir):
    """A checkpoint of two processes with four devices is continued by one process with four, and a worker."""
    workdir = tmp_path / "run"
    shutil.copytree(soak.folder / "undisturbed", workdir)
    (workdir / "result.json").unlink()
    kept = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert len(kept) == 3
    for step in kept[1:]:
        shutil.rmtree(workdir / "checkpoints" / str(step))
    before = read(workdir / "metrics.jsonl")
    with Job(workdir, data_dir, "--workers", "1", *tiny(f"train.duration={STEPS} steps"), processes=1) as job:
        assert job.ended()[0] == [0], job.text()
    after = read(workdir / "metrics.jsonl")
    losses = [{row["step"]: row["train/loss"] for row in rows if "train/loss" in row} for rows in (before, after)]
    assert losses[0].keys() == losses[1].keys()
    np.testing.assert_allclose(list(losses[1].values()), list(losses[0].values()), rtol=1e-5)
