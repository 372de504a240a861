"""Segmentation networks by the names of the release, in and out, and encoders of the release as their start."""

import flax.traverse_util as traverse
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run
from segmentation_files import segmentation_dir, segmentation_golden
from segmentation_networks import golden_params, golden_weights

from configs import base
from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.convert import FORMATS, ConvertError, convert_file, from_torch, to_torch
from tinymim_jax.convert.families.segmentation import STAR
from tinymim_jax.convert.families.table import leaves, sizes_shown
from tinymim_jax.convert.readers.safetensors_file import read
from tinymim_jax.models.segmentation import SegmentationNetwork, variables
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.platform import compiling_for
from tinymim_jax.tasks.segment.task import build


def flat(tree) -> dict[str, np.ndarray]:
    return traverse.flatten_dict(tree, sep="/")


@pytest.fixture(scope="module")
def converted():
    buffers = {
        "backbone.blocks.0.attn.relative_position_index": np.zeros((5, 5), np.int64),
        "decode_head.bottleneck.bn.num_batches_tracked": np.int64(3),
    }
    return from_torch("tinymim_segmentation", {"state_dict": golden_weights() | buffers, "meta": {"epoch": 1}})


def test_a_network_of_the_release_comes_in_with_its_heads(converted, close):
    model, params = converted
    meta, arrays = segmentation_golden("seg_meta.json")["segmentation"], segmentation_golden("seg_model.npz")
    assert model["encoder"]["heads"] == [meta["heads"]] * meta["depth"]
    assert model["segmenter"] == {
        "head": "upernet",
        "classes": meta["classes"],
        "taps": [index + 1 for index in meta["out_indices"]],
        "channels": meta["channels"],
        "auxiliary": meta["aux_channels"],
        "pyramid": "plain",
        "widen": 0,
    }
    assert {path: x.shape for path, x in flat(params).items()} == {
        path: x.shape for path, x in flat(golden_params()).items()
    }
    network = SegmentationNetwork.from_record(ViT.from_record(model["encoder"]), model["segmenter"], auxiliary=False)
    images = jnp.asarray(arrays["images"][:1], jnp.float32)
    close(jax.jit(network.apply)(variables(params), images), arrays["encoder/logits"][:1], 1e-5)


def test_back_to_the_names_of_the_release_without_a_change_of_any_bit(converted):
    back = to_torch("tinymim_segmentation", *converted)
    assert list(back) == list(golden_weights())
    for name, x in golden_weights().items():
        np.testing.assert_array_equal(back[name], x, err_msg=name)


def test_a_file_keeps_what_no_tensor_shows(converted, tmp_path):
    model, params = converted
    record = model | {"preprocessing": {"class_names": [f"class {i}" for i in range(model["segmenter"]["classes"])]}}
    record["segmenter"] = model["segmenter"] | {"taps": [2, 4, 6, 8]}
    assert FORMATS["tinymim_segmentation"](tmp_path / "x.safetensors", record, params) == []
    again, same = convert_file("tinymim_segmentation", tmp_path / "x.safetensors")
    assert again["segmenter"] == record["segmenter"]
    assert again["preprocessing"]["class_names"][1] == "class 1"
    for path, x in flat(params).items():
        np.testing.assert_array_equal(flat(same)[path], x, err_msg=path)


def test_the_auxiliary_head_may_be_missing():
    state = {name: x for name, x in golden_weights().items() if not name.startswith("auxiliary_head.")}
    model, params = from_torch("tinymim_segmentation", state)
    assert model["segmenter"]["auxiliary"] == 0
    assert "auxiliary_head" not in params
    assert set(to_torch("tinymim_segmentation", model, params)) == set(state)


def test_files_that_do_not_fit_are_refused(converted):
    state = golden_weights()
    with pytest.raises(ConvertError, match=r"missing: decode_head.conv_seg.weight"):
        from_torch("tinymim_segmentation", {k: x for k, x in state.items() if "conv_seg" not in k})
    with pytest.raises(ConvertError, match="tables of relative positions are for"):
        from_torch("tinymim_segmentation", state, heads=1)
    name = "decode_head.bottleneck.conv.weight"
    with pytest.raises(ConvertError, match=f"shape: {name}"):
        from_torch("tinymim_segmentation", state | {name: state[name][:, 1:]})
    with pytest.raises(ConvertError, match="the encoder of a segmentation network: use --from tinymim_segmentation"):
        from_torch("tinymim", state)
    model, params = converted
    with pytest.raises(ConvertError, match="names segmentation networks, and this is none"):
        to_torch("tinymim_segmentation", {"encoder": model["encoder"]}, params)
    light = model | {"segmenter": model["segmenter"] | {"head": "light"}}
    with pytest.raises(ConvertError, match="this network has head 'light'"):
        to_torch("tinymim_segmentation", light, params)


