"""`tinymim sweep`: checking, naming, running, stopping, resuming and tabulating points, with short trainings."""

import csv
import json
import os
import pathlib
import shutil
import signal
import time

import numpy as np
import optuna
import pytest
from commands import documented_words, run
from processes import cpu_devices, output_of, run_python, saved_steps
from runs import SMALL

from tinymim_jax.metrics import read
from tinymim_jax.runtime.locks import locked
from tinymim_jax.runtime.workdir import RunState
from tinymim_jax.sweeps.children import Children
from tinymim_jax.sweeps.points import (
    folder_name,
    format_override,
    make_runs,
    parse_overrides,
    read_stages,
    short_names,
)
from tinymim_jax.sweeps.sweep import read_points
from tinymim_jax.sweeps.tables import summarize, write_table

ROOT = pathlib.Path(__file__).parents[1]
NAMES = [f"{n:03d}_base_lr={rate}_seed={seed}" for seed in (0, 1) for n, rate in enumerate((0.016, 0.032))]
# Enough steps for a run to be interrupted between its first checkpoint and its end.
STEPS = 100
MANY = f"train.duration={STEPS} steps"

FILE = """
from configs import digits

def get_config():
    return digits.finetune()

def sweep():
    yield {"optim.base_lr": 1e30, "train.max_skipped": 1}
    yield {"optim.base_lr": 1.6e-2, "note.paper": 80.5}

def sweep_wrong():
    yield {"optim.base_lr": 1e-2}
    yield {"optim.base_rl": 2e-2}

def sweep_unbuildable():
    yield {"train.batch_size": 8}
    yield {"train.batch_size": 9, "train.accumulate": 2}

def sweep_empty():
    return []

def sweep_twice():
    yield {"seed": 1}
    yield {"seed": 1}
"""


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.setattr("tinymim_jax.runtime.distributed.initialize_distributed", lambda: None)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("XLA_FLAGS", cpu_devices(1)["XLA_FLAGS"])  # of the trainings that a sweep starts


@pytest.fixture
def file(tmp_path) -> pathlib.Path:
    path = tmp_path / "my" / "sweeps.py"
    path.parent.mkdir()
    path.write_text(FILE)
    return path


def command(workdir, data_dir, *words) -> list[str]:
    """The documented sweep with small models and STEPS steps."""
    shown = documented_words("docs/sweeps.md", "sweep", "--run")
    seeds = shown.index("--seeds")
    moved = [str(workdir) if word.startswith("runs/") else word for word in [*shown[:seeds], *shown[seeds + 2 :]]]
    return [
        *moved,
        "--seeds",
        "2",
        "--data_dir",
        data_dir,
        "--compile_cache",
        "",
        *SMALL,
        f"train.duration={STEPS} steps",
        *words,
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data_dir):
    """A sweep of two points and two seeds, two at a time: its workdir and output."""
    workdir = tmp_path_factory.mktemp("sweep")
    process = start(command(workdir, data_dir, "--jobs", "2"))
    status, out, err = output_of(process)
    assert status == 0, out + err
    return workdir, out


def start(words):
    os.chdir(ROOT)
    return run_python(f"from tinymim_jax.cli.main import main; main({[str(w) for w in words]!r})")


def results(workdir) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in workdir.glob("*/result.json")}


@pytest.mark.slow
def test_all_points_are_run_and_tabled(undisturbed):
    workdir, out = undisturbed
    found = {name: json.loads(text) for name, text in results(workdir).items()}
    assert sorted(found) == sorted(NAMES)
    for number, rate in enumerate((0.016, 0.032)):
        own = [name for name in NAMES if name.startswith(f"{number:03d}")]
        configs = [json.loads((workdir / name / "config.json").read_text()) for name in own]
        assert [config["optim"]["base_lr"] for config in configs] == [rate] * 2
        assert [config["seed"] for config in configs] == [0, 1]
    table = json.loads((workdir / "table.json").read_text())
    assert (table["metric"], table["direction"]) == ("top1", "max")
    for row in table["rows"]:
        values = [found[name]["top1"] for name in row["workdirs"]]
        assert row["mean"] == pytest.approx(np.mean(values), rel=1e-12)
        assert row["std"] == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert table["rows"][0]["mean"] >= table["rows"][1]["mean"]
    assert (workdir / "table.md").read_text().strip() in out
    assert (workdir / "table.png").stat().st_size > 1000
    assert "| 2 finished |" in out
    assert "001 seed 1 | " in out


