"""The convolutional stem: against numpy, in ONNX, and as a student of a distillation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import DIGITS, same_bits, small_config

from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.config import load_config
from tinymim_jax.convert import FORMATS, ConvertError
from tinymim_jax.convert.formats.onnx import read_file
from tinymim_jax.evaluation.evaluate import evaluate_checkpoint
from tinymim_jax.evaluation.exporting import export
from tinymim_jax.evaluation.predictor import load as load_model
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.stem import ConvStem
from tinymim_jax.models.switches import Switches
from tinymim_jax.models.vit import ViT
from tinymim_jax.optim import layer_scales
from tinymim_jax.tasks import TASKS
from tinymim_jax.tasks.segment.encoder import segmentation_encoder
from tinymim_jax.train import train


def encoder(**changes) -> ViT:
    fields = {"embed_dim": 16, "depth": 2, "heads": 2, "patch_size": 4, "image_size": (8, 12)} | changes
    return ViT(**fields, switches=Switches(stem="conv"))


def random_params(vit: ViT):
    """Parameters that are all different from their initial zeros and ones."""
    shapes = jax.eval_shape(vit.init, jax.random.key(0), np.zeros((1, *vit.image_size, 3), np.float32))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: (rng.normal(size=x.shape) * 0.3).astype(np.float32), shapes)


def by_numpy(params, images):
    """The stem in float64, one output pixel at a time."""
    x = images.astype(np.float64)
    for i in range(2):
        kernel, bias = (np.asarray(params[f"conv_{i}"][name], np.float64) for name in ("kernel", "bias"))
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        rows, columns = x.shape[1] // 2, x.shape[2] // 2
        y = np.zeros((len(x), rows, columns, kernel.shape[-1]))
        for r in range(rows):
            for c in range(columns):
                window = padded[:, 2 * r : 2 * r + 3, 2 * c : 2 * c + 3]
                y[:, r, c] = np.einsum("bijc,ijcd->bd", window, kernel) + bias
        mean, variance = y.mean(-1, keepdims=True), y.var(-1, keepdims=True)
        y = (y - mean) / np.sqrt(variance + 1e-6) * params[f"norm_{i}"]["scale"] + params[f"norm_{i}"]["bias"]
        x = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    return x.reshape(len(x), -1, x.shape[-1]) @ params["proj"]["kernel"] + params["proj"]["bias"]


def test_values(close):
    vit = encoder()
    params = random_params(vit)["stem"]
    images = np.random.default_rng(1).normal(size=(2, 8, 12, 3)).astype(np.float32)
    found = ConvStem(16, 4).apply({"params": params}, jnp.asarray(images))
    assert found.shape == (2, 2 * 3, 16)
    close(found, by_numpy(params, images), 1e-5)  # float32 against float64


def test_record_and_learning_rates():
    vit = encoder()
    assert ViT.from_record(vit.record()).switches.stem == "conv"
    scales = layer_scales({"encoder": random_params(vit)}, 0.5, 2)
    # As the patch embedding: below both blocks, which have 0.5^2 and 0.5^1.
    assert scales["encoder"]["stem"]["conv_0"]["kernel"] == 0.5**3


def test_onnx_and_back(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    vit = encoder(image_size=(16, 16))
    params = random_params(vit)
    save_params(tmp_path / "vit", {"encoder": params}, {"encoder": vit.record()})
    # Raises where onnxruntime and jax differ by more than 2e-6 of the largest output.
    said = "\n".join(export(str(tmp_path / "vit"), "onnx", tmp_path / "vit.onnx", features="mean"))
    assert "onnxruntime" in said
    record, back = read_file(tmp_path / "vit.onnx")
    assert record["encoder"] == vit.record()
    for (path, first), second in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(back["encoder"]), strict=True):
        assert np.array_equal(first, second), path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A classifier of 7 classes on a convolutional stem, as a checkpoint."""
    folder = tmp_path_factory.mktemp("hybrid") / "classifier"
    network = Classifier(encoder(image_size=(16, 16), final_norm=False), 7)
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.4, leaf.shape).astype(np.float32), shapes)
    pixels = {"mean": [0.5] * 3, "std": [0.25] * 3, "resize": 18, "interpolation": "bicubic", "upright": False}
    pixels |= {"image_size": [16, 16], "class_names": list("abcdefg")}
    record = {"encoder": network.encoder.record(), "classifier": network.record(), "preprocessing": pixels}
    save_params(folder, params, record)
    return folder


@pytest.mark.parametrize(
    ("to", "package"),
    [("onnx", "onnx"), ("stablehlo", "flatbuffers"), ("litert", "litert_converter")],
)
def test_formats_that_know_it(saved, to, package, tmp_path):
    """Each raises where its own runtime and jax differ by more than 2e-6 of the largest output."""
    pytest.importorskip(package)
    options = {"batch": 8} if to == "litert" else {}
    said = "\n".join(export(str(saved), to, tmp_path / "file", **options))
    assert "answers equal" in said
    assert (tmp_path / "file").stat().st_size > 4 * sum(x.size for x in jax.tree.leaves(load_params(saved)[1]))


