"""Conversion of state dicts: round trips are bit-identical, all differences are named, nothing is guessed."""

import hashlib
import tracemalloc

import jax
import ml_dtypes
import numpy as np
import pytest
from torch_files import save_arrays

from tinymim_jax.convert import (
    FAMILIES,
    ConvertError,
    Opaque,
    convert_file,
    from_torch,
    parse_heads,
    read,
    to_torch,
)
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT

GOLDEN = {"mae": "mae", "teacher": "mae", "student": "tinymim", "vit_gap": "vit", "vit_cls": "vit"}


@pytest.fixture
def file(golden):
    """`file("mae")`: the state dict of a golden file."""
    return lambda name: dict(read(golden.path(f"{name}.pth"))["model"])


@pytest.fixture
def heads(golden):
    """`heads("mae")`: the heads of a golden file, as arguments of the conversion."""

    def of(name: str) -> dict:
        meta = golden.meta.get(name, golden.meta["vit"])
        if name == "mae":
            return {"heads": meta["heads"], "decoder_heads": meta["decoder_heads"]}
        last = f"*{meta['depth'] - 1},{meta['last_heads']}" if name == "student" else ""
        return {"heads": f"{meta['heads']}{last}"}

    return of


@pytest.fixture
def converted(file, heads):
    """`converted("mae")`: the record and the parameters of a golden file."""
    return lambda name: from_torch(GOLDEN[name], file(name), **heads(name))


def flat(tree: dict, prefix: str = "") -> dict:
    found = {}
    for name, value in tree.items():
        found |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}
    return found


def blank(width: int, depth: int = 2, **others: tuple) -> dict[str, np.ndarray]:
    """Zeros with the names and shapes of an encoder with 16 patches of 2 x 2 pixels (written out from vit.py)."""
    shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, 17, width),
        "patch_embed.proj.weight": (width, 3, 2, 2),
        "patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        shapes |= {
            f"blocks.{i}.norm1.weight": (width,),
            f"blocks.{i}.norm1.bias": (width,),
            f"blocks.{i}.attn.qkv.weight": (3 * width, width),
            f"blocks.{i}.attn.qkv.bias": (3 * width,),
            f"blocks.{i}.attn.proj.weight": (width, width),
            f"blocks.{i}.attn.proj.bias": (width,),
            f"blocks.{i}.norm2.weight": (width,),
            f"blocks.{i}.norm2.bias": (width,),
            f"blocks.{i}.mlp.fc1.weight": (4 * width, width),
            f"blocks.{i}.mlp.fc1.bias": (4 * width,),
            f"blocks.{i}.mlp.fc2.weight": (width, 4 * width),
            f"blocks.{i}.mlp.fc2.bias": (width,),
        }
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    return {name: np.zeros(shape, np.float32) for name, shape in (shapes | others).items()}


@pytest.mark.parametrize("name", GOLDEN)
def test_there_and_back_is_identical(file, converted, name):
    state = file(name)
    model, params = converted(name)
    back = to_torch(GOLDEN[name], model, params)
    assert list(back) == list(state), "the same names in the same order"
    for key, array in state.items():
        assert back[key].shape == array.shape, key
        assert back[key].dtype == array.dtype, key
        assert back[key].tobytes() == array.tobytes(), key
        assert back[key].flags.c_contiguous, key
    for path, array in flat(params).items():
        assert array.dtype == np.float32, path
        assert array.flags.owndata, path
        assert array.flags.writeable, path


@pytest.mark.parametrize(
    ("name", "family"), [("vit_cls", "mae"), ("mae", "mae"), ("student", "mae"), ("teacher", "vit")]
)
def test_an_encoder_alone(file, heads, name, family):
    """The published MAE files contain only the encoder, which is also a classifier without its head."""
    state = {key: x for key, x in file(name).items() if not key.startswith(("head", "decoder", "mask"))}
    model, params = from_torch(family, state, heads=heads(name)["heads"])
    assert set(model) == {"encoder"}
    assert set(params) == {"encoder"}
    back = to_torch(family, model, params)
    assert list(back) == list(state)
    assert all(back[key].tobytes() == state[key].tobytes() for key in state)


