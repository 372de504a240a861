"""`tinymim status`: every stage of a run, as text and as JSON; runs in a bucket."""

import argparse
import fcntl
import json
import subprocess
import sys
import time

import fsspec
import pytest
from commands import run
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem

from tinymim_jax import metrics
from tinymim_jax.cli import status
from tinymim_jax.cli.status import find_runs, read_run
from tinymim_jax.config import load_config
from tinymim_jax.metrics import Writer, read
from tinymim_jax.resume import as_json, check_same
from tinymim_jax.runtime import heartbeat
from tinymim_jax.runtime import workdir as workdirs
from tinymim_jax.runtime.goodput import LOSSES
from tinymim_jax.runtime.locks import LOCK, Busy
from tinymim_jax.runtime.progress import Progress

SECONDS = dict.fromkeys(LOSSES, 0.0) | {"steps": 90.0, "evaluation": 10.0}


def make_run(folder, *, lock=False, result=None, failed="", **facts):
    """The workdir of a run in a given state."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    status = {"stage": "training", "attempts": 3, "processes": 2, "host": "here", "pid": 1, "time": time.time() - 1000}
    status |= {"step": 50, "total_steps": 200, "seconds": SECONDS, "images_per_second": 1234.5, "data_wait": 0.02}
    status |= {"skipped": 1, "substituted": 2, "eta_seconds": 600.0, "reported": time.time() - 100}
    status |= {"train": {"train/loss": 0.25}} | facts
    (folder / "status.json").write_text(json.dumps(status))
    saved = folder / "checkpoints" / "40"
    saved.mkdir(parents=True)
    (saved / "_CHECKPOINT_METADATA").write_text("{}")
    (folder / "checkpoints" / "50.orbax-checkpoint-tmp").mkdir()
    if result:
        (folder / "result.json").write_text(json.dumps(result))
    if failed:
        (folder / "failed.txt").write_text(failed)
    if lock:
        file = (folder / LOCK).open("a+")
        fcntl.flock(file, fcntl.LOCK_EX)
        return file
    return None


@pytest.mark.parametrize(
    ("stage", "exit_status", "left"),
    [
        ("training", 3, {"lock": True}),
        ("evaluating", 3, {"lock": True, "stage": "evaluating"}),
        ("interrupted", 75, {}),  # it says training, but nobody holds the lock
        ("interrupted", 75, {"stage": "interrupted", "error": "stopped after step 50"}),
        ("failed", 1, {"stage": "failed", "error": "FloatingPointError: loss"}),
        ("failed", 1, {"failed": "out of memory"}),
        ("stalled", 86, {"stage": "stalled", "error": "nothing was finished", "failed": "exit status 86"}),
        ("finished", 0, {"stage": "finished", "result": {"top1": 0.75, "examples": 13}}),
        ("finished", 0, {"result": {"top1": 0.75, "examples": 13}}),  # killed after its last word was written
    ],
)
def test_stage_and_exit_status(stage, exit_status, left, tmp_path, capsys):
    held = make_run(tmp_path / "run", **left)
    code, out, _ = run(capsys, "status", tmp_path / "run", "--json")
    row = json.loads(out)
    assert (row["stage"], code) == (stage, exit_status)
    assert (row["step"], row["total_steps"], row["restarts"], row["skipped"], row["substituted"]) == (50, 200, 2, 1, 2)
    assert row["checkpoint"]["step"] == 40
    assert 0 <= row["checkpoint"]["seconds_ago"] < 1000
    assert (row["goodput"], row["lost/evaluation"]) == (0.9, 0.1)
    if exit_status == 3:
        assert 400 < row["eta_seconds"] <= 500  # 600 seconds, said 100 seconds ago
    else:
        assert "eta_seconds" not in row
    code, out, _ = run(capsys, "status", tmp_path / "run")
    assert code == exit_status
    assert f"{stage}" in out.splitlines()[0]
    assert "step 50 of 200 (25%)" in out
    assert "90.0% of the time in steps; lost to evaluation 10.0%" in out
    assert ("top1 0.75" if "result" in left else "loss 0.25") in out
    if held:
        held.close()


def test_the_step_of_an_ended_run_is_that_of_its_checkpoint_after_a_refused_start(tmp_path):
    make_run(tmp_path / "run", result={"loss": 0.5}, stage="failed", step=0)
    assert read_run(epath.Path(tmp_path / "run"))["step"] == 40


def test_a_line_for_each_run_of_a_folder(tmp_path, capsys):
    make_run(tmp_path / "000_a" / "b", result={"top1": 0.5})
    make_run(tmp_path / "000_a" / "s")
    make_run(tmp_path / "001_a", failed="out of memory")
    (tmp_path / "table").mkdir()
    code, out, _ = run(capsys, "status", tmp_path)
    assert code == 1
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["000_a/b", "000_a/s", "001_a"]
    assert "finished | step 50 of 200 (25%) | 2 restarts | top1 0.5" in lines[0]
    assert lines[2].endswith("out of memory")
    assert lines[3] == "3 runs: 1 finished, 1 interrupted, 1 failed"


@pytest.mark.parametrize("text", ["", '{"top1": 0.', "[]"])
def test_a_damaged_result_is_named_and_the_run_can_go_on(text, tmp_path, capsys):
    make_run(tmp_path / "run", stage="finished", error="")
    (tmp_path / "run" / "result.json").write_text(text)
    code, out, _ = run(capsys, "status", tmp_path / "run")
    assert code == 75
    assert out.splitlines()[0].split() == ["stage", "interrupted"]
    assert f"{tmp_path / 'run' / 'result.json'} is empty or damaged" in out
    assert workdirs.read_state(tmp_path / "run").name == "interrupted"  # so a sweep runs it again


def test_nothing_there(tmp_path, capsys):
    code, _, err = run(capsys, "status", tmp_path / "nothing")
    assert code == 1
    assert "no run has begun" in err


def test_a_run_of_a_version_without_status_and_a_damaged_one(tmp_path):
    make_run(tmp_path / "run")
    for text in ("", "{", "[]", '{"stage": "training"}', '{"time": 1.0}'):
        (tmp_path / "run" / "status.json").write_text(text)
        assert read_run(epath.Path(tmp_path / "run"))["stage"] == "interrupted"
    (tmp_path / "run" / "status.json").unlink()
    assert read_run(epath.Path(tmp_path / "run"))["step"] == 40


# -------------------------------------------------------------------------------------------------- buckets


class Bucket(MemoryFileSystem):
    """A bucket in memory, with gs:// paths."""

    protocol = ("gs", "gcs")
    store: dict = {}  # noqa: RUF012, as its parent has it
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.replace("gs://", "memory://"))


