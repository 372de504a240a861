"""Exports a checkpoint to another runtime's format and runs the file there against jax before it is kept."""

import dataclasses
import functools
import importlib
import inspect
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.convert.formats.hub import in_timm, read_folder
from tinymim_jax.convert.formats.network import Network, size_of, without_training_parts
from tinymim_jax.convert.formats.runners import RUNNERS, Runner
from tinymim_jax.errors import unknown
from tinymim_jax.evaluation.model_card import licence_of, model_card
from tinymim_jax.evaluation.pictures import find_pictures
from tinymim_jax.evaluation.predictor import Model, load
from tinymim_jax.ops.color import normalize

# One module each in convert/formats, with `write(path, network, **options)`; what runs the file is in its runners.py.
PROGRAMS = ("onnx", "litert", "stablehlo", "hub")
# Largest difference from jax in float32, of the largest output (or of 1, where all are smaller).
LIMIT = 2e-6
# The same with a segmentation's head `mask`, whose last norm divides by how much the classes differ and so enlarges
# rounding: 2.5e-6 was measured of a network that had learned CamVid.
MASK_LIMIT = 1e-5
# With so few images, a difference that depends on the batch size shows; int8 needs more to count agreement.
_BATCHES = (1, 3, 8)
_IMAGES, _INT8_IMAGES = 8, 256
_SCENES, _INT8_SCENES = 3, 16  # of networks that label pixels, which have thousands of answers in each image
_WITHOUT_METADATA = ("litert", "stablehlo")
PIXELS = ("onnx", "stablehlo")  # formats that are tested with networks that label pixels


@dataclasses.dataclass(frozen=True)
class Comparison:
    """An exported file against jax.

    runtime: what ran it.
    images: how many.
    difference: largest |exported - jax|, divided by the largest |jax| where that is above 1. Of class maps: how far the
      logit of a class that was chosen lies below the largest one, at most.
    answers: images, or places of an image, for which there is a most probable class; 0 where the output is features.
    equal: those for which it is the same.
    cosine: smallest cosine between the two outputs of an image; None of class maps.
    """

    runtime: str
    images: int
    difference: float
    answers: int
    equal: int
    cosine: float | None


def network_of(model: Model, output: str | None = None) -> Network:
    """What is exported of a loaded model: float32 arrays on the host.

    output: one of network.OUTPUTS; None: logits where it has a head for classes, or else the mean of its patch tokens.
    """
    if output is None:
        output = "logits" if "head" in model.params or model.labels_pixels else "mean"
    record, params = model.record, jax.device_get(model.params)
    if model.labels_pixels and output in ("logits", "class_map"):
        record, params = without_training_parts(record, params)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    return Network(record, params, model.preprocessing, output)


def check_format(network: Network, to: str) -> None:
    """Raises ValueError for a network that labels pixels and a format that is not made for such networks."""
    if network.labels_pixels and to not in PIXELS:
        raise ValueError(
            f"--to {to} has no networks that label pixels: choose {' or '.join(PIXELS)}, --to "
            "tinymim_segmentation for PyTorch's names (head upernet), or --features mean for the encoder alone"
        )


def write_program(path: pathlib.Path, network: Network, to: str, **options: Any) -> None:
    """Writes `network` in the format `to`; an option that this format does not have is an error."""
    if to not in PROGRAMS:
        raise unknown("format", to, PROGRAMS)
    check_format(network, to)
    write = importlib.import_module(f"tinymim_jax.convert.formats.{to}").write
    known = inspect.signature(write).parameters
    for name, value in options.items():
        if name not in known and value:
            having = [each for each in PROGRAMS if name in _options(each)]
            raise ValueError(f"--{name} has no meaning for --to {to}; it is an option of {', '.join(having)}")
    write(path, network, **{name: value for name, value in options.items() if name in known})


