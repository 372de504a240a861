"""ConvNeXt and ResNet against timm: the maps of every stage, and their use as teachers."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import DIGITS, small_config

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.checkpoints.params import load_params
from tinymim_jax.cli.main import main
from tinymim_jax.convert import convert_file
from tinymim_jax.convert.cnn import from_cnn
from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.readers import read_contents
from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import IMAGENET_MEAN, IMAGENET_STD, normalize
from tinymim_jax.ops.losses import smooth_l1
from tinymim_jax.ops.token_grid import bilinear_matrix, resize_images
from tinymim_jax.tasks import TASKS

GOLDEN = pathlib.Path(__file__).parent / "golden" / "teachers"
KINDS = ("convnext", "resnet")


def state_of(kind: str) -> dict:
    return dict(read_contents(GOLDEN / f"timm_{kind}.safetensors").data)


@pytest.mark.parametrize("kind", KINDS)
def test_every_stage(kind):
    with np.load(GOLDEN / f"timm_{kind}.npz") as file:
        want = dict(file)
    model, params = from_cnn(state_of(kind), want["images"].shape[1:3])
    network = ConvNet.from_record(json.loads(json.dumps(model["backbone"])))
    assert network.record() == model["backbone"]
    images = jnp.asarray(want["images"])
    stages = jax.jit(network.stages)(params["backbone"], images)
    assert len(stages) == sum(name.startswith("stage_") for name in want)
    for i, maps in enumerate(stages):
        np.testing.assert_allclose(maps, want[f"stage_{i}"], atol=5e-5, rtol=0, err_msg=f"stage {i}")
    np.testing.assert_allclose(stages[-1], want["final"], atol=5e-5, rtol=0)
    (tap,) = network.apply({"params": params["backbone"]}, images, tap=(4,))
    np.testing.assert_allclose(tap.output, want["final"].reshape(1, -1, network.embed_dim), atol=5e-5)
    assert network.grid == want["final"].shape[1:3]
    assert network.embed_dim == want["final"].shape[3]


def test_two_convolutions_in_a_block():
    """ResNet-18's blocks against numpy: a stride of 1 and of 2."""
    rng = np.random.default_rng(0)
    state = state_of("resnet")
    widths = {1: (4, 64), 2: (6, 4)}
    small = {name: x for name, x in state.items() if not name.startswith(("layer", "fc"))}
    for i, (out, into) in widths.items():
        small |= {
            f"layer{i}.0.conv1.weight": rng.normal(0, 0.2, (out, into, 3, 3)),
            f"layer{i}.0.conv2.weight": rng.normal(0, 0.2, (out, out, 3, 3)),
            f"layer{i}.0.downsample.0.weight": rng.normal(0, 0.2, (out, into, 1, 1)),
        }
        for name in ("bn1", "bn2", "downsample.1"):
            for part in ("weight", "bias", "running_mean", "running_var"):
                small[f"layer{i}.0.{name}.{part}"] = rng.uniform(0.5, 1, out)
    small = {name: np.asarray(x, np.float32) for name, x in small.items()}
    model, params = from_cnn(small, (32, 32))
    network = ConvNet.from_record(model["backbone"])
    assert (network.widths, network.blocks, network.grid) == ((4, 6), (1, 1), (4, 4))
    _, first, second = network.stages(params["backbone"], jnp.asarray(rng.normal(size=(1, 32, 32, 3)), jnp.float32))

    def conv(x, kernel, stride):
        half = kernel.shape[2] // 2
        x = np.pad(x, ((half, half), (half, half), (0, 0)))
        rows = range(0, x.shape[0] - kernel.shape[2] + 1, stride)
        size = kernel.shape[2]
        return np.array([[np.einsum("rci,oirc->o", x[r : r + size, c : c + size], kernel) for c in rows] for r in rows])

    def norm(x, name):
        w, b, mean, var = (small[f"layer2.0.{name}.{p}"] for p in ("weight", "bias", "running_mean", "running_var"))
        return (x - mean) / np.sqrt(var + 1e-5) * w + b

    x = np.asarray(first, np.float64)[0]
    y = np.maximum(norm(conv(x, small["layer2.0.conv1.weight"], 2), "bn1"), 0)
    y = norm(conv(y, small["layer2.0.conv2.weight"], 1), "bn2")
    want = np.maximum(y + norm(conv(x, small["layer2.0.downsample.0.weight"], 2), "downsample.1"), 0)
    np.testing.assert_allclose(second[0], want, atol=1e-4)


