"""`tinymim export` to other runtimes as a user runs it, the model card, and `tinymim bench`."""

import dataclasses
import io
import json
import resource
import sys

import jax
import numpy as np
import pytest
from commands import run
from networks import make_network
from PIL import Image
from runs import small_config

from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.cli import main as cli
from tinymim_jax.evaluation import bench, bench_child, exporting
from tinymim_jax.evaluation.model_card import licence_of, lineage, model_card
from tinymim_jax.evaluation.predictor import load
from tinymim_jax.train import train

pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, data_dir):
    """A run of the digits: a classifier."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    train(small_config("finetune"), folder, data_dir=data_dir)
    return folder


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """An export with an adaptive last block, whose source is a file of MAE's release."""
    network = make_network("adaptive")
    folder = tmp_path_factory.mktemp("saved") / "student"
    source = {"family": "mae", "file": "mae.pth", "sha256": "0" * 64}
    save_params(folder, network.params, {**network.record, "preprocessing": network.preprocessing, "source": source})
    return folder


def test_the_file_is_written_where_nobody_reads_the_output(student, tmp_path, monkeypatch):
    """`tinymim export ... | head -1`"""

    class Gone(io.StringIO):
        def write(self, _):
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(SystemExit) as ended:
        cli.main(["export", str(student), "--to", "onnx", "--output", str(tmp_path / "model.onnx")])
    assert ended.value.code == 0
    assert (tmp_path / "model.onnx").stat().st_size > 10_000


def test_the_difference_on_the_runs_own_images_is_printed(workdir, tmp_path, data_dir, capsys):
    path = tmp_path / "model.onnx"
    code, out, err = run(capsys, "export", workdir, "--to", "onnx", "--output", path, "--data_dir", data_dir)
    assert code == 0, err
    assert "onnxruntime" in out
    assert "8 images of digits@test[:13]: largest difference" in out
    assert "answers equal" in out
    # An independent look: raw pixels through onnxruntime against the loaded model's logits.
    model = load(str(workdir))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8))
    pixels = (np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 255 - 0.5) / 0.5
    session = onnxruntime.InferenceSession(str(path))
    (logits,) = session.run(["logits"], {"pixel_values": pixels})
    np.testing.assert_allclose(logits[0], model.logits(image), atol=1e-5)
    (names,) = (json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items() if k == "class_names")
    assert tuple(names) == model.class_names


def test_int8_says_how_many_answers_agree(workdir, tmp_path, data_dir, capsys):
    words = ["export", workdir, "--to", "onnx", "--int8", "--output", tmp_path / "model.onnx", "--data_dir", data_dir]
    code, out, err = run(capsys, *words, "--data", "digits@test[:40]")
    assert code == 0, err
    assert "40 images of digits@test[:40]" in out
    assert "of 40 answers equal, smallest cosine 0.99" in out or "smallest cosine 1.0" in out


