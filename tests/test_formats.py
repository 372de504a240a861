"""Exported networks in their own runtimes against jax; what the files say of themselves; and reading them back."""

import ast
import json

import jax
import numpy as np
import pytest
from networks import ARCHITECTURES, CLASSES, SIZE, answers, by_jax, make_network, pixels_of
from torch_files import save_arrays

from tinymim_jax.convert import ConvertError, to_torch
from tinymim_jax.convert.formats import hub, litert, onnx_graph, stablehlo
from tinymim_jax.convert.formats import onnx as onnx_format
from tinymim_jax.convert.formats.network import Network, size_of
from tinymim_jax.convert.formats.runners import RUNNERS

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

# Of the largest output: rounding of float32 sums in another order. What export refuses is above the same figure.
LIMIT = 2e-6
BATCHES = (1, 3, 8)


def difference(got, want) -> float:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def same_bits(first, second) -> bool:
    assert jax.tree.structure(first) == jax.tree.structure(second)
    return all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@pytest.mark.parametrize("opset", onnx_format.OPSETS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_onnx_computes_what_jax_does(name, opset, tmp_path):
    network = make_network(name)
    onnx_format.write(tmp_path / "model.onnx", network, opset=opset)
    run = RUNNERS["onnx"](tmp_path / "model.onnx", 1)
    for batch in BATCHES:
        assert difference(run(pixels_of(batch)), answers(name, batch)) <= LIMIT
    record, params = onnx_format.read_file(tmp_path / "model.onnx")
    assert same_bits(params, dict(network.params))
    assert record["encoder"] == network.record["encoder"]
    assert record["classifier"] == network.record["classifier"]
    assert {**record["preprocessing"], "origin": 0} == {**network.preprocessing, "origin": 0}


@pytest.mark.parametrize("output", ["mean", "cls", "tokens"])
def test_onnx_features(output, tmp_path):
    network = make_network("star_cls", output)
    onnx_format.write(tmp_path / "model.onnx", network)
    found = RUNNERS["onnx"](tmp_path / "model.onnx", 1)(pixels_of(3))
    assert found.shape == ((3, 16) if output != "tokens" else (3, 2 + 6, 16))
    assert difference(found, answers("star_cls", 3, output)) <= LIMIT
    record, params = onnx_format.read_file(tmp_path / "model.onnx")
    assert "classifier" not in record
    assert same_bits(params, {"encoder": network.params["encoder"]})


def test_onnx_files_say_what_they_are(tmp_path):
    onnx_format.write(tmp_path / "model.onnx", make_network("adaptive"), opset=17)
    model = onnx.load(str(tmp_path / "model.onnx"))
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 17)]
    (given,), (returned,) = model.graph.input, model.graph.output
    sizes = [each.dim_param or each.dim_value for each in given.type.tensor_type.shape.dim]
    assert (given.name, sizes) == ("pixel_values", ["batch", 3, *SIZE])
    sizes = [each.dim_param or each.dim_value for each in returned.type.tensor_type.shape.dim]
    assert (returned.name, sizes) == ("logits", ["batch", CLASSES])
    properties = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(properties["class_names"])[3] == "class 3"
    assert json.loads(properties["preprocessing"])["std"] == [0.2, 0.3, 0.4]
    assert json.loads(properties["model"])["encoder"]["heads"] == [2, 4]
    assert not any(node.op_type == "Attention" for node in model.graph.node)


def test_onnx_int8(tmp_path):
    network = make_network("star")
    onnx_format.write(tmp_path / "model.onnx", network, int8=True)
    pixels = pixels_of(8)
    got, want = RUNNERS["onnx"](tmp_path / "model.onnx", 1)(pixels), answers("star", 8)
    cosine = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
    assert cosine.min() > 0.99
    assert not np.array_equal(got, want)
    model = onnx.load(str(tmp_path / "model.onnx"))
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    kernels = [name for name in kinds if name.endswith("/kernel") and "patch_embed" not in name]
    assert len(kernels) == 2 * 4 + 3  # four in each block, widening, two heads
    assert all(kinds[name] == onnx.TensorProto.INT8 for name in kernels)
    integers = [onnx.numpy_helper.to_array(each) for each in model.graph.initializer if each.name in kernels]
    assert max(np.abs(each.astype(int)).max() for each in integers) == 64
    assert np.iinfo(np.int16).max >= 2 * 255 * 64  # onnxruntime adds two products in 16 bits on x86 without VNNI
    with pytest.raises(ConvertError, match="rounded to int8"):
        onnx_format.read_file(tmp_path / "model.onnx")


