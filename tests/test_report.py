"""report.html of runs, chains, sweeps and suites: what it shows, that it loads nothing, that it never fails a run."""

import json
import logging
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from browser import BROWSER, open_page
from commands import run
from pages import Page, check_page
from runs import small_config

from tinymim_jax.analysis.look import look_at, samples
from tinymim_jax.data.pipeline import train_batches
from tinymim_jax.experiment import build_experiment
from tinymim_jax.metrics import read
from tinymim_jax.pages.colours import data_uri
from tinymim_jax.reports.curves import panels
from tinymim_jax.reports.write import write_at_end, write_report
from tinymim_jax.train import train

ONE_STEP = ("train.duration=1 steps", "optim.warmup=0 steps")


@pytest.fixture(scope="module")
def chain(tmp_path_factory, mae_run, data_dir):
    """A folder with a teacher, a student and a classifier, four steps each, and its report."""
    folder = tmp_path_factory.mktemp("chain")
    shutil.copytree(mae_run, folder / "teacher")
    words = [f"distill.teacher.path={folder / 'teacher'}", "distill.mask_ratio=0.5", "train.eval_every=2 steps"]
    train(small_config("distill", *words), folder / "student", data_dir=data_dir)
    words = [f"init={folder / 'student'}", "data.examples=40", "train.batch_size=8"]
    train(small_config("finetune", *words), folder / "classifier", data_dir=data_dir)
    write_report(folder, data_dir=data_dir)
    return folder


def test_a_run_writes_its_report_at_its_end(chain):
    text = (chain / "teacher" / "report.html").read_text()
    page = check_page(text)
    assert {"Curves", "Result", "Time", "Commands and versions", "Configuration"} <= set(page.texts["h2"])
    rows = [row for row in read(chain / "teacher" / "metrics.jsonl") if "train/loss" in row]
    (loss,) = [text for text in page.texts["desc"] if text.startswith("loss:")][:1]
    assert f"loss: {rows[0]['train/loss']:.4g} at step 1, {rows[-1]['train/loss']:.4g} at step 4" in loss
    assert any(text.startswith("gradient_norm") for text in page.texts["desc"])
    cells = page.texts["td"]
    assert {"optim.base_lr", "model.heads", "jax", jax.__version__} <= set(cells)
    assert f"{json.loads((chain / 'teacher' / 'result.json').read_text())['loss']:.4g}" in cells


def test_the_chain_shows_all_parts_of_its_runs(chain):
    text = (chain / "report.html").read_text()
    page = check_page(text)
    assert page.texts["h2"] == ["Runs", "Losses", "teacher", "student", "classifier"]  # in the order of their starts
    links = [a["href"] for a in page.all("a") if not a["href"].startswith("#")]
    assert links == [f"{name}/report.html" for name in ("teacher", "student", "classifier")]
    alts = [image["alt"] for image in page.all("img")]
    assert sum("as the student sees it" in alt for alt in alts) == 8
    assert sum("as the teacher sees it" in alt for alt in alts) == 8
    assert sum("as the encoder sees it" in alt for alt in alts) == 8
    for relation in ("QK", "VV"):
        for network in ("student", "teacher"):
            assert sum(f"{relation} relation" in alt and f"in the {network}" in alt for alt in alts) == 4
    titles = set(page.texts["figcaption"])
    assert {"CKA, student and teacher", "Attention distance", "Confused pairs", "Classes", "Calibration"} <= titles
    assert len(text) < 2_000_000


