"""Networks that label pixels in other runtimes against jax, and read back from ONNX."""

import json

import jax
import numpy as np
import pytest
from commands import run
from networks import by_jax
from test_formats import difference, same_bits

from tinymim_jax import load
from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.convert.formats import onnx as onnx_format
from tinymim_jax.convert.formats import stablehlo
from tinymim_jax.convert.formats.network import Network, without_training_parts
from tinymim_jax.convert.formats.runners import RUNNERS
from tinymim_jax.evaluation import bench, bench_child, exporting
from tinymim_jax.models.segmentation import SegmentationNetwork
from tinymim_jax.models.switches import Switches
from tinymim_jax.models.vit import ViT

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")

LIMIT = 2e-6  # of the largest output, as for classifiers: rounding of float32 sums in another order
# The mask transformer's last norm divides cosines of the classes by how much they differ, which enlarges rounding.
LIMIT_OF_MASK = 1e-5
SIZE = (24, 40)  # 3 x 5 patches: odd grids, for the coarsest map
CLASSES = 5
HEADS = {
    "linear": {"head": "linear", "taps": (2, 3)},
    "light": {"head": "light", "taps": (1, 2, 3), "channels": 8},
    "mask": {"head": "mask", "taps": (2, 4), "channels": 12},
    "upernet": {"head": "upernet", "taps": (1, 2, 3, 4), "channels": 8, "auxiliary": 4},
    "star": {"head": "upernet", "taps": (1, 2, 3, 4), "channels": 8, "pyramid": "star", "widen": 24},
}


def make(name: str, *, depth: int = 4) -> tuple[dict, dict]:
    """(record, parameters) of a network with random weights; all biases, factors and statistics count."""
    head = HEADS[name]
    encoder = ViT(
        embed_dim=16, depth=depth, heads=(2,) * (depth - 1) + (4,), patch_size=8, image_size=SIZE,
        pos_embed="learned", final_norm=head["head"] in ("linear", "mask"), dist_token=name == "star",
        switches=Switches(relative_bias=name != "linear", layer_scale=name != "linear"),
    )  # fmt: skip
    network = SegmentationNetwork(encoder, classes=CLASSES, **head)
    shapes = jax.eval_shape(network.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *SIZE, 3), np.float32))
    rng = np.random.default_rng(1)

    def drawn(path, leaf):
        values = rng.normal(size=leaf.shape) / 2
        return (np.exp(values) if path[-1].key == "variance" else values).astype(np.float32)

    found = jax.tree_util.tree_map_with_path(drawn, dict(shapes))
    params = dict(found.pop("params")) | found
    preprocessing = {
        "image_size": list(SIZE), "resize": 46, "interpolation": "bilinear", "upright": True,
        "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "class_names": [f"class {i}" for i in range(CLASSES)],
        "class_colours": [[i, 2 * i, 9] for i in range(CLASSES)],
        "windows": {"mode": "slide", "stride": [11, 21], "resize": None, "flip": False, "scales": [1.0]},
    }  # fmt: skip
    return {"encoder": encoder.record(), "segmenter": network.record(), "preprocessing": preprocessing}, params


def network_of(name: str, output: str = "logits", **changes) -> Network:
    record, params = without_training_parts(*make(name, **changes))
    return Network(record, params, record["preprocessing"], output)


def pixels_of(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).normal(size=(batch, *SIZE, 3)).astype(np.float32)


@pytest.mark.parametrize(("name", "opset"), [*((name, 17) for name in HEADS), ("light", 23)])
def test_onnx_computes_what_jax_does(name, opset, tmp_path):
    network = network_of(name)
    onnx_format.write(tmp_path / "model.onnx", network, opset=opset)
    runner = RUNNERS["onnx"](tmp_path / "model.onnx", 1)
    for batch in (1, 3):
        wanted = by_jax(network, pixels_of(batch))
        stride = {"linear": 1, "mask": 1}.get(name, 4)
        assert wanted.shape == (batch, 3 * stride, 5 * stride, CLASSES)
        assert difference(runner(pixels_of(batch)), wanted) <= (LIMIT_OF_MASK if name == "mask" else LIMIT)
    record, params = onnx_format.read_file(tmp_path / "model.onnx")
    assert same_bits(params, dict(network.params))
    assert record["encoder"] == network.record["encoder"]
    assert record["segmenter"] == network.record["segmenter"]
    assert {**record["preprocessing"], "origin": 0} == {**network.preprocessing, "origin": 0}


