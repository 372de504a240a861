"""A segmentation run as users have it: pairs in folders, training, evaluation, resuming."""

import json

import numpy as np
import pytest
from pages import check_page
from pictures import encoded
from PIL import Image

from configs import base
from tinymim_jax import load
from tinymim_jax.class_names import ClassMismatch
from tinymim_jax.cli import main as cli
from tinymim_jax.config import apply_overrides
from tinymim_jax.data.sources.labels import LabelError
from tinymim_jax.evaluation.evaluate import evaluate_checkpoint
from tinymim_jax.experiment import batch_shapes, build_experiment
from tinymim_jax.reports.write import write_report
from tinymim_jax.train import train

SIZES = [(40, 60), (50, 44), (64, 48)]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TINYMIM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """An image with a bright square on a dark background, and its mask: 0, 1, and 7 around the square."""
    rng = np.random.default_rng(number)
    height, width = SIZES[number % 3]
    image = rng.integers(0, 80, (height, width, 3), dtype=np.uint8)
    labels = np.zeros((height, width), np.uint8)
    side = int(rng.integers(12, 24))
    top, left = int(rng.integers(1, height - side - 1)), int(rng.integers(1, width - side - 1))
    labels[top - 1 : top + side + 1, left - 1 : left + side + 1] = 7
    labels[top : top + side, left : left + side] = 1
    image[labels == 1] += 150
    return image, labels


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    for split, numbers in (("train", range(20)), ("val", range(20, 25))):
        for kind in ("images", "masks"):
            (root / split / kind).mkdir(parents=True)
        for number in numbers:
            image, labels = scene(number)
            (root / split / "images" / f"{number}.png").write_bytes(encoded(image, "PNG"))
            (root / split / "masks" / f"{number}.png").write_bytes(encoded(labels, "PNG"))
    (root / "classes.txt").write_text("ground 0 0 100\nsquare 200 0 0\n")
    return root


def experiment(pairs, *words: str):
    config = base.segment()
    own = ("model.embed_dim=16", "model.depth=2", "model.heads=2", "model.image_size=(32,32)", "model.patch_size=8")
    own += ("model.dtype=float32", "segment.head=linear", "train.batch_size=8", f"data.source=pairs:{pairs}")
    own += ("train.duration=30 steps", "optim.warmup=0 steps", "optim.base_lr=0.3", "train.eval_every=0 steps")
    own += ("data.eval_split=val", "data.masks.ignore=7", "data.scale=(60,40)", "segment.evaluation.stride=(20,20)")
    apply_overrides(config, [*own, "train.log_every=10", *words])
    return config.lock()


