"""Vision Transformers of other authors: every array of the golden files, and the file itself again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run
from teacher_files import arrays, converted, fitted, images, index, names, options_of, path_of, teachers_dir

from tinymim_jax.cli import convert as command
from tinymim_jax.convert import PUBLISHED, ConvertError, convert_file
from tinymim_jax.convert.detect import find_weights
from tinymim_jax.convert.families.jax_names import to_timm
from tinymim_jax.convert.families.spellings import IGNORED
from tinymim_jax.convert.foreign import from_foreign, to_foreign
from tinymim_jax.convert.foreign_architecture import Hints
from tinymim_jax.convert.locate import locate, read_npz
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.relative_bias import relative_bias
from tinymim_jax.ops.rope import angles, rotate

TOLERANCE = (
    5e-5  # absolute; the largest difference seen is 8e-6, and the smallest wrong switch (eps) makes 2e-6 to 8e-5
)

# Golden files with a head that reads CLS, or a norm of the mean of the patches. CLIP's is a projection.
CLASSIFIERS = ("timm_vit", "timm_deit3", "fb_deit3", "hf_vit", "timm_beit", "ms_beitv2")


def outputs(name: str, encoder: ViT, params: dict) -> dict[str, np.ndarray]:
    """Our counterparts of the golden arrays."""
    pixels = images(name)
    if index()["models"][name]["family"] == "radio":  # its images are in 0..1: the model normalizes them itself
        config = json.loads((teachers_dir() / f"{name}.config.json").read_text())
        pixels = (pixels - np.float32(config["norm_mean"])) / np.float32(config["norm_std"])
    given, pixels = {"params": params}, jnp.asarray(pixels)
    with jax.default_matmul_precision("highest"):
        taps = encoder.apply(given, pixels, tap=range(1, encoder.depth + 1), method="encode")
        found = {"embedded": encoder.apply(given, pixels, method="embed"), "final": encoder.apply(given, pixels)}
    found |= {f"block_{i}": tap.output for i, tap in enumerate(taps, 1)}
    last = taps[-1]
    found |= {"q": last.q, "k": last.k, "v": last.v}
    if name.startswith("hf_clip"):  # transformers' last_hidden_state is before the norm
        found["final"] = last.output
    if rope := encoder.switches.rope:
        back = -angles(rope, encoder.grid, last.q.shape[-1])
        found |= {f"{x}_unrotated": rotate(found[x], back, rope.layout) for x in "qk"}
    if encoder.switches.relative_bias:
        table = params[f"blocks_{encoder.depth - 1}"]["attn"]["relative_bias"]
        found["attention_bias"] = relative_bias(table, encoder.grid, encoder.prefix)
    return {key: np.asarray(value) for key, value in found.items()}


@pytest.mark.parametrize("name", names())
def test_every_array_of_a_golden_model(name):
    model, params = converted(name)
    encoder, fitting = fitted(name, model, params)
    want, got = arrays(name), outputs(name, encoder, fitting)
    if "logits" in want and "classifier" in model:
        network = Classifier(encoder, **model["classifier"])
        with jax.default_matmul_precision("highest"):
            got["logits"] = np.asarray(
                network.apply({"params": params | {"encoder": fitting}}, jnp.asarray(images(name)))
            )
    compared = [key for key in want if key in got]
    assert {"block_1", "final"} <= set(compared)
    assert set(want) - set(compared) <= {"pooled", "logits"}
    assert ("logits" in compared) == (name in CLASSIFIERS)
    for key in compared:
        np.testing.assert_allclose(got[key], want[key], atol=TOLERANCE, rtol=0, err_msg=key)


@pytest.mark.parametrize("name", [name for name in names() if index()["models"][name]["layout"] != "jax_npz"])
def test_what_was_read_is_written_as_it_was(name):
    model, params = converted(name)
    if model["source"]["family"] not in PUBLISHED:
        pytest.skip("a family of FAMILIES: test_convert.py")
    data, _ = locate(path_of(name)).read()
    config = json.loads(options_of(name)["config"].read_text()) if options_of(name)["config"] else {}
    found = find_weights(data, config)[1]
    state = found.state | found.beside
    back = to_foreign(model, params)
    left = [key for key in state if key not in back and "input_conditioner" not in key]
    assert all(IGNORED.fullmatch(key) for key in left), left
    for key, array in back.items():
        mask = state.get(key.replace("qkv.bias", "qkv.bias_mask"), 1) if key.endswith("qkv.bias") else 1
        np.testing.assert_array_equal(array, np.asarray(state[key]) * mask, err_msg=key)


def test_the_command_knows_all_families():
    assert tuple(PUBLISHED) == command.PUBLISHED


@pytest.mark.parametrize(
    ("name", "left_out", "message"),
    [
        ("fb_dinov2_reg", {"heads": None}, r"no published 'dinov2' model is \d+ wide.*--heads"),
        ("openclip", {"activation": None}, r"different activations.*--activation \(quick_gelu: OpenAI"),
        ("timm_siglip", {"config": "none"}, r"different activations.*--activation"),
        ("hf_ijepa", {"config": "none"}, r"the eps of the norms .* --eps"),
        ("hf_radio", {"config": "none"}, r"does not say how many of them are CLS tokens.*--config"),
        ("bv_gap_sincos", {"image_size": None}, r"position table is not in the file.*--image_size"),
    ],
)
def test_what_tensors_do_not_show_is_asked_for(name, left_out, message):
    with pytest.raises(ConvertError, match=rf"(?s){path_of(name).name}.*{message}"):
        converted(name, **left_out)


def test_names_that_several_releases_have():
    """A plain encoder alone may be MAE's or TinyMIM's, which have other heads in the last block."""
    plain = path_of("timm_vit")
    data, _ = locate(plain).read()
    state = {key: value for key, value in data.items() if not key.startswith("head")}
    with pytest.raises(ConvertError, match=r"attention heads in the last block: choose by --from mae"):
        find_weights(state, {})
    assert find_weights({"teacher": {f"backbone.{key}": value for key, value in state.items()}}, {})[0] == "vit"
    patches = {key: value for key, value in state.items() if key != "cls_token"}
    patches["pos_embed"] = patches["pos_embed"][:, 1:]
    with pytest.raises(ConvertError, match="ijepa and siglip have these names: choose by --from ijepa"):
        find_weights(patches, {})


@pytest.mark.parametrize(
    ("name", "family", "right"),
    [("fb_dinov2_reg", "dinov3", "dinov2"), ("fb_dinov3", "dinov2", "dinov3"), ("hf_siglip", "beit", "siglip")],
)
def test_a_family_that_the_names_contradict(name, family, right):
    """DINOv2 read as DINOv3 would have rotary positions, another eps and another licence."""
    message = rf"--from {family}: the names of its tensors are those of {right},.*: --from {right}, or auto"
    with pytest.raises(ConvertError, match=message):
        converted(name, family)
    assert converted(name, right)[0]["source"]["family"] == right


def test_files_that_hold_something_else(tmp_path):
    from safetensors.numpy import save_file

    save_file({"features.0.weight": np.ones((2, 3, 3, 3), np.float32)}, tmp_path / "vgg.safetensors")
    with pytest.raises(ConvertError, match="no Vision Transformer was found in it"):
        convert_file("auto", tmp_path / "vgg.safetensors")
    data, _ = locate(path_of("timm_dinov3")).read()
    save_file(dict(data) | {"blocks.0.attn.surprise": np.ones(2, np.float32)}, tmp_path / "more.safetensors")
    with pytest.raises(ConvertError, match=r"not known of a 'dinov3' model: blocks\.0\.attn\.surprise"):
        convert_file("auto", tmp_path / "more.safetensors", heads=2)
    short = {key: value for key, value in data.items() if key != "blocks.1.mlp.fc2.weight"}
    save_file(short, tmp_path / "less.safetensors")
    with pytest.raises(ConvertError, match=r"blocks_1/mlp/fc2/kernel: got None"):
        convert_file("auto", tmp_path / "less.safetensors", heads=2)


def test_folders_shards_and_the_cache(tmp_path, monkeypatch):
    from safetensors.numpy import save_file

    data, _ = locate(path_of("hf_dinov2")).read()
    snapshot = tmp_path / "hub" / "models--facebook--dinov2-tiny" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    config = options_of("hf_dinov2")["config"]
    (snapshot / "config.json").write_text(config.read_text())
    keys = sorted(data)
    for number, part in enumerate((keys[:20], keys[20:])):
        save_file({key: np.array(data[key]) for key in part}, snapshot / f"model-{number}.safetensors")
    weight_map = {key: f"model-{int(i >= 20)}.safetensors" for i, key in enumerate(keys)}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    whole = converted("hf_dinov2", heads=None)
    for place in (snapshot, "facebook/dinov2-tiny"):
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        model, params = convert_file("auto", place)
        assert model["encoder"] == whole[0]["encoder"]
        jax.tree.map(np.testing.assert_array_equal, params, whole[1])
    with pytest.raises(ConvertError, match=r"hf download facebook/dinov2-base"):
        convert_file("auto", "facebook/dinov2-base")
    (snapshot / "model-1.safetensors").unlink()
    with pytest.raises(ConvertError, match=r"not beside it: model-1\.safetensors"):
        convert_file("auto", snapshot)
    (snapshot / "model.safetensors.index.json").unlink()
    save_file({"a": np.ones(1)}, snapshot / "other.safetensors")
    with pytest.raises(ConvertError, match=r"which file holds the weights.*model-0.*other"):
        convert_file("auto", snapshot)


def test_the_command(tmp_path, capsys):
    """As a user: a DINOv3 of timm, its licence, what was not read; and the file again."""
    words = [
        "--input",
        path_of("fb_dinov3"),
        "--heads",
        index()["heads"],
        "--image_size",
        *images("fb_dinov3").shape[1:3],
    ]
    code, out, err = run(capsys, "convert", *words, "--output", tmp_path / "teacher")
    assert code == 0, err
    assert "dinov3, encoder" in out
    assert "licence of the weights: dinov3-license" in out
    assert "not read: " in out
    record = json.loads((tmp_path / "teacher" / "model.json").read_text())
    assert record["encoder"]["switches"]["rope"]["centred"] is True
    assert record["source"]["licence"] == "dinov3-license"
    assert record["preprocessing"]["origin"]["mean"] == "as published for 'dinov3' models"
    code, _, err = run(
        capsys, "export", tmp_path / "teacher", "--to", "original", "--output", tmp_path / "again.safetensors"
    )
    assert code == 0, err
    back, _ = locate(tmp_path / "again.safetensors").read()
    original, _ = locate(path_of("fb_dinov3")).read()
    np.testing.assert_array_equal(back["storage_tokens"], original["storage_tokens"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: a | {"Transformer/encoderblock_1/LayerScale_0/gamma": np.ones(2)},
            "has what no ViT has: LayerScale",
        ),
        (lambda a: without(a, "Transformer/encoderblock_0/"), "no block 0, and has block 1"),
        (lambda a: without(a, "embedding/bias"), "lacks embedding/bias, which every ViT has"),
        (lambda a: without(a, "Transformer/encoder_norm/scale"), "lacks Transformer/encoder_norm/scale"),
        (lambda a: without(a, "Transformer/encoderblock_1/MlpBlock_3/Dense_1/bias"), "is not that of a ViT"),
    ],
)
def test_files_of_google_are_read_whole_or_not_at_all(change, message):
    found = read_npz(path_of("vitjax_augreg"))
    root = next(name for name in found if name.endswith("embedding/kernel")).removesuffix("embedding/kernel")
    to_timm(found, None)
    changed = change({name.removeprefix(root): array for name, array in found.items()})
    with pytest.raises(ConvertError, match=message):
        to_timm(changed, None)


def test_npz_files_that_unpack_to_far_more_than_their_size_are_refused(tmp_path):
    np.savez_compressed(tmp_path / "zeros.npz", np.zeros(2**24, np.float32))
    with pytest.raises(ConvertError, match=r"would unpack to 64 MiB"):
        read_npz(tmp_path / "zeros.npz")
    (tmp_path / "no.npz").write_bytes(b"PK no archive")
    with pytest.raises(ConvertError, match=r"cannot read .*no.npz"):
        read_npz(tmp_path / "no.npz")


def without(found: dict, start: str) -> dict:
    kept = {name: array for name, array in found.items() if not name.startswith(start)}
    assert len(kept) < len(found)
    return kept


def test_options_without_a_meaning_for_google_files():
    for option in ({"use": "ema"}, {"prefix": "x."}, {"decoder_heads": 2}):
        with pytest.raises(ConvertError, match=f"--{next(iter(option))} has no meaning"):
            convert_file("auto", path_of("vitjax_augreg"), heads=2, **option)


def test_shared_position_biases_that_differ_are_not_written_as_one():
    """BEiT's pre-training has one table for all blocks; here the last block's, of a file with one for each."""
    data, config = locate(path_of("timm_beit")).read()
    state = dict(find_weights(data, {})[1].state)
    tables = [key for key in state if key.endswith("relative_position_bias_table")]
    state["rel_pos_bias.relative_position_bias_table"] = [state.pop(key) for key in tables][-1]
    record = converted("timm_beit")[0]["encoder"]
    hints = Hints(heads=record["heads"], image_size=tuple(record["image_size"]))
    encoder, params, source = from_foreign("beit", state, config, hints)
    back = to_foreign({**encoder, "source": source}, params)
    assert [key for key in back if "bias_table" in key] == ["rel_pos_bias.relative_position_bias_table"]
    params["encoder"]["blocks_0"]["attn"]["relative_bias"][0] += 1
    with pytest.raises(ConvertError, match="tables of the model differ: it was trained since"):
        to_foreign({**encoder, "source": source}, params)