def test_records(golden, converted):
    meta, image_size = golden.meta, [golden.meta["image_size"]] * 2
    mae, student = meta["mae"], meta["student"]
    model, _ = converted("mae")
    assert model == {
        "encoder": {
            "embed_dim": mae["embed_dim"],
            "depth": mae["depth"],
            "heads": [mae["heads"]] * mae["depth"],
            "patch_size": meta["patch_size"],
            "image_size": image_size,
            "mlp_ratio": 4.0,
            "pos_embed": "learned",
            "final_norm": True,
        },
        "decoder": {
            "embed_dim": mae["decoder_dim"],
            "depth": mae["decoder_depth"],
            "heads": mae["decoder_heads"],
        },
    }
    model, _ = converted("student")
    assert model["encoder"]["heads"] == [student["heads"]] * (student["depth"] - 1) + [student["last_heads"]]
    for name, pool in (("vit_gap", "mean"), ("vit_cls", "cls")):
        model, _ = converted(name)
        assert model["classifier"] == {"classes": meta["vit"]["classes"], "pool": pool}
        assert model["encoder"]["final_norm"] == (pool == "cls")


def test_layouts(golden, file, converted):
    """The convolution and the linear layers, computed from torch's arrays by their definitions."""
    state, rng = file("teacher"), np.random.default_rng(0)
    _, params = converted("teacher")
    patch = rng.normal(size=(golden.meta["patch_size"], golden.meta["patch_size"], 3))  # row, column, channel
    weight = state["patch_embed.proj.weight"].astype(np.float64)
    want = np.einsum("dcyx,yxc->d", weight, patch)
    np.testing.assert_allclose(patch.reshape(-1) @ params["encoder"]["patch_embed"]["kernel"], want, rtol=1e-5)
    tokens = rng.normal(size=(5, weight.shape[0]))
    for layer in ("attn/qkv", "attn/proj", "mlp/fc1"):
        part, name = layer.split("/")
        kernel = params["encoder"]["blocks_1"][part][name]["kernel"]
        want = tokens @ state[f"blocks.1.{part}.{name}.weight"].T
        np.testing.assert_allclose(tokens @ kernel, want, rtol=1e-6)


@pytest.mark.parametrize("name", ["student", "vit_gap", "vit_cls"])
def test_paths_are_those_of_our_models(converted, name):
    model, params = converted(name)
    network = ViT.from_record(model["encoder"])
    if "classifier" in model:
        network = Classifier(network, **model["classifier"])
    images = jax.ShapeDtypeStruct((1, *model["encoder"]["image_size"], 3), np.float32)
    want = jax.eval_shape(network.init, jax.random.key(0), images)["params"]
    got = params if "classifier" in model else params["encoder"]
    assert jax.tree.map(np.shape, got) == jax.tree.map(np.shape, want)


def test_fixed_tables_are_put_into_the_export(file, converted):
    """Our models do not have the fixed table as a parameter; PyTorch models expect the one in the golden files."""
    for name in ("mae", "student"):
        state = file(name)
        model, params = converted(name)
        model["encoder"]["pos_embed"] = "sincos"
        for part in params.values():
            part.pop("pos_embed", None)
        back = to_torch(GOLDEN[name], model, params)
        assert list(back) == list(state)
        for key in state:
            np.testing.assert_array_equal(back[key], state[key], err_msg=key)


NESTS = {
    "bare": lambda state: state,
    "model": lambda state: {"model": state, "epoch": 3, "optimizer": {"state": {}}},
    "state_dict": lambda state: {"state_dict": state},
    "both": lambda state: {"model": "vit_tiny", "state_dict": state},
    "twice": lambda state: {"model": {"state_dict": state}},
    "ddp": lambda state: {f"module.{name}": x for name, x in state.items()},
    "compiled ddp": lambda state: {"model": {f"module._orig_mod.{name}": x for name, x in state.items()}},
}