def test_what_the_networks_see(chain, data_dir):
    """The teacher's view, without jitter and with the same crop, is the batch's image; half of the student is grey."""
    config = small_config("distill", f"distill.teacher.path={chain / 'teacher'}", "distill.mask_ratio=0.5")
    found = samples(config, data_dir)
    experiment = build_experiment(config, data_dir=data_dir)
    options = {"batch_size": 8, "seed": config.seed}
    with train_batches(experiment.train_source, augment=experiment.views.train, **options) as batches:
        batch = next(batches)
    assert [each["label"] for each in found] == [str(label) for label in batch["label"]]
    assert [each["seen"]["teacher"] for each in found] == [data_uri(image) for image in batch["image"]]
    seen = jax.jit(experiment.task.seen)({"image": jnp.asarray(batch["image"])}, jax.random.key(0))
    assert seen["student"].shape == (8, 16, 16, 3)
    patches = np.asarray(seen["student"]).reshape(8, 2, 8, 2, 8, 3)
    grey = (patches == 0.5).all(axis=(2, 4, 5))
    assert (grey.sum(axis=(1, 2)) == 2).all()


def test_mae_and_mixed_images_are_shown_as_they_are_trained_on(data_dir):
    for words, task in ((("mae.mask_ratio=0.75",), "mae_teacher"), (("classify.mixup=0.8",), "finetune")):
        experiment = build_experiment(small_config(task, *words), data_dir=data_dir)
        images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
        batch = {"image": jnp.asarray(images), "label": jnp.arange(4)}
        ((name, seen),) = jax.jit(experiment.task.seen)(batch, jax.random.key(3)).items()
        seen = np.asarray(seen)
        if task == "finetune":
            # Mixup is lam * image + (1 - lam) * the image at the other end of the batch.
            own, other = images / 255, images[::-1] / 255
            lam = ((seen - other) * (own - other)).sum() / ((own - other) ** 2).sum()
            np.testing.assert_allclose(seen, lam * own + (1 - lam) * other, atol=1e-5)
            assert 0 < lam < 1
        else:
            assert name == "encoder"
            hidden = (seen.reshape(4, 2, 8, 2, 8, 3) == 0.5).all(axis=(2, 4, 5))
            assert (hidden.sum(axis=(1, 2)) == 3).all()
            kept = ~np.repeat(np.repeat(hidden, 8, 1), 8, 2)
            np.testing.assert_allclose(seen[kept], (images / 255)[kept], atol=1e-6)


def test_scores_are_those_of_the_evaluation(chain):
    scores = json.loads((chain / "classifier" / "analysis" / "scores.json").read_text())
    result = json.loads((chain / "classifier" / "result.json").read_text())
    assert scores["top1"] == pytest.approx(result["top1"])
    assert scores["examples"] == result["examples"]
    page = Page((chain / "report.html").read_text())
    pair = scores["confusions"][0]
    cells = page.texts["td"]
    start = next(
        i for i in range(len(cells)) if cells[i : i + 3] == [pair["true"], pair["predicted"], str(pair["count"])]
    )
    assert cells[start + 3] == f"{pair['share']:.1%}"


def test_nothing_is_computed_again_for_the_same_checkpoint(chain, monkeypatch, caplog):
    monkeypatch.setattr("tinymim_jax.analysis.look.find_networks", lambda *a, **k: pytest.fail("looked again"))
    monkeypatch.setattr("tinymim_jax.analysis.look.analyze", lambda *a, **k: pytest.fail("analyzed again"))
    look_at(chain / "student")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_report_that_cannot_be_made_does_not_fail_the_run(data_dir, tmp_path, monkeypatch, caplog):
    def broken(*_, **__):
        raise RuntimeError("no paper left")

    monkeypatch.setattr("tinymim_jax.reports.write.write_report", broken)
    result = train(small_config("mae_teacher", *ONE_STEP), tmp_path / "run", data_dir=data_dir)
    assert "loss" in result
    assert "the report could not be written: RuntimeError: no paper left" in caplog.text
    assert json.loads((tmp_path / "run" / "status.json").read_text())["stage"] == "finished"