@pytest.fixture
def bucket(monkeypatch):
    fsspec.register_implementation("gcs", Bucket, clobber=True)
    backend = epath.backend.fsspec_backend
    backend._get_filesystem.cache_clear()
    Bucket.store.clear()
    yield epath.Path("gs://bucket/run")
    backend._get_filesystem.cache_clear()
    sys.modules["fsspec.registry"]._registry.pop("gcs")


def test_metrics_in_a_bucket_go_on_resuming(bucket):
    with Writer(bucket, start_step=0, active=True) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"train/loss": float(step)})
    assert [row["step"] for row in read(bucket / "metrics.jsonl")] == [1, 2, 3]
    with Writer(bucket, start_step=2, active=True) as writer:
        writer.write(3, {"train/loss": 30.0})
    assert [row["train/loss"] for row in read(bucket / "metrics.jsonl")] == [1.0, 2.0, 30.0]
    assert all(path.name.startswith("events.out.tfevents") for path in (bucket / "tensorboard").iterdir())
    assert sum(path.stat().length for path in (bucket / "tensorboard").iterdir()) > 0


def test_a_bucket_in_use_is_not_claimed(bucket, monkeypatch):
    monkeypatch.setattr(workdirs.heartbeat, "WRITE_SECONDS_REMOTE", 0.5)
    monkeypatch.setattr(workdirs, "_SETTLE_SECONDS", 0.0)
    config = load_config("configs/digits.py:finetune")
    with workdirs.claimed(bucket, as_json(config)):
        pass
    assert json.loads((bucket / "config.json").read_text())["task"] == "classify"
    check_same(bucket, config)
    status = {"stage": "training", "pid": 7, "host": "elsewhere", "attempts": 1, "time": time.time()}
    (bucket / "status.json").write_text(json.dumps(status))
    assert workdirs.owner(bucket) == "process 7 on elsewhere"
    assert read_run(bucket)["stage"] == "training"
    assert list(find_runs(epath.Path("gs://bucket"))) == [bucket]
    waits = []

    def go_on(seconds):
        waits.append(seconds)
        (bucket / "status.json").write_text(json.dumps(status | {"time": time.time() + 1}))

    monkeypatch.setattr(workdirs.time, "sleep", go_on)
    with pytest.raises(Busy, match="in use by process 7 on elsewhere"), workdirs.claimed(bucket, as_json(config)):
        pytest.fail("it was not kept out")
    assert waits
    monkeypatch.undo()
    monkeypatch.setattr(workdirs, "_SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(workdirs.heartbeat, "WRITE_SECONDS_REMOTE", 0.1)
    (bucket / "status.json").write_text(json.dumps(status | {"time": time.time()}))
    with workdirs.claimed(
        bucket, as_json(config)
    ):  # silent for three times as long as it would take: its process is dead
        assert workdirs.owner(bucket) is None


def test_of_two_newcomers_one_gets_the_bucket(bucket, monkeypatch):
    other = {"claim": "theirs", "pid": 7, "host": "elsewhere"}
    monkeypatch.setattr(workdirs.time, "sleep", lambda _: (bucket / "owner.json").write_text(json.dumps(other)))
    with pytest.raises(Busy, match=r"in use by process 7 on elsewhere, which writes its owner\.json"):
        workdirs.claimed(bucket, {}).__enter__()
    assert not (bucket / "config.json").exists()


def test_a_run_whose_bucket_was_claimed_by_another_ends(bucket, monkeypatch):
    ended = []
    monkeypatch.setattr(heartbeat, "exit_at_once", lambda status, why, **_: ended.append((status, why)))
    monkeypatch.setattr(workdirs, "_SETTLE_SECONDS", 0.0)
    with workdirs.claimed(bucket, {}):
        heart = heartbeat.Heartbeat(bucket, stall_seconds=0)
        heart._write()
        assert ended == []
        assert read_run(bucket)["stage"]
        (bucket / "owner.json").write_text(json.dumps({"claim": "theirs", "pid": 7, "host": "elsewhere"}))
        heart._write()
    ((status, why),) = ended
    assert status == 1
    assert "now belongs to process 7 on elsewhere" in why


def test_metrics_that_cannot_be_copied_do_not_end_a_run(bucket, monkeypatch, caplog, tmp_path):
    def fail(_):
        raise KeyError("503")

    monkeypatch.setattr(metrics, "_COPY_SECONDS", 0.0)
    monkeypatch.setattr(metrics.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("tinymim_jax.runtime.files.time.sleep", lambda _: None)
    with Writer(bucket, start_step=0, active=True) as writer:
        monkeypatch.setattr(Writer, "_copy", fail)
        writer.write(1, {"train/loss": 1.0})
        writer.write(2, {"train/loss": 2.0})
    assert "metrics could not be copied" in caplog.text
    (kept,) = tmp_path.glob("tinymim-metrics-*")
    assert f"They are kept in {kept}" in caplog.text
    assert [row["step"] for row in read(kept / "metrics.jsonl")] == [1, 2]


def test_figures_of_single_classes_are_left_to_reports(tmp_path, capsys):
    make_run(tmp_path / "run", stage="finished", result={"mIoU": 0.5, "iou/wall": 0.25, "examples": 13})
    code, out, _ = run(capsys, "status", tmp_path / "run")
    assert code == 0
    assert "mIoU 0.5" in out
    assert "wall" not in out


def test_a_closed_output_is_no_error(tmp_path):
    make_run(tmp_path / "run", stage="finished", result={"top1": 0.75, "examples": 13})
    command = [sys.executable, "-m", "tinymim_jax", "status", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    process.wait(timeout=100)


def test_names_of_runs_below_the_current_folder(tmp_path, monkeypatch, capsys):
    for name in ("bad1", "good2"):
        make_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    status.run(argparse.Namespace(workdir=".", json=False))
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["bad1", "good2", "2"]


def test_a_report_directly_after_compiling_has_no_speed():
    progress = Progress(total_steps=10, batch_size=4, start_step=0)
    progress.restart(1)  # the first step is compiled, and not measured
    numbers, text = progress.report(1)
    assert text == "speed not measured yet"
    assert not {"images_per_second", "eta_seconds"} & set(numbers)
    assert {"images_per_second", "eta_seconds"} < set(progress.report(2)[0])