@pytest.mark.slow
def test_the_same_command_again_runs_nothing(undisturbed, data_dir, capsys):
    workdir, _ = undisturbed
    before = {path: path.stat().st_mtime_ns for path in workdir.glob("*/*.json*")}
    status, out, _ = run(capsys, *command(workdir, data_dir))
    assert status == 0
    assert "first step" not in out
    assert {path: path.stat().st_mtime_ns for path in workdir.glob("*/*.json*")} == before


@pytest.mark.slow
def test_list_shows_states_and_results(undisturbed, data_dir, tmp_path, capsys):
    workdir, _ = undisturbed
    words = [word for word in command(workdir, data_dir) if word not in ("--run", "local")]
    status, out, _ = run(capsys, *words, "--list")
    assert status == 0
    lines = out.splitlines()
    for index, name in enumerate(NAMES):
        line = next(line for line in lines if name in line)
        assert line.split()[:3] == [str(index), name, "finished"]
        assert f"top1 {json.loads(results(workdir)[name])['top1']:.4g}" in line
    words = [word for word in command(tmp_path / "new", data_dir) if word not in ("--run", "local")]
    status, out, _ = run(capsys, *words, "--list")
    assert (status, out.count("not started")) == (0, 4)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_interrupted_and_killed_it_goes_on_to_the_same_bits(undisturbed, data_dir, tmp_path):
    for name in NAMES[2:]:
        shutil.copytree(undisturbed[0] / name, tmp_path / name)  # finished points, which are left alone

    def begin(step: int):
        """Starts the sweep and waits until a point is beyond `step`; returns the process and the point's workdir."""
        process = start(command(tmp_path, data_dir, "--jobs", "2"))
        for _ in range(600):
            for name in NAMES[:2]:
                path = tmp_path / name / "metrics.jsonl"
                if saved_steps(path.parent) and step <= read(path)[-1]["step"] < STEPS - 25:
                    return process, path.parent
            time.sleep(0.1)
        raise AssertionError(output_of(process))

    process, _ = begin(2)
    process.send_signal(signal.SIGINT)
    status, out, _ = output_of(process)
    assert status == 75, out
    assert "all saved" in out
    assert "interrupted: stopped after step" in out

    process, running = begin(9)
    process.kill()
    process.wait()
    time.sleep(1.0)  # its children must not outlive it
    said = (running / "log.txt").stat().st_size
    time.sleep(1.5)
    assert (running / "log.txt").stat().st_size == said
    assert not (running / "result.json").exists()

    status, out, err = output_of(start(command(tmp_path, data_dir, "--jobs", "2")))
    assert status == 0, out + err
    assert "resuming at step" in (running / "log.txt").read_text()
    assert results(tmp_path) == results(undisturbed[0])


@pytest.mark.slow
def test_a_failing_point_is_reported_and_the_others_finish(file, data_dir, tmp_path, capsys):
    words = ["sweep", file, "--workdir", tmp_path / "w", "--data_dir", data_dir, "--compile_cache", "", *SMALL]
    status, out, _ = run(capsys, *words, "--run", "local")
    assert status == 1
    failing, sound = "000_base_lr=1e+30_max_skipped=1", "001_base_lr=0.016"
    assert list(results(tmp_path / "w")) == [sound]
    assert f"{failing} failed: loss or gradient were not finite" in out
    assert "Lower optim.base_lr" in (tmp_path / "w" / failing / "failed.txt").read_text()
    rows = list(csv.DictReader((tmp_path / "w" / "table.csv").open()))
    assert [(row["point"], row["finished"], row["paper"]) for row in rows] == [("1", "1", "80.5"), ("0", "0", "")]
    assert (float(rows[0]["top1_mean"]), rows[1]["top1_mean"]) == (
        json.loads(results(tmp_path / "w")[sound])["top1"],
        "",
    )
    status, out, _ = run(capsys, *words, "--list")
    assert [line.split()[2] for line in out.splitlines()[:2]] == ["failed", "finished"]


@pytest.mark.slow
def test_index_runs_one_point(file, data_dir, tmp_path, capsys):
    words = ["sweep", file, "--workdir", tmp_path / "w", "--data_dir", data_dir, "--compile_cache", "", *SMALL]
    status, _, err = output_of(start([*words, "--index", "1"]))
    assert status == 0, err
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["001_base_lr=0.016"]
    assert list(results(tmp_path / "w")) == ["001_base_lr=0.016"]
    status, _, err = run(capsys, *words, "--index", "0")
    assert status == 1
    assert "not finite" in err
    assert "not finite" in (tmp_path / "w" / "000_base_lr=1e+30_max_skipped=1" / "failed.txt").read_text()
    status, _, err = run(capsys, *words, "--index", "2")
    assert status == 1
    assert "points 0 to 1" in err