def test_long_runs_are_looked_at_at_their_end_and_short_ones_say_how(chain, monkeypatch, caplog):
    looked = []
    monkeypatch.setattr("tinymim_jax.analysis.look.look_at", lambda run, **_: looked.append(run))
    with caplog.at_level(logging.INFO, logger="tinymim_jax"):
        write_at_end(chain / "teacher", seconds=59.0, images=20_000)
        write_at_end(chain / "teacher", seconds=61.0, images=19_999)
    assert (looked, f"`tinymim report {chain / 'teacher'}` adds" in caplog.text) == ([], True)
    write_at_end(chain / "teacher", seconds=61.0, images=20_000)
    assert looked == [chain / "teacher"]


def test_what_is_gone_or_damaged_is_left_out(chain, tmp_path, data_dir, capsys):
    """Half a JSON file, a teacher that is gone, metrics that a crash cut short."""
    shutil.copytree(chain / "student", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "analysis")
    for name in ("result.json", "status.json", "resume.json"):
        (tmp_path / "run" / name).write_text('{"loss": 0.')
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train/lo')
    model = json.loads((tmp_path / "run" / "model.json").read_text())
    model["teacher"]["checkpoint"] = str(tmp_path / "gone")
    (tmp_path / "run" / "model.json").write_text(json.dumps(model))
    code, out, err = run(capsys, "report", tmp_path / "run", "--data_dir", data_dir, "--compile_cache", "")
    assert code == 0, err
    page = check_page((tmp_path / "run" / "report.html").read_text())
    assert out.splitlines()[-1] == str(tmp_path / "run" / "report.html")
    assert "the teacher is not compared" in out
    assert "CKA within the encoder" in page.texts["figcaption"]


def test_files_only_and_other_outputs(chain, tmp_path, capsys):
    shutil.copytree(chain / "student", tmp_path / "run", ignore=shutil.ignore_patterns("analysis"))
    code, _, err = run(capsys, "report", tmp_path / "run", "--files_only", "--output", tmp_path / "x.html")
    assert code == 0, err
    page = check_page((tmp_path / "x.html").read_text())
    assert not page.all("img")
    assert not (tmp_path / "run" / "analysis").exists()


def test_a_folder_without_runs_says_what_to_give(tmp_path, capsys):
    code, _, err = run(capsys, "report", tmp_path)
    assert (code, "no run has begun in" in err and "--workdir of a run" in err) == (1, True)
    (tmp_path / "other.json").write_text("{}")
    code, _, err = run(capsys, "report", tmp_path / "other.json")
    assert (code, "is no result of `tinymim evaluate --suite" in err) == (1, True)


def test_a_sweep_with_the_papers_figures(chain, tmp_path):
    """Many runs: the table with notes and deviations, curves of each, links; nothing is computed."""
    rows = [
        {"point": 1, "overrides": {"distill.target": "qk_vv"}, "notes": {"paper": 84.6}, "mean": 0.5, "std": 0.1,
         "values": [0.4, 0.6], "states": {"finished": 2}, "workdirs": []},
        {"point": 0, "overrides": {"distill.target": "cls"}, "notes": {"paper": None}, "mean": None, "std": None,
         "values": [], "states": {"failed": 1}, "workdirs": []},
    ]  # fmt: skip
    table = {"metric": "top1", "direction": "max", "rows": rows}
    (tmp_path / "table.json").write_text(json.dumps(table))
    for number in range(5):
        shutil.copytree(chain / "student", tmp_path / f"00{number}_a&b", ignore=shutil.ignore_patterns("checkpoints"))
    page = check_page(write_report(tmp_path).read_text())
    assert {"Runs", "Sweep", "Losses", "Curves of each run"} == set(page.texts["h2"])
    cells = page.texts["td"]
    row = cells.index("qk_vv")
    assert [cells[row + 2], cells[row + 3], cells[row + 4], cells[row + 5]] == ["0.5", "0.1", "84.6", "2 finished"]
    assert any("top1 0.5 +- 0.1" in title for title in page.texts["title"])
    assert page.texts["summary"].count("000_a&b") == 1


