"""Each family of published Vision Transformers once as the teacher of a distillation, and once as its start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import DIGITS, small_config
from teacher_files import converted, images

from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.tasks import TASKS
from tinymim_jax.tasks.pretrained import Loaded, fit_positions

FAMILIES = (
    *("timm_vit", "timm_deit3", "fb_mocov3", "fb_dino_full", "fb_dinov2_reg", "timm_dinov2_swiglu", "fb_dinov3_plus"),
    *("hf_dinov3", "openclip", "timm_siglip", "hf_ijepa", "hf_aimv2", "timm_eva02", "fb_pe_core", "timm_pe_spatial"),
    *("hf_beit", "hf_vitmae", "hf_radio", "vitjax_augreg", "bv_siglip2_scan"),
)
SIZE = images("timm_vit").shape[1:3]
WORDS = (
    f"model.image_size=({SIZE[0]},{SIZE[1]})",
    "model.patch_size=4",
    "model.dtype=float32",
    "model.drop_path=0.0",
    "model.pos_embed=learned",
)
BATCH = {
    "image": jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, *SIZE, 3), np.uint8)),
    "label": jnp.zeros(2, jnp.int32),
}


def saved(name: str, path) -> tuple[dict, dict]:
    """The golden model, which is saved to `path`."""
    model, params = converted(name)
    save_params(path, params, model)
    return model, params


@pytest.mark.parametrize("name", FAMILIES)
def test_as_a_teacher_and_as_a_start(name, tmp_path):
    """A twin that sees the same pixels has loss 0, a plain student has not; fine-tuning starts from it as it is."""
    model, params = saved(name, tmp_path / "teacher")
    record, pixels = ViT.from_record(model["encoder"]), model["preprocessing"]
    sizes = [f"model.{key}={model['encoder'][key]}" for key in ("embed_dim", "depth", "mlp_ratio")]
    teacher = f"distill.teacher.path={tmp_path / 'teacher'}"
    plain = TASKS["distill"].build(small_config("distill", *WORDS, teacher), DIGITS)
    assert "switches" not in plain.model["encoder"]
    assert plain.origin["teacher"]["mean"] == pytest.approx(pixels["mean"])
    frozen = plain.load_frozen()
    losses = jax.jit(plain.losses, static_argnums=4)
    found = losses(plain.init(jax.random.key(0)), frozen, BATCH, jax.random.key(1), False)
    assert np.isfinite(found["loss"]).all()
    assert (np.asarray(found["loss"]) > 1e-6).all()

    start = [f"init={tmp_path / 'teacher'}", *sizes, f"model.heads={record.block_heads[0]}"]
    own = [f"data.{key}=({','.join(map(str, pixels[key]))})" for key in ("mean", "std")]
    twin = TASKS["distill"].build(small_config("distill", *WORDS, *start, *own, teacher), DIGITS)
    weights = twin.start(jax.device_get(twin.init(jax.random.key(0))))
    same = jax.jit(twin.losses, static_argnums=4)(weights, frozen, BATCH, jax.random.key(1), False)
    np.testing.assert_allclose(same["loss"], 0, atol=1e-5)

    tuned = TASKS["classify"].build(small_config("finetune", *WORDS, *start, *own), DIGITS)
    weights = tuned.start(jax.device_get(tuned.init(jax.random.key(0))))
    network = Classifier(ViT.from_record(tuned.model["encoder"]), **tuned.model["classifier"])
    assert network.encoder.switches == record.switches
    shown = normalize(BATCH["image"], tuple(pixels["mean"]), tuple(pixels["std"]))
    encoder = record.clone(image_size=SIZE, final_norm=False)
    fitted = {k: v for k, v in fit_positions(Loaded("", model, params), encoder).items() if k != "norm"}
    pooled = np.asarray(encoder.apply({"params": fitted}, shown))[:, encoder.prefix :].mean(1)
    norm = weights["fc_norm"]
    want = (pooled - pooled.mean(-1, keepdims=True)) / np.sqrt(pooled.var(-1, keepdims=True) + 1e-6)
    features = network.apply({"params": weights}, shown, method="features")
    np.testing.assert_allclose(features, want * norm["scale"] + norm["bias"], atol=2e-4)
