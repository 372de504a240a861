"""`--log`: figures reach the trackers, resuming continues their run, and no tracker can end a training."""

import logging
import sys
import time
import types

import pytest
from commands import run
from etils import epath
from runs import SMALL

from tinymim_jax import loggers
from tinymim_jax.config import load_config
from tinymim_jax.loggers import Loggers, open_loggers, parse, run_id
from tinymim_jax.metrics import read
from tinymim_jax.train import train


class Remembering:
    """A logger that keeps what it is given; `breaks` is the step at which it raises."""

    def __init__(self, breaks=None):
        self.rows, self.closed, self.breaks = [], [], breaks

    def write(self, step, values):
        if step == self.breaks:
            raise ConnectionError("no network")
        self.rows.append((step, dict(values)))

    def close(self, *, failed):
        self.closed.append(failed)


@pytest.fixture
def remembering(monkeypatch):
    """Puts a Remembering in place of wandb; returns the list of those that were opened, with their arguments."""
    opened = []

    def make(workdir, config):
        opened.append((Remembering(), workdir, config))
        return opened[-1][0]

    monkeypatch.setitem(loggers.LOGGERS, "wandb", make)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "wandb" or None)
    return opened


def test_a_run_sends_what_it_writes(remembering, tmp_path, data_dir):
    config = load_config("configs/digits.py:finetune", SMALL)
    train(config, tmp_path / "run", data_dir=data_dir, loggers=["wandb"])
    ((logger, workdir, given),) = remembering
    assert workdir == epath.Path(tmp_path / "run")
    assert (given["model.depth"], given["optim.base_lr"]) == (2, config.optim.base_lr)
    assert logger.closed == [False]
    written = read(tmp_path / "run" / "metrics.jsonl")
    assert [step for step, _ in logger.rows] == [row["step"] for row in written]
    assert [values["train/loss"] for _, values in logger.rows if "train/loss" in values] == [
        row["train/loss"] for row in written if "train/loss" in row
    ]


def test_a_failed_run_says_so(remembering, tmp_path, data_dir, monkeypatch):
    monkeypatch.setattr("tinymim_jax.run_log.RunLog.first_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(load_config("configs/digits.py:finetune", SMALL), tmp_path / "run", data_dir=data_dir, loggers=["wandb"])
    assert remembering[0][0].closed == [True]


def test_a_failing_logger_is_left_alone(caplog):
    bad, good = Remembering(breaks=2), Remembering()
    both = Loggers({"wandb": bad, "mlflow": good})
    for step in (1, 2, 3):
        both.write(step, {"loss": 0.5})
    both.close(failed=False)
    assert [step for step, _ in bad.rows] == [1]
    assert bad.closed == []
    assert [step for step, _ in good.rows] == [1, 2, 3]
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "--log wandb failed" in caplog.text


def test_names_are_checked_before_anything_starts(capsys, tmp_path, monkeypatch):
    assert parse("wandb, mlflow,wandb") == ("wandb", "mlflow")
    monkeypatch.setattr("tinymim_jax.runtime.distributed.initialize_distributed", lambda: None)
    words = ["train", "--config", "configs/digits.py:finetune", "--workdir", tmp_path / "run"]
    code, _, err = run(capsys, *words, "--log", "wandv")
    assert (code, "did you mean 'wandb'" in err) == (2, True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run(capsys, *words, "--log", "mlflow", "--compile_cache", "")
    assert (code, "pip install 'tinymim-jax[mlflow]'" in err) == (1, True)
    assert not (tmp_path / "run").exists()


def test_one_that_cannot_start(monkeypatch, tmp_path):
    def refuse(workdir, config):
        raise OSError("api_key not configured")

    first = Remembering()
    monkeypatch.setitem(loggers.LOGGERS, "wandb", lambda *_: first)
    monkeypatch.setitem(loggers.LOGGERS, "mlflow", refuse)
    with pytest.raises(RuntimeError, match=r"--log mlflow cannot start: api_key not configured. Log in, work offline"):
        open_loggers(["wandb", "mlflow"], epath.Path(tmp_path), {})
    assert first.closed == [True]


def test_mlflow_in_a_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/store")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file://{tmp_path}/store")
    workdir = epath.Path(tmp_path / "run")
    for attempt in (0, 1):  # the second resumes
        logger = open_loggers(["mlflow"], workdir, {"model.depth": 2})
        logger.write(attempt + 1, {"train/loss": 0.5 - attempt / 10, "eval/iou/c++ (old)": 0.25})
        logger.close(failed=attempt == 0)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tinymim-jax")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params == {"model.depth": "2"}
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.5), (2, 0.4)]
    assert found.data.metrics["eval/iou/c__ _old_"] == 0.25


def test_wandb_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    workdir = epath.Path(tmp_path / "run")
    workdir.mkdir()
    logger = open_loggers(["wandb"], workdir, {"model.depth": 2})
    logger.write(1, {"train/loss": 0.5})
    logger.close(failed=False)
    (kept,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    assert kept.name.endswith(run_id(workdir))
    (file,) = kept.glob("*.wandb")
    until = time.monotonic() + 30  # wandb's own process writes it
    while b"train/loss" not in file.read_bytes() and time.monotonic() < until:
        time.sleep(0.1)
    assert b"train/loss" in file.read_bytes()