def export(
    checkpoint: str,
    to: str,
    output: str | os.PathLike,
    *,
    features: str | None = None,
    class_map: bool = False,
    int8: bool = False,
    data: str | None = None,
    images: Sequence[str] = (),
    data_dir: str | None = None,
    licence: str | None = None,
    suites: Sequence[str] = (),
    **options: Any,
) -> Iterator[str]:
    """Writes `output` and yields lines that describe the result.

    Args:
      to: one of PROGRAMS.
      features: 'mean', 'cls' or 'tokens' exports the encoder's features; None: the logits of its head.
      class_map: of a network that labels pixels, the classes of all pixels of a window in place of logits.
      int8: weights and products in int8.
      data, images, data_dir: what to compare on; see `find_pictures`.
      licence: of the weights, for the hub; by default that of what they were made from, as far as it is known.
      suites: files of `tinymim evaluate --suite --output`, for the hub's model card.
      options: of the format: opset, batch.

    Raises:
      ValueError: the file differs from jax by more than LIMIT (or MASK_LIMIT), and was not kept; or an option is not
        the format's.
    """
    output = pathlib.Path(output).expanduser()
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"--output {output}: {output.absolute().parent} is not a folder; create it first")
    if to == "hub" and output.exists():
        raise FileExistsError(f"--output {output} exists already; delete it, or choose another folder")
    if to != "hub" and output.is_dir():
        raise IsADirectoryError(f"--output {output} is a folder; name a file in it")
    model = load(checkpoint)
    network = network_of(model, "class_map" if class_map else features or "logits")
    check_format(network, to)
    given = {name: value for name, value in options.items() if value is not None}
    if to == "hub":
        given["licence"] = licence_of(checkpoint, licence)
        given["card"] = model_card(checkpoint, network, licence=given["licence"], suites=suites, name=output.name)
    elif licence or suites:
        raise ValueError(f"--{'licence' if licence else 'suites'} is for the model card of --to hub")
    scratch = output.with_name(f".writing-{os.getpid()}-{output.name}")
    try:
        write_program(scratch, network, to, int8=int8, **given)
        yield _description(scratch, output, network, to, int8)
        few, many = (_SCENES, _INT8_SCENES) if network.labels_pixels else (_IMAGES, _INT8_IMAGES)
        count = many if int8 else few
        views, named = find_pictures(model, checkpoint, count=count, data=data, images=images, data_dir=data_dir)
        yield "  " + _check(scratch, network, to, int8, views, named)
        scratch.replace(output)
    except OSError as error:  # a full disk does not say where
        error.filename = error.filename or str(output)
        raise
    finally:
        _remove(scratch)
    if to in _WITHOUT_METADATA:
        beside = output.with_name(output.name + ".json")
        beside.write_text(json.dumps(_readable(network), indent=2) + "\n")
        yield f"  {beside.name} beside it: preprocessing, class names and architecture"
    yield from _hints(output, network, to)


def compare(runner: Runner, network: Network, views: np.ndarray) -> Comparison:
    """Runs `views` (uint8, as Model.views gives them) through `runner` and through jax on the CPU.

    The first images are run in batches of 1, 3 and 8, all in batches of 8.
    """
    mean, std = tuple(network.preprocessing["mean"]), tuple(network.preprocessing["std"])
    with jax.default_device(jax.local_devices(backend="cpu")[0]), jax.default_matmul_precision("highest"):
        step = functools.partial(jax.jit(network.scores()), jax.device_put(network.used_params()))
        pixels = np.asarray(normalize(jnp.asarray(views), mean, std))
        parts = [slice(start, start + _BATCHES[-1]) for start in range(0, len(pixels), _BATCHES[-1])]
        wanted = np.concatenate([np.asarray(step(pixels[part])) for part in parts])
        found = np.concatenate([runner(pixels[part]) for part in parts])
    is_map = network.output == "class_map"
    distance = _below_best if is_map else _apart
    difference = distance(found, wanted)
    for size in _BATCHES[:-1] if runner.batch is None else ():
        difference = max(difference, distance(runner(pixels[:size]), wanted[:size]))
    answers = equal = 0
    if is_map or network.output == "logits":
        same = (found if is_map else found.argmax(-1)) == wanted.argmax(-1)
        answers, equal = same.size, int(same.sum())
    scale = max(1.0, float(np.abs(wanted).max()))
    cosine = None if is_map else _smallest_cosine(found, wanted)
    return Comparison(runner.runtime, len(views), difference / scale, answers, equal, cosine)


