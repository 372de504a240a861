"""TEACHERS: published checkpoints by name, with the block of each that is tapped."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from tinymim_jax.errors import unknown
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks.stand_in import StandIn, encoder_zeros, is_missing


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A published checkpoint.

    embed_dim, depth: the architecture of the encoder in its file.
    tap: block, counted from 1, that is distilled from.
    family: the argument of `tinymim convert --from`.
    url: where its authors offer the file, or its page on the Hugging Face hub.
    md5: first six digits of the file's checksum, as published by its authors; None where they published none.
    patch_size: side of its square patches, in pixels.
    licence: of the weights, in the hub's spelling; '' where their authors state none.
    tap_is_ours: the paper does not study this teacher, and the tap is a choice of this project that was not tuned.
    more: what else of the encoder's record differs from a plain ViT's, for planning without the file.
    """

    embed_dim: int
    depth: int
    tap: int
    family: str
    url: str
    md5: str | None = None
    patch_size: int = 16
    licence: str = ""
    tap_is_ours: bool = False
    more: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def encoder(self) -> ViT:
        """An encoder of the sizes of its file, at 224 pixels."""
        plain = ViT(self.embed_dim, self.depth, self.embed_dim // 64, self.patch_size, pos_embed="learned").record()
        return ViT.from_record(plain | dict(self.more))


_MAE = "https://dl.fbaipublicfiles.com/mae/pretrain/mae_pretrain_vit_"
_MOCO = "https://dl.fbaipublicfiles.com/moco-v3/"
_TINYMIM = "https://drive.google.com/drive/folders/10L305AoXyBSjJK7WfhBlxi3PF2Ni31Yu"
_HUB = "https://huggingface.co/"


def _hub(model: str, sizes: tuple[int, int, int], licence: str, patch_size: int, **switches: Any) -> Teacher:
    """A model of the hub, of sizes (embed_dim, depth, tap)."""
    more: dict[str, Any] = {"switches": switches} if switches else {}
    if switches.get("mlp") == "gated":
        more["mlp_ratio"] = 8 / 3  # as many parameters as an MLP of four times the width
    return Teacher(*sizes, "auto", _HUB + model, None, patch_size, licence, tap_is_ours=True, more=more)


def _dinov3(model: str, sizes: tuple[int, int, int]) -> Teacher:
    rope = {"centred": True, "layout": "halves", "theta": 100.0}
    switches = {"registers": 4, "positions": "none", "qkv_bias": "qv", "layer_scale": True, "rope": rope, "eps": 1e-5}
    return _hub(f"facebook/dinov3-{model}-pretrain-lvd1689m", sizes, "dinov3-license", 16, **switches)


_CLIP = {"eps": 1e-5, "patch_bias": False, "pre_norm": True}
_SIGLIP = {"cls_tokens": 0, "positions": "patches", "activation": "gelu_tanh"}
_EVA = {
    "qkv_bias": "qv",
    "mlp": "gated",
    "activation": "silu",
    "mlp_norm": True,
    "rope": {"layout": "pairs", "reference": [16, 16]},
}

# Taps that the paper does not give are ours: three quarters of the depth for teachers that predicted hidden patches
# (I-JEPA, EVA-02, BEiT), whose last blocks serve that prediction, as the paper found for MAE's ViT-L; the last block
# for all others, whose outputs are what they were trained to give.
TEACHERS: dict[str, Teacher] = {
    # MAE release, README. Tapped blocks: TinyMIM, models_teacher.py, and the paper's table on the target block. The
    # paper does not study ViT-H: three quarters of the depth, as for ViT-L.
    "mae_vit_base": Teacher(768, 12, 12, "mae", _MAE + "base.pth", "8cad7c", licence="cc-by-nc-4.0"),
    "mae_vit_large": Teacher(1024, 24, 18, "mae", _MAE + "large.pth", "b8b06e", licence="cc-by-nc-4.0"),
    "mae_vit_huge": Teacher(
        1280,
        32,
        24,
        "mae",
        _MAE + "huge.pth",
        "9bdbb0",
        14,
        "cc-by-nc-4.0",
        tap_is_ours=True,
        more={"heads": [16] * 32},
    ),
    # The authors' own students, for sequential distillation; of the last block only q, k and v were trained.
    "tinymim_vit_base": Teacher(768, 12, 12, "tinymim", _TINYMIM),
    "tinymim_vit_small": Teacher(384, 12, 12, "tinymim", _TINYMIM),
    "dinov3_vit_small": _dinov3("vits16", (384, 12, 12)),
    "dinov3_vit_base": _dinov3("vitb16", (768, 12, 12)),
    "dinov3_vit_large": _dinov3("vitl16", (1024, 24, 24)),
    "dinov2_vit_small": _hub("facebook/dinov2-small", (384, 12, 12), "apache-2.0", 14, layer_scale=True),
    "dinov2_vit_base": _hub("facebook/dinov2-base", (768, 12, 12), "apache-2.0", 14, layer_scale=True),
    "dinov2_vit_large": _hub("facebook/dinov2-large", (1024, 24, 24), "apache-2.0", 14, layer_scale=True),
    "dinov2_reg_vit_base": _hub(
        "facebook/dinov2-with-registers-base", (768, 12, 12), "apache-2.0", 14, layer_scale=True, registers=4
    ),
    "dino_vit_base": _hub("facebook/dino-vitb16", (768, 12, 12), "apache-2.0", 16, eps=1e-12),
    "mocov3_vit_base": Teacher(
        768, 12, 12, "auto", _MOCO + "vit-b-300ep/vit-b-300ep.pth.tar", licence="cc-by-nc-4.0", tap_is_ours=True
    ),
    "deit3_vit_base": _hub(
        "timm/deit3_base_patch16_224.fb_in22k_ft_in1k",
        (768, 12, 12),
        "apache-2.0",
        16,
        layer_scale=True,
        positions="patches",
    ),
    "clip_vit_base": _hub("openai/clip-vit-base-patch16", (768, 12, 12), "mit", 16, **_CLIP, activation="quick_gelu"),
    "openclip_vit_base": _hub("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", (768, 12, 12), "mit", 16, **_CLIP),
    "siglip_vit_base": _hub("google/siglip-base-patch16-224", (768, 12, 12), "apache-2.0", 16, **_SIGLIP),
    "siglip2_vit_base": _hub("google/siglip2-base-patch16-224", (768, 12, 12), "apache-2.0", 16, **_SIGLIP),
    "eva02_vit_base": _hub("timm/eva02_base_patch14_224.mim_in22k", (768, 12, 9), "mit", 14, **_EVA),
    "eva02_vit_large": _hub("timm/eva02_large_patch14_224.mim_m38m", (1024, 24, 18), "mit", 14, **_EVA),
    "beit_vit_base": _hub(
        "microsoft/beit-base-patch16-224-pt22k",
        (768, 12, 9),
        "apache-2.0",
        16,
        eps=1e-12,
        positions="none",
        relative_bias=True,
        qkv_bias="qv",
        layer_scale=True,
    ),
    "pe_core_vit_base": _hub(
        "timm/vit_pe_core_base_patch16_224.fb",
        (768, 12, 12),
        "apache-2.0",
        16,
        **_CLIP,
        rope={"layout": "pairs", "order": "xy", "offset": 1},
    ),
    "ijepa_vit_huge": dataclasses.replace(
        _hub("facebook/ijepa_vith14_1k", (1280, 32, 24), "cc-by-nc-4.0", 14),
        more={"heads": [16] * 32, "switches": {"cls_tokens": 0, "positions": "patches"}},
    ),
    "aimv2_vit_large": dataclasses.replace(
        _hub("apple/aimv2-large-patch14-224", (1024, 24, 24), "apple-amlr", 14),
        more={
            "heads": [8] * 24,
            "mlp_ratio": 2.75,
            "switches": {
                "cls_tokens": 0,
                "positions": "patches",
                "norm": "rms",
                "eps": 1e-5,
                "patch_norm": True,
                "qkv_bias": "none",
                "linear_bias": False,
                "mlp": "gated",
                "activation": "silu",
            },
        },
    ),
    "radio_vit_base": dataclasses.replace(
        _hub("nvidia/C-RADIOv2-B", (768, 12, 12), "nvidia-open-model-license", 16),
        more={
            "final_norm": False,
            "switches": {"cls_tokens": 3, "registers": 5, "positions": "patches", "patch_bias": False},
        },
    ),
}


def find_teacher(name: str) -> Teacher:
    """The row of TEACHERS; the error for an unknown name suggests the nearest one."""
    if name not in TEACHERS:
        raise unknown("distill.teacher.name", name, TEACHERS)
    return TEACHERS[name]


def how_to_get(name: str, path: str) -> str:
    """Instructions for downloading the named teacher and converting it to `path`."""
    teacher = TEACHERS[name]
    if teacher.url.startswith(_HUB):
        model = teacher.url.removeprefix(_HUB)
        return f"hf download {model}\n  tinymim convert --from auto --input {model} --output {path}"
    known = teacher.url.endswith((".pth", ".pth.tar"))
    file = pathlib.PurePosixPath(teacher.url).name if known else "FILE.pth"
    checksum = f" (its md5 begins {teacher.md5})" if teacher.md5 else ""
    return f"download {teacher.url}{checksum}\n  tinymim convert --from {teacher.family} --input {file} --output {path}"


def teacher_stand_in(teacher: ConfigDict, key: str) -> list[StandIn]:
    """For the `config.distill.teacher` of a missing checkpoint: zeros of the shapes of its row in TEACHERS.

    Args:
      key: of this section in the config.

    Raises ValueError where the config does not name a row.
    """
    if not is_missing(teacher.path):
        return []
    if not teacher.name:
        raise ValueError(
            f"distill.teacher.path={teacher.path!r} is not here and distill.teacher.name is empty, so the teacher's "
            f"size is not known: give one of them. Names: {', '.join(TEACHERS)}"
        )
    row, path = find_teacher(teacher.name), teacher.path or f"the {teacher.name} of TEACHERS"
    loaded = encoder_zeros(path, row.encoder)
    note = f"the teacher is not here: zeros of {teacher.name}'s shapes stand in for it"
    return [StandIn(f"{key}.path", loaded, note)]