def test_int8_weights_have_a_scale_for_each_channel():
    """A channel a thousand times larger than the others takes nothing from them: with one scale they would be zeros."""
    kernel = np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    kernel[:, 1] *= 1000
    kernel[:, 3] = 0
    rounded, scale = onnx_graph.quantize(kernel, axis=0)
    assert rounded.dtype == np.int8
    assert scale.shape == (4,)
    np.testing.assert_array_equal(np.abs(rounded).max(axis=0), [127, 127, 127, 0])
    assert (np.abs(rounded * scale - kernel) <= scale / 2 * (1 + 1e-6)).all()


def test_only_our_onnx_files_are_read(tmp_path):
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ConvertError, match="not an ONNX file"):
        onnx_format.read_file(tmp_path / "text.onnx")
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "other", [], [])), str(tmp_path / "other.onnx"))
    with pytest.raises(ConvertError, match="only ONNX files that `tinymim export` wrote"):
        onnx_format.read_file(tmp_path / "other.onnx")


@pytest.mark.parametrize("name", ["adaptive", "star"])
def test_stablehlo_computes_what_jax_does(name, tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")
    network = make_network(name)
    stablehlo.write(tmp_path / "model", network)
    exported = jax.export.deserialize(bytearray((tmp_path / "model").read_bytes()))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    run = RUNNERS["stablehlo"](tmp_path / "model", None)
    for batch in BATCHES:
        assert difference(run(pixels_of(batch)), answers(name, batch)) <= LIMIT


@pytest.mark.parametrize("name", ["adaptive", "star"])
def test_litert_computes_what_jax_does(name, tmp_path):
    pytest.importorskip("litert_converter", reason="litert-converter has no wheel here or is not installed")
    pytest.importorskip("ai_edge_litert", reason="ai-edge-litert is not installed")
    network = make_network(name)
    pixels = pixels_of(5)
    want = answers(name, 5)
    litert.write(tmp_path / "model.tflite", network, batch=3)
    run = RUNNERS["litert"](tmp_path / "model.tflite", 1)
    assert run.batch == 3
    assert difference(run(pixels), want) <= LIMIT  # the second call is padded
    litert.write(tmp_path / "int8.tflite", network, batch=5, int8=True)
    got = RUNNERS["litert"](tmp_path / "int8.tflite", 1)(pixels)
    cosine = (got * want).sum(-1) / np.linalg.norm(got, axis=-1) / np.linalg.norm(want, axis=-1)
    assert cosine.min() > 0.99
    assert (tmp_path / "int8.tflite").stat().st_size < (tmp_path / "model.tflite").stat().st_size


def test_the_gelu_for_litert_is_the_same_function():
    """What the converter replaces by name is a composite whose body is the exact GELU."""
    from tinymim_jax.ops.gelu import gelu
    from tinymim_jax.ops.platform import compiling_for

    x = np.linspace(-6, 6, 101, dtype=np.float32)
    with compiling_for("litert"):
        lowered = jax.jit(lambda x: gelu(x)).lower(x)
        assert 'stablehlo.composite "aten.gelu.default"' in lowered.as_text()
    np.testing.assert_array_equal(lowered.compile()(x), jax.jit(lambda x: gelu(x))(x))


def test_hub_folder_of_a_plain_vit_is_timms(tmp_path):
    """Names and shapes of timm's VisionTransformer, and the keys that its create_model('local-dir:...') reads."""
    network = make_network("plain")
    hub.write(tmp_path / "model", network, card="text", licence="apache-2.0")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md", "config.json", "model.safetensors",
    ]  # fmt: skip
    from safetensors.numpy import load_file

    shapes = {name: array.shape for name, array in load_file(tmp_path / "model" / "model.safetensors").items()}
    golden = {"cls_token": (1, 1, 16), "pos_embed": (1, 7, 16), "patch_embed.proj.weight": (16, 3, 8, 8)}
    golden |= {"patch_embed.proj.bias": (16,), "fc_norm.weight": (16,), "fc_norm.bias": (16,)}
    golden |= {"head.weight": (7, 16), "head.bias": (7,)}
    for i in range(2):
        golden |= {f"blocks.{i}.norm{n}.{kind}": (16,) for n in (1, 2) for kind in ("weight", "bias")}
        for name, out, given in (("attn.qkv", 48, 16), ("attn.proj", 16, 16), ("mlp.fc1", 64, 16), ("mlp.fc2", 16, 64)):
            golden |= {f"blocks.{i}.{name}.weight": (out, given), f"blocks.{i}.{name}.bias": (out,)}
    assert shapes == golden
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architecture"] == "vit_base_patch16_224"
    # Without fc_norm and global_pool timm 1.0 expects norm.* and fails; the others replace vit_base's numbers.
    assert config["model_args"] == {
        "img_size": [16, 24], "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "mlp_ratio": 4.0,
        "global_pool": "avg", "fc_norm": True,
    }  # fmt: skip
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 7
    assert config["label_names"] == [f"class {i}" for i in range(7)]
    assert config["pretrained_cfg"]["input_size"] == [3, 16, 24]
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.4, 0.3]
    assert config["pretrained_cfg"]["license"] == "apache-2.0"
    assert int(24 / config["pretrained_cfg"]["crop_pct"]) == 27  # timm's short side: floor(size / crop_pct)