def _apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference; infinite where something is not a number."""
    return float(np.abs(found - wanted).max()) if np.isfinite(found).all() else np.inf


def _below_best(found: np.ndarray, scores: np.ndarray) -> float:
    """How far the score of a class of `found` lies below the best one, at most: 0 where all classes are the best."""
    chosen = np.take_along_axis(scores, found[..., None].astype(int), axis=-1)[..., 0]
    return float((scores.max(-1) - chosen).max())


def _smallest_cosine(found: np.ndarray, wanted: np.ndarray) -> float:
    rows = [x.reshape(len(x), -1).astype(np.float64) for x in (found, wanted)]
    lengths = np.linalg.norm(rows[0], axis=1) * np.linalg.norm(rows[1], axis=1)
    return float(((rows[0] * rows[1]).sum(1) / np.maximum(lengths, 1e-30)).min())


def _check(path: pathlib.Path, network: Network, to: str, int8: bool, views: np.ndarray, named: str) -> str:
    """What the comparison gave, in words; ValueError if a float32 file differs too much."""
    try:
        runner = RUNNERS[to](path, None)
    except ImportError as error:
        if to != "hub":
            return f"not run, and so not compared with jax: {error}"
        runner = _read_back(path, network.output, str(error))
    found = compare(runner, network, views)
    kind = "pixels" if network.labels_pixels else "answers"
    answers = f", {found.equal} of {found.answers} {kind} equal" if found.answers else ""
    text = f"{found.runtime} against jax on {named}: largest difference {found.difference:.1e}{answers}"
    if int8:
        return text if found.cosine is None else f"{text}, smallest cosine {found.cosine:.4f}"
    limit = MASK_LIMIT if network.labels_pixels and network.segmenter.head == "mask" else LIMIT
    if not found.difference <= limit:
        raise ValueError(
            f"{text}. That is more than {limit:.0e} of the largest output, so the file was not kept; please report "
            "it with the versions of jax and of the runtime"
        )
    return text


def _read_back(path: pathlib.Path, output: str, why: str) -> Runner:
    """The hub folder as this package reads it, where PyTorch is not installed (`why`)."""
    record, params = read_folder(path)
    network = Network(record, params, record["preprocessing"], output)
    step = functools.partial(jax.jit(network.forward()), network.used_params())
    name = f"tinymim's own reader ({why})"
    return Runner(name, np.asarray, lambda pixels: np.asarray(step(pixels)))


def _description(path: pathlib.Path, output: pathlib.Path, network: Network, to: str, int8: bool) -> str:
    height, width = network.image_size
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    what = _what(network)
    stored = "weights as int8" if int8 else f"{size_of(network.used_params()) / 1e6:.2f} MB of them weights"
    mean, std = (" ".join(f"{x:.4g}" for x in network.preprocessing[name]) for name in ("mean", "std"))
    return (
        f"{output}: {to}, {size / 1e6:.2f} MB, {stored}; {what}\n"
        f"  input: images of {height}x{width}, float32, scaled to 0..1, then (x - mean) / std; mean {mean}, std {std}"
    )


def _what(network: Network) -> str:
    """The output, in words."""
    if network.labels_pixels:
        classes, (rows, columns) = network.segmenter.classes, network.logits_grid
        if network.output == "class_map":
            return f"the class of every pixel, one of {classes}"
        return f"logits of {classes} classes on a grid of {rows}x{columns}"
    if network.output == "logits":
        return f"logits of {network.record['classifier']['classes']} classes"
    return f"features ({network.output})"


def _hints(output: pathlib.Path, network: Network, to: str) -> Iterator[str]:
    if to == "stablehlo":
        from tinymim_jax.convert.formats.stablehlo import loads_in

        yield f"  jax.export.deserialize(bytearray(FILE.read())).call(pixels) runs it, in {loads_in()}"
    if to == "hub":
        height, width = network.image_size
        if height != width and in_timm(network.record):
            yield (
                f"  WARNING: timm resizes for oblong inputs in another way, so its transform shows another crop of an "
                f"image than the short side at {network.preprocessing['resize']} pixels does"
            )
        yield f"  read README.md in it, then upload it: hf upload NAME/MODEL {output}"


def _readable(network: Network) -> dict[str, Any]:
    """The description of the network with its JSON texts as values."""
    texts = network.description()
    return {key: json.loads(text) if text[:1] in "[{" else text for key, text in texts.items()}


def _options(to: str) -> set[str]:
    module = importlib.import_module(f"tinymim_jax.convert.formats.{to}")
    return set(inspect.signature(module.write).parameters)


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