@pytest.fixture(scope="module")
def run(pairs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    return workdir, train(experiment(pairs), workdir)


def test_training_and_its_evaluation(run, pairs):
    workdir, result = run
    assert set(result) == {"mIoU", "mAcc", "aAcc", "pixels", "iou/ground", "iou/square", "examples", "substituted"}
    truth = [scene(number)[1] for number in range(20, 25)]
    assert result["pixels"] == sum(int((labels != 7).sum()) for labels in truth)
    assert result["examples"] == 5
    majority = sum((labels == 0).sum() for labels in truth) / result["pixels"]
    assert result["aAcc"] > majority + 0.02  # brightness tells the classes apart
    assert result["mIoU"] > majority / 2 + 0.1
    record = json.loads((workdir / "model.json").read_text())
    assert record["segmenter"]["classes"] == 2
    assert record["preprocessing"]["class_names"] == ["ground", "square"]
    assert record["preprocessing"]["class_colours"] == [[0, 0, 100], [200, 0, 0]]
    assert record["preprocessing"]["windows"]["stride"] == [20, 20]


def test_the_same_figures_from_its_checkpoint(run, pairs):
    workdir, result = run
    assert evaluate_checkpoint(experiment(pairs), workdir) == result
    other = evaluate_checkpoint(experiment(pairs, "segment.evaluation.mode=whole"), workdir)
    assert other["pixels"] == result["pixels"]
    flipped = evaluate_checkpoint(experiment(pairs, "segment.evaluation.flip=True"), workdir)
    assert flipped["aAcc"] == pytest.approx(result["aAcc"], abs=0.1)


def test_shapes_and_classes_come_from_the_data(pairs):
    built = build_experiment(experiment(pairs))
    shapes = batch_shapes(built)
    assert shapes["pixel_labels"].shape == (8, 32, 32)
    assert shapes["pixel_labels"].dtype == np.uint8
    assert built.train_source.class_names == ("ground", "square")


def test_masks_that_do_not_fit_are_told_before_the_first_step(pairs, tmp_path):
    with pytest.raises(LabelError, match=r"masks/\d+.png: .* have values that are none of the 2 classes: 7"):
        train(experiment(pairs, "data.masks.ignore=255"), tmp_path)
    assert not (tmp_path / "checkpoints").exists()
    words = (f"data.source=folder:{pairs}/train/images", "data.train_split=all", "data.eval_split=all")
    with pytest.raises(LabelError, match="has no mask"):
        build_experiment(experiment(pairs, *words, "data.masks.classes=2"))


def command(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([*map(str, words)])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


def test_segmenting_images_by_function(run, pairs):
    model = load(run[0])
    path = next((pairs / "val" / "images").glob("*.png"))
    found = model.segment(path)
    pixels = np.asarray(Image.open(path))
    assert found.labels.shape == pixels.shape[:2]
    assert found.labels.dtype == np.uint8
    np.testing.assert_array_equal(model.segment(pixels).labels, found.labels)
    assert [x.labels.shape for x in model.segment([pixels[:20], pixels])] == [(20, pixels.shape[1]), pixels.shape[:2]]
    assert model.class_names == ("ground", "square")
    assert sum(found.shares().values()) == pytest.approx(1)
    assert found.shares()["square"] == (found.labels == 1).mean()
    # The labels are those by which evaluation counted.
    total = np.zeros((2, 2), np.int64)
    for number in range(20, 25):
        image, truth = scene(number)
        labels = model.segment(image).labels
        np.add.at(total, (truth[truth != 7], labels[truth != 7]), 1)
    assert np.trace(total) / total.sum() == pytest.approx(run[1]["aAcc"], abs=1e-3)
    with pytest.raises(ValueError, match="has no classifier"):
        model.classify(pixels)


def test_segmenting_images_by_command(run, pairs, tmp_path, capsys):
    workdir = run[0]
    paths = sorted((pairs / "val" / "images").glob("*.png"))[:2]
    (tmp_path / "damaged.png").write_bytes(b"no image")
    words = ("predict", workdir, *paths, tmp_path / "damaged.png", "--output", tmp_path / "out", "--json", "--flip")
    code, out, err = command(capsys, *words)
    assert code == 1
    assert "damaged.png cannot be decoded" in err
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in lines] == [str(path) for path in paths]
    mask, overlay = Image.open(lines[0]["mask"]), Image.open(lines[0]["overlay"])
    assert (mask.mode, mask.getpalette()[:6]) == ("P", [0, 0, 100, 200, 0, 0])
    labels = np.asarray(mask)
    assert lines[0]["shares"]["square"] == pytest.approx((labels == 1).mean(), abs=1e-4)
    assert labels.shape == np.asarray(overlay).shape[:2]
    red = np.asarray(overlay).astype(int)[..., 0] - np.asarray(Image.open(paths[0])).astype(int)[..., 0] * 0.45
    assert red[labels == 1].mean() > red[labels == 0].mean() + 60
    code, out, err = command(capsys, "predict", workdir, paths[0], "--output", tmp_path / "out")
    assert code == 0
    assert "ground" in out and "_overlay.jpg" in out  # noqa: PT018
    folder = pairs / "val" / "images"
    code, out, err = command(capsys, "predict", workdir, folder, "--output", tmp_path / "all", "--mode", "whole")
    assert code == 0
    assert [line.partition(":")[0] for line in out.splitlines()] == sorted(map(str, folder.iterdir()))
    assert len(list((tmp_path / "all").glob("*_overlay.jpg"))) == 5
    code, out, err = command(capsys, "predict", workdir, pairs / "val", "--output", tmp_path / "none")
    assert code == 1
    assert "val is a folder without images; images in folders below it are not taken" in err
    code, out, err = command(capsys, "predict", workdir, paths[0], paths[0])
    assert code == 1
    assert "would write the same files" in err


def test_evaluating_by_command(run, capsys):
    code, out, _ = command(capsys, "evaluate", run[0])
    assert code == 0
    assert json.loads(out.splitlines()[-1]) == run[1]


def test_classes_of_the_checkpoint_and_of_the_data_must_agree(run, pairs):
    with pytest.raises(ClassMismatch):
        evaluate_checkpoint(experiment(pairs, "data.masks.classes=2"), run[0])


def test_its_report_shows_the_classes(run, tmp_path):
    """Figures of each class, and the images as they are trained on."""
    workdir, result = run
    page = check_page(write_report(workdir, output=tmp_path / "report.html").read_text())
    cells = page.texts["td"]
    row = cells.index("square")
    assert cells[row + 1] == f"{result['iou/square']:.4g}"
    assert sum("as the network sees it" in image["alt"] for image in page.all("img")) == 8
    assert "CKA within the encoder" in page.texts["figcaption"]