def test_suites(tmp_path, capsys):
    results = {
        "checkpoint": "runs/b", "model": {"embed_dim": 192, "depth": 12, "parameters": 5_700_000,
        "forward_flops": 2.5e9, "classes": 1000},
        "throughput": {"images_per_second": 100.0, "devices": 1, "device": "cpu"},
        "suites": {
            "imagenet": {"status": "evaluated", "examples": 50000, "top1": 0.751, "top5": 0.92, "ece": 0.03,
                         "per_class": [{"class": 0, "name": "tench", "examples": 50, "top1": 0.9},
                                       {"class": 1, "name": "<goldfish>", "examples": 50, "top1": 0.4}],
                         "confusions": [{"true": "<goldfish>", "predicted": "tench", "count": 7, "share": 0.14}],
                         "calibration": [{"above": 0.5, "examples": 5, "confidence": 0.6, "top1": 0.5}]},
            "v2": {"status": "missing", "reason": "not there"},
        },
    }  # fmt: skip
    (tmp_path / "suites.json").write_text(json.dumps(results))
    code, out, err = run(capsys, "report", tmp_path / "suites.json")
    assert code == 0, err
    assert out.splitlines()[-1] == str(tmp_path / "suites.html")
    page = check_page((tmp_path / "suites.html").read_text())
    cells = page.texts["td"]
    start = cells.index("imagenet")
    assert cells[start : start + 8] == ["imagenet", "evaluated", "50,000", "75.1", "92", "3", "-", "75.8"]
    assert "v2: not there" in page.texts["p"]
    weakest = cells.index("<goldfish>", cells.index("14.0%"))
    assert cells[weakest : weakest + 6] == ["<goldfish>", "50", "40.0%", "tench", "50", "90.0%"]
    folder = check_page(write_report(tmp_path).read_text())
    assert "Test suites" in folder.texts["h2"]


def test_curves_take_whatever_figures_there_are():
    rows = [
        {"step": 1, "time": 1.0, "train/loss": 1.0, "train/qk": 0.4, "lr": 0.1, "train/gradient_norm": 2.0},
        {"step": 2, "probe/knn10_top1": 0.3, "probe/rank": 12.0, "eval/loss": 0.9, "eval/top1": 0.2, "eval/miou": 0.1},
        {"step": 3, "train/loss": None, "train/qk": 0.3, "eval/iou/wall": 0.2, "eval/examples": 13, "note": "text"},
    ]
    found = {title: [series.name for series in lines] for title, lines in panels(rows)}
    assert found == {
        "Training loss": ["loss", "qk"],
        "Learning rate": ["lr"],
        "Gradient norm": ["gradient_norm"],
        "Probe accuracy": ["knn10_top1"],
        "Probe: rank": ["rank"],
        "Evaluation loss": ["loss"],
        "Evaluation accuracy": ["top1"],
        "Evaluation: miou": ["miou"],
    }
    loss = dict(panels(rows))["Training loss"][0]
    assert (list(loss.x), list(loss.y)) == ([1, 3], [1.0, None])


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize(("width", "dark"), [(400, False), (1600, True)])
def test_in_a_browser(chain, tmp_path, width, dark):
    """No script error, no request to any address, nothing wider than the window, and texts that can be read."""
    found = open_page(chain / "report.html", tmp_path, width, dark=dark)
    assert found["errors"] == []
    assert found["asked"] == []
    assert found["wide"] <= width
    assert 10 <= found["text"] < 40  # pixels


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_the_browser_test_notices_errors_and_requests(tmp_path):
    """Of a page with each of them."""
    bad = """<html><head></head><body><script>nothing.there();</script><img src="http://localhost:9/x.png" alt="x">
    <div style="width:900px">wide</div></body></html>"""
    (tmp_path / "bad.html").write_text(bad)
    found = open_page(tmp_path / "bad.html", tmp_path, 400)
    assert any("nothing is not defined" in error for error in found["errors"])
    assert any("broken picture" in error for error in found["errors"])
    assert "http://localhost:9/x.png" in found["asked"]
    assert found["wide"] >= 900
