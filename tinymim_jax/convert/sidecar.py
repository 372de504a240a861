"""What files beside the weights say about preprocessing: timm's config.json, or Hugging Face's two files."""

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from tinymim_jax.convert.errors import ConvertError, printable

_PILLOW = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_MAX_BYTES = 1 << 26


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """What was read.

    values: 'mean', 'std', 'interpolation', 'class_names' and 'image_size' (height, width), where the files have them.
    origin: the name of the file that each value, and the resizing, comes from.
    crop: the part of the resized short side that is kept, or its length in pixels; None if unknown.
    notes: what the user should know, a sentence each.
    """

    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    origin: dict[str, str] = dataclasses.field(default_factory=dict)
    crop: float | int | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def resize(self, side: int) -> int | None:
        """The short side in pixels before the central crop of `side` pixels; None if unknown."""
        if self.crop is None:
            return None
        return self.crop if isinstance(self.crop, int) else math.floor(side / self.crop)


def read_sidecar(weights: pathlib.Path, config: str | pathlib.Path | None = None) -> Sidecar:
    """Reads config.json and preprocessor_config.json in the folder of `weights`, if they exist.

    Args:
      config: read this file (and preprocessor_config.json in its folder) instead; 'none' reads nothing.

    Raises:
      ConvertError: a file is named and missing, or is not JSON of the known kinds.
    """
    if config == "none":
        return Sidecar()
    path, main = _main(weights, config)
    beside = path.parent / "preprocessor_config.json"
    processor = _read(beside) if beside.is_file() else {}
    try:
        timm = main.get("pretrained_cfg") or (main if {"mean", "std", "input_size"} <= set(main) else {})
        if timm:
            return _timm(timm, main, path.name)
        found = _hugging_face(main, path.name, processor, beside.name)
    except (TypeError, ValueError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise ConvertError(
            f"{path} or {beside.name} beside it is not understood ({printable(error)}); use --config none, and --mean, "
            "--std, --resize"
        ) from error
    if main and not found.values and found.crop is None:
        message = f"{path} says nothing about preprocessing in the way of timm or Hugging Face"
        if config:
            raise ConvertError(message)
        found.notes.append(message)
    return found


def read_config(weights: pathlib.Path, config: str | pathlib.Path | None = None) -> dict[str, Any]:
    """The content of the config.json that `read_sidecar` reads; {} without one."""
    return {} if config == "none" else _main(weights, config)[1]


def _main(weights: pathlib.Path, config: str | pathlib.Path | None) -> tuple[pathlib.Path, dict[str, Any]]:
    path = pathlib.Path(config).expanduser() if config else weights.parent / "config.json"
    if config and not path.is_file():
        raise ConvertError(f"--config {path}: no such file")
    return path, _read(path) if path.is_file() else {}


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ConvertError(f"{path} is larger than any configuration; use --config none")
        data = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConvertError(f"{path} cannot be read: {printable(error)}; use --config none to ignore it") from error
    if not isinstance(data, dict):
        raise ConvertError(f"{path} holds no JSON object; use --config none to ignore it")
    return data


def _timm(cfg: Mapping[str, Any], main: Mapping[str, Any], name: str) -> Sidecar:
    values: dict[str, Any] = {}
    for key in ("mean", "std"):
        if cfg.get(key) is not None:
            values[key] = [float(x) for x in cfg[key]]
    # timm draws the method anew for each image in training; its evaluation then uses bilinear.
    if cfg.get("interpolation"):
        values["interpolation"] = {"random": "bilinear"}.get(cfg["interpolation"], cfg["interpolation"])
    if cfg.get("input_size"):
        values["image_size"] = tuple(int(n) for n in cfg["input_size"][1:])
    if names := cfg.get("label_names") or main.get("label_names"):
        values["class_names"] = [str(label) for label in names]
    crop = float(cfg["crop_pct"]) if cfg.get("crop_pct") else None
    notes = []
    if cfg.get("crop_mode", "center") != "center":
        notes.append(
            f"{name} has crop_mode {cfg['crop_mode']!r}; here the short side is resized and the centre cropped"
        )
    return Sidecar(values, dict.fromkeys((*values, "resize"), name), crop, notes)


def _hugging_face(main: Mapping[str, Any], name: str, processor: Mapping[str, Any], beside: str) -> Sidecar:
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    notes: list[str] = []
    if labels := main.get("id2label"):
        names = [str(labels[str(i)]) for i in range(len(labels))]
        # Hugging Face writes LABEL_0, LABEL_1, ... where it was told no names.
        if not all(re.fullmatch(r"LABEL_\d+", label) for label in names):
            values["class_names"], origin["class_names"] = names, name
    if size := main.get("image_size"):
        values["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
        origin["image_size"] = name
    for key, theirs in (("mean", "image_mean"), ("std", "image_std")):
        if processor.get("do_normalize") is False:
            values[key], origin[key] = [float(key == "std")] * 3, beside
        elif processor.get(theirs):
            values[key], origin[key] = [float(x) for x in processor[theirs]], beside
    if processor.get("resample") is not None:
        values["interpolation"] = _PILLOW.get(processor["resample"], str(processor["resample"]))
        origin["interpolation"] = beside
    crop: int | None = None
    size = processor.get("size")
    if processor.get("do_resize", True) and size:
        size = {"height": size, "width": size} if isinstance(size, int) else size
        crop = int(size.get("shortest_edge") or min(size["height"], size["width"]))
        origin["resize"] = beside
        if "shortest_edge" not in size and not processor.get("do_center_crop"):
            notes.append(
                f"{beside} squeezes images to {size['height']}x{size['width']}; here the short side is resized and the "
                "centre cropped, which is the same for square images only"
            )
    return Sidecar(values, origin, crop, notes)
