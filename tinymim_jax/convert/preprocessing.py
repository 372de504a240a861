"""How a converted model wants its images, which no tensor shows: given, read from files beside the weights, or assumed.

The keys are those that a training run writes (experiment.preprocessing) and that evaluation reads. `origin` says for
each of them where it comes from.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from tinymim_jax.convert.errors import ConvertError, printable
from tinymim_jax.convert.sidecar import Sidecar

PUBLISHED_BY = "as published for"
"""How the origin of values begins that are those of a family's published models."""

INTERPOLATIONS = ("bicubic", "bilinear")

ASSUMED = {
    "interpolation": "bicubic",
    "upright": False,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "class_names": [],
}
"""What holds where nothing says otherwise: the published evaluation on ImageNet of MAE, TinyMIM and DeiT."""

_ASSUMED_RESIZE = 256 / 224
_OF_SEGMENTERS = ("windows", "class_colours")


@dataclasses.dataclass(frozen=True)
class Given:
    """What the user says about the preprocessing; None where he says nothing.

    mean, std: three numbers for pixels in 0..1.
    resize: the short side in pixels before the central crop.
    interpolation: one of INTERPOLATIONS.
    class_names: in the order of the classifier's outputs.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    resize: int | None = None
    interpolation: str | None = None
    class_names: Sequence[str] | None = None


def complete_preprocessing(model: Mapping[str, Any], given: Given, exported: Mapping, sidecar: Sidecar) -> dict:
    """The `preprocessing` of model.json.

    Args:
      model: the architecture, for the size of the images and the number of classes.
      given: what the user says; it is preferred to what follows.
      exported: `preprocessing` in the metadata of a file that `tinymim export` wrote; {} for others.
      sidecar: what the files beside the weights say; it is preferred to the assumptions.

    Raises:
      ConvertError: a value is impossible, or the number of class names is not that of the classes.
    """
    size = list(model["encoder"]["image_size"])
    classes = model.get("classifier", model.get("segmenter", {})).get("classes", 0)
    if not classes:  # a run without a classifier records the classes of its images; they do not correspond to outputs
        exported = {key: value for key, value in exported.items() if key != "class_names"}
    read = {**sidecar.values, "resize": sidecar.resize(max(size))}
    # What was assumed before an export stays marked as assumed after it.
    guessed = exported.get("origin")
    guessed = guessed if isinstance(guessed, Mapping) else {}
    sources = [
        ({**dataclasses.asdict(given)}, lambda key: "given"),
        (exported, lambda key: "assumed" if guessed.get(key) == "assumed" else "read from the file's metadata"),
        (read, lambda key: _read_from(sidecar.origin.get(key, "a file beside the weights"))),
        (ASSUMED | {"resize": round(max(size) * _ASSUMED_RESIZE)}, lambda key: "assumed"),
    ]
    result: dict[str, Any] = {"image_size": size}
    origin = {"image_size": "the position table"}
    for key in ("resize", "interpolation", "upright", "mean", "std", "class_names"):
        values, where = next((values, where) for values, where in sources if values.get(key) is not None)
        value = values[key]
        result[key] = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        origin[key] = where(key)
    # Windows and colours of a segmentation network can only come from the metadata of one of our exports.
    result |= {key: exported[key] for key in _OF_SEGMENTERS if exported.get(key) and "segmenter" in model}
    _check(result, origin, classes)
    return result | {"origin": origin}


def described(preprocessing: Mapping[str, Any], *, classifier: bool) -> list[str]:
    """Lines for the user: each value with its origin; what was assumed comes last, with the options that change it."""
    origin = preprocessing["origin"]
    height, width = preprocessing["image_size"]
    shown = {
        "mean": " ".join(f"{x:g}" for x in preprocessing["mean"]),
        "std": " ".join(f"{x:g}" for x in preprocessing["std"]),
        "resize": f"{preprocessing['resize']}, then the central {height}x{width}",
        "interpolation": preprocessing["interpolation"],
    }
    if preprocessing["class_names"]:
        shown["class_names"] = _classes_shown(preprocessing["class_names"])
    lines = [f"  {key}: {value} ({origin[key]})" for key, value in shown.items() if origin[key] != "assumed"]
    assumed = [f"{key} {value}" for key, value in shown.items() if origin[key] == "assumed" and key != "class_names"]
    if assumed:
        lines.append(
            f"  ASSUMED, as the file does not say it: {'; '.join(assumed)}. If the model was trained otherwise, its "
            "results will be wrong: convert again with --mean, --std, --resize, --interpolation, or with its "
            "config.json beside the file"
        )
    if classifier and not preprocessing["class_names"]:
        lines.append("  no class names: classes are called by their numbers, unless --classes FILE names them")
    return lines


def read_class_names(path: str | pathlib.Path) -> list[str]:
    """Class names from a text file with one name on each line, or a JSON list, or JSON {"0": "name", ...}.

    Raises:
      ConvertError: it cannot be read, or holds something else.
    """
    path = pathlib.Path(path).expanduser()
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConvertError(f"--classes {path} cannot be read: {error}") from error
    if path.suffix != ".json":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        names = json.loads(text)
        names = [names[str(i)] for i in range(len(names))] if isinstance(names, dict) else names
    except (ValueError, KeyError) as error:
        raise ConvertError(f"--classes {path} holds no list of names: {printable(error)}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConvertError(f"--classes {path} holds no list of names")
    return names


def _read_from(origin: str) -> str:
    return origin if origin.startswith(PUBLISHED_BY) else f"read from {origin}"


def _check(result: Mapping[str, Any], origin: Mapping[str, str], classes: int) -> None:
    for key in ("mean", "std"):
        numbers = result[key]
        fits = len(numbers) == 3 and all(isinstance(x, int | float) and 0 <= x <= 1 for x in numbers)
        if not fits or (key == "std" and not all(numbers)):
            raise ConvertError(
                f"{key}={numbers} ({origin[key]}): it takes three numbers between 0 and 1, for pixels divided by 255, "
                f"such as --{key} 0.5 0.5 0.5"
            )
    if result["interpolation"] not in INTERPOLATIONS:
        raise ConvertError(
            f"interpolation={result['interpolation']!r} ({origin['interpolation']}) is not supported; choose "
            f"--interpolation {' or --interpolation '.join(INTERPOLATIONS)}"
        )
    largest = max(result["image_size"])
    if not isinstance(result["resize"], int) or result["resize"] < largest:
        raise ConvertError(
            f"resize={result['resize']} ({origin['resize']}): the short side before the crop cannot be smaller than "
            f"the {largest} pixels that the model takes"
        )
    names = result["class_names"]
    if names and len(names) != classes:
        has = f"has {classes} classes" if classes else "has no classes"
        raise ConvertError(
            f"{len(names)} class names ({origin['class_names']}), and the model {has}. If a file beside the weights "
            "belongs to another model, use --config none or --config FILE"
        )


def _classes_shown(names: Sequence[str]) -> str:
    shown = ", ".join(printable(name, 30) for name in names[:3])
    return f"{len(names)}: {shown}" + ", ..." * (len(names) > 3)