@pytest.mark.slow
def test_a_point_may_be_a_chain(data_dir, tmp_path, capsys):
    (tmp_path / "digits.py").write_text((ROOT / "configs" / "digits.py").read_text())
    (tmp_path / "chain.py").write_text(
        "def get_chain():\n"
        "    return [('start', 'digits.py:finetune', {}), ('end', 'digits.py:finetune', {'init': '{start}'})]\n"
        "def sweep():\n"
        "    yield {'optim.base_lr': 0.016, 'end.optim.b1': 0.8}\n"
    )
    words = ["sweep", tmp_path / "chain.py", "--workdir", tmp_path / "w", "--data_dir", data_dir, *SMALL]
    status, out, err = run(capsys, *words, "--compile_cache", "", "--seeds", "1", "--index", "0")
    assert status == 0, out + err
    configs = {
        name: tmp_path / "w" / "000_base_lr=0.016_b1=0.8_seed=0" / name / "config.json" for name in ("start", "end")
    }
    first, last = (json.loads(configs[name].read_text()) for name in ("start", "end"))
    assert (first["optim"]["b1"], last["optim"]["b1"]) == (0.9, 0.8)
    assert (first["init"], last["init"]) == ("", str(configs["start"].parent))
    assert all((path.parent / "result.json").exists() for path in configs.values())


@pytest.mark.parametrize(
    ("words", "messages"),
    [
        (["--sweep", "wrong"], ["point 1 of sweep_wrong()", "did you mean 'optim.base_lr'"]),
        (["--sweep", "unbuildable"], ["point 001_batch_size=9_accumulate=2: train.batch_size=9", "choose a divisor"]),
        (["--sweep", "empty"], ["sweep_empty() yields no points"]),
        (["--sweep", "twice"], ["points 0 and 1 are the same"]),
        (["--sweep", "wrng"], ["--sweep='wrng' is unknown", "'sweep_wrong'"]),
        (["optim.base_lr=1"], ["optim.base_lr differs from point to point"]),
        (["optim.b3=1"], ["point 0", "did you mean 'optim.b"]),
        (["data.source=digit"], ["digit"]),
        (["--jobs", "0"], ["counted from 1"]),
        (["--sweep", "twice", "--seeds", "2"], ["points 0 and 1"]),
    ],
)
def test_nothing_runs_unless_all_points_can_be_built(words, messages, file, data_dir, tmp_path, capsys):
    common = ["--workdir", tmp_path / "w", "--data_dir", data_dir, "--run", "local", *SMALL[:-5]]
    status, out, err = run(capsys, "sweep", file, *common, *words)
    assert status == 1, out
    assert err.startswith("tinymim sweep: ")
    for message in messages:
        assert message in err
    assert "Traceback" not in err
    assert not (tmp_path / "w").exists()


@pytest.mark.slow
def test_a_changed_sweep_is_noticed(undisturbed, data_dir, capsys):
    status, _, err = run(capsys, *command(undisturbed[0], data_dir, "optim.b1=0.8"))
    assert status == 1
    assert "holds another experiment" in err
    assert "optim.b1: 0.9 there, 0.8 here" in err


def test_names_are_stable_unique_and_safe(tmp_path):
    name = folder_name(3, {"optim.base_lr": 1e-3, "model.drop_path": 0.1}, 0)
    assert name == "003_base_lr=0.001_drop_path=0.1_seed=0"
    hard = {"train.duration": "300 epochs", "init": "runs/a b/c:d", "model.heads": (2, 4), "data.examples": -1}
    assert folder_name(0, hard) == "000_duration=300-epochs_init=c-d_heads=2,4_examples=-1"
    keys = ["model.drop_path", "distill.teacher.drop_path", "optim.base_lr"]
    assert list(short_names(keys).values()) == ["model.drop_path", "teacher.drop_path", "base_lr"]
    long = {f"a.{letter * 20}": value for letter, value in zip("bcdefghij", range(9))}
    names = {folder_name(0, long | {"a.jjjj": value}) for value in range(50)}
    assert len(names) == 50
    assert max(map(len, names)) <= 120
    few, more = (read_points("configs/digits.py:finetune", "sweep", tmp_path, {}, seeds) for seeds in (1, 3))
    assert [point.name for point in more][: len(few)] == [point.name for point in few]
    assert len({point.name for point in more}) == len(more) == 6


@pytest.mark.parametrize(
    "value", [1, 1e-3, True, None, "qk_vv", "18", "None", "", "300 epochs", (1, 2), np.float64(0.1)]
)
def test_overrides_are_parsed_back(value):
    assert parse_overrides([format_override("a.b", value)]) == {"a.b": value}


