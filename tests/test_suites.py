"""Suites on tiny sets with the same names and label spaces, against the network applied by hand."""

import importlib
import io
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from imagenet_sets import pictures, write_set
from PIL import Image
from processes import free_port, output_of, run_python

from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.cli import main as cli
from tinymim_jax.convert import convert_file
from tinymim_jax.data.sources.imagenet import imagenet_classes
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.evaluation.suites import run as suite_run
from tinymim_jax.evaluation.suites.classifier import SuiteClassifier
from tinymim_jax.evaluation.suites.registry import (
    ALEXNET_ERRORS,
    PAPER_MODELS,
    SUITES,
    Suite,
    corruption_errors,
    parse_suites,
)
from tinymim_jax.evaluation.suites.report import markdown
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.sharding import make_mesh

ENCODER = ViT(16, 1, 2, patch_size=16, image_size=(32, 32), final_norm=False)
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


def save_classifier(path, classes: int, **record) -> str:
    """A classifier with random weights whose predictions differ between images."""
    shapes = jax.eval_shape(Classifier(ENCODER, classes).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)
    save_params(
        path, params, {"encoder": ENCODER.record(), "classifier": {"classes": classes, "pool": "mean"}, **record}
    )
    return str(path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    """As converted from PyTorch: 1,000 classes, without preprocessing or class names."""
    return save_classifier(tmp_path_factory.mktemp("checkpoint") / "tiny", 1000)


def logits_by_hand(checkpoint: str, images: np.ndarray) -> np.ndarray:
    """Of pictures 40 x 48, resized to the short side of 37 (32 * 256 / 224) and cropped, or of 32 x 32, as they are."""
    views = images
    if images.shape[1:3] == (40, 48):
        resized = [Image.fromarray(each).resize((44, 37), Image.Resampling.BICUBIC) for each in images]
        views = np.stack([np.asarray(each)[2:34, 6:38] for each in resized])
    record, params = load_params(checkpoint)
    return apply(record, params, views)


def apply(record: dict, params: dict, views: np.ndarray) -> np.ndarray:
    network = Classifier(ViT.from_record(record["encoder"]), record["classifier"]["classes"])
    return np.asarray(jax.jit(network.apply)({"params": params}, jnp.asarray((views / 255 - MEAN) / STD, jnp.float32)))


def check_figures(found: dict, logits: np.ndarray, labels: np.ndarray) -> None:
    """The figures of a set whose `logits` are known."""
    order = np.argsort(-logits, axis=1)
    chances = np.exp(logits - logits.max(axis=1, keepdims=True))
    chances /= chances.sum(axis=1, keepdims=True)
    assert found["status"] == "evaluated"
    assert found["examples"] == len(labels) == sum(each["examples"] for each in found["calibration"])
    assert found["top1"] == pytest.approx((order[:, 0] == labels).mean())
    assert found["top5"] == pytest.approx((order[:, :5] == labels[:, None]).any(axis=1).mean())
    sure = sum(each["examples"] * (each["confidence"] or 0) for each in found["calibration"]) / len(labels)
    assert sure == pytest.approx(chances.max(axis=1).mean(), abs=1e-4)


def partly_right(logits: np.ndarray, seed: int) -> np.ndarray:
    """Labels of which about half are the first answer, a quarter the third."""
    order, dice = np.argsort(-logits, axis=1), np.random.default_rng(seed).random(len(logits))
    return np.where(dice < 0.5, order[:, 0], np.where(dice < 0.75, order[:, 2], order[:, 9]))


@pytest.fixture(scope="module")
def sets(tmp_path_factory, checkpoint):
    """(data_dir, what is in it): imagenet, real, v2, a, two corruptions and a part of another; r lacks classes."""
    folder, held = tmp_path_factory.mktemp("sets"), {}
    for seed, (suite, name, split) in enumerate(
        [("imagenet", "imagenet2012", "validation"), ("v2", "imagenet_v2/matched-frequency", "test")]
    ):
        images = pictures(seed, 13)
        logits = logits_by_hand(checkpoint, images)
        labels = partly_right(logits, seed)
        held[suite] = (images, logits, labels)
        write_set(folder, name, images, labels, split=split)
    images, logits, labels = held["imagenet"]
    several = [(), *[(int(label), int(second)) for label, second in zip(labels, np.argsort(-logits)[:, 1])][1:]]
    held["real"] = (images, logits, labels, several)
    write_set(folder, "imagenet2012_real", images, labels, split="validation", several=several)

    images = pictures(7, 207)
    classes = np.random.default_rng(7).permutation(1000)[:200]
    labels = np.concatenate([classes, classes[:7]])
    held["a"] = (images, logits_by_hand(checkpoint, images), labels, classes)
    write_set(folder, "imagenet_a", images, labels)
    write_set(folder, "imagenet_r", images[:5], labels[:5])

    images = pictures(9, 9, size=(32, 32))
    labels = partly_right(logits_by_hand(checkpoint, images), 9)
    held["c"] = (images, logits_by_hand(checkpoint, images), labels)
    write_set(folder, "imagenet2012_corrupted/fog_1", images, labels, split="validation")
    corrupted = folder / "imagenet2012_corrupted"
    for other in ("fog_2", "fog_3", "fog_4", "fog_5", "snow_1"):
        shutil.copytree(corrupted / "fog_1", corrupted / other)
    return str(folder), held


def run(capsys, *words) -> tuple[int, str]:
    """Exit status of one command, and all that it printed."""
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    return stop.value.code, "".join(capsys.readouterr())


def no_constant(name: str):
    raise AssertionError(f"{name} is not JSON")


@pytest.fixture(autouse=True)
def _stay_alone(monkeypatch):
    monkeypatch.setattr("tinymim_jax.runtime.distributed.initialize_distributed", lambda: None)
    monkeypatch.setattr("tinymim_jax.evaluation.suites.classifier._TIMED_SECONDS", 0.01)


@pytest.fixture(scope="module")
def evaluated(checkpoint, sets, tmp_path_factory):
    """(exit status, results, the table) of all suites on a converted checkpoint, as the command gives them."""
    output = tmp_path_factory.mktemp("results") / "results.json"
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinymim_jax.runtime.distributed.initialize_distributed", lambda: None)
        patch.setattr("tinymim_jax.evaluation.suites.classifier._TIMED_SECONDS", 0.01)
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        words = ["evaluate", checkpoint, "--suite", "all", "--data_dir", sets[0], "--output", str(output)]
        with pytest.raises(SystemExit) as stop:
            cli.main([*words, "--batch_size", "16", "--compile_cache", ""])
    return stop.value.code, json.loads(output.read_text(), parse_constant=no_constant), printed[-1]


def test_sets_without_a_restriction(evaluated, sets):
    _, results, _ = evaluated
    for suite in ("imagenet", "v2"):
        _, logits, labels = sets[1][suite]
        found = results["suites"][suite]
        check_figures(found, logits, labels)
        assert 0 < found["top1"] < found["top5"] < 1
        names = {each["name"]: each for each in found["per_class"]}
        assert set(names) == {imagenet_classes()[label] for label in labels}


def test_answers_are_restricted_to_the_classes_of_the_benchmark(evaluated, sets):
    _, results, _ = evaluated
    _, logits, labels, classes = sets[1]["a"]
    restricted = np.full_like(logits, -np.inf)
    restricted[:, classes] = logits[:, classes]
    found = results["suites"]["a"]
    check_figures(found, restricted, labels)
    assert found["classes"] == 200
    free = (np.argsort(-logits, axis=1)[:, :5] == labels[:, None]).any(axis=1).mean()
    assert found["top5"] > free  # there is less to choose among


def test_any_of_several_labels_is_right(evaluated, sets):
    _, results, _ = evaluated
    _, logits, _, several = sets[1]["real"]
    found, order = results["suites"]["real"], np.argsort(-logits, axis=1)
    hits = [order[i, 0] in answers for i, answers in enumerate(several) if answers]
    assert found["examples"] == 12
    assert found["top1"] == pytest.approx(np.mean(hits))
    assert 0 < found["top1"] < found["top5"]


def test_corrupted_pictures_are_not_resized(evaluated, sets):
    _, results, _ = evaluated
    _, logits, labels = sets[1]["c"]
    found = results["suites"]["c"]
    for part in ("fog/1", "fog/5", "snow/1"):
        check_figures(found["sets"][part], logits, labels)
    assert found["sets"]["snow/2"]["status"] == "missing"
    assert found["status"] == "incomplete"
    assert found["mce"] is None
    error = (np.argmax(logits, axis=1) != labels).mean()
    assert found["corruption_errors"] == {"fog": pytest.approx(error / ALEXNET_ERRORS["fog"])}


def test_what_is_missing_or_fails_stops_nothing_and_is_told(evaluated, sets):
    status, results, table = evaluated
    assert status == 1  # r failed
    assert list(results["suites"]) == list(SUITES)
    assert results["suites"]["sketch"]["status"] == "missing"
    assert results["suites"]["r"]["status"] == "failed"
    assert "| sketch | missing |" in table
    assert "| r | failed |" in table
    assert "images of 5 classes, but the benchmark has 200: is the set complete?" in table
    assert "tinymim prepare imagenet_sketch" in table
    assert "c, 69 sets missing (gaussian_noise/1, gaussian_noise/2, gaussian_noise/3, ...)" in table
    assert f"DATA_DIR: {sets[0]}" in table


def test_what_stands_beside_the_figures(evaluated, checkpoint, sets):
    _, results, table = evaluated
    _, params = load_params(checkpoint)
    assert results["model"]["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(params))
    assert results["model"]["forward_flops"] > 2 * 16 * 1000
    assert results["throughput"]["images_per_second"] > 0
    assert results["throughput"]["device"] == jax.devices()[0].device_kind
    found = results["suites"]["imagenet"]
    assert f"| imagenet | 13 | {found['classes']} | {100 * found['top1']:.1f} |" in table
    first, weakest = found["confusions"][0], min(found["per_class"], key=lambda each: each["top1"])
    assert f"- imagenet: {first['true']} taken for {first['predicted']} {first['count']} (" in table
    assert f"- imagenet: {weakest['name']} {weakest['top1']:.0%} ({weakest['examples']})" in table


def test_the_papers_figures_are_those_of_the_width():
    figures = {"examples": 50, "top1": 0.5, "top5": 0.75, "ece": 0.125, "classes": 9, "status": "evaluated"}
    suites = {
        "a": figures,
        "v2": figures | {"substituted": 3},
        "c": figures | {"mce": 0.25, "sets": {}},
        "r": {"status": "missing"},
    }
    speed = {"images_per_second": 12345.6, "dtype": "float32", "batch_size": 8, "devices": 2, "device": "H100"}
    sizes = {"depth": 12, "classes": 1000, "parameters": 86_567_656, "forward_flops": 35_127_656_448}
    tables = {
        width: markdown(
            {"checkpoint": "x", "model": sizes | {"embed_dim": width}, "throughput": speed, "suites": suites}
        )
        for width in (192, 384, 768, 1024)
    }
    assert "| suite | images | classes | top-1 | top-5 | ECE | mCE | TinyMIM-B, paper |" in tables[768]
    assert "| a | 50 | 9 | 50.0 | 75.0 | 12.5 | - | 43.0 |" in tables[768]
    assert "| v2 | 50 | 9 | 50.0 | 75.0 | 12.5 | - | - |" in tables[768]
    assert "| c | 50 | 9 | 50.0 | 75.0 | 12.5 | 25.0 | 32.7 |" in tables[768]
    assert "| r | missing | - | - | - | - | - | 54.6 |" in tables[768]
    assert "86.57 M parameters, 17.56 G multiply-adds an image" in tables[768]
    assert "12,345.6 images/s, forward alone, float32, batches of 8 on 2 x H100" in tables[768]
    assert "| a | 50 | 9 | 50.0 | 75.0 | 12.5 | - | 11.0 |" in tables[192]
    assert "| c | 50 | 9 | 50.0 | 75.0 | 12.5 | 25.0 | 35.8 |" in tables[384]
    assert "paper |" not in tables[1024]
    assert "Of v2: 3 images could not be decoded, and others were counted in their place." in tables[192]
    assert "Of a: " not in tables[192]


@pytest.mark.parametrize("batch_size", [8, 16])
@pytest.mark.parametrize("devices", [1, 8])
def test_every_image_counts_once(checkpoint, sets, devices, batch_size):
    mesh = make_mesh(1, jax.devices()[:devices])
    model = SuiteClassifier(checkpoint, batch_size=batch_size, mesh=mesh)
    source = open_source("imagenet2012", split="validation", data_dir=sets[0])
    answers, _ = model.answers(source)  # 13: one ragged batch, or the second of two
    _, logits, _ = sets[1]["imagenet"]
    labels = [source[i]["label"] for i in range(13)]
    assert answers.label.tolist() == labels
    assert answers.best.shape == (13, 5)
    # TFDS has an order of its own: pictures are told by their first answers.
    want = np.argsort(-logits, axis=1)[:, :5].tolist()
    assert sorted(answers.best.tolist()) == sorted(want)


def test_a_set_written_from_the_unpacked_archive(checkpoint, tmp_path):
    """As `tinymim prepare folder:/data/imagenet-r --name imagenet_r` writes it: one split, and 200 classes alone."""
    images, classes = pictures(5, 202), np.sort(np.random.default_rng(5).permutation(1000)[:200])
    labels = np.concatenate([np.arange(200), [3, 150]])
    names = [imagenet_classes()[c] for c in classes]
    write_set(tmp_path, "imagenet_r", images, labels, split="train", classes=names)
    found = suite_run._part(SuiteClassifier(checkpoint, batch_size=16), SUITES["r"], "", str(tmp_path))
    logits = logits_by_hand(checkpoint, images)
    restricted = np.full_like(logits, -np.inf)
    restricted[:, classes] = logits[:, classes]
    check_figures(found, restricted, classes[labels])
    assert found["split"] == "train"
    assert [each["name"] for each in found["per_class"]] == names


def test_classes_with_names_of_their_own_are_in_imagenets_order(sets, checkpoint, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("tinymim_jax.evaluation.collect._REPORT_SECONDS", 0.0)
    record, params = load_params(checkpoint)
    names = [f"thing {index}" for index in range(1000)]
    save_params(tmp_path / "named", params, record | {"preprocessing": {"class_names": names}})
    with caplog.at_level("INFO"):
        model = SuiteClassifier(str(tmp_path / "named"), batch_size=8)
        results = suite_run.evaluate_suites(model, parse_suites(["imagenet"]), data_dir=sets[0])
    check_figures(results["suites"]["imagenet"], *sets[1]["imagenet"][1:])
    assert "calls its classes thing 0, thing 1, ...: they are assumed to be in ImageNet's order" in caplog.text
    assert "8/13 images | " in caplog.text


def test_weights_that_are_not_finite_answer_nothing(sets, checkpoint, tmp_path):
    record, params = load_params(checkpoint)
    params["head"]["bias"] = np.full(1000, np.nan, np.float32)
    save_params(tmp_path / "broken", params, record)
    model = SuiteClassifier(str(tmp_path / "broken"), batch_size=8)
    answers, _ = model.answers(open_source("imagenet2012", split="validation", data_dir=sets[0]))
    assert (answers.best == -1).all()
    assert (answers.confidence == 0).all()


# ------------------------------------------------------------------------------------------- sets of the user


def test_a_converted_file_on_a_set_by_name(golden, tmp_path, data_dir, capsys):
    model, params = convert_file("vit", golden.path("vit_gap.pth"), heads=str(golden.meta["vit"]["heads"]))
    save_params(tmp_path / "converted", params, model)
    words = ["evaluate", tmp_path / "converted", "--suite", "digits@test[:13]", "--data_dir", data_dir]
    words += ["--output", tmp_path / "results.json", "--batch_size", "8", "--compile_cache", ""]
    status, printed = run(capsys, *words)
    assert status == 0, printed
    found = json.loads((tmp_path / "results.json").read_text())["suites"]["digits@test[:13]"]
    source = open_source("digits", split="test[:13]", data_dir=data_dir)
    record, params = load_params(tmp_path / "converted")
    side, size = record["encoder"]["image_size"][0], round(record["encoder"]["image_size"][0] * 256 / 224)
    files = [Image.open(io.BytesIO(source[i]["image"])).convert("RGB") for i in range(13)]
    first = round((size - side) / 2)
    box = slice(first, first + side)
    views = [np.asarray(file.resize((size, size), Image.Resampling.BICUBIC))[box, box] for file in files]
    network = Classifier(ViT.from_record(record["encoder"]), 10)
    logits = np.asarray(
        network.apply({"params": params}, jnp.asarray((np.stack(views) / 255 - MEAN) / STD, jnp.float32))
    )
    check_figures(found, logits, np.array([source[i]["label"] for i in range(13)]))
    assert [each["name"] for each in found["per_class"]] == sorted({str(source[i]["label"]) for i in range(13)})


def test_classes_of_a_folder_are_found_by_name(tmp_path, capsys):
    names = ["dog", "cat", "cow"]
    checkpoint = save_classifier(tmp_path / "tiny", 3, preprocessing={"class_names": names})
    images = pictures(3, 6)
    answers = logits_by_hand(checkpoint, images).argmax(axis=1)
    for i, (image, answer) in enumerate(zip(images, answers)):
        given = "cat" if i == 0 else names[answer]  # all but the first are right, unless that is a cat
        (tmp_path / "pets" / "test" / given).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "pets" / "test" / given / f"{i}.png")
    pets = f"folder:{tmp_path}/pets"
    status, printed = run(
        capsys, "evaluate", checkpoint, "--suite", pets, "--compile_cache", "", "--output", tmp_path / "o.json"
    )
    assert status == 0, printed
    found = json.loads((tmp_path / "o.json").read_text())["suites"][pets]
    assert found["split"] == "test"
    assert found["examples"] == 6
    assert found["top1"] == pytest.approx(1 if answers[0] == 1 else 5 / 6)
    assert {each["name"] for each in found["per_class"]} <= set(names)
    (tmp_path / "pets" / "test" / "emu").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "pets" / "test" / "emu" / "x.png")
    status, printed = run(capsys, "evaluate", checkpoint, "--suite", pets, "--compile_cache", "")
    assert status == 1
    assert "does not know 1 of the" in printed
    assert "'emu'" in printed


def test_a_suite_is_one_row(checkpoint, sets, monkeypatch):
    """Two sets whose figures are averaged, and a figure of the paper for this width."""
    row = Suite(
        "twins", {"first": ("imagenet2012",), "second": ("imagenet_v2/matched-frequency",)}, None, "", paper={16: 12.5}
    )
    monkeypatch.setitem(SUITES, "twins", row)
    monkeypatch.setitem(PAPER_MODELS, 16, "Tiny")
    model = SuiteClassifier(checkpoint, batch_size=16)
    results = suite_run.evaluate_suites(model, parse_suites(["twins"]), data_dir=sets[0])
    found = results["suites"]["twins"]
    tops = [(logits.argmax(1) == labels).mean() for _, logits, labels in (sets[1]["imagenet"], sets[1]["v2"])]
    assert found["top1"] == pytest.approx(np.mean(tops))
    assert (found["status"], found["examples"], found["substituted"]) == ("evaluated", 26, 0)
    assert "mce" not in found
    table = markdown(results, sets[0])
    assert f"| twins | 26 | {found['classes']} | {100 * found['top1']:.1f} |" in table
    assert "| - | 12.5 |" in table
    assert "Of twins: top-1, top-5 and ECE are means over its sets." in table


def test_class_names_that_are_numbers_are_imagenets(checkpoint, sets, tmp_path):
    """Of a model that was trained on folders 0 to 999, which sort as words."""
    names = sorted(map(str, range(1000)))
    order = [int(name) for name in names]
    record, params = load_params(checkpoint)
    params["head"] = {name: leaf[..., order] for name, leaf in params["head"].items()}
    save_params(tmp_path / "numbers", params, record | {"preprocessing": {"class_names": names}})
    model = SuiteClassifier(str(tmp_path / "numbers"), batch_size=16)
    found = suite_run.evaluate_suites(model, parse_suites(["imagenet"]), data_dir=sets[0])["suites"]["imagenet"]
    _, logits, labels = sets[1]["imagenet"]
    check_figures(found, logits, labels)
    assert {each["name"] for each in found["per_class"]} == {imagenet_classes()[label] for label in labels}


def test_how_suites_are_written():
    assert list(parse_suites(["a", "all"])) == ["a", "imagenet", "real", "v2", "r", "sketch", "c"]
    own = parse_suites(["cifar10@test[:5]", "folder:/data/x@y/pets", "folder:/data/pets@val", "digits@"])
    assert [(suite.sets[""], suite.split) for suite in own.values()] == [
        (("cifar10",), "test[:5]"),
        (("folder:/data/x@y/pets",), None),
        (("folder:/data/pets",), "val"),
        (("digits@",), None),
    ]
    with pytest.raises(ValueError, match=r"--suite 'cifar10' is unknown\. Choices: imagenet, .*NAME@SPLIT"):
        parse_suites(["cifar10"])


# ----------------------------------------------------------------------------------------------- ImageNet-C


def test_corruption_errors_are_relative_to_alexnets():
    itself = {name: [error] * 5 for name, error in ALEXNET_ERRORS.items()}
    assert all(value == pytest.approx(1) for value in corruption_errors(itself).values())
    uneven = {"fog": [0.1, 0.2, 0.3, 0.4, 0.5]}
    assert corruption_errors(uneven) == {"fog": pytest.approx(1.5 / (5 * 0.819324))}
    with pytest.raises(ValueError, match="fog has errors of 4 severities"):
        corruption_errors({"fog": [0.1] * 4})


def test_mce_is_the_mean_over_the_corruptions():
    def figures(part: str) -> dict:
        name, severity = part.split("/")
        # Errors spread around AlexNet's half, by severity: their sum is half of AlexNet's.
        error = ALEXNET_ERRORS[name] * (0.5 + 0.1 * (int(severity) - 3))
        return {"status": "evaluated", "examples": 2, "classes": 2, "top1": 1 - error, "top5": 1.0, "ece": 0.1} | {
            "substituted": 0,
            "per_class": [],
            "confusions": [],
        }

    suite = SUITES["c"]
    parts = {part: figures(part) for part in suite.sets}
    whole = suite_run._combined(suite, parts)
    assert whole["status"] == "evaluated"
    assert whole["mce"] == pytest.approx(0.5)
    assert whole["top1"] == pytest.approx(1 - 0.5 * np.mean(list(ALEXNET_ERRORS.values())))
    assert whole["examples"] == 150
    assert len(whole["corruption_errors"]) == 15


def test_names_are_those_of_tfds():
    def builder(name: str):
        return importlib.import_module(f"tensorflow_datasets.datasets.{name}.{name}_dataset_builder")

    corrupted = builder("imagenet2012_corrupted")
    assert list(ALEXNET_ERRORS) == corrupted.BENCHMARK_CORRUPTIONS
    theirs = {f"imagenet2012_corrupted/{config.name}" for config in corrupted.Builder.BUILDER_CONFIGS}
    assert {name for names in SUITES["c"].sets.values() for name in names} < theirs
    assert len(SUITES["c"].sets) == 75
    assert SUITES["v2"].sets[""][0] in {f"imagenet_v2/{c.name}" for c in builder("imagenet_v2").Builder.BUILDER_CONFIGS}
    for suite in ("imagenet", "real", "a", "r", "sketch"):
        assert builder(SUITES[suite].sets[""][0]).Builder.VERSION
    assert len(imagenet_classes()) == 1000
    assert list(imagenet_classes()) == sorted(imagenet_classes())


# ------------------------------------------------------------------------------------- mistakes, interruptions


def test_mistakes_are_told_before_anything_is_computed(checkpoint, tmp_path, capsys):
    ten = save_classifier(tmp_path / "ten", 10)
    record, params = load_params(ten)
    encoder = save_params(tmp_path / "encoder", {"encoder": params["encoder"]}, {"encoder": record["encoder"]})
    assert encoder is None
    cases = [
        ((ten, "--suite", "imagenet", "a"), "has 10 classes, but --suite imagenet a has ImageNet's 1,000"),
        ((checkpoint, "--output", "x.json"), "--output needs --suite"),
        ((checkpoint, "--suite", "a", "--config", "configs/digits.py"), "--config: a --suite is evaluated without"),
        ((checkpoint, "--suite", "a", "seed=1"), "seed=1: a --suite is evaluated without a config"),
        ((checkpoint, "--suite", "imagenet_a"), "--suite 'imagenet_a' is unknown"),
        (
            (checkpoint, "--suite", "a", "--output", tmp_path / "no" / "x.json"),
            "is not a folder that can be written to",
        ),
        ((checkpoint, "--suite", "a", "--output", tmp_path), "is a folder: name a file in it"),
        ((checkpoint, "--suite", "a", "--batch_size", "12"), "batch_size=12: give a multiple of 8"),
        ((tmp_path / "encoder", "--suite", "a"), "has no classifier: fine-tune it first"),
    ]
    for words, message in cases:
        status, printed = run(capsys, "evaluate", *words, "--data_dir", tmp_path, "--compile_cache", "")
        assert (status, message in printed) == (1, True), (words, printed)


def test_nothing_there_is_an_error(checkpoint, tmp_path, capsys):
    words = ["evaluate", checkpoint, "--suite", "a", "imagenet", "--data_dir", tmp_path, "--batch_size", "8"]
    status, printed = run(capsys, *words, "--compile_cache", "")
    assert status == 1
    assert "tinymim prepare imagenet_a" in printed
    assert "| imagenet | missing |" in printed


def test_ctrl_c_keeps_what_is_done(checkpoint, sets, tmp_path, capsys, monkeypatch):
    part = suite_run._part

    def interrupted(model, suite, name, data_dir):
        if suite is SUITES["v2"]:
            raise KeyboardInterrupt
        return part(model, suite, name, data_dir)

    monkeypatch.setattr(suite_run, "_part", interrupted)
    words = ["evaluate", checkpoint, "--suite", "imagenet", "v2", "--data_dir", sets[0], "--batch_size", "16"]
    status, printed = run(capsys, *words, "--output", tmp_path / "o.json", "--compile_cache", "")
    assert status == 130
    assert "| imagenet | 13 |" in printed
    assert list(json.loads((tmp_path / "o.json").read_text())["suites"]) == ["imagenet"]
    assert [path.name for path in tmp_path.iterdir()] == ["o.json"]


def test_two_processes_give_the_figures_of_one(checkpoint, sets, evaluated, tmp_path):
    words = ["evaluate", checkpoint, "--suite", "imagenet", "a", "--data_dir", sets[0], "--batch_size", "16"]
    words += ["--output", str(tmp_path / "two.json"), "--compile_cache", ""]
    code = f"from tinymim_jax.cli.main import main; main({words!r})"
    job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    processes = [run_python(code, devices=4, JAX_PROCESS_ID=str(p), **job) for p in range(2)]
    ended = [output_of(process) for process in processes]
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert ["| imagenet |" in out for _, out, _ in ended] == [True, False]  # one of them prints
    two = json.loads((tmp_path / "two.json").read_text())
    assert two["throughput"]["devices"] == 8
    for suite in ("imagenet", "a"):
        one = {
            key: v for key, v in evaluated[1]["suites"][suite].items() if key not in ("seconds", "calibration", "ece")
        }
        assert {key: two["suites"][suite][key] for key in one} == one
        assert two["suites"][suite]["ece"] == pytest.approx(evaluated[1]["suites"][suite]["ece"], abs=1e-4)
