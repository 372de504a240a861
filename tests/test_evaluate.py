"""Evaluation of a classifier on a folder of images, against the network applied by hand."""

import functools
import logging
import shutil
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from labelled_files import write_array_records, write_parquet
from pictures import encoded
from PIL import Image
from runs import small_config

from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.cli import main as cli
from tinymim_jax.evaluation.collect import count_substituted
from tinymim_jax.evaluation.evaluate import evaluate_checkpoint
from tinymim_jax.evaluation.knn import evaluate_knn
from tinymim_jax.evaluation.linear_probe import evaluate_probe
from tinymim_jax.evaluation.suites.classifier import SuiteClassifier
from tinymim_jax.evaluation.suites.registry import parse_suites
from tinymim_jax.evaluation.suites.run import evaluate_suites
from tinymim_jax.experiment import build_experiment, evaluation_batch_size, evaluation_batches
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks import TASKS
from tinymim_jax.train import train

PETS = ("cat", "dog", "emu")
# Each image has a color of its own, so that answers differ.
IMAGES = np.kron(np.random.default_rng(0).integers(0, 256, (9, 2, 2, 3)), np.ones((1, 8, 8, 1))).astype(np.uint8)
LABELS = np.arange(9) // 3  # three of each class, in the order of the folders


def write_folders(root, names=PETS):
    """IMAGES as a training and a test split, three in the folder of each name."""
    for split in ("train", "test"):
        for image, label, i in zip(IMAGES, LABELS, range(9)):
            (root / split / names[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(root / split / names[label] / f"{i}.png")
    return f"folder:{root}"


def config_of(source, *overrides, experiment="finetune"):
    words = (f"data.source={source}", "data.train_split=train", "data.eval_split=test", "data.examples=0")
    return small_config(experiment, *words, "model.dtype=float32", *overrides)


@pytest.fixture(scope="module")
def pets(tmp_path_factory):
    return write_folders(tmp_path_factory.mktemp("pets"))


@pytest.fixture(scope="module")
def classifier(pets):
    """(record, parameters): random weights whose predictions differ between images."""
    task = TASKS["classify"].build(config_of(pets), PETS)
    rng = np.random.default_rng(3)
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), jax.eval_shape(task.init, jax.random.key(0))
    )
    params["head"]["bias"] -= logits_of(task.model, params).mean(axis=0)
    return task.model, params


@pytest.fixture(scope="module")
def logits(classifier):
    """float32 [9, 3], of PETS in this order."""
    logits = logits_of(*classifier)
    assert len({*logits.argmax(axis=1)}) > 1
    return logits


def logits_of(record, params):
    network = Classifier(ViT.from_record(record["encoder"]), **record["classifier"])
    pixels = jnp.asarray(IMAGES / 127.5 - 1, jnp.float32)
    return np.asarray(network.apply({"params": params}, pixels))


def figures_by_hand(logits):
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    loss = -np.log(chances[np.arange(9), LABELS]).mean()
    return {"top1": (logits.argmax(1) == LABELS).mean(), "loss": pytest.approx(loss, rel=1e-4)}


def save(path, classifier, order, names):
    """The classifier with its outputs in another order and these names for them."""
    record, params = classifier
    head = jax.tree.map(lambda leaf: leaf[..., list(order)], params["head"])
    preprocessing = {"preprocessing": {"class_names": list(names)}} if names else {}
    save_params(path, params | {"head": head}, record | preprocessing)
    return str(path)


@pytest.mark.parametrize(
    ("order", "names", "folders"),
    [
        ((0, 1, 2), PETS, PETS),
        ((2, 0, 1), ("emu", "cat", "dog"), PETS),
        ((0, 1, 2), ("0", "1", "2"), ("00", "01", "02")),
        ((2, 0, 1), ("10", "2", "9"), ("02", "09", "10")),  # trained on folders without leading zeros
        ((0, 1, 2), (), PETS),
    ],
)
def test_classes_are_matched_by_name(tmp_path, classifier, logits, order, names, folders):
    checkpoint = save(tmp_path / "classifier", classifier, order, names)
    source = write_folders(tmp_path / "images", folders)
    found = evaluate_checkpoint(config_of(source), checkpoint)
    want = figures_by_hand(logits)
    assert {name: found[name] for name in want} == want
    assert found["examples"] == 9


def test_classes_without_names_are_matched_by_position_in_one_logged_line(tmp_path, classifier, pets, caplog):
    checkpoint = save(tmp_path / "classifier", classifier, range(3), ())
    with caplog.at_level(logging.INFO):
        evaluate_checkpoint(config_of(pets), checkpoint)
    assert caplog.text.count("does not name its classes: they are matched") == 1