def test_overrides_reach_their_stages(tmp_path):
    stages = read_stages("configs/chain.py:digits")
    changes = {"seed": 3, "distill.teacher.path": "x", "small.optim.base_lr": 1.0}
    teacher, large, small, classifier = make_runs(stages, tmp_path, changes)
    assert all("seed=3" in run.overrides for run in (teacher, large, small, classifier))
    assert f"distill.teacher.path={tmp_path / 'large'}" in small.overrides  # a link is not undone by a word for all
    assert "optim.base_lr=1.0" in small.overrides
    assert not any(word.startswith("optim") for word in large.overrides)
    with pytest.raises(ValueError, match=r"stage 'small'.*did you mean 'optim.base_lr'"):
        make_runs(stages, tmp_path, {"small.optim.base_rl": 1})
    with pytest.raises(ValueError, match=r"did you mean 'mae.mask_ratio'"):
        make_runs(stages, tmp_path, {"mae.mask_ration": 1})


def test_the_table_counts_as_numpy_does(tmp_path):
    points = read_points("configs/digits.py:finetune", "sweep", tmp_path, {}, 3)
    values = dict(zip((point.name for point in points), (0.5, 0.7, 0.6, 0.9, 0.8, 0.75)))
    states = {name: RunState("finished", result={"top1": value, "loss": -value}) for name, value in values.items()}
    rows = summarize(points, states, metric="top1", direction="max")
    for row in rows:
        own = [values[name] for name in row["workdirs"]]
        np.testing.assert_allclose([row["mean"], row["std"]], [np.mean(own), np.std(own, ddof=1)], rtol=1e-12)
    assert [row["point"] for row in rows] == [1, 0]
    assert [row["point"] for row in summarize(points, states, metric="top1", direction="min")] == [0, 1]
    states[points[1].name] = RunState("failed", "why")  # of three seeds two are left, and the table says so
    row = next(row for row in summarize(points, states, metric="loss", direction="min") if row["point"] == 1)
    assert (row["states"], len(row["values"])) == ({"failed": 1, "finished": 2}, 2)
    with pytest.raises(ValueError, match="did you mean 'top1'"):
        write_table(points, states, tmp_path, metric="top")


@pytest.mark.slow
def test_optuna_chooses_points_and_goes_on(data_dir, tmp_path, capsys):
    words = ["sweep", "configs/digits.py:finetune", "--study", "study", "--workdir", tmp_path, "--data_dir", data_dir]
    words += ["--compile_cache", "", *SMALL]
    status, out, err = run(capsys, *words, "--trials", "1")
    assert status == 0, out + err
    (first,) = results(tmp_path)
    status, out, err = run(capsys, *words, "--trials", "2")
    assert status == 0, out + err
    assert len(results(tmp_path)) == 2
    assert first in results(tmp_path)
    rates = [json.loads((tmp_path / n / "config.json").read_text())["optim"]["base_lr"] for n in results(tmp_path)]
    assert len(set(rates)) == 2
    assert all(4e-3 <= rate <= 6.4e-2 for rate in rates)
    assert len(json.loads((tmp_path / "table.json").read_text())["rows"]) == 2
    lost = tmp_path / next(iter(results(tmp_path))) / "result.json"
    before = lost.read_text()
    lost.write_text("")  # as after a full disk: the trial counts, but its figures are missing
    status, out, err = run(capsys, *words, "--trials", "2")
    assert status == 0, out + err
    assert lost.read_text() == before


def test_a_metric_that_does_not_exist_is_refused_before_the_first_trial(data_dir, tmp_path, capsys):
    words = ["sweep", "configs/digits.py:finetune", "--study", "study", "--workdir", tmp_path / "w", *SMALL]
    status, _, err = run(capsys, *words, "--data_dir", data_dir, "--metric", "topp1")
    assert status == 1
    assert "--metric='topp1' is unknown; did you mean 'top1'" in err
    assert not (tmp_path / "w").exists()
    (tmp_path / "w").mkdir()
    with locked(tmp_path / "w"):  # another command runs a study there
        status, _, err = run(capsys, *words, "--data_dir", data_dir)
    assert status == 1
    assert f"in use by process {os.getpid()}" in err