@pytest.mark.parametrize("nest", NESTS)
def test_nests_and_prefixes(file, heads, nest):
    state = file("vit_gap")
    model, params = from_torch("vit", NESTS[nest](state), **heads("vit_gap"))
    back = to_torch("vit", model, params)
    assert all(back[key].tobytes() == state[key].tobytes() for key in state)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(tmp_path, file, heads, dtype):
    state = {name: x.astype(dtype) for name, x in file("vit_cls").items()}
    save_arrays(tmp_path / "w.pth", state)
    model, params = convert_file("vit", tmp_path / "w.pth", **heads("vit_cls"))
    for name, array in to_torch("vit", model, params).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, state[name].astype(np.float32), err_msg=name)


def change(state: dict, **changes) -> dict:
    """`state` with some tensors replaced, or left out where the change is None."""
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in (state | names).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm__weight": None}, r"missing: norm\.weight \(24,\)"),
        ({"cls_token": None}, r"missing: cls_token \(1, 1, 24\)"),
        ({"patch_embed__proj__weight": None}, r"missing: patch_embed\.proj\.weight \(24, 3, 'p', 'p'\)"),
        ({"blocks__1__mlp__fc1__bias": None}, r"missing: blocks\.1\.mlp\.fc1\.bias \(96,\)"),
        ({"dist_token": np.zeros((1, 1, 24), np.float32)}, r"unexpected: dist_token \(1, 1, 24\)"),
        ({"epoch": 3}, r"unexpected: epoch \(int, not a tensor\)"),
        ({"x\x1b[31m": np.zeros(1)}, r"unexpected: 'x\\x1b\[31m'"),
        ({"blocks__2__norm1__bias": np.zeros(24, np.float32)}, r"missing: blocks\.2\.norm1\.weight"),
        ({"blocks__99999999__norm1__bias": np.zeros(24, np.float32)}, r"unexpected: blocks\.99999999\.norm1"),
        ({"norm__weight": np.zeros(23, np.float32)}, r"shape: norm\.weight is \(23,\), expected \(24,\)"),
        ({"pos_embed": np.zeros((17, 24), np.float32)}, r"shape: pos_embed is \(17, 24\), expected \(1, 'n', 24\)"),
        ({"patch_embed__proj__weight": np.zeros((24, 3, 2, 4), np.float32)}, r"expected \(24, 3, 2, 2\)"),
        ({"patch_embed__proj__weight": np.zeros((24, 1, 2, 2), np.float32)}, r"expected \(24, 3, 2, 2\)"),
        ({"norm__weight": np.zeros(24, np.int64)}, r"norm\.weight is int64 \(24,\), expected \(24,\)"),
        ({"norm__weight": "text"}, r"norm\.weight is \(str, not a tensor\)"),
        ({"norm__weight": Opaque("torch.Sparse")}, r"norm\.weight is \(torch\.Sparse, not a tensor\)"),
        ({"cls_token": np.zeros((1, 1, 0), np.float32)}, r"cls_token is empty \(1, 1, 0\)"),
    ],
)
def test_differences_are_named(changes, message):
    with pytest.raises(ConvertError, match=message):
        from_torch("tinymim", change(blank(24), **changes), heads=4)


def test_long_lists_are_cut():
    state = {name: x for name, x in blank(24, depth=5).items() if not name.startswith("blocks.3.")}
    with pytest.raises(ConvertError) as error:
        from_torch("tinymim", state)
    lines = str(error.value).splitlines()
    assert any("and 4 more missing" in line for line in lines)
    assert len(lines) < 25


