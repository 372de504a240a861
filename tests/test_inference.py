"""A loaded model against the network applied by hand, on files, Pillow images and arrays; and `tinymim predict`."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import small_config

import tinymim_jax
from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.cli import main as cli
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.evaluation.evaluate import evaluate_checkpoint
from tinymim_jax.evaluation.predictor import Model
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.train import train


@pytest.fixture(scope="module")
def config():
    return small_config("finetune", "train.duration=30 steps", "data.eval_split=test[:60]")


@pytest.fixture(scope="module")
def run(tmp_path_factory, config, data_dir):
    workdir = tmp_path_factory.mktemp("classifier")
    train(config, workdir, data_dir=data_dir)
    return workdir


@pytest.fixture(scope="module")
def digits(data_dir):
    return open_source("digits", split="test[:60]", data_dir=data_dir)


@pytest.fixture(scope="module")
def files(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{i}.png" for i in range(len(digits))]
    for i, path in enumerate(paths):
        path.write_bytes(digits[i]["image"])
    return paths


def by_hand(run, images):
    """Resized by Pillow, normalised by numpy."""
    record, params = load_params(run)
    wanted = [np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)) for image in images]
    pixels = (np.stack(wanted) / 255 - 0.5) / 0.5
    network = Classifier(ViT.from_record(record["encoder"]), 10, record["classifier"]["pool"])
    return np.asarray(network.apply({"params": params}, jnp.asarray(pixels, jnp.float32)))


def test_logits_are_the_networks_whatever_the_image_is(run, files):
    model = tinymim_jax.load(run)
    images = [Image.open(path) for path in files[:5]]
    want = by_hand(run, images)
    np.testing.assert_allclose(model.logits(files[:5]), want, atol=1e-5)
    np.testing.assert_allclose(model.logits([str(path) for path in files[:5]]), want, atol=1e-5)
    np.testing.assert_allclose(model.logits(images), want, atol=1e-5)
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    np.testing.assert_allclose(model.logits(arrays), want, atol=1e-5)
    one = model.logits(files[3])
    assert one.shape == (10,)
    np.testing.assert_allclose(one, want[3], atol=1e-5)


def test_its_accuracy_is_that_of_evaluate(run, config, files, digits, data_dir):
    model = tinymim_jax.load(str(run))
    best = [predictions[0] for predictions in model.classify(files, top=1)]
    accuracy = np.mean([each.index == digits[i]["label"] for i, each in enumerate(best)])
    assert accuracy == pytest.approx(evaluate_checkpoint(config, run, data_dir=data_dir)["top1"])
    assert all(each.name == digits.class_names[each.index] for each in best)


def test_predictions_are_the_most_probable_in_order(run, files):
    model = tinymim_jax.load(run)
    predictions = model.classify(files[0], top=10)
    probabilities = np.asarray(jax.nn.softmax(model.logits(files[0])))
    assert [each.index for each in predictions] == np.argsort(-probabilities).tolist()
    assert sum(each.probability for each in predictions) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_features(run, files, pool):
    model = tinymim_jax.load(run)
    record, params = load_params(run)
    image = Image.open(files[0]).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
    pixels = jnp.asarray((np.asarray(image)[None] / 255 - 0.5) / 0.5, jnp.float32)
    tokens = np.asarray(ViT.from_record(record["encoder"]).apply({"params": params["encoder"]}, pixels))
    want = tokens[0, 0] if pool == "cls" else tokens[0, 1:].mean(axis=0)
    np.testing.assert_allclose(model.embed(files[0], pool=pool), want, atol=1e-5)
    assert model.embed(files[:3], pool=pool).shape == (3, 16)


def test_numbers_of_images_share_programs(run, files):
    model = tinymim_jax.load(run)
    whole = model.logits([files[i % 60] for i in range(130)])  # 64, 64 and 2
    np.testing.assert_allclose(whole[:60], whole[60:120], atol=1e-6)
    model.logits(files[:3])
    model.logits(files[:4])
    assert model._programs["logits"]._cache_size() == 3  # of 64, 2 and 4 images


def test_a_converted_file_is_seen_as_published(golden, tmp_path):
    from tinymim_jax.convert import convert_file

    model, params = convert_file("vit", golden.path("vit_gap.pth"), heads=str(golden.meta["vit"]["heads"]))
    save_params(tmp_path / "converted", params, model)
    loaded = tinymim_jax.load(tmp_path / "converted")
    assert loaded.preprocessing["mean"] == [0.485, 0.456, 0.406]
    assert loaded.class_names == ()


def test_mistakes_are_told(run, files, tmp_path, data_dir):
    model = tinymim_jax.load(run)
    with pytest.raises(ValueError, match=r"uint8 \[height, width, 3\], RGB; got float32 \[8, 8, 3\]"):
        model.logits(np.zeros((8, 8, 3), np.float32))
    with pytest.raises(ValueError, match="no images"):
        model.logits([])
    with pytest.raises(ValueError, match="pool='max' is unknown"):
        model.embed(files[0], pool="max")
    train(small_config("mae_teacher", "train.duration=2 steps"), tmp_path / "mae", data_dir=data_dir)
    with pytest.raises(ValueError, match="has no classifier: fine-tune it first"):
        tinymim_jax.load(tmp_path / "mae").classify(files[0])


def test_odd_images_are_errors_that_say_what_to_do(run, files, tmp_path):
    model = tinymim_jax.load(run)
    (tmp_path / "empty.png").write_bytes(b"")
    whole = files[0].read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    for image, message in [
        (tmp_path / "gone.png", "gone.png does not exist"),
        (tmp_path, "is a folder: name image files, such as"),
        (tmp_path / "empty.png", "empty.png cannot be decoded"),
        (tmp_path / "cut.png", "cut.png cannot be decoded"),
        (np.zeros((0, 8, 3), np.uint8), "has no pixels"),
        (np.zeros((8, 8), np.uint8), r"got uint8 \[8, 8\].*for grey np.repeat"),
        (np.zeros((8, 8, 4), np.uint8), r"got uint8 \[8, 8, 4\]"),
        (Image.fromarray(np.full((8, 8), 900, np.uint16)), "mode 'I;16' has more than 8 bits"),
        (Image.fromarray(np.full((8, 8), 0.5, np.float32)), "mode 'F' has more than 8 bits"),
    ]:
        with pytest.raises((ValueError, OSError), match=message):
            model.classify(image)
        with pytest.raises((ValueError, OSError), match=message):
            model.embed([files[0], image])
    with pytest.raises(ValueError, match="top=0: ask for at least one"):
        model.classify(files[0], top=0)


def test_orientation_of_a_pillow_image_is_that_of_its_file(run, tmp_path):
    record, params = load_params(run)
    picture = np.random.default_rng(0).integers(0, 256, (24, 40, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture).save(tmp_path / "turned.png", exif=exif)
    for upright in (False, True):
        seen = record | {"preprocessing": record["preprocessing"] | {"upright": upright}}
        model = Model("x", seen, params)
        want = np.rot90(picture, -1) if upright else picture
        for image in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
            np.testing.assert_allclose(model.logits(image), model.logits(np.ascontiguousarray(want)), atol=1e-6)


def test_predict_goes_on_after_a_broken_file_and_names_classes(run, files, tmp_path, capsys):
    record, params = load_params(run)
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    named = record | {"preprocessing": record["preprocessing"] | {"class_names": words}}
    save_params(tmp_path / "named", params, named)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    given = [str(files[0]), str(broken), str(files[1])]
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", str(tmp_path / "named"), *given, "--json", "--top", "3", "--compile_cache", ""])
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert "tinymim predict: " in printed.err
    assert "broken.png cannot be decoded" in printed.err
    rows = [json.loads(line) for line in printed.out.splitlines() if line.startswith("{")]
    assert [row["image"] for row in rows] == [given[0], given[2]]
    want = np.asarray(tinymim_jax.load(run).logits(files[:2])).argmax(axis=1)
    for row, index in zip(rows, want):
        assert row["predictions"][0]["index"] == index
        assert all(each["name"] == words[each["index"]] for each in row["predictions"])


def test_predict(run, files, capsys):
    words = ["predict", str(run), str(files[0]), str(files[1]), "--top", "2", "--compile_cache", ""]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{files[0]}: ")
    assert lines[0].count("%") == 2
    with pytest.raises(SystemExit):
        cli.main([*words, "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in found] == [str(path) for path in files[:2]]
    assert all(len(row["predictions"]) == 2 for row in found)
    broken = io.BytesIO(b"no image").getvalue()
    files[0].with_name("broken.png").write_bytes(broken)
    with pytest.raises(SystemExit) as stop:
        cli.main(["predict", str(run), str(files[0].with_name("broken.png")), "--compile_cache", ""])
    assert stop.value.code == 1
    assert "broken.png" in capsys.readouterr().err