@pytest.mark.parametrize("name", ["light", "star"])
def test_a_class_map_is_that_of_the_resized_logits(name, tmp_path):
    network = network_of(name, "class_map")
    onnx_format.write(tmp_path / "model.onnx", network)
    found = RUNNERS["onnx"](tmp_path / "model.onnx", 1)(pixels_of(3))
    assert (found.shape, found.dtype) == ((3, *SIZE), np.uint8)
    logits = by_jax(network_of(name), pixels_of(3))
    # Independent of our resizing: jax's own, which does not antialias when it enlarges.
    wanted = np.asarray(jax.image.resize(logits, (3, *SIZE, CLASSES), "linear", antialias=False))
    chosen = np.take_along_axis(wanted, found[..., None].astype(int), axis=-1)[..., 0]
    assert (wanted.max(-1) - chosen).max() <= 1e-5 * np.abs(wanted).max()
    assert len(np.unique(found)) > 1
    (returned,) = onnx.load(str(tmp_path / "model.onnx")).graph.output
    assert [each.dim_param or each.dim_value for each in returned.type.tensor_type.shape.dim] == ["batch", *SIZE]


def test_files_say_how_images_of_any_size_are_shown(tmp_path):
    onnx_format.write(tmp_path / "model.onnx", network_of("upernet"))
    model = onnx.load(str(tmp_path / "model.onnx"))
    (returned,) = model.graph.output
    shape = [each.dim_param or each.dim_value for each in returned.type.tensor_type.shape.dim]
    assert (returned.name, shape) == ("logits", ["batch", CLASSES, 12, 20])
    about = {entry.key: json.loads(entry.value) for entry in model.metadata_props if entry.value[:1] in "[{"}
    assert about["preprocessing"]["windows"]["stride"] == [11, 21]
    assert about["preprocessing"]["class_colours"][2] == [2, 4, 9]
    assert about["class_names"][3] == "class 3"
    assert not any("auxiliary" in tensor.name for tensor in model.graph.initializer)


def test_blocks_behind_the_last_tap_are_left_out(tmp_path):
    record, params = make("light", depth=5)
    whole = Network(record, params, record["preprocessing"])
    params = params | {"encoder": params["encoder"] | {"blocks_4": params["encoder"]["blocks_0"]}}
    network = Network(*without_training_parts(record, params), record["preprocessing"])
    assert (network.record["encoder"]["depth"], network.record["encoder"]["heads"]) == (3, [2, 2, 2])
    assert "blocks_4" not in network.params["encoder"]
    np.testing.assert_array_equal(by_jax(network, pixels_of(1)), by_jax(whole, pixels_of(1)))
    onnx_format.write(tmp_path / "model.onnx", network)
    assert onnx_format.read_file(tmp_path / "model.onnx")[0]["segmenter"]["taps"] == [1, 2, 3]