def test_the_command_converts_and_exports(converted, tmp_path, capsys):
    save_params(tmp_path / "run", converted[1], converted[0])
    file = tmp_path / "x.safetensors"
    status, _, _ = run(capsys, "export", tmp_path / "run", "--to", "tinymim_segmentation", "--output", file)
    assert status == 0
    words = ("--from", "tinymim_segmentation", "--input", file, "--output", tmp_path / "back")
    status, out, _ = run(capsys, "convert", *words)
    assert status == 0
    assert "encoder, segmentation network; width" in out
    assert set(read(file)[0]) == set(golden_weights())


# TinyMIM*-T


def star_state() -> dict[str, np.ndarray]:
    """Random weights of the released encoder's names and shapes, and of its heads (one channel number each)."""
    released = segmentation_golden("seg_star.json")["shapes"]
    shapes = {f"backbone.{name}": tuple(shape) for name, shape in released.items()}
    rows = STAR.rows_with({"auxiliary"})
    known = sizes_shown(rows, shapes) | {"k": 3, "c": 4, "a": 2}
    rng = np.random.default_rng(0)
    named = {leaf.torch: leaf.shape for leaf in leaves(rows, known)}
    assert {name: shape for name, shape in named.items() if name.startswith("backbone.")} == shapes
    return {name: rng.normal(0, 0.02, shape).astype(np.float32) for name, shape in named.items()}


def test_the_encoder_of_tinymim_star_t_has_the_released_names_and_maps():
    state = star_state()
    model, params = from_torch("tinymim_star_segmentation", state)
    assert (model["segmenter"]["pyramid"], model["segmenter"]["widen"]) == ("star", 1280)
    assert model["encoder"]["dist_token"] is True
    back = to_torch("tinymim_star_segmentation", model, params)
    assert all((back[name] == x).all() for name, x in state.items())
    network = SegmentationNetwork.from_record(ViT.from_record(model["encoder"]), model["segmenter"])
    golden = segmentation_golden("seg_star.npz")
    maps = jax.eval_shape(lambda p, x: network.apply(variables(p), x, method="feature_maps"), params, golden["images"])
    steps = segmentation_golden("seg_star.json")["channel_step"]
    for i, got in enumerate(maps):
        stored = golden[f"map_{i}"].shape
        assert got.shape == (*stored[:3], stored[3] * steps.get(f"map_{i}", 1))


def test_the_strided_convolution_pads_both_sides_as_torch():
    from tinymim_jax.models.convolutions import Conv

    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 4, 6, 2)).astype(np.float32), rng.normal(size=(3, 3, 2, 5)).astype(np.float32)
    got = Conv(5, 3, 2).apply({"params": {"kernel": kernel}}, jnp.asarray(x))
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    want = [
        [np.einsum("abi,abio->o", padded[0, r : r + 3, c : c + 3], kernel) for c in range(0, 6, 2)]
        for r in range(0, 4, 2)
    ]
    np.testing.assert_allclose(got[0], want, rtol=1e-4, atol=1e-5)


# Encoders of the release as the start of a segmentation


def test_a_pretrained_encoder_starts_a_network_on_another_grid(tmp_path, close):
    sizes = segmentation_golden("seg_meta.json")["pretrained"]
    model, params = convert_file("tinymim", segmentation_dir() / "seg_pretrained.pth", heads=sizes["heads"])
    save_params(tmp_path / "e", params, model)
    config = base.segment()
    side = 16 * sizes["target_grid"]
    config.model.update(embed_dim=sizes["embed_dim"], depth=sizes["depth"], image_size=(side, side), dtype="float32")
    config.segment.update(channels=4, auxiliary_channels=2)
    config.init = str(tmp_path / "e")
    task = build(config.lock(), ("a", "b"))
    with compiling_for("cpu"):
        fresh = jax.device_get(jax.jit(task.init)(jax.random.key(0)))
    assert task.start is not None
    started = task.start(fresh)
    close(started["encoder"]["pos_embed"], segmentation_golden("seg_pretrained.npz")["pos_embed"], 1e-5)
    assert task.model["encoder"]["heads"] == [sizes["heads"]] * sizes["depth"]
    # What the authors' loader reports as missing keeps its initial value; all else is the file's.
    report = segmentation_golden("seg_small.json")["pretrained"]
    missing = next(line for line in report if line.startswith("missing")).partition(": ")[2].split(", ")
    names = {"gamma_1": "scale1", "gamma_2": "scale2", "attn.relative_position_bias_table": "attn/relative_bias"}
    split = [name.split(".", 2) for name in missing if name.startswith("blocks.")]
    ours = {f"encoder/blocks_{number}/{names[leaf]}" for _, number, leaf in split if leaf in names}
    same = {path for path, x in flat(started).items() if path.startswith("encoder/") and (x == flat(fresh)[path]).all()}
    assert same == ours
