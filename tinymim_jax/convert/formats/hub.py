"""A folder for the Hugging Face hub, which timm, transformers and tinymim-jax load: weights, config.json, README.md.

timm's VisionTransformer has one number of heads for all blocks and nothing behind its last block. Models that it cannot
express (an adaptive last block, TinyMIM*-T) come with their own PyTorch code, which transformers loads with
`trust_remote_code=True`; timm refuses such a folder.
"""

import importlib.resources
import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.formats.network import Network, refuse_two_pools
from tinymim_jax.runtime.files import write_json, write_text

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
_CODE, _PROCESSOR = "modeling_tinymim.py", "preprocessor_config.json"
# timm's names by width, depth and heads. Other numbers are among the arguments in config.json.
_NAMES = {(192, 12, 3): "tiny", (384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large"}
# The arguments of a timm model that `read_folder` understands.
_ARGUMENTS = {"img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "global_pool", "fc_norm"}
_HARMLESS = {"num_classes", "in_chans", "drop_rate", "drop_path_rate", "attn_drop_rate", "proj_drop_rate"}
_HARMLESS |= {"patch_drop_rate", "pos_drop_rate", "weight_init", "dynamic_img_size", "class_token", "qkv_bias"}


def write(path: pathlib.Path, network: Network, *, card: str = "", licence: str = "other") -> None:
    """Writes the folder `path`, which must not exist.

    Args:
      card: text of README.md.
      licence: of the weights, as the hub writes licences (apache-2.0, cc-by-nc-4.0, other).
    """
    from tinymim_jax.convert import FORMATS

    if changed := network.record["encoder"].get("switches"):
        remedy = "--to stablehlo or litert, or --to original with the names of the file it came from"
        if set(changed) == {"stem"}:
            remedy = "--to onnx, stablehlo or litert"
        raise ConvertError(
            f"a folder for the hub holds a plain ViT, and this encoder differs from it ({', '.join(changed)}): export "
            f"it {remedy}"
        )
    refuse_two_pools(network)
    record: dict[str, Any] = {"encoder": network.record["encoder"]}
    if network.output == "logits":
        record["classifier"] = network.record["classifier"]
    if not record["encoder"]["final_norm"] and "classifier" not in record:
        raise ConvertError("an encoder without a final norm has no features that timm could give: export its logits")
    family = "tinymim_star" if record.get("classifier", {}).get("hidden_dim") else "vit"
    preprocessing = {key: value for key, value in network.preprocessing.items() if key != "origin"}
    preprocessing["class_names"] = network.class_names
    path.mkdir()
    FORMATS[family](path / WEIGHTS, record | {"preprocessing": preprocessing}, network.used_params())
    if in_timm(record):
        config = _timm_config(record, preprocessing, licence)
    else:
        config = _own_config(record, preprocessing)
        code = importlib.resources.files("tinymim_jax.convert.formats") / "hub_model.txt"
        write_text(path / _CODE, code.read_text())
        write_json(path / _PROCESSOR, _processor(preprocessing))
    write_json(path / CONFIG, config)
    write_text(path / CARD, card)


def in_timm(record: Mapping[str, Any]) -> bool:
    """Whether timm has an architecture that computes what this record describes."""
    encoder, classifier = record["encoder"], record.get("classifier", {})
    two_tokens_by_mean = encoder.get("dist_token") and classifier.get("pool") == "mean"
    return len(set(encoder["heads"])) == 1 and not classifier.get("hidden_dim") and not two_tokens_by_mean


def read_folder(path: str | pathlib.Path, **given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(architecture record, parameters) of a folder of `write`, or of a plain ViT that timm saved for the hub.

    Args:
      given: further arguments of `convert_file`.

    Raises ConvertError if the folder is another model's.
    """
    from tinymim_jax.convert import convert_file

    path = pathlib.Path(path).expanduser()
    try:
        config = json.loads((path / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise ConvertError(f"cannot read {path}: it needs a {CONFIG} beside its {WEIGHTS} ({error})") from error
    family, heads, size = _shape_of(path, config)
    # timm writes pytorch_model.bin unless it is told otherwise.
    weights = path / WEIGHTS if (path / WEIGHTS).exists() else path / "pytorch_model.bin"
    known = {"heads": heads, "image_size": size} | {name: value for name, value in given.items() if value is not None}
    return convert_file(family, weights, **known)


def _shape_of(path: pathlib.Path, config: Mapping[str, Any]) -> tuple[str, Any, tuple[int, int]]:
    """(family of the tensor names, attention heads, image size) of a config.json."""
    if config.get("model_type") == "tinymim":
        encoder, classifier = config["encoder"], config.get("classifier", {})
        family = "tinymim_star" if classifier.get("hidden_dim") else "vit"
        return family, encoder["heads"], tuple(encoder["image_size"])
    name, arguments = config.get("architecture", ""), config.get("model_args", {})
    if not name.startswith(("vit_", "deit_")):
        raise ConvertError(f"cannot read {path}: its architecture is {name!r}, and only timm's plain ViTs are known")
    if strange := sorted(set(arguments) - _ARGUMENTS - _HARMLESS):
        raise ConvertError(f"cannot read {path}: its model_args {', '.join(strange)} have no counterpart here")
    size = arguments.get("img_size") or config.get("pretrained_cfg", config)["input_size"][1:]
    height, width = (size, size) if isinstance(size, int) else size
    usual = {label: heads for (_, _, heads), label in _NAMES.items()}.get(name.split("_")[1])
    return "vit", arguments.get("num_heads", usual), (height, width)


def _timm_config(record: Mapping[str, Any], preprocessing: Mapping[str, Any], licence: str) -> dict[str, Any]:
    encoder, classifier = record["encoder"], record.get("classifier", {"classes": 0, "pool": "mean"})
    size = _NAMES.get((encoder["embed_dim"], encoder["depth"], encoder["heads"][0]), "base")
    height, width = encoder["image_size"]
    pooled_first = "classifier" in record and classifier["pool"] == "mean"
    arguments = {
        "img_size": [height, width],
        "patch_size": encoder["patch_size"],
        "embed_dim": encoder["embed_dim"],
        "depth": encoder["depth"],
        "num_heads": encoder["heads"][0],
        "mlp_ratio": encoder["mlp_ratio"],
        "global_pool": "avg" if classifier["pool"] == "mean" else "token",
        "fc_norm": pooled_first,
    }
    distilled = bool(encoder.get("dist_token"))
    if distilled:
        arguments.pop("fc_norm")
    resize = preprocessing["resize"]
    config: dict[str, Any] = {
        "architecture": f"deit_{size}_distilled_patch16_224" if distilled else f"vit_{size}_patch16_224",
        "num_classes": classifier["classes"],
        "num_features": encoder["embed_dim"],
        "global_pool": arguments["global_pool"],
        "model_args": arguments,
        "pretrained_cfg": {
            "tag": "tinymim",
            "custom_load": False,
            "input_size": [3, height, width],
            "fixed_input_size": True,
            "interpolation": preprocessing["interpolation"],
            "crop_pct": _crop_fraction(max(height, width), resize),
            "crop_mode": "center",
            "mean": list(preprocessing["mean"]),
            "std": list(preprocessing["std"]),
            "num_classes": classifier["classes"],
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": ["head", "head_dist"] if distilled else "head",
            "license": licence,
        },
    }
    if names := list(preprocessing.get("class_names", [])):
        config["label_names"] = names
    return config


def _crop_fraction(side: int, resize: int) -> float:
    """timm's crop_pct, with which it computes the short side again: floor(side / crop_pct) == resize."""
    fraction = side / resize
    while math.floor(side / fraction) < resize:
        fraction = math.nextafter(fraction, 0.0)
    return fraction


def _own_config(record: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    names = list(preprocessing.get("class_names", []))
    names = names or [f"LABEL_{i}" for i in range(record.get("classifier", {}).get("classes", 0))]
    module = _CODE.removesuffix(".py")
    return {
        # timm then reports that the model is unknown.
        "architecture": "tinymim",
        "model_type": "tinymim",
        "architectures": ["TinyMIMForImageClassification"],
        "auto_map": {
            "AutoConfig": f"{module}.TinyMIMConfig",
            "AutoModel": f"{module}.TinyMIMForImageClassification",
            "AutoModelForImageClassification": f"{module}.TinyMIMForImageClassification",
        },
        "encoder": record["encoder"],
        "classifier": record.get("classifier", {}),
        "preprocessing": {key: value for key, value in preprocessing.items() if key != "class_names"},
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _processor(preprocessing: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' image processor of the same resizing, cropping and normalizing."""
    height, width = preprocessing["image_size"]
    return {
        "image_processor_type": "BitImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": preprocessing["resize"]},
        "resample": 3,  # bicubic
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(preprocessing["mean"]),
        "image_std": list(preprocessing["std"]),
    }