def test_a_study_refuses_overrides_that_would_falsify_its_table(tmp_path, data_dir, capsys):
    """For a key that it chooses, or other ones than it was begun with; what says how trials run may differ."""
    from tinymim_jax.sweeps.optuna_study import _check_words

    words = ["sweep", "configs/digits.py:finetune", "--study", "study", "--workdir", tmp_path, "--data_dir", data_dir]
    code, _, err = run(capsys, *words, *SMALL, "optim.base_lr=0.5")
    assert code == 1
    assert "study() in configs/digits.py:finetune chooses optim.base_lr: leave optim.base_lr=... out" in err
    study = optuna.create_study()
    _check_words(study, {"model.depth": 1, "train.log_every": 5}, tmp_path)
    _check_words(study, {"model.depth": 1, "train.log_every": 9, "classifier.checkpoint.keep": 1}, tmp_path)
    with pytest.raises(ValueError, match=r"was begun with model.depth=1, not with model.depth=2"):
        _check_words(study, {"model.depth": 2}, tmp_path)


def test_a_study_without_its_journal_does_not_begin_anew(tmp_path):
    from tinymim_jax.sweeps.optuna_study import _open_study

    (tmp_path / "000_base_lr=0.1").mkdir()
    with pytest.raises(ValueError, match=r"study.journal is missing, but 000_base_lr=0.1 is a trial"):
        _open_study(optuna, tmp_path, "study", "top1", "max")
    (tmp_path / "study.journal").touch()
    with pytest.raises(ValueError, match=r"study.journal is empty"):
        _open_study(optuna, tmp_path, "study", "top1", "max")
    (tmp_path / "study.journal").write_text('{"op')
    with pytest.raises(ValueError, match=r"study.journal is damaged"):
        _open_study(optuna, tmp_path, "study", "top1", "max")


def test_a_study_keeps_its_metric_and_direction(tmp_path):
    from tinymim_jax.sweeps.optuna_study import _open_study

    _open_study(optuna, tmp_path, "study", "top1", "max")
    _open_study(optuna, tmp_path, "study", "top1", "max")
    for metric, direction in (("loss", "min"), ("top5", "max"), ("top1", "min")):
        with pytest.raises(ValueError, match=rf"compares 'top1' \(max is better\), but --metric {metric}"):
            _open_study(optuna, tmp_path, "study", metric, direction)


def test_a_tilde_is_the_home_folder(data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    points = read_points("configs/digits.py:finetune", "sweep", tmp_path / "w", {})
    points[0].runs[0].workdir.mkdir(parents=True)
    (points[0].runs[0].workdir / "result.json").write_text('{"top1": 0.5}')
    words = ["sweep", "configs/digits.py:finetune", "--workdir", "~/w", "--list", *SMALL, "--data_dir", data_dir]
    status, out, _ = run(capsys, *words)
    assert status == 0
    assert "finished     top1 0.5" in out
    seen = []
    monkeypatch.setattr("tinymim_jax.sweeps.checks.check_points", lambda points, **_: seen.extend(points))
    monkeypatch.setattr(Children, "run_point", lambda *_, **__: RunState("finished"))
    (tmp_path / "c").mkdir()
    assert run(capsys, "chain", "configs/chain.py:digits", "--workdir", "~/c")[0] == 0
    assert [each.workdir.parent for each in seen[0].runs] == [tmp_path / "c"] * 4
    assert (tmp_path / "c" / "table.md").exists()


def test_trials_behind_the_median_are_stopped(tmp_path):
    from tinymim_jax.sweeps.optuna_study import _Watch

    points = read_points("configs/digits.py:finetune", "sweep", tmp_path, {})
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    metrics = points[0].runs[0].workdir / "metrics.jsonl"
    metrics.parent.mkdir()
    for value, behind in ((0.5, False), (0.4, True), (0.6, False)):
        trial = study.ask()
        watch = _Watch(trial, points[0], "top1")
        metrics.write_text('{"step": 3, "train/loss": 1.0}\n')
        assert not watch()
        metrics.write_text(f'{{"step": 3, "train/loss": 1.0}}\n{{"step": 4, "eval/top1": {value}}}\n')
        assert watch() == behind
        study.tell(trial, value)


def test_trials_of_a_stopped_study_are_queued_again(data_dir, tmp_path):
    from tinymim_jax.sweeps.optuna_study import _requeue_running

    study = optuna.create_study()
    stopped = study.ask()
    rate = stopped.suggest_float("rate", 0, 1)
    stopped.set_user_attr("number", 0)
    _requeue_running(study, optuna.trial.TrialState)
    again = study.ask()
    assert again.suggest_float("rate", 0, 1) == rate
    assert (again.number, again.user_attrs["number"]) == (1, 0)  # so it goes on in the folder where it was
    assert study.ask().suggest_float("rate", 0, 1) != rate