def test_only_the_evaluation_split_is_needed(tmp_path, classifier, logits, caplog):
    """The config of a training on a subset, with another data set that has no such split."""
    checkpoint = save(tmp_path / "classifier", classifier, range(3), PETS)
    source = write_folders(tmp_path / "images")
    shutil.rmtree(tmp_path / "images" / "train")
    with caplog.at_level(logging.INFO):
        found = evaluate_checkpoint(config_of(source, "data.examples=100"), checkpoint)
    assert found["top1"] == figures_by_hand(logits)["top1"]
    assert found["examples"] == 9
    assert "evaluating without data.train_split='train': split='train' of" in caplog.text
    with pytest.raises(ValueError, match=r"split='val' of 'folder:.*' is unknown"):
        evaluate_checkpoint(config_of(source, "data.eval_split=val"), checkpoint)


def test_other_classes_are_refused(tmp_path, classifier, pets):
    checkpoint = save(tmp_path / "classifier", classifier, range(3), ("cat", "dog", "gnu"))
    with pytest.raises(ValueError, match=r"does not know 1 of the 3 classes of 'folder:.*': 'emu'\..*lacks.*'gnu'"):
        evaluate_checkpoint(config_of(pets), checkpoint)


def started_head(task):
    return task.start(quarters(task))["head"]


def quarters(task):
    return jax.tree.map(
        lambda leaf: np.full(leaf.shape, 0.25, np.float32), jax.eval_shape(task.init, jax.random.key(0))
    )


def test_fine_tuning_keeps_a_head_in_the_order_of_its_own_classes(tmp_path, classifier, pets, caplog):
    checkpoint = save(tmp_path / "classifier", classifier, (2, 0, 1), ("emu", "cat", "dog"))
    task = TASKS["classify"].build(config_of(pets, f"init={checkpoint}"), PETS)
    np.testing.assert_array_equal(started_head(task)["kernel"], classifier[1]["head"]["kernel"])
    np.testing.assert_array_equal(started_head(task)["bias"], classifier[1]["head"]["bias"])
    other = TASKS["classify"].build(config_of(pets, f"init={checkpoint}"), ("cat", "dog", "gnu"))
    with caplog.at_level(logging.WARNING):
        head = started_head(other)
    assert (head["kernel"] == 0.25).all()
    assert (head["bias"] == 0.25).all()
    assert "is initialized anew" in caplog.text
    assert "'gnu'" in caplog.text


def test_pixels_normalized_otherwise_are_refused(tmp_path, classifier, pets, caplog):
    record, params = classifier
    half = [0.5, 0.5, 0.5]
    recorded = {"mean": [0.485, 0.456, 0.406], "std": half, "interpolation": "bilinear", "class_names": PETS}
    save_params(tmp_path / "other", params, record | {"preprocessing": recorded})
    message = r"normalized by mean \(0\.485, 0\.456, 0\.406\), but the config has mean \(0\.5, .*: add 'data\.mean="
    for function in (evaluate_checkpoint, functools.partial(evaluate_knn, neighbors=(1,)), evaluate_probe):
        with pytest.raises(ValueError, match=message):
            function(config_of(pets, "train.batch_size=8"), tmp_path / "other")
    assumed = recorded | {"origin": {"mean": "assumed", "interpolation": "given"}}
    save_params(tmp_path / "assumed", params, record | {"preprocessing": assumed})
    with caplog.at_level(logging.WARNING):
        evaluate_checkpoint(config_of(pets), tmp_path / "assumed")
    assert "expects interpolation='bilinear', and is evaluated with 'bicubic'" in caplog.text


def test_a_dist_token_that_is_not_there_is_no_random_head(tmp_path, classifier, pets):
    checkpoint = save(tmp_path / "classifier", classifier, range(3), PETS)
    with pytest.raises(ValueError, match=r"has no DIST token, but the config has model\.dist_token=True"):
        evaluate_checkpoint(config_of(pets, "model.dist_token=True"), checkpoint)


# ------------------------------------------------------------------------------------------------ damaged images


def large_set(root, count, damaged):
    """`count` test images of three classes, the first ones damaged; and nine training images."""
    source = write_folders(root)
    for i in range(9, count):
        Image.fromarray(IMAGES[i % 9]).save(root / "test" / PETS[i % 3] / f"{i}.png")
    files = sorted((root / "test").rglob("*.png"))
    assert len(files) == count
    for path in files[:damaged]:
        path.write_bytes(b"not an image")
    return source


def evaluation_of(command, config, checkpoint, source, monkeypatch):
    if command == "evaluate":
        return evaluate_checkpoint(config, checkpoint)
    if command == "knn":
        return evaluate_knn(config, checkpoint, neighbors=(1,))
    if command == "probe":
        return evaluate_probe(config, checkpoint, base_lrs=(0.1,), epochs=1)
    monkeypatch.setattr("tinymim_jax.evaluation.suites.classifier._TIMED_SECONDS", 0.001)
    suites = parse_suites([f"{source}@test"])
    found = evaluate_suites(SuiteClassifier(checkpoint), suites)["suites"][f"{source}@test"]
    if found["status"] == "failed":
        raise RuntimeError(found["reason"])
    return found