def test_the_authors_names_of_convnext():
    theirs = {
        name.replace("stem.", "downsample_layers.0.")
        .replace(".blocks.", ".")
        .replace("conv_dw", "dwconv")
        .replace("mlp.fc", "pwconv"): x
        for name, x in state_of("convnext").items()
    }
    theirs = {
        f"downsample_layers.{name[7]}.{name.partition('downsample.')[2]}" if ".downsample." in name else name: x
        for name, x in theirs.items()
    }
    assert "stages.0.0.dwconv.weight" in theirs
    assert "downsample_layers.3.1.bias" in theirs
    assert from_cnn(theirs, None)[0] == from_cnn(state_of("convnext"), None)[0]
    jax.tree.map(np.testing.assert_array_equal, from_cnn(theirs, None)[1], from_cnn(state_of("convnext"), None)[1])


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("resnet", {"layer1.0.se.fc1.weight": np.ones(2)}, r"not known of a resnet: layer1\.0\.se\.fc1\.weight"),
        ("convnext", {"stages.0.blocks.0.mlp.grn.weight": np.ones(2)}, r"mlp\.grn\.weight.*not V2"),
        ("convnext", {"stages.1.blocks.0.norm.weight": None}, "not hold a whole convnext: 'weight' is missing"),
        ("resnet", {"bn1.running_var": None}, r"missing tensors.*KeyError: 'running_var'"),
        ("resnet", {"layer1.0.conv2.weight": np.ones((8, 2, 3, 3))}, "grouped convolutions as in ResNeXt"),
    ],
)
def test_other_networks(kind, change, message):
    state = state_of(kind) | change
    with pytest.raises(ConvertError, match=message):
        from_cnn({name: x for name, x in state.items() if x is not None}, None)
    with pytest.raises(ConvertError, match="neither a ConvNeXt nor a ResNet"):
        from_cnn({"a": np.ones(2)}, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("cnns")
    for kind in KINDS:
        words = ["convert", "--input", str(GOLDEN / f"timm_{kind}.safetensors"), "--output", str(path / kind)]
        with pytest.raises(SystemExit) as end:
            main([*words, "--image_size", "32", "32", "--licence", "mit"])
        assert not end.value.code
    return path


def distill(folder, kind: str, *words: str):
    size = ("model.image_size=(32,32)", "model.patch_size=8", "data.eval_resize=32", "distill.target=output")
    return small_config("distill", *size, f"distill.teacher.path={folder / kind}", *words)


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_of_another_kind(folder, kind):
    """Its last map, brought to the student's grid, is what the student's adapted patches are compared with."""
    words = [f"distill.jitter.{name}=0.0" for name in ("brightness", "contrast", "saturation")]
    config = distill(folder, kind, *words, "distill.teacher.image_size=(64,64)", "model.dtype=float32")
    task = TASKS["distill"].build(config, DIGITS)
    params, frozen = task.init(jax.random.key(2)), task.load_frozen()
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))
    batch = {"image": images, "label": jnp.zeros(2, jnp.int32)}
    got = jax.jit(task.losses, static_argnums=4)(params, frozen, batch, jax.random.key(0), False)
    model, weights = load_params(folder / kind, cnn=True)
    assert model["source"] | {"licence": "mit"} == model["source"]
    network = ConvNet.from_record(model["backbone"], image_size=(64, 64))
    pixels = normalize(resize_images(images.astype(jnp.float32), (64, 64)), IMAGENET_MEAN, IMAGENET_STD)
    maps = network.stages(weights["backbone"], pixels)[-1]
    assert maps.shape[1:3] == (2, 2)
    wide = jnp.einsum("rh,cw,bhwd->brcd", *[bilinear_matrix(2, 4)] * 2, maps).reshape(2, 16, -1)
    normed = (wide - wide.mean(-1, keepdims=True)) / jnp.sqrt(wide.var(-1, keepdims=True) + 1e-6)
    student = ViT.from_record(task.model["encoder"])
    assert student.block_heads == (2, 2)
    own = student.apply({"params": params["encoder"]}, normalize(images, *[(0.5,) * 3] * 2), tap=2, method="encode")
    adapter = params["adapter"]["taps_0"]["output"]
    features = own.output[:, 1:] @ adapter["kernel"] + adapter["bias"]
    np.testing.assert_allclose(got["output"], smooth_l1(features, normed, beta=2.0), rtol=1e-3)
    gradient = jax.grad(lambda p: task.losses(p, frozen, batch, jax.random.key(0), True)["loss"].mean())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert task.origin["teacher"]["image_size"] == [64, 64]