@pytest.mark.parametrize(
    ("name", "family", "other"),
    [("vit_gap", "mae", "vit"), ("vit_cls", "tinymim", "vit"), ("mae", "tinymim", "mae"), ("mae", "vit", "mae")],
)
def test_the_right_family_is_named(file, name, family, other):
    with pytest.raises(ConvertError, match=f"looks like '{other}': use --from {other}"):
        from_torch(family, file(name))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "nothing"),
        ([1], "list"),
        (np.zeros(3), "ndarray"),
        ({"model": {}}, "nothing"),
        (Opaque("models_vit.VisionTransformer"), r"VisionTransformer\), not its state dict"),
        ({"model": Opaque("models_vit.VisionTransformer"), "epoch": 1}, "not its state dict"),
        ({3: np.zeros(1), "3": np.zeros(1)}, r"unexpected: 3 \(not a text\) \(1,\)"),
    ],
)
def test_no_state_dict(data, message):
    with pytest.raises(ConvertError, match=message):
        from_torch("mae", data, heads=4)


def test_a_nest_that_contains_itself():
    data: dict = {"epoch": 1}
    data["model"] = data
    with pytest.raises(ConvertError, match="unexpected: epoch"):
        from_torch("mae", data)


def test_unknown_family():
    with pytest.raises(ValueError, match=r"did you mean 'tinymim'.*Choices: 'mae', 'tinymim', 'vit'"):
        from_torch("tinymin", blank(24))
    with pytest.raises(ValueError, match="Choices"):
        to_torch("x", {}, {})


@pytest.mark.parametrize(
    ("family", "width", "heads"),
    [  # MAE models_mae.py, models_vit.py of both releases, models_tinymim.py
        ("mae", 192, [3, 3]),
        ("mae", 384, [6, 6]),
        ("mae", 768, [12, 12]),
        ("mae", 1024, [16, 16]),
        ("mae", 1280, [16, 16]),
        ("vit", 192, [3, 3]),
        ("vit", 768, [12, 12]),
        ("tinymim", 192, [6, 12]),
        ("tinymim", 384, [6, 12]),
        ("tinymim", 768, [12, 16]),
    ],
)
def test_heads_of_the_published_models(family, width, heads):
    model, _ = from_torch(family, blank(width))
    assert model["encoder"]["heads"] == heads


def test_heads_of_other_models():
    with pytest.raises(ConvertError, match=r"no published model is 24 wide.*--heads"):
        from_torch("mae", blank(24))
    model, _ = from_torch("mae", blank(24), heads=[2, 4])
    assert model["encoder"]["heads"] == [2, 4]


def test_heads_of_the_decoder(golden, file, heads):
    meta, chosen = golden.meta["mae"], heads("mae")
    with pytest.raises(ConvertError, match="--decoder_heads"):
        from_torch("mae", file("mae"), heads=chosen["heads"])
    odd = meta["decoder_dim"] - 1
    with pytest.raises(ConvertError, match=f"heads={odd} does not divide the width {odd + 1}"):
        from_torch("mae", file("mae"), **(chosen | {"decoder_heads": odd}))


@pytest.mark.parametrize(
    ("text", "want"),
    [("6", [6] * 4), (6, [6] * 4), ("2,2,4,12", [2, 2, 4, 12]), ("2*3,4", [2, 2, 2, 4]), ((1, 2, 3, 4), [1, 2, 3, 4])],
)
def test_parse_heads(text, want):
    assert parse_heads(text, 4, 24) == want


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not understood"),
        ("six", "not understood"),
        ("2,", "not understood"),
        ("-2", "not understood"),
        ("2*", "not understood"),
        ("99999", "not understood"),
        ("2,4", "names 2 blocks and the model has 4"),
        ("2*3", "names 3 blocks"),
        (5, "heads=5 does not divide the width 24"),
        ("0", "heads=0 does not divide"),
        ([2, 2, 2, 48], "heads=48 does not divide"),
    ],
)
def test_heads_that_do_not_fit(text, message):
    with pytest.raises(ConvertError, match=message):
        parse_heads(text, 4, 24)