COMMANDS = ["evaluate", "knn", "probe", "suites"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_damaged_image_in_a_small_split_is_an_error(tmp_path, classifier, monkeypatch, command):
    checkpoint = save(tmp_path / "classifier", classifier, range(3), PETS)
    source = write_folders(tmp_path / "images")
    config = config_of(source)
    assert evaluation_of(command, config, checkpoint, source, monkeypatch)["substituted"] == 0
    (tmp_path / "images" / "test" / "dog" / "4.png").write_bytes(b"not an image")
    with pytest.raises(RuntimeError, match=r"(?s)1 of 9 records cannot be decoded, more than the 0\.1 % .*dog/4\.png"):
        evaluation_of(command, config, checkpoint, source, monkeypatch)


@pytest.mark.parametrize("command", COMMANDS)
def test_up_to_a_thousandth_of_damaged_images_is_counted(tmp_path, classifier, monkeypatch, command):
    checkpoint = save(tmp_path / "classifier", classifier, range(3), PETS)
    source = large_set(tmp_path / "images", 1999, damaged=1)
    found = evaluation_of(command, config_of(source, "train.batch_size=512"), checkpoint, source, monkeypatch)
    assert found["examples"] == 1999
    assert found["substituted"] == 1


def test_damaged_images_of_an_evaluation_during_training(tmp_path):
    source = write_folders(tmp_path / "images")
    (tmp_path / "images" / "test" / "dog" / "4.png").write_bytes(b"not an image")
    with pytest.raises(RuntimeError, match="1 of 9 records cannot be decoded"):
        train(config_of(source, "train.duration=2 steps"), tmp_path / "run")


def test_substitutions_of_all_hosts_are_added(monkeypatch):
    batches: Any = types.SimpleNamespace(substitutions=2)
    assert count_substituted(batches, 2000) == 2
    with pytest.raises(RuntimeError, match="2 of 1999 images cannot be decoded"):
        count_substituted(batches, 1999)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        "tinymim_jax.evaluation.collect.multihost_utils.process_allgather", lambda count: np.array([count, 1])
    )
    assert count_substituted(batches, 3000) == 3
    with pytest.raises(RuntimeError, match="3 of 2000 images cannot be decoded"):
        count_substituted(batches, 2000)


# ------------------------------------------------------------------------------------------------ labels of -1


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("late", [False, True], ids=["known before", "found while reading"])
def test_labels_that_are_missing_are_refused(tmp_path, classifier, monkeypatch, command, late):
    """As in the test splits of Hugging Face's hub; the label of one image of many is found only when it is read."""
    checkpoint = save(tmp_path / "classifier", classifier, range(3), PETS)
    (tmp_path / "images").mkdir()
    files = [encoded(image, "PNG") for image in IMAGES]
    for split, labels in (("train", [0, 1, 2] * 15), ("test", [0, 1, -1] + [0, 1, 2] * 14)):
        rows = [files[i % 9] for i in range(len(labels))]
        if late:
            write_array_records(tmp_path / "images", split, labels, names=PETS, images=rows)
        else:
            write_parquet(tmp_path / "images", split, labels, names=PETS, images=rows)
    kind = "array_record" if late else "parquet"
    source = f"{kind}:{tmp_path}/images"
    message = r"label -1 \(no label\)" if late else r"1 of 45 examples of split 'test' of 'parquet:.* have label -1"
    with pytest.raises((ValueError, RuntimeError), match=message):
        evaluation_of(command, config_of(source), checkpoint, source, monkeypatch)


# ------------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "devices", "wanted"),
    [
        (4096, 1, 64, 4096),  # 64 for each device, as in training
        (4096, 1, 1, 256),
        (4096, 1, 8, 2048),
        (4096, 32, 1, 128),  # a micro-batch
        (8, 1, 3, 9),  # a multiple of the devices
        (8, 2, 8, 8),
    ],
)
def test_evaluation_batches_fit_the_devices(pets, batch_size, accumulate, devices, wanted):
    config = config_of(pets, f"train.batch_size={batch_size}", f"train.accumulate={accumulate}")
    assert evaluation_batch_size(config, devices) == wanted


def test_evaluation_takes_batches_of_that_size(pets):
    experiment = build_experiment(config_of(pets, "train.batch_size=65536"))
    with evaluation_batches(experiment, workers=0) as batches:
        assert next(batches)["image"].shape[0] == 256 * jax.device_count()


# ------------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize(
    "words",
    [["evaluate"], ["evaluate", "--suite", "a"], ["knn"], ["probe"]],
    ids=["evaluate", "suites", "knn", "probe"],
)
def test_commands_that_save_nothing_end_on_sigterm(tmp_path, classifier, monkeypatch, capsys, words):
    """JAX's service would catch the signal and the command would run on to its end."""

    class Prepared(Exception):
        pass

    def end_on_sigterm():
        raise Prepared

    monkeypatch.setattr("tinymim_jax.runtime.distributed.initialize_distributed", lambda: None)
    monkeypatch.setattr("tinymim_jax.runtime.exits.end_on_sigterm", end_on_sigterm)
    checkpoint = save(tmp_path / "classifier", classifier, range(3), PETS)
    command, *rest = words
    config = [] if rest else ["--config", "configs/digits.py:finetune"]
    with pytest.raises(Prepared):
        cli.main([command, checkpoint, *rest, *config])