@pytest.mark.parametrize("words", [["onnx"], ["stablehlo"], ["hub"], ["vit"]])
def test_a_full_disk_leaves_nothing_and_says_what_to_do(words, workdir, tmp_path, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
        code, _, err = run(capsys, "export", workdir, "--to", *words, "--output", tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert str(tmp_path) in err
    assert "The disk is full, or a quota: free some space, or write elsewhere, and run the command again" in err
    assert not list(tmp_path.iterdir())


def test_a_file_that_differs_is_not_kept(student, tmp_path, capsys, monkeypatch):
    honest = exporting.RUNNERS["onnx"]

    def wrong(path, threads):
        runner = honest(path, threads)
        return dataclasses.replace(runner, run=lambda pixels: runner.run(pixels) * 1.00001)

    monkeypatch.setitem(exporting.RUNNERS, "onnx", wrong)
    code, _, err = run(capsys, "export", student, "--to", "onnx", "--output", tmp_path / "model.onnx")
    assert code == 1
    assert "more than 2e-06 of the largest output, so the file was not kept" in err
    assert not list(tmp_path.iterdir())


def test_not_a_number_is_a_difference(tmp_path):
    network = make_network("plain")
    runner = exporting.Runner("none", np.asarray, lambda pixels: np.full((len(pixels), 7), np.nan))
    views = np.zeros((3, *network.image_size, 3), np.uint8)
    assert exporting.compare(runner, network, views).difference == np.inf


def test_without_the_runtime_the_file_is_kept_and_the_user_told(student, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    code, out, _ = run(capsys, "export", student, "--to", "onnx", "--output", tmp_path / "model.onnx")
    assert code == 0
    assert "not compared with jax: onnxruntime is missing: pip install onnxruntime" in out
    assert (tmp_path / "model.onnx").exists()


def test_a_runtime_that_cannot_be_imported_is_told_from_a_missing_one(student, tmp_path, capsys, monkeypatch):
    """torchvision raises RuntimeError beside a torch that it was not built for, and timm imports it."""
    (tmp_path / "onnxruntime.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    code, out, _ = run(capsys, "export", student, "--to", "onnx", "--output", tmp_path / "model.onnx")
    assert code == 0
    assert "onnxruntime is installed but cannot be imported" in out
    assert "(RuntimeError: operator torchvision::nms does not exist): pip install onnxruntime" in out
    assert (tmp_path / "model.onnx").exists()


def test_without_the_package_the_remedy_is_named(student, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, _, err = run(capsys, "export", student, "--to", "onnx", "--output", tmp_path / "model.onnx")
    assert code == 1
    assert "pip install 'tinymim-jax[onnx]'" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--to", "hub", "--int8"], "--int8 has no meaning for --to hub; it is an option of onnx, litert"),
        (["--to", "onnx", "--batch", "2"], "--batch has no meaning for --to onnx; it is an option of litert"),
        (["--to", "onnx", "--licence", "mit"], "--licence is for the model card of --to hub"),
        (["--to", "vit", "--features", "mean"], "--features is for --to onnx, litert, stablehlo, hub, not for vit"),
        (["--to", "onnx", "--data", "digits"], "write NAME@SPLIT"),
        (["--to", "hub", "--features", "mean"], "without a final norm"),
    ],
)
def test_options_that_mean_nothing_are_errors(words, message, student, tmp_path, capsys):
    code, _, err = run(capsys, "export", student, "--output", tmp_path / "out", *words)
    assert code == 1
    assert message in err
    assert not list(tmp_path.iterdir())


def test_hub_folder_with_its_card(student, tmp_path, capsys):
    results = {"suites": {"imagenet": {"status": "evaluated", "top1": 0.7512, "top5": 0.9}}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    folder = tmp_path / "tinymim-ti"
    words = ["export", student, "--to", "hub", "--output", folder, "--suites", tmp_path / "results.json"]
    code, out, err = run(capsys, *words)
    assert code == 0, err
    assert "answers equal" in out
    assert f"hf upload NAME/MODEL {folder}" in out
    card = (folder / "README.md").read_text()
    assert card.startswith(
        "---\nlicense: cc-by-nc-4.0\nlibrary_name: transformers\npipeline_tag: image-classification\n"
    )
    assert "| imagenet: top1 | 75.12 % |" in card
    assert "trust_remote_code=True" in card
    assert "converted from `mae.pth` (mae)" in card
    assert "converted by tinymim-jax from the weights named below." in card
    assert "tinymim\n" not in card.split("---")[1]
    assert "Citation" not in card
    assert str(tmp_path) not in card
    code, _, err = run(capsys, *words)
    assert code == 1
    assert "exists already" in err


def test_lineage_follows_teachers_and_starts(student, tmp_path):
    """A fine-tuned run, from a distilled one, from a teacher: the strictest known licence is that of the whole."""
    for name, config in {
        "tuned": {"task": "classify", "init": str(tmp_path / "distilled"), "data": {"source": "own", "examples": 100}},
        "distilled": {
            "task": "distill",
            "init": "",
            "distill": {"target": "qk_vv", "teacher": {"name": "", "path": str(student)}},
        },
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        (tmp_path / name / "model.json").write_text(json.dumps({"licence": "apache-2.0"} if name == "tuned" else {}))
    (tmp_path / "tuned" / "result.json").write_text('{"top1": 0.5}')
    steps = lineage(str(tmp_path / "tuned"))
    assert [step["name"] for step in steps] == ["tuned", "distilled", "student"]
    assert (steps[0]["init"], steps[1]["teacher"]) == ("distilled", "student")
    assert steps[0]["result"] == {"top1": 0.5}
    assert steps[0]["settings"]["labelled images"] == 100
    assert steps[1]["settings"]["target"] == "qk_vv"
    model = load(str(student))
    card = model_card(str(tmp_path / "tuned"), exporting.network_of(model), licence="mit", name="tuned")
    assert "distilled with [TinyMIM](https://arxiv.org/abs/2301.01296) in tinymim-jax." in card
    assert "@inproceedings{ren2023tinymim" in card
    assert licence_of(str(tmp_path / "tuned")) == "cc-by-nc-4.0"
    assert licence_of(str(tmp_path / "tuned"), "mit") == "mit"
    assert licence_of(str(tmp_path / "distilled" / "nothing")) == "other"


def test_made_up_images_are_said_to_be(student, tmp_path, capsys):
    code, out, err = run(
        capsys, "export", student, "--to", "onnx", "--output", tmp_path / "model.onnx", "--opset", "23"
    )
    assert code == 0, err
    assert "8 made-up images (for real ones: --data NAME@SPLIT or --images FILE ...)" in out
    Image.new("RGB", (40, 30), (9, 99, 200)).save(tmp_path / "one.png")
    words = ["export", student, "--to", "onnx", "--output", tmp_path / "model.onnx", "--features", "tokens"]
    code, out, err = run(capsys, *words, "--images", tmp_path / "one.png")
    assert code == 0, err
    assert "1 images given: largest difference" in out
    assert "answers" not in out


def test_bench_measures_in_a_process_of_its_own(student):
    rows = bench.bench(str(student), runtimes=["onnx"], int8=True, batches=(1, 2), threads=(0,), seconds=0.01)
    assert [(row["runtime"], row["weights"]) for row in rows] == [
        (f"onnxruntime {onnxruntime.__version__}", "float32"),
        (f"onnxruntime {onnxruntime.__version__}", "int8"),
    ]
    assert rows[0]["megabytes"] > rows[1]["megabytes"] > 0
    for row in rows:
        assert row["peak_megabytes"] > 10
        assert set(row["batches"]) == {"1", "2"}
        assert all(value > 0 for value in row["batches"]["2"].values())
    lines = bench.table(rows).splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1


def test_bench_of_jax_runs_the_checkpoint(student):
    size = list(make_network("adaptive").image_size)
    job = {"runtime": "jax", "checkpoint": str(student), "size": size, "seconds": 0.01, "threads": 0}
    row = bench_child.main(job | {"files": {"2": ""}})
    assert row["runtime"] == f"jax {jax.__version__}"
    assert row["megabytes"] is None
    assert row["batches"][2]["images_per_second"] == pytest.approx(2000 / row["batches"][2]["milliseconds"])


def test_bench_refuses_a_file_it_cannot_write_before_it_measures(student, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "bench", lambda *_, **__: pytest.fail("it has measured"))
    code, _, err = run(capsys, "bench", student, "--json", tmp_path / "absent" / "speed.json")
    assert code == 1
    assert f"--json {tmp_path / 'absent' / 'speed.json'}: {tmp_path / 'absent'} is not a folder" in err
    assert "is a folder: name a file in it" in run(capsys, "bench", student, "--json", tmp_path)[2]
    monkeypatch.setattr(bench, "bench", lambda *_, **__: [dict(_ROW)])
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(capsys, "bench", student, "--json", "~/speed.json")[0] == 0
    assert json.loads((tmp_path / "speed.json").read_text()) == [_ROW]


def test_bench_says_how_busy_the_machine_is(student, capsys, monkeypatch):
    monkeypatch.setattr(bench, "bench", lambda checkpoint, **options: [dict(_ROW)])
    for average, warned in ((0.0, False), (100.0, True)):
        monkeypatch.setattr("os.getloadavg", lambda average=average: (average, average, average))
        code, out, err = run(capsys, "bench", student)
        assert code == 0
        assert f"load average {average:.1f} before measuring" in out
        assert "| any runtime | float32 | all | - | 90 | 1.5 | 2.5 | 3.5 |" in out
        assert ("other programs are running" in err) == warned


_FIGURES = {"milliseconds": 1.5, "cpu_milliseconds": 2.5, "images_per_second": 3.5}
_ROW = {
    "runtime": "any runtime", "weights": "float32", "threads": 0, "megabytes": None, "peak_megabytes": 90.0,
    "batches": {"1": _FIGURES},
}  # fmt: skip


def test_bench_names_what_is_missing(student, capsys, monkeypatch):
    code, _, err = run(capsys, "bench", student, "--runtime", "jax,tensorrt")
    assert code == 1
    assert "'tensorrt'" in err
    assert "openvino" in err
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "openvino" else object())
    code, _, err = run(capsys, "bench", student, "--runtime", "openvino")
    assert code == 1
    assert "pip install openvino" in err


@pytest.mark.parametrize("to", ["onnx", "hub"])
def test_exported_and_converted_back(to, student, tmp_path, capsys):
    """The same logits, preprocessing and class names; what is given replaces what the file says."""
    code, _, err = run(capsys, "export", student, "--to", to, "--output", tmp_path / "model")
    assert code == 0, err
    words = ["convert", "--from", to, "--input", tmp_path / "model"]
    code, out, err = run(capsys, *words, "--output", tmp_path / "back")
    assert code == 0, err
    assert "heads [2, 4]" in out
    there, back = load(str(student)), load(str(tmp_path / "back"))
    assert back.class_names == there.class_names
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    np.testing.assert_array_equal(back.logits(image), there.logits(image))
    code, _, err = run(capsys, *words, "--output", tmp_path / "other", "--mean", "0", "0", "0")
    assert code == 0, err
    assert load(str(tmp_path / "other")).preprocessing["mean"] == [0, 0, 0]
    code, _, err = run(capsys, *words, "--output", tmp_path / "third", "--heads", "2")
    assert code == 1
    assert f"is read as --from {to}, where " in err
    assert "says all of it: leave out --heads" in err