def test_image_size():
    state = blank(24)
    assert from_torch("mae", state, heads=4)[0]["encoder"]["image_size"] == [8, 8]
    model, params = from_torch("mae", state, heads=4, image_size=(4, 16))
    assert model["encoder"]["image_size"] == [4, 16]
    assert to_torch("mae", model, params).keys() == state.keys()
    for wrong in ((8, 4), (5, 16), (32, 1)):
        with pytest.raises(ConvertError, match="does not fit: the position table is for 16 patches of 2 pixels"):
            from_torch("mae", state, heads=4, image_size=wrong)
    oblong = state | {"pos_embed": np.zeros((1, 13, 24), np.float32)}
    with pytest.raises(ConvertError, match=r"12 patches, which is no square.*--image_size"):
        from_torch("mae", oblong, heads=4)
    assert from_torch("mae", oblong, heads=4, image_size=(6, 8))[0]["encoder"]["image_size"] == [6, 8]
    with pytest.raises(ConvertError, match="0 patches"):
        from_torch("mae", state | {"pos_embed": np.zeros((1, 1, 24), np.float32)}, heads=4)


@pytest.mark.parametrize("hidden", [1, 23, 50, 61, 100, 1000])
def test_any_width_of_the_mlp(hidden):
    state = blank(24)
    for i in range(2):
        for name, shape in {"fc1.weight": (hidden, 24), "fc1.bias": (hidden,), "fc2.weight": (24, hidden)}.items():
            state[f"blocks.{i}.mlp.{name}"] = np.ones(shape, np.float32)
    model, params = from_torch("vit", state, heads=4)
    assert int(24 * model["encoder"]["mlp_ratio"]) == hidden, "as models.blocks computes it"
    assert to_torch("vit", model, params)["blocks.1.mlp.fc1.bias"].shape == (hidden,)


def test_parameters_that_do_not_fit_the_export(converted):
    model, params = from_torch("tinymim", blank(24), heads=4)
    with pytest.raises(ConvertError, match=r"missing: encoder/norm/bias \(24,\)"):
        to_torch("tinymim", model, {"encoder": params["encoder"] | {"norm": {"scale": np.zeros(24)}}})
    with pytest.raises(ConvertError, match=r"unexpected: adapter/kernel \(2, 2\)"):
        to_torch("tinymim", model, params | {"adapter": {"kernel": np.zeros((2, 2))}})
    with pytest.raises(ConvertError, match=r"shape: encoder/norm/bias is \(3,\), expected \(24,\)"):
        to_torch(
            "tinymim", model, {"encoder": params["encoder"] | {"norm": {"scale": np.ones(24), "bias": np.ones(3)}}}
        )
    model, params = converted("vit_gap")
    with pytest.raises(ConvertError, match="unexpected: head/kernel"):
        to_torch("mae", model, params)


@pytest.mark.parametrize("family", FAMILIES)
def test_tables_are_two_way(family):
    """Names and paths of a model are unique, given that it has one of the two pooling norms."""
    for pool in ("cls", "mean"):
        rows = FAMILIES[family].rows_with({"decoder", "head", pool})
        assert len({row.torch for row in rows}) == len({row.ours for row in rows}) == len(rows)


def test_the_source_is_recorded(golden, heads):
    path = golden.path("teacher.pth")
    model, params = convert_file("mae", path, **heads("teacher"))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert model["source"] == {"family": "mae", "file": "teacher.pth", "sha256": digest, "licence": "cc-by-nc-4.0"}
    assert len(to_torch("mae", model, params)) == len(read(path)["model"])


def test_errors_name_the_file(golden):
    with pytest.raises(ConvertError, match=r"vit_gap\.pth: the file does not hold a 'mae' model"):
        convert_file("mae", golden.path("vit_gap.pth"))


def test_memory_is_that_of_the_parameters(tmp_path):
    state = blank(384, depth=6)
    save_arrays(tmp_path / "w.pth", state)
    size = sum(x.nbytes for x in state.values())
    del state
    tracemalloc.start()
    _, params = convert_file("vit", tmp_path / "w.pth")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(x.nbytes for x in flat(params).values()) == size > 40 << 20
    assert peak < 1.1 * size