def test_relations_of_its_positions(folder):
    """'oo': KL of the softmaxes of products of the student's patches, and of the teacher's on the student's grid."""
    config = distill(folder, "resnet", "distill.target=oo", "model.dtype=float32")
    task = TASKS["distill"].build(config, DIGITS)
    params, frozen = task.init(jax.random.key(2)), task.load_frozen()
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8))
    batch = {"image": images, "label": jnp.zeros(2, jnp.int32)}
    got = jax.jit(task.losses, static_argnums=4)(params, frozen, batch, jax.random.key(0), False)
    network = ConvNet.from_record(load_params(folder / "resnet", cnn=True)[0]["backbone"])
    maps = np.asarray(network.stages(frozen, normalize(images, IMAGENET_MEAN, IMAGENET_STD))[-1], np.float64)
    student = ViT.from_record(task.model["encoder"])
    own = student.apply({"params": params["encoder"]}, normalize(images, *[(0.5,) * 3] * 2), tap=2, method="encode")
    logs = []
    for tokens in (np.asarray(own.output[:, 1:], np.float64), np.repeat(maps.reshape(2, 1, -1), 16, axis=1)):
        products = tokens @ tokens.swapaxes(1, 2) / tokens.shape[-1] ** 0.5
        logs.append(products - np.log(np.exp(products).sum(-1, keepdims=True)))
    want = (np.exp(logs[1]) * (logs[1] - logs[0])).sum(-1).mean(1)
    np.testing.assert_allclose(got["oo"], want, rtol=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill.target=qk_vv"], r"teacher is a resnet, which has no qk, vv.*Choose distill\.target=output"),
        (["distill.target=qkv"], "has no q, k, v"),
        (["distill.target=cls"], "has no cls"),
        (["distill.teacher.image_size=(48,48)"], r"one position for 32 pixels.*images of 48x48"),
        (["distill.teacher.tap=2"], "the last stage, 4, is compared"),
        (["distill.mask_ratio=0.5", "distill.teacher.masked=True"], "sees whole images as they are"),
        (["distill.teacher.name=mae_vit_base"], r"names a ViT: set it to ''"),
    ],
)
def test_what_such_a_teacher_cannot_do(folder, words, message):
    with pytest.raises(ValueError, match=message):
        TASKS["distill"].build(distill(folder, "resnet", *words), DIGITS)


def test_it_can_only_be_a_teacher(folder):
    with pytest.raises(CheckpointError, match=r"is a convnext, which can only be a teacher: distill\.teacher\.path"):
        load_params(folder / "convnext")
    config = small_config("finetune", f"init={folder / 'convnext'}")
    with pytest.raises(CheckpointError, match="can only be a teacher"):
        TASKS["classify"].build(config, DIGITS)
    for option in ({"heads": 4}, {"use": "ema"}, {"prefix": "module."}):
        with pytest.raises(ConvertError, match=rf"timm_resnet.*--{next(iter(option))} has no meaning"):
            convert_file("auto", GOLDEN / "timm_resnet.safetensors", **option)
