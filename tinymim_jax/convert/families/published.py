"""The families of Vision Transformers that other authors have published: what their tensors do not show.

`spellings.py` has the names of their tensors. A family more is a row here, and its names there if they are new.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}


@dataclasses.dataclass(frozen=True)
class Published:
    """A family.

    licence: of the published weights, as their licence file or model card says, in the hub's spelling; '' where members
      differ.
    eps: of the norms; None for 1e-6, but in files of Hugging Face's transformers what config.json says (often 1e-12).
    activation: of the MLP, where it is plain; None where members of the family differ and the names do not show it.
    switches: others that tensors do not show, as in `models.switches.Switches.record`.
    heads: attention heads by width.
    pixels: (mean, std) of the published preprocessing; None where members differ.
    model_types: `model_type` in Hugging Face's config.json.
    architectures: a pattern of the names of timm's models.
    """

    licence: str
    eps: float | None = 1e-6
    activation: str | None = "gelu"
    switches: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    heads: Mapping[int, int] = dataclasses.field(default_factory=lambda: _HEADS)
    pixels: tuple[tuple[float, ...], tuple[float, ...]] | None = _IMAGENET
    model_types: tuple[str, ...] = ()
    architectures: str = r"(?!)"


PUBLISHED: dict[str, Published] = {
    "dinov3": Published(
        "dinov3-license",
        eps=1e-5,
        switches={"rope": {"centred": True, "layout": "halves", "theta": 100.0}},
        heads=_HEADS | {1280: 20, 4096: 32},
        model_types=("dinov3_vit",),
        architectures=r".*dinov3|.*eupe",
    ),
    "dinov2": Published(
        "apache-2.0",
        heads=_HEADS | {1536: 24},
        model_types=("dinov2", "dinov2_with_registers"),
        architectures=r".*dinov2",
    ),
    "deit3": Published("apache-2.0", heads=_HEADS | {1280: 16}, architectures=r"deit3_"),
    "ijepa": Published("cc-by-nc-4.0", eps=None, heads=_HEADS | {1280: 16, 1408: 16}, model_types=("ijepa",)),
    # Names of Hugging Face's transformers; `vit` of FAMILIES are timm's names for the same models.
    "hf_vit": Published(
        "", eps=None, heads=_HEADS | {1280: 16}, pixels=None, model_types=("vit", "vit_mae", "deit", "vit_msn")
    ),
    "clip": Published(
        "",  # of OpenAI and OpenCLIP mit, of MetaCLIP cc-by-nc-4.0
        eps=1e-5,
        activation=None,
        heads=_HEADS | {1280: 16, 1664: 16},
        pixels=_CLIP,
        model_types=("clip_vision_model", "clip"),
        architectures=r"vit_.*clip",
    ),
    "siglip": Published(
        "apache-2.0",
        activation=None,
        heads=_HEADS | {1152: 16, 1536: 16},
        pixels=_HALF,
        model_types=("siglip_vision_model", "siglip", "siglip2_vision_model"),
        architectures=r"vit_.*siglip",
    ),
    "eva02": Published(
        "mit",
        switches={"rope": {"layout": "pairs", "order": "yx", "theta": 10000.0, "reference": [16, 16]}},
        pixels=_CLIP,
        architectures=r"eva02_",
    ),
    "beit": Published(
        "apache-2.0",
        eps=None,
        switches={"relative_bias": True},
        pixels=_HALF,
        model_types=("beit", "data2vec-vision"),
        architectures=r"beit",
    ),
    "pe": Published(
        "apache-2.0",
        eps=1e-5,
        switches={"rope": {"layout": "pairs", "order": "xy", "theta": 10000.0, "offset": 1}},
        heads=_HEADS | {1536: 16},
        pixels=_HALF,
        architectures=r"vit_pe_",
    ),
    "aimv2": Published(
        "apple-amlr",
        eps=1e-5,
        switches={"norm": "rms"},
        heads=_HEADS | {1024: 8, 1536: 12, 2048: 16, 3072: 24},
        pixels=_CLIP,
        model_types=("aimv2_vision_model", "aimv2"),
        architectures=r"aimv2_",
    ),
    "radio": Published(
        "nvidia-open-model-license",
        switches={"table": "square"},
        heads=_HEADS | {1280: 16},
        model_types=("radio",),
    ),
    "vit_jax": Published("apache-2.0", activation="gelu_tanh", heads=_HEADS | {1280: 16}, pixels=_HALF),
    "big_vision": Published(
        "apache-2.0", activation="gelu_tanh", heads=_HEADS | {1152: 16, 1280: 16, 1536: 16}, pixels=_HALF
    ),
}


def families_of(names: set[str], config: Mapping[str, Any]) -> list[str]:
    """The families that a file may be of: one, where its names and config.json agree on one.

    Args:
      names: of its tensors, without a prefix.
      config: the content of Hugging Face's or timm's config.json; {} without one.
    """
    kind, architecture = config.get("model_type"), str(config.get("architecture", ""))
    said = [
        name
        for name, row in PUBLISHED.items()
        if (kind in row.model_types) or (architecture and re.match(row.architectures, architecture))
    ]
    if "ijepa" in str((config.get("pretrained_cfg") or {}).get("tag", "")):
        return ["ijepa"]
    if said:
        return ["pe"] if "pe" in said else said[:1]
    text = "\n".join(sorted(names))

    def has(pattern: str) -> bool:
        return re.search(pattern, text, re.MULTILINE) is not None

    if has(r"^patch_generator\."):
        return ["radio"]
    if has(r"relative_position_bias_table$"):
        return ["beit"]
    if has(r"\.(ffn_ln|mlp\.norm)\.weight$"):
        return ["eva02"]
    if has(r"^(patch_embed\.norm|embeddings\.rms_norm)\.weight$"):
        return ["aimv2"]
    if has(r"^(storage_tokens|rope_embed\.periods)$|^(model\.)?layer\.0\.attention\.o_proj"):
        return ["dinov3"]
    table = has(r"^(.*\.)?(pos_embed|positional_embedding|position_embeddings?)(\.weight)?$")
    if not table:
        return ["dinov3"] if has(r"^reg_token$") else []
    token = has(r"^(.*\.)?(cls_token|class_embedding)$")
    if has(r"^(norm_pre|ln_pre|pre_layrnorm)\.weight$"):
        rotated = has(r"^attn_pool\.") or not has(r"^(norm|ln_post|post_layernorm)\.weight$")
        return ["pe"] if rotated else ["clip"]
    if has(r"^attn_pool\.|^head\.probe$|^post_layernorm\.weight$") and not token:
        return ["siglip"]
    if has(r"^(register_tokens|reg_token|embeddings\.register_tokens)$|\.mlp\.(w12|weights_in)\."):
        return ["dinov2"]
    if has(r"\.(ls1\.gamma|layer_scale1\.lambda1)$"):
        return ["dinov2"]  # DeiT III in timm's names too: the same switches
    if has(r"\.gamma_1$"):
        return ["deit3"]
    if has(r"^encoder\.layer\.0\.layernorm_before\.weight$"):
        return ["hf_vit"] if token else ["ijepa"]
    if not token:
        return ["ijepa", "siglip"]
    return []