@pytest.mark.parametrize(("side", "resize"), [(224, 256), (224, 235), (16, 16), (24, 27), (384, 439), (518, 592)])
def test_crop_fraction_gives_the_short_side_back(side, resize):
    assert int(side / hub._crop_fraction(side, resize)) == resize


@pytest.mark.parametrize("name", ["adaptive", "star", "star_norm_first"])
def test_hub_folder_of_what_timm_cannot_express_brings_its_code(name, tmp_path):
    hub.write(tmp_path / "model", make_network(name))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    # timm looks for `architecture` and does not know this one; transformers looks for `auto_map`.
    assert config["architecture"] == "tinymim"
    assert "pretrained_cfg" not in config
    module, kind = config["auto_map"]["AutoModelForImageClassification"].split(".")
    tree = ast.parse((tmp_path / "model" / f"{module}.py").read_text())
    assert kind in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert config["id2label"]["3"] == "class 3"
    processor = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    assert (processor["size"], processor["crop_size"]) == ({"shortest_edge": 27}, {"height": 16, "width": 24})
    assert (processor["image_mean"], processor["image_std"]) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])


def test_features_of_a_headless_encoder(tmp_path):
    hub.write(tmp_path / "model", make_network("cls", "mean"))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (config["num_classes"], config["global_pool"], config["model_args"]["fc_norm"]) == (0, "avg", False)
    with pytest.raises(ConvertError, match="without a final norm"):
        hub.write(tmp_path / "other", make_network("plain", "mean"))


def test_what_cannot_be_exported_is_refused():
    network = make_network("plain")
    params = {"encoder": network.params["encoder"]}
    with pytest.raises(ConvertError, match=r"no classifier.*--features"):
        Network({"encoder": network.record["encoder"]}, params, network.preprocessing)
    with pytest.raises(ConvertError, match="output='median'"):
        make_network("plain", "median")


def test_onnx_refuses_encoders_that_are_no_plain_vit(tmp_path):
    network = make_network("plain")
    record = network.record | {"encoder": network.record["encoder"] | {"switches": {"registers": 2}}}
    with pytest.raises(ConvertError, match=r"differs from it \(registers\): export it --to stablehlo"):
        onnx_format.write(tmp_path / "x.onnx", Network(record, network.params, network.preprocessing))


