"""TinyMIM*-T: its network, round trips of its official files, and that all commands accept its checkpoints.

tests/data/tinymim_star.npz holds random weights and what the authors' own class (Segmentation/TinyMIMstar-T/backbone/
mae.py of their release, torch 2.13 on a CPU, float32) makes of two images: the tokens behind the last block and behind
conv1x1. Its two fixed widths were replaced, 192 by 24 and 1280 by 40, and block 12 by 2; 32 px, patches of 8, 12 heads.
fc_norm, head and head_dist, which that class lacks, are random arrays with the names that their log lists.
"""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import DIGITS, small_config
from torch_files import save_arrays

import tinymim_jax
from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.cli import main as cli
from tinymim_jax.convert import ConvertError, from_torch, read, to_torch
from tinymim_jax.evaluation.evaluate import evaluate_checkpoint
from tinymim_jax.evaluation.knn import evaluate_knn
from tinymim_jax.models.heads import Classifier, Widen
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks import TASKS

HEADS = 12
# The experiment of the network in the data file, on digits.
WORDS = (
    "model.embed_dim=24",
    "model.heads=12",
    "model.image_size=(32,32)",
    "data.eval_resize=32",
    "model.dist_token=True",
    "classify.hidden_dim=40",
)


@pytest.fixture(scope="module")
def data():
    with np.load(pathlib.Path(__file__).parent / "data" / "tinymim_star.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def state(data):
    """The state dict."""
    return {name.removeprefix("state/"): value for name, value in data.items() if name.startswith("state/")}


@pytest.fixture(scope="module")
def converted(state, tmp_path_factory):
    """The converted file."""
    folder = tmp_path_factory.mktemp("star")
    save_arrays(folder / "star.pth", state)
    words = ["--input", str(folder / "star.pth"), "--output", str(folder / "star"), "--heads", str(HEADS)]
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", "--from", "tinymim_star", *words])
    assert stop.value.code == 0
    return folder / "star"


def norm(x, scale, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def widened(state, x):
    """conv1x1 of the release; torch's LayerNorm has eps 1e-5 by default."""
    return gelu(linear(state, "conv1x1.1", norm(x, state["conv1x1.0.weight"], state["conv1x1.0.bias"], 1e-5)))


def by_hand(state, tokens, pool, *, norm_first=False):
    """Both heads' logits in float64, from the tokens after the last block; the second token is DIST."""
    state = {name: value.astype(np.float64) for name, value in state.items()}
    tokens = tokens.astype(np.float64) if norm_first else widened(state, tokens.astype(np.float64))
    read = tokens[:, :2]
    if pool == "mean":
        read = np.stack([tokens[:, 2:].mean(axis=1), tokens[:, 1]], axis=1)
        read = norm(read, state["fc_norm.weight"], state["fc_norm.bias"], 1e-6)
    read = widened(state, read) if norm_first else read
    return linear(state, "head", read[:, 0]), linear(state, "head_dist", read[:, 1])


def test_tokens_are_the_authors(data, state, converted, close):
    record, params = load_params(converted)
    encoder = ViT.from_record(record["encoder"])
    tokens = jax.jit(encoder.apply)({"params": params["encoder"]}, jnp.asarray(data["images"]))
    assert tokens.shape == (2, 2 + 16, 24)
    close(tokens, data["tokens"], 5e-6, "tokens")
    wide = jax.jit(Widen(40).apply)({"params": params["widen"]}, tokens)
    close(wide, data["wide"], 5e-6, "conv1x1")
    close(widened(state, data["tokens"]), data["wide"], 5e-6, "conv1x1 by hand")


@pytest.mark.parametrize(("pool", "norm_first"), [("mean", False), ("mean", True), ("cls", False)])
def test_logits_are_those_of_the_definition(data, state, close, pool, norm_first):
    changed = dict(state)
    if norm_first:  # a narrow fc_norm can only stand before conv1x1
        changed |= {"fc_norm.weight": state["fc_norm.weight"][:24], "fc_norm.bias": state["fc_norm.bias"][:24]}
    if pool == "cls":
        del changed["fc_norm.weight"], changed["fc_norm.bias"]
    record, params = from_torch("tinymim_star", changed, heads=HEADS)
    want = {"classes": 10, "pool": pool, "hidden_dim": 40} | ({"norm_first": True} if norm_first else {})
    assert record["classifier"] == want
    network = Classifier(ViT.from_record(record["encoder"]), **record["classifier"])
    assert network.record() == want
    images = jnp.asarray(data["images"])
    first, second = jax.jit(lambda p: network.apply({"params": p}, images, method="logits"))(params)
    hand = by_hand(changed, data["tokens"], pool, norm_first=norm_first)
    close(first, hand[0], 1e-5, "head")
    close(second, hand[1], 1e-5, "head_dist")
    close(jax.jit(network.apply)({"params": params}, images), (hand[0] + hand[1]) / 2, 1e-5, "mean of both")


@pytest.mark.parametrize("left_out", [(), ("fc_norm",), ("fc_norm", "head")])
def test_there_and_back_is_identical(state, left_out):
    some = {name: x for name, x in state.items() if not name.startswith(left_out)}
    record, params = from_torch("tinymim_star", {"model": some, "epoch": 999}, heads=HEADS)
    back = to_torch("tinymim_star", record, params)
    assert list(back) == list(some)
    assert all(back[name].tobytes() == x.tobytes() for name, x in some.items())
    network = Classifier(ViT.from_record(record["encoder"]), **(record["classifier"] | {"classes": 10}))
    want = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    shapes = jax.tree.map(np.shape, want)
    assert jax.tree.map(np.shape, params) == {name: x for name, x in shapes.items() if not name.startswith(left_out)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dist_token": None}, r"missing: dist_token \(1, 1, 24\)"),
        ({"conv1x1.1.bias": None}, r"missing: conv1x1\.1\.bias \(40,\)"),
        ({"head_dist.weight": None}, r"missing: head_dist\.weight \(10, 40\)"),
        ({"norm.weight": np.zeros(24, np.float32)}, r"unexpected: norm\.weight \(24,\)"),
        (
            {"conv1x1.1.weight": np.zeros((40, 23), np.float32)},
            r"conv1x1\.1\.weight is \(40, 23\), expected \(40, 24\)",
        ),
        ({"fc_norm.weight": np.zeros(7, np.float32), "fc_norm.bias": np.zeros(7, np.float32)}, r"fc_norm is 7 wide"),
    ],
)
def test_differences_are_named(state, changes, message):
    with pytest.raises(ConvertError, match=message):
        from_torch("tinymim_star", {n: x for n, x in (state | changes).items() if x is not None}, heads=HEADS)


def test_the_family_is_recognised(state):
    for family in ("tinymim", "vit", "mae"):
        with pytest.raises(ConvertError, match="looks like 'tinymim_star': use --from tinymim_star"):
            from_torch(family, state)


def test_the_published_width_has_twelve_heads_in_every_block():
    shapes = {"cls_token": (1, 1, 192), "dist_token": (1, 1, 192), "pos_embed": (1, 198, 192)}
    shapes |= {"patch_embed.proj.weight": (192, 3, 16, 16), "patch_embed.proj.bias": (192,)}
    linears = {"attn.qkv": (576, 192), "attn.proj": (192, 192), "mlp.fc1": (768, 192), "mlp.fc2": (192, 768)}
    for i in range(12):
        shapes |= {f"blocks.{i}.norm{n}.{kind}": (192,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"blocks.{i}.{name}.weight": shape for name, shape in linears.items()}
        shapes |= {f"blocks.{i}.{name}.bias": shape[:1] for name, shape in linears.items()}
    shapes |= {"conv1x1.0.weight": (192,), "conv1x1.0.bias": (192,), "conv1x1.1.weight": (1280, 192)}
    shapes |= {"conv1x1.1.bias": (1280,), "fc_norm.weight": (1280,), "fc_norm.bias": (1280,)}
    for head in ("head", "head_dist"):
        shapes |= {f"{head}.weight": (1000, 1280), f"{head}.bias": (1000,)}
    arrays = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
    record, params = from_torch("tinymim_star", arrays)
    assert record["encoder"]["heads"] == [12] * 12
    assert record["encoder"]["image_size"] == [224, 224]
    # The paper's table 1 counts 5.8 M parameters without the classification layers.
    counted = sum(x.size for part in ("encoder", "widen", "fc_norm") for x in jax.tree.leaves(params[part]))
    assert round(counted / 1e6, 1) == 5.8


def test_deits_distilled_models_are_read_as_well(state):
    """timm's names: two tokens, a final norm, two heads, no conv1x1."""
    some = {name: x for name, x in state.items() if not name.startswith(("conv1x1", "fc_norm", "head"))}
    rng = np.random.default_rng(0)
    some |= {name: rng.normal(size=24).astype(np.float32) for name in ("norm.weight", "norm.bias")}
    for head in ("head", "head_dist"):
        some |= {f"{head}.weight": rng.normal(size=(10, 24)).astype(np.float32)}
        some |= {f"{head}.bias": rng.normal(size=10).astype(np.float32)}
    record, params = from_torch("vit", some, heads=HEADS)
    assert record["classifier"] == {"classes": 10, "pool": "cls"}
    assert record["encoder"]["dist_token"]
    back = to_torch("vit", record, params)
    assert list(back) == list(some)
    assert all(back[name].tobytes() == x.tobytes() for name, x in some.items())
    del some["head_dist.bias"]
    with pytest.raises(ConvertError, match=r"missing: head_dist\.bias"):
        from_torch("vit", some, heads=HEADS)
    del some["head_dist.weight"]
    with pytest.raises(ConvertError, match=r"missing: head_dist\.weight"):
        from_torch("vit", some, heads=HEADS)


def test_the_checkpoint_is_used_like_any_other(data, state, converted, data_dir, close, tmp_path, capsys):
    model = tinymim_jax.load(converted)
    image = np.full((50, 40, 3), (200, 30, 90), np.uint8)  # of one color, so resizing does not change it
    mean, std = (np.array(model.preprocessing[name]) for name in ("mean", "std"))
    record, params = load_params(converted)
    pixels = jnp.asarray((image[None, :32, :32] / 255 - mean) / std, jnp.float32)
    encoder = ViT.from_record(record["encoder"])
    tokens = np.asarray(jax.jit(encoder.apply)({"params": params["encoder"]}, pixels))
    first, second = by_hand(state, tokens, "mean")
    close(model.logits(image), ((first + second) / 2)[0], 1e-4, "logits")
    close(model.embed(image), tokens[0, 2:].mean(axis=0), 1e-4, "features")
    result = evaluate_checkpoint(small_config("finetune", *WORDS), converted, data_dir=data_dir)
    assert result["examples"] == 13
    assert np.isfinite(result["loss"])
    found = evaluate_knn(small_config("finetune", *WORDS), converted, neighbors=(5,), data_dir=data_dir)
    assert 0 <= found["knn5_top1"] <= found["knn5_top5"] <= 1
    with pytest.raises(SystemExit) as stop:
        cli.main(["export", str(converted), "--to", "tinymim_star", "--output", str(tmp_path / "back.safetensors")])
    assert stop.value.code == 0
    back = read(tmp_path / "back.safetensors")
    assert all(back[name].tobytes() == x.tobytes() for name, x in state.items())
    assert json.loads((converted / "model.json").read_text())["source"]["family"] == "tinymim_star"
    capsys.readouterr()


def test_relations_are_of_cls_and_patches_alone(tmp_path):
    """A student with the token and a teacher without it: the token is in no softmax."""
    teacher = ViT(embed_dim=16, depth=1, heads=2, patch_size=8, image_size=(16, 16))
    rng = np.random.default_rng(0)

    def randomly(shapes):
        return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) / 2, shapes)

    of_teacher = randomly(jax.eval_shape(teacher.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"])
    pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}  # the digits'
    save_params(tmp_path / "teacher", {"encoder": of_teacher}, {"encoder": teacher.record(), "preprocessing": pixels})
    words = ["model.dist_token=True", "model.depth=1", f"distill.teacher.path={tmp_path / 'teacher'}"]
    config = small_config("distill", *words)
    task = TASKS["distill"].build(config, DIGITS)
    assert task.model["encoder"]["dist_token"]
    params = randomly(jax.eval_shape(task.init, jax.random.key(0)))
    images = rng.integers(0, 256, (2, 16, 16, 3), np.uint8)
    student = ViT.from_record(task.model["encoder"])
    pixels = jnp.asarray(images / 127.5 - 1, jnp.float32)

    @jax.jit
    def everything(params):
        values = task.losses(params, task.load_frozen(), {"image": jnp.asarray(images)}, jax.random.key(0), False)
        seen = student.apply({"params": params["encoder"]}, pixels, tap=1, method="encode")
        return values, seen, teacher.apply({"params": of_teacher}, pixels, tap=1, method="encode")

    values, seen, wanted = everything(params)
    kept = np.array([0, 2, 3, 4, 5])
    for name, (first, second) in {"qk": ("q", "k"), "vv": ("v", "v")}.items():
        mine = log_relation(getattr(seen, first)[:, kept], getattr(seen, second)[:, kept])
        theirs = log_relation(getattr(wanted, first), getattr(wanted, second))
        divergence = (np.exp(theirs) * (theirs - mine)).sum(-1).mean(axis=(1, 2))
        np.testing.assert_allclose(values[name], divergence, rtol=1e-4)


def log_relation(first, second):
    """log softmax(a b^T / sqrt(head_dim)) over the keys, [batch, heads, queries, keys]."""
    first, second = (np.asarray(x, np.float64).transpose(0, 2, 1, 3) for x in (first, second))
    products = first @ second.swapaxes(-1, -2) / np.sqrt(first.shape[-1])
    return products - np.log(np.exp(products).sum(-1, keepdims=True))
