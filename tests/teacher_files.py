"""Golden files of other authors' Vision Transformers: $TINYMIM_TEACHERS, or tests/golden/teachers.

Tiny random models of the authors' classes, saved as users get them, with their tokens after every block and the q, k
and v of their last block. index.json lists them.
"""

import functools
import json
import os
import pathlib
from typing import Any

import numpy as np

from tinymim_jax.convert import convert_file
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks.pretrained import Loaded, fit_positions

CNNS = ("convnext", "resnet")


def teachers_dir() -> pathlib.Path:
    return pathlib.Path(os.environ.get("TINYMIM_TEACHERS") or pathlib.Path(__file__).parent / "golden" / "teachers")


@functools.cache
def index() -> dict[str, Any]:
    return json.loads((teachers_dir() / "index.json").read_text())


def names(*, cnns: bool = False) -> list[str]:
    return [name for name, model in index()["models"].items() if cnns or model["family"] not in CNNS]


def images(name: str) -> np.ndarray:
    """float32 [batch, height, width, 3], normalized."""
    with np.load(teachers_dir() / "images.npz") as file:
        return file[index()["models"][name]["images"]]


def arrays(name: str) -> dict[str, np.ndarray]:
    with np.load(teachers_dir() / f"{name}.npz") as file:
        return dict(file)


def path_of(name: str) -> pathlib.Path:
    """The file of a model, or its folder where it has one."""
    files = index()["models"][name]["files"]
    weights = next(file for file in files if not file.endswith("config.json"))
    return teachers_dir() / weights.split("/")[0]


def config_of(name: str) -> pathlib.Path | None:
    """config.json, which lies beside the weights of others under a name of its own here."""
    files = [file for file in index()["models"][name]["files"] if file.endswith(".config.json")]
    return teachers_dir() / files[0] if files else None


def options_of(name: str) -> dict[str, Any]:
    """What a user has to say of a model so small: heads, the oblong images, and what its file does not show."""
    found, model = index(), index()["models"][name]
    options: dict[str, Any] = {"heads": found["heads"], "config": config_of(name)}
    if model["family"] != "radio":  # whose table is for larger images
        options["image_size"] = images(name).shape[1:3]
    if name == "openclip":
        options["activation"] = "quick_gelu"
    if name == "baai_eva02":
        config = json.loads((teachers_dir() / "timm_eva02.config.json").read_text())
        options["rope_grid"] = tuple(config["model_args"]["ref_feat_shape"])
    return options


def converted(name: str, family: str = "auto", **more: Any) -> tuple[dict, dict]:
    """(architecture, parameters) of a golden model."""
    return convert_file(family, path_of(name), **(options_of(name) | more))


def fitted(name: str, model: dict, params: dict) -> tuple[ViT, dict]:
    """The encoder for the golden images, and its parameters."""
    encoder = ViT.from_record(model["encoder"], image_size=images(name).shape[1:3])
    return encoder, fit_positions(Loaded(name, model, params), encoder)