@pytest.mark.parametrize("name", ["adaptive", "star"])
def test_files_are_little_larger_than_the_weights(name, tmp_path):
    """The graph itself takes kilobytes, whatever the width: under 1 % of a ViT-Tiny's 23 MB."""
    network = make_network(name)
    weights = size_of(network.used_params()) + network.positions.nbytes
    onnx_format.write(tmp_path / "model.onnx", network)
    assert 0 < (tmp_path / "model.onnx").stat().st_size - weights < 2 * 10_000


def test_hub_card_with_a_class_name_in_another_encoding(tmp_path):
    hub.write(tmp_path / "model", make_network("plain"), card="cl\udce9 é")
    assert (tmp_path / "model" / "README.md").read_text("utf-8") == "cl\\udce9 é"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_hub_folders_are_read_back(name, tmp_path):
    network = make_network(name)
    hub.write(tmp_path / "model", network)
    record, params = hub.read_folder(tmp_path / "model")
    assert set(record["preprocessing"]["origin"].values()) <= {"the position table", "read from the file's metadata"}
    assert record["encoder"]["heads"] == network.record["encoder"]["heads"]
    assert record["classifier"] == network.record["classifier"]
    for key, value in network.preprocessing.items():
        assert record["preprocessing"][key] == value
    back = Network(record, params, record["preprocessing"])
    np.testing.assert_array_equal(by_jax(back, pixels_of(3)), answers(name, 3))


def test_what_timm_saves_after_fine_tuning_is_read(tmp_path):
    """The folder of timm 1.0.31's save_for_hf: no metadata of ours, torch's format, and its own keys in config.json."""
    network, tuned = make_network("plain"), make_network("plain", seed=1)
    hub.write(tmp_path / "exported", network)
    config = json.loads((tmp_path / "exported" / "config.json").read_text())
    labels = config.pop("label_names")
    config["model_args"] |= {"in_chans": 3, "num_classes": 7}
    config["pretrained_cfg"]["label_names"] = labels
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_arrays(folder / "pytorch_model.bin", to_torch("vit", tuned.record, tuned.params))
    record, params = hub.read_folder(folder)
    assert record["encoder"]["heads"] == [2, 2]
    assert record["preprocessing"]["class_names"] == labels
    assert (record["preprocessing"]["resize"], record["preprocessing"]["mean"]) == (27, [0.5, 0.4, 0.3])
    back = Network(record, params, record["preprocessing"])
    np.testing.assert_array_equal(by_jax(back, pixels_of(3)), by_jax(tuned, pixels_of(3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "resnet50"}, "its architecture is 'resnet50', and only timm's plain ViTs are known"),
        ({"model_args": {"qk_norm": True}}, "its model_args qk_norm have no counterpart"),
    ],
)
def test_hub_folders_of_other_models_are_refused(change, message, tmp_path):
    hub.write(tmp_path / "model", make_network("plain"))
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConvertError, match=message):
        hub.read_folder(tmp_path / "model")
    path.unlink()
    with pytest.raises(ConvertError, match=r"it needs a config\.json"):
        hub.read_folder(tmp_path / "model")


def test_onnx_files_with_other_tensors_are_refused(tmp_path):
    path = tmp_path / "model.onnx"
    onnx_format.write(path, make_network("plain"))
    model = onnx.load(str(path))
    tensors = model.graph.initializer
    (place,) = (i for i, tensor in enumerate(tensors) if tensor.name == "encoder/blocks_1/mlp/fc2/bias")
    del tensors[place]
    onnx.save(model, str(path))
    with pytest.raises(ConvertError, match=r"not those of the architecture.*: encoder/blocks_1/mlp/fc2/bias"):
        onnx_format.read_file(path)
    (entry,) = (entry for entry in model.metadata_props if entry.key == "model")
    entry.value = "[1, 2]"
    onnx.save(model, str(path))
    with pytest.raises(ConvertError, match="its metadata are damaged"):
        onnx_format.read_file(path)
