"""Classifier heads of other authors' files, with random heads: logits in closed form, and what is left out."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from teacher_files import fitted, images, options_of, path_of

from tinymim_jax.convert import ConvertError, convert_file
from tinymim_jax.convert.detect import find_weights
from tinymim_jax.convert.foreign import to_foreign
from tinymim_jax.convert.formats.hub import write as write_hub
from tinymim_jax.convert.formats.network import Network, refuse_two_pools
from tinymim_jax.convert.locate import locate
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT

CLASSES, WIDTH = 3, 16


def with_head(folder, name: str, head: dict[str, np.ndarray], *, drop: tuple[str, ...] = (), labels=(), prefix=None):
    """A golden file with more tensors and fewer, and its config.json with class names; returns (folder, options)."""
    from safetensors.numpy import save_file

    data, _ = locate(path_of(name)).read()
    data = data.get("module", data) if isinstance(data.get("module"), dict) else data
    state = {key: np.array(value) for key, value in data.items() if not key.startswith(drop or ("\0",))}
    if prefix:
        state = {f"{prefix}{key}": value for key, value in state.items()}
    save_file(state | head, folder / "model.safetensors")
    options = options_of(name)
    config = json.loads(options.pop("config").read_text()) if options["config"] else options.pop("config") or {}
    if labels:
        config |= {"id2label": {str(i): label for i, label in enumerate(labels)}}
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors", options


def random_head(width: int, stem: str, *norms: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(width)
    head = {f"{stem}.weight": rng.normal(size=(CLASSES, width)), f"{stem}.bias": rng.normal(size=CLASSES)}
    for norm in norms:
        head |= {f"{norm}.weight": rng.normal(1, 0.2, WIDTH), f"{norm}.bias": rng.normal(size=WIDTH)}
    return {key: value.astype(np.float32) for key, value in head.items()}


def tokens_of(name: str, model, params) -> tuple[ViT, dict, np.ndarray]:
    """The encoder for the golden images, its parameters and its output tokens, float64."""
    encoder, fitting = fitted(name, model, params)
    with jax.default_matmul_precision("highest"):
        return encoder, fitting, np.asarray(encoder.apply({"params": fitting}, jnp.asarray(images(name))), np.float64)


def normed(x: np.ndarray, scale, bias, eps: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


CASES = {
    # file, stem of the head, norm behind the pooling, tensors left out, its prefix, and the pool
    "hf_dinov2": ("classifier", None, (), "dinov2.", "cls_mean"),
    "hf_dinov2_reg": ("classifier", None, (), "dinov2_with_registers.", "cls_mean"),
    "fb_dinov2_swiglu": ("linear_head", None, (), "backbone.", "cls_mean"),
    "fb_dinov3": ("linear_head", None, (), "backbone.", "cls_mean"),
    "hf_data2vec": (
        "classifier",
        "data2vec_vision.pooler.layernorm",
        ("layernorm", "pooler"),
        "data2vec_vision.",
        "mean",
    ),
    "timm_eva02": ("head", "fc_norm", ("norm.", "head", "fc_norm"), None, "mean"),
    "timm_dinov2": ("head", None, ("head", "fc_norm"), None, "cls"),  # DeiT III has the same names in timm
}


@pytest.mark.parametrize("name", CASES)
def test_a_head_with_its_pooling(tmp_path, name):
    stem, norm, drop, prefix, pool = CASES[name]
    head = random_head(2 * WIDTH if pool == "cls_mean" else WIDTH, stem, *([norm] if norm else []))
    labels = ("cat", "dog", "eel") if name == "hf_dinov2" else ()
    path, options = with_head(tmp_path, name, head, drop=drop, labels=labels, prefix=prefix)
    model, params = convert_file("auto", path, **options)
    assert model["classifier"]["pool"] == pool
    assert model["classifier"]["classes"] == CLASSES
    assert model["preprocessing"]["class_names"] == list(labels)
    encoder, fitting, tokens = tokens_of(name, model, params)
    weight, bias = np.float64(head[f"{stem}.weight"]), np.float64(head[f"{stem}.bias"])
    read = {"cls": tokens[:, 0], "mean": tokens[:, encoder.prefix :].mean(1)}
    read["cls_mean"] = np.concatenate([read["cls"], read["mean"]], axis=1)
    if norm:
        eps = encoder.switches.eps
        assert model["classifier"].get("norm_eps", 1e-6) == eps
        read["mean"] = normed(read["mean"], np.float64(head[f"{norm}.weight"]), np.float64(head[f"{norm}.bias"]), eps)
    network = Classifier(encoder, **model["classifier"])
    assert network.record() == model["classifier"]
    with jax.default_matmul_precision("highest"):
        got = network.apply({"params": params | {"encoder": fitting}}, jnp.asarray(images(name)))
    np.testing.assert_allclose(got, read[pool] @ weight.T + bias, atol=5e-5)
    # The way back.
    back = to_foreign(model, params)
    for key, array in head.items():
        np.testing.assert_array_equal(back[key.removeprefix(prefix or "")], array)


LEFT_OUT = {
    "4 layers": ("fb_dinov2_swiglu", random_head(5 * WIDTH, "linear_head"), "backbone.", r"has 80 inputs"),
    "no CLS": ("hf_ijepa", random_head(WIDTH, "classifier"), "ijepa.", r"has 16 inputs, which no supported pooling"),
    "attention pool": ("timm_siglip", random_head(WIDTH, "head"), None, "pooled by attention"),
    "projection": ("timm_clip", {}, None, "a projection, not a classifier"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_other_poolings_are_left_out_and_said_once(tmp_path, case):
    name, head, prefix, message = LEFT_OUT[case]
    labels = ("cat", "dog", "eel") if name == "hf_ijepa" else ()
    path, options = with_head(tmp_path, name, head, labels=labels, prefix=prefix)
    model, params = convert_file("auto", path, **options)
    assert "classifier" not in model
    assert set(params) == {"encoder"}
    assert model["preprocessing"]["class_names"] == []
    reasons = [text for text in model["source"]["not_read"] if "of these, the head is" in text]
    assert len(reasons) == 1
    assert message.replace(r"\.", ".") in reasons[0]


def test_a_head_beside_a_plain_encoder_is_left_out_by_name():
    data, _ = locate(path_of("timm_vit")).read()
    state = {f"backbone.{key}": value for key, value in data.items() if not key.startswith("head")}
    family, found = find_weights(state | random_head(WIDTH, "linear_head"), {"architecture": "vit_tiny_patch16_224"})
    assert family == "vit"
    assert set(found.beside) == {"linear_head.weight", "linear_head.bias"}
    assert not found.left_out


def test_two_pools_and_formats(tmp_path):
    vit = ViT(WIDTH, 1, 2, 4, (8, 8))
    network = Classifier(vit, CLASSES, "cls_mean")
    params = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    assert params["head"]["kernel"].shape == (2 * WIDTH, CLASSES)
    record = {"encoder": vit.record(), "classifier": network.record()}
    exported = Network(record, params, {"class_names": []})
    for refuse in (lambda: refuse_two_pools(exported), lambda: write_hub(tmp_path / "hub", exported)):
        with pytest.raises(ConvertError, match=r"pool cls_mean\): export it --to stablehlo"):
            refuse()
    no_cls = vit.clone(switches=vit.switches.from_record({"cls_tokens": 0, "positions": "patches"}))
    with pytest.raises(ValueError, match="no CLS token: choose 'mean'"):
        Classifier(no_cls, CLASSES, "cls_mean").init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)))