@pytest.mark.parametrize(("name", "output"), [("upernet", "logits"), ("linear", "class_map")])
def test_stablehlo_computes_what_jax_does(name, output, tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export needs flatbuffers")
    network = network_of(name, output)
    stablehlo.write(tmp_path / "model", network)
    runner = RUNNERS["stablehlo"](tmp_path / "model", None)
    for batch in (1, 2) if name == "linear" else (2,):
        found, wanted = runner(pixels_of(batch)), by_jax(network, pixels_of(batch))
        if output == "logits":
            assert difference(found, wanted) <= LIMIT
        else:
            assert (found == wanted).mean() > 0.99  # ties of rounding apart


def test_an_int8_file_labels_nearly_all_pixels_alike(tmp_path):
    network = network_of("light")
    onnx_format.write(tmp_path / "model.onnx", network, int8=True)
    found, wanted = RUNNERS["onnx"](tmp_path / "model.onnx", 1)(pixels_of(3)), by_jax(network, pixels_of(3))
    assert not np.array_equal(found, wanted)
    assert (found * wanted).sum() / np.linalg.norm(found) / np.linalg.norm(wanted) > 0.99


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "light"
    record, params = make("light")
    save_params(folder, params, record)
    return folder


@pytest.mark.parametrize("words", [(), ("--class_map", "--opset", "23")])
def test_the_command_compares_and_converts_back(words, saved, tmp_path, capsys):
    path = tmp_path / "model.onnx"
    code, out, err = run(capsys, "export", saved, "--to", "onnx", "--output", path, *words)
    assert code == 0, err
    wanted = "the class of every pixel, one of 5" if words else "logits of 5 classes on a grid of 12x20"
    assert wanted in out
    assert f"of {3 * 24 * 40 if words else 3 * 12 * 20} pixels equal" in out
    code, _, err = run(capsys, "convert", "--input", path, "--output", tmp_path / "back")
    assert code == 0, err
    image = np.random.default_rng(0).integers(0, 256, (50, 61, 3), np.uint8)
    there, back = load(saved), load(tmp_path / "back")
    np.testing.assert_array_equal(back.segment(image).labels, there.segment(image).labels)
    assert back.segment(image).colours == there.segment(image).colours


@pytest.mark.parametrize(("head", "difference", "kept"), [("mask", 5e-6, True), ("mask", 2e-5, False),
                                                          ("linear", 5e-6, False)])  # fmt: skip
def test_the_command_allows_mask_heads_more_rounding(head, difference, kept, tmp_path, capsys, monkeypatch):
    honest = exporting.RUNNERS["onnx"]

    def shifted(path, threads):
        runner = honest(path, threads)

        def run(pixels):
            found = runner.run(pixels)
            return found + difference * max(1, np.abs(found).max())

        return exporting.Runner("shifted", runner.prepare, run)

    monkeypatch.setitem(exporting.RUNNERS, "onnx", shifted)
    record, params = make(head)
    save_params(tmp_path / "checkpoint", params, record)
    path = tmp_path / "model.onnx"
    code, _, err = run(capsys, "export", tmp_path / "checkpoint", "--to", "onnx", "--output", path)
    assert (code, path.exists()) == ((0, True) if kept else (1, False)), err
    assert kept or f"more than {1e-5 if head == 'mask' else 2e-6:.0e} of the largest output" in err


def test_a_class_map_that_differs_is_not_kept(saved, tmp_path, capsys, monkeypatch):
    honest = exporting.RUNNERS["onnx"]

    def wrong(path, threads):
        runner = honest(path, threads)
        return exporting.Runner("wrong", runner.prepare, lambda pixels: (runner.run(pixels) + 1) % CLASSES)

    monkeypatch.setitem(exporting.RUNNERS, "onnx", wrong)
    code, _, err = run(capsys, "export", saved, "--to", "onnx", "--class_map", "--output", tmp_path / "model.onnx")
    assert code == 1
    assert "so the file was not kept" in err
    assert not list(tmp_path.iterdir())


def test_bench_measures_what_can_be_measured(saved, monkeypatch):
    """Runtimes whose formats have no networks that label pixels are left out, unless they are asked for."""
    measured = []
    monkeypatch.setattr(bench, "installed", lambda: ["jax", "onnx", "litert"])
    monkeypatch.setattr(bench, "_measure", lambda job: measured.append((job["runtime"], job["size"])) or {})
    bench.bench(str(saved), batches=(1,), threads=(1,))
    assert measured == [("jax", SIZE), ("onnx", SIZE)]
    row = bench_child.main({"runtime": "jax", "checkpoint": str(saved), "size": SIZE, "seconds": 0.01, "threads": 0,
                            "files": {"1": ""}})  # fmt: skip
    assert row["batches"][1]["images_per_second"] > 0


@pytest.mark.parametrize("to", ["hub", "litert"])
def test_formats_without_such_networks_say_so(to, saved, tmp_path, capsys):
    code, _, err = run(capsys, "export", saved, "--to", to, "--output", tmp_path / "x")
    assert code == 1
    assert f"--to {to} has no networks that label pixels: choose onnx or stablehlo" in err