def test_formats_that_do_not_know_it_say_which_do(saved, tmp_path):
    with pytest.raises(ConvertError, match=r"differs from it \(stem\): export it --to onnx, stablehlo or litert"):
        list(export(str(saved), "hub", tmp_path / "hub"))
    record, params = load_params(saved)
    for family, write in FORMATS.items():
        if family != "original":
            with pytest.raises(ConvertError, match=rf"no names in the family '{family}'.*--to onnx, stablehlo"):
                write(tmp_path / "file.safetensors", record, params)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", ["pico", "nano", "hybrid"])
def test_every_stage_of_a_small_student_is_the_same_network(size, tmp_path):
    """The configs of both trainings, and a fine-tuning by a config that does not name the stem."""
    teacher = ViT(embed_dim=32, depth=2, heads=4, patch_size=16, image_size=(32, 32))
    params = jax.jit(teacher.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    save_params(tmp_path / "teacher", {"encoder": params}, {"encoder": teacher.record()})
    words = ["model.image_size=(32,32)"]
    config = load_config(f"distill_images:{size},5k", [*words, f"distill.teacher.path={tmp_path / 'teacher'}"])
    student = TASKS["distill"].build(config, DIGITS)
    record = student.model["encoder"]
    width = {"pico": 96, "nano": 128, "hybrid": 128}[size]
    assert (record["embed_dim"], record["depth"]) == (width, 11 if size == "hybrid" else 12)
    assert record.get("switches", {}).get("stem", "linear") == ("conv" if size == "hybrid" else "linear")
    weights = jax.device_get(jax.jit(student.init)(jax.random.key(1)))
    save_params(tmp_path / "student", weights, student.model)
    plain = [f"model.embed_dim={width}", f"model.depth={record['depth']}", "model.variant=nano"]
    for spec, more in ((f"own_images:{size},1000", []), ("finetune_t", plain)):
        tuned = load_config(spec, [*words, f"init={tmp_path / 'student'}", "model.pos_embed=sincos", *more])
        task = TASKS["classify"].build(tuned, DIGITS)
        assert task.model["encoder"] == record | {"final_norm": False}
        started = task.start(jax.device_get(jax.jit(task.init)(jax.random.key(2))))
        assert started["encoder"].keys() == weights["encoder"].keys() - {"norm"}
        first = "stem" if size == "hybrid" else "patch_embed"
        assert same_bits(started["encoder"][first], weights["encoder"][first])


def test_a_segmentation_network_keeps_it():
    config = load_config("segment_linear", ["model.stem=conv", "model.image_size=(32,32)"])
    assert segmentation_encoder(config, None).switches.stem == "conv"


def test_mistakes():
    images = jnp.zeros((1, 8, 12, 3))
    with pytest.raises(ValueError, match=r"model.stem='linear', or distill.mask_ratio=0"):
        encoder().init(jax.random.key(0), images, keep=jnp.zeros((1, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"choose model.patch_size among 2, 4, 8, 16"):
        encoder(patch_size=6, image_size=(12, 12)).init(jax.random.key(0), jnp.zeros((1, 12, 12, 3)))


def test_from_the_student_to_its_use(data_dir, tmp_path):
    """Distilled, fine-tuned, evaluated, exported and used: each stage has the stem."""
    teacher = ViT(embed_dim=16, depth=2, heads=2, patch_size=8, image_size=(16, 16))
    params = jax.jit(teacher.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    save_params(tmp_path / "teacher", {"encoder": params}, {"encoder": teacher.record()})
    words = [f"distill.teacher.path={tmp_path / 'teacher'}", "model.stem=conv", "optim.base_lr=0.1"]
    train(small_config("distill", *words), tmp_path / "run", data_dir=data_dir)
    record, trained = load_params(tmp_path / "run")
    assert record["encoder"]["switches"] == {"stem": "conv"}
    assert np.abs(trained["encoder"]["stem"]["conv_0"]["bias"]).max() > 0  # zero before the first update
    config = small_config("finetune", f"init={tmp_path / 'run'}", "optim.base_lr=0.1")
    result = train(config, tmp_path / "classifier", data_dir=data_dir)
    record, tuned = load_params(tmp_path / "classifier")
    assert record["encoder"]["switches"] == {"stem": "conv"}
    assert not np.array_equal(tuned["encoder"]["stem"]["proj"]["kernel"], trained["encoder"]["stem"]["proj"]["kernel"])
    assert evaluate_checkpoint(config, tmp_path / "classifier", data_dir=data_dir)["top1"] == result["top1"]
    model = load_model(str(tmp_path / "classifier"))
    images = np.random.default_rng(0).integers(0, 256, (2, 20, 24, 3), np.uint8)
    assert model.embed(list(images)).shape == (2, 16)
    (first, *_) = model.classify(images[0])
    assert first.name in map(str, range(10))
