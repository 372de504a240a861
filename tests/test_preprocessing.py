"""How a converted model wants its images: given, read from an export or files beside it, or assumed and said so."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from small_vit import vit_state

from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.cli import convert as convert_command
from tinymim_jax.cli import export as export_command
from tinymim_jax.cli import main as cli
from tinymim_jax.convert import FAMILIES, FORMATS, INTERPOLATIONS, ConvertError, Given, convert_file, read_class_names
from tinymim_jax.evaluation.predictor import Model
from tinymim_jax.models.vit import ViT

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
NAMES = ["ant", "bee", "cat", "dog", "eel"]


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(vit_state(), path, {"format": "pt"})
    return path


def beside(weights: pathlib.Path, **files: dict) -> None:
    for name, content in files.items():
        (weights.parent / f"{name}.json").write_text(json.dumps(content))


def timm_config(**changes) -> dict:
    """As timm writes it for vit_tiny_patch16_224.augreg_in21k_ft_in1k, at the size of `vit_state`."""
    cfg = {
        "tag": "augreg_in21k_ft_in1k",
        "input_size": [3, 16, 16],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "crop_mode": "center",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "num_classes": 5,
    }
    return {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "pretrained_cfg": cfg | changes}


def preprocessing(weights, **options) -> dict:
    return convert_file("vit", weights, heads=3, **options)[0]["preprocessing"]


def test_without_information_everything_is_assumed(weights):
    found = preprocessing(weights)
    assert found.pop("origin") == {"image_size": "the position table"} | dict.fromkeys(
        ("resize", "interpolation", "upright", "mean", "std", "class_names"), "assumed"
    )
    # 16 * 256 / 224 = 18.3
    assert found == IMAGENET | {
        "image_size": [16, 16], "resize": 18, "interpolation": "bicubic", "upright": False, "class_names": []
    }  # fmt: skip


def test_timms_config_is_read(weights):
    beside(weights, config=timm_config(label_names=NAMES))
    found = preprocessing(weights)
    assert (found["mean"], found["std"]) == ([0.5] * 3, [0.5] * 3)
    assert found["resize"] == 17  # floor(16 / 0.9), as timm.data.create_transform does
    assert found["class_names"] == NAMES
    assert found["origin"]["mean"] == found["origin"]["resize"] == "read from config.json"
    assert found["origin"]["upright"] == "assumed"


def test_hugging_faces_files_are_read(weights):
    beside(
        weights,
        config={"id2label": {str(i): name for i, name in enumerate(NAMES)}, "image_size": 16, "model_type": "vit"},
        preprocessor_config={
            "do_normalize": True, "do_resize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.2, 0.1],
            "resample": 2, "size": {"height": 16, "width": 16},
        },
    )  # fmt: skip
    model, _ = convert_file("vit", weights, heads=3)
    found = model["preprocessing"]
    assert (found["mean"], found["std"]) == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1])
    assert (found["interpolation"], found["resize"], found["class_names"]) == ("bilinear", 16, NAMES)
    assert found["origin"]["class_names"] == "read from config.json"
    assert found["origin"]["mean"] == "read from preprocessor_config.json"
    assert "squeezes images to 16x16" in model["source"]["notes"][0]


def test_placeholder_names_are_no_names(weights):
    beside(weights, config={"id2label": {str(i): f"LABEL_{i}" for i in range(5)}})
    assert preprocessing(weights)["class_names"] == []
    beside(weights, preprocessor_config={"do_normalize": False, "size": {"shortest_edge": 20}})
    found = preprocessing(weights)
    assert (found["mean"], found["std"], found["resize"]) == ([0.0] * 3, [1.0] * 3, 20)


def test_what_is_given_comes_first(weights):
    beside(weights, config=timm_config(label_names=NAMES))
    given = Given(mean=(0, 0, 0), std=(1, 1, 1), resize=32, interpolation="bilinear", class_names=NAMES[::-1])
    found = preprocessing(weights, given=given)
    assert (found["mean"], found["std"], found["resize"]) == ([0, 0, 0], [1, 1, 1], 32)
    assert (found["interpolation"], found["class_names"]) == ("bilinear", NAMES[::-1])
    assert set(found["origin"].values()) == {"the position table", "given", "assumed"}


def test_a_config_elsewhere_or_none(weights, tmp_path):
    beside(weights, config=timm_config())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps(timm_config(mean=[0.1, 0.2, 0.3])))
    assert preprocessing(weights, config=tmp_path / "other" / "config.json")["mean"] == [0.1, 0.2, 0.3]
    assert preprocessing(weights, config="none")["mean"] == IMAGENET["mean"]
    with pytest.raises(ConvertError, match="no such file"):
        preprocessing(weights, config=tmp_path / "absent.json")


def test_an_oblong_grid_is_read_from_the_config(tmp_path):
    state = vit_state()
    state["pos_embed"] = state["pos_embed"][:, :9]  # 8 patches
    save_file(state, tmp_path / "w.safetensors")
    beside(tmp_path / "w.safetensors", config=timm_config(input_size=[3, 8, 16]))
    model, _ = convert_file("vit", tmp_path / "w.safetensors", heads=3)
    assert model["encoder"]["image_size"] == [8, 16]


def test_classes_of_a_run_without_a_classifier_name_no_output(tmp_path):
    """Its export, such as that of a teacher, is converted back: the names are those of its images."""
    vit = ViT(embed_dim=12, depth=1, heads=3, patch_size=8, image_size=(16, 16))
    params = jax.jit(vit.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    record = {"encoder": vit.record(), "preprocessing": IMAGENET | {"resize": 20, "class_names": NAMES}}
    FORMATS["vit"](tmp_path / "teacher.safetensors", record, {"encoder": params})
    model, _ = convert_file("vit", tmp_path / "teacher.safetensors")
    assert (model["preprocessing"]["class_names"], model["preprocessing"]["resize"]) == ([], 20)
    with pytest.raises(ConvertError, match=r"5 class names \(given\), and the model has no classes"):
        convert_file("vit", tmp_path / "teacher.safetensors", given=Given(class_names=NAMES))


@pytest.mark.parametrize(
    ("config", "given", "message"),
    [
        (
            timm_config(label_names=NAMES[:4]),
            {},
            r"4 class names \(read from config\.json\), and the model has 5 classes",
        ),
        (None, {"class_names": NAMES * 2}, r"10 class names \(given\)"),
        (None, {"mean": (124, 116, 104)}, r"mean=\[124, 116, 104\] \(given\): .*between 0 and 1"),
        (None, {"std": (0, 1, 1)}, "std=.*three numbers"),
        (None, {"resize": 8}, "cannot be smaller than the 16 pixels"),
        (timm_config(interpolation="lanczos"), {}, "'lanczos' .*config.json.*--interpolation bicubic"),
        (timm_config(mean="grey"), {}, "not understood.*--config none"),
        ([1], {}, "holds no JSON object"),
    ],
)
def test_impossible_values_are_errors(weights, config, given, message):
    if config is not None:
        beside(weights, config=config)
    with pytest.raises(ConvertError, match=message):
        preprocessing(weights, given=Given(**given))


def test_a_config_of_another_kind_is_mentioned(weights):
    beside(weights, config={"task": "classify"})
    model, _ = convert_file("vit", weights, heads=3)
    assert "says nothing about preprocessing" in model["source"]["notes"][0]


def test_class_names_from_files(tmp_path):
    (tmp_path / "names.txt").write_text("ant\nküken \n\nred fox\n", "utf-8")
    assert read_class_names(tmp_path / "names.txt") == ["ant", "küken", "red fox"]
    for content in (["a", "b"], {"1": "b", "0": "a"}):
        (tmp_path / "names.json").write_text(json.dumps(content))
        assert read_class_names(tmp_path / "names.json") == ["a", "b"]
    (tmp_path / "names.json").write_text('{"0": "a", "2": "b"}')
    with pytest.raises(ConvertError, match="no list of names"):
        read_class_names(tmp_path / "names.json")
    with pytest.raises(ConvertError, match="cannot be read"):
        read_class_names(tmp_path / "absent.txt")


def run(capsys, *words) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        cli.main([str(word) for word in words])
    return stop.value.code, *capsys.readouterr()


def test_convert_export_and_convert_again(weights, tmp_path, monkeypatch, capsys):
    """convert, use, export and convert again: the logits are those of pixels in -1..1, and nothing is lost."""
    monkeypatch.setenv("HOME", str(tmp_path))
    beside(weights, config=timm_config())
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    words = (
        "--from",
        "vit",
        "--input",
        "~/model.safetensors",
        "--output",
        "~/a",
        "--heads",
        3,
        "--classes",
        "~/names.txt",
    )
    code, out, err = run(capsys, "convert", *words)
    assert code == 0, err
    assert "mean: 0.5 0.5 0.5 (read from config.json)" in out
    assert "class_names: 5: ant, bee, cat, ... (given)" in out

    model, params = load_params(tmp_path / "a")
    image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    logits = Model("a", model, params).logits(image)
    plain = {"mean": [0.0] * 3, "std": [1.0] * 3}  # (x / 255 - 0.5) / 0.5 by hand: weights that take x / 255
    folded = json.loads(json.dumps(model)) | {"preprocessing": model["preprocessing"] | plain}
    kernel = params["encoder"]["patch_embed"]["kernel"]
    patch = params["encoder"]["patch_embed"] | {
        "kernel": kernel * 2, "bias": params["encoder"]["patch_embed"]["bias"] - kernel.sum(0)
    }  # fmt: skip
    by_hand = Model("a", folded, params | {"encoder": params["encoder"] | {"patch_embed": patch}}).logits(image)
    np.testing.assert_allclose(logits, by_hand, rtol=0, atol=2e-5 * np.abs(by_hand).max() + 2e-5)

    code, out, err = run(capsys, "export", "~/a", "--to", "vit", "--output", "~/again.safetensors")
    assert code == 0
    assert "WARNING: this model has 3 attention heads" in err  # 24 wide: nothing published
    (tmp_path / "config.json").write_text("{")  # neither needed nor read
    code, out, err = run(capsys, "convert", "--from", "vit", "--input", "~/again.safetensors", "--output", "~/b")
    assert code == 0, err
    again, same = load_params(tmp_path / "b")
    assert again["encoder"] == model["encoder"]
    assert again["preprocessing"] == model["preprocessing"] | {"origin": again["preprocessing"]["origin"]}
    assert again["preprocessing"]["origin"]["class_names"] == "read from the file's metadata"
    assert again["preprocessing"]["origin"]["upright"] == "assumed"  # an export does not make it more certain
    assert same["head"]["kernel"].tobytes() == params["head"]["kernel"].tobytes()


def save_encoder(tmp_path, width=384) -> pathlib.Path:
    """An encoder of two blocks as a file."""
    state = vit_state(dim=width)
    state |= {name.replace("blocks.0", "blocks.1"): x for name, x in state.items() if name.startswith("blocks.0")}
    save_file({n: x for n, x in state.items() if not n.startswith("head.")}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def export(tmp_path, family, heads, width=384, **record) -> tuple[dict, list[str]]:
    """(header metadata, messages) of an exported encoder with these heads; two blocks of `width`."""
    model, params = convert_file("vit", save_encoder(tmp_path, width), heads=heads)
    save_params(tmp_path / "x", params, model | record, overwrite=True)
    path = tmp_path / "out.safetensors"
    warnings = FORMATS[family](path, *load_params(tmp_path / "x"))
    assert load_file(path)["pos_embed"].tobytes() == params["encoder"]["pos_embed"].tobytes()
    head = path.read_bytes()
    return json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])["__metadata__"], warnings


@pytest.mark.parametrize(("family", "heads"), [("vit", [6, 6]), ("mae", [6, 6]), ("tinymim", [6, 12])])
def test_usual_heads_need_no_warning(tmp_path, family, heads):
    metadata, warnings = export(tmp_path, family, heads)
    assert warnings == []
    assert json.loads(metadata["heads"]) == heads
    assert json.loads(metadata["tinymim_jax"])["encoder"]["heads"] == heads


@pytest.mark.parametrize(
    ("family", "heads", "message"),
    [
        ("vit", [6, 12], r"6 x 1, 12 attention heads, and .*'vit' at width 384 a model has 6\..*num_heads=6; then a = "
         r"model\.blocks\[1\]\.attn; a\.num_heads, a\.head_dim, a\.scale = 12, 32, 32\*\*-0\.5"),
        ("tinymim", [6, 6], r"a model has 6 x 1, 12\. .*num_heads=6 \("),
        ("vit", [3, 3], r"this model has 3 attention heads.*a model has 6\. .*num_heads=3"),
    ],
)  # fmt: skip
def test_other_heads_are_warned_of(tmp_path, family, heads, message):
    metadata, (warning,) = export(tmp_path, family, heads)
    assert warning.startswith("WARNING: this model has")

    assert re.search(message, warning), warning
    assert json.loads(metadata["heads"]) == heads


def test_what_an_export_leaves_out_is_said(tmp_path):
    model, params = convert_file("vit", save_encoder(tmp_path), heads=6)
    messages = FORMATS["vit"](
        tmp_path / "out.safetensors", model | {"adapter": 8}, params | {"adapter": {"kernel": np.zeros((384, 8))}}
    )
    assert messages == ["left out: the adapter, which is used in the training of a distillation only"]
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        FORMATS["vit"](tmp_path / "absent" / "out.safetensors", model, params)


def test_the_command_line_knows_the_rows():
    """The tuples in the commands are written out to keep --help quick."""
    assert tuple(FAMILIES) == convert_command.FAMILIES
    assert tuple(INTERPOLATIONS) == convert_command.INTERPOLATIONS
    assert tuple(FORMATS) == (*export_command.FAMILIES, "original")
