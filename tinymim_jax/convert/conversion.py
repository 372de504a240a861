"""Conversion of state dicts to our parameters and back, strict about names and shapes, without a change of any bit."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tinymim_jax.convert.architecture import Heads, grid_of, make_architecture, parts_of, sizes_of, whole_parts
from tinymim_jax.convert.errors import ConvertError, printable
from tinymim_jax.convert.families import FAMILIES
from tinymim_jax.convert.families.table import Family, Leaf, Shape, leaves, sizes_shown
from tinymim_jax.convert.readers.pickle_values import Opaque
from tinymim_jax.convert.segmentation import check_segmenter, make_segmenter, segmenter_parts, segmenter_sizes
from tinymim_jax.convert.state_dict import find_state_dict
from tinymim_jax.errors import unknown

_FLOATS = tuple(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))
_MAX_LISTED = 8
# What this family's names do not have, by patterns of tensor names; --from auto reads the first of them.
_AUTO = "--from auto reads such models"
_UNSUPPORTED = {
    r"\.ls[12]\.gamma$|\.gamma_[12]$": f"LayerScale (DINOv2, DeiT III, BEiT): {_AUTO}",
    r"(^|\.)(register_tokens|reg_token)$": f"register tokens: {_AUTO}",
    r"relative_position_|rel_pos_": f"relative position biases (BEiT): {_AUTO}",
    r"\.mlp\.(w12|fc1_g|w1)\.": f"gated MLPs (SwiGLU): {_AUTO}",
    r"\.attention\.(attention\.)?query\.": f"names of Hugging Face's transformers: {_AUTO}",
    r"\.in_proj_weight$": f"names of CLIP: {_AUTO}",
    r"^blocks\.\d+\.\d+\.": "blocks in chunks (training checkpoints of DINOv2)",
    r"\.[qk]_norm\.": "normalised queries and keys",
    r"^layers\.\d+\.(blocks|downsample)\.": "stages (Swin)",
}


def from_torch(
    family: str,
    data: Any,
    *,
    heads: Heads | None = None,
    decoder_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
    use: str | None = None,
    prefix: str | None = None,
) -> tuple[dict, dict]:
    """Our architecture and parameters from a PyTorch state dict.

    Args:
      family: a name in FAMILIES.
      data: numpy arrays by name; or what a training program saves, with that somewhere in it (see state_dict).
      heads: attention heads, which no tensor shows: one number, or one for each block ([2, 2, 4], '2,2,4', '2*11,4').
        The default is that of the published model of this width.
      decoder_heads: the same for the decoder of an MAE.
      image_size: (height, width) in pixels; by default the grid of the position table is taken to be square.
      use, prefix: which network of several to take, and how its names begin; see `find_state_dict`.

    Returns:
      The architecture (plain JSON, as in model.json) and the nested dict of float32 arrays, which own their memory.
      Half-precision files are widened.

    Raises:
      ConvertError: a name is missing, unexpected or misshapen (all are listed), or heads or image_size do not fit.
    """
    found = find_state_dict(data, family_of(family).anchor, use=use, prefix=prefix)
    return from_state_dict(family, found.state, heads=heads, decoder_heads=decoder_heads, image_size=image_size)


def from_state_dict(
    family: str,
    state: Mapping[str, Any],
    *,
    heads: Heads | None = None,
    decoder_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> tuple[dict, dict]:
    """As `from_torch`, of a state dict alone."""
    plan = _plan(family_of(family), state)
    if plan.problems:
        raise ConvertError(_listed(f"the file does not hold a {family!r} model", plan.problems) + _hint(family, state))
    if FAMILIES[family].pyramid:
        model = make_segmenter(FAMILIES[family], plan.parts, plan.sizes, heads, image_size)
    else:
        model = make_architecture(FAMILIES[family], plan.parts, plan.sizes, heads, decoder_heads, image_size)
    params: dict = {}
    for leaf in plan.leaves:
        *folders, name = leaf.ours.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        # A copy in every case: the file may be deleted, and its arrays are read-only.
        node[name] = np.array(leaf.layout.ours(state[leaf.torch]), np.float32, order="C", copy=True)
    return model, params


def to_torch(family: str, model: Mapping, params: Mapping) -> dict[str, np.ndarray]:
    """The PyTorch state dict of our parameters: the inverse of `from_torch`, bit for bit.

    Args:
      family: a name in FAMILIES.
      model: the architecture.
      params: nested dict of arrays (numpy or jax). Fixed position tables, which are no parameters here, are computed.

    Returns:
      float32 arrays by name, contiguous, in the order of PyTorch's state dict.

    Raises:
      ConvertError: the parameters are not those of this model in this family; all differences are listed.
    """
    known = family_of(family)
    if model["encoder"].get("switches", {}).get("stem"):
        raise ConvertError(
            f"a convolutional stem has no names in the family {family!r}, nor in timm: export the model --to onnx, "
            "stablehlo or litert"
        )
    if pyramid := known.pyramid:
        check_segmenter(family, pyramid, model)
        parts, sizes = segmenter_parts(model), segmenter_sizes(model)
    else:
        parts, sizes = parts_of(model), sizes_of(model)
    expected = leaves(known.rows_with(parts), sizes)
    # These parts of a distillation are used in its training only; PyTorch's families have no name for them.
    added = {"adapter", "statistics", "mask_token"} & set(model)
    arrays = dict(_flatten({part: tree for part, tree in params.items() if part not in added}))
    arrays |= _fixed_tables(model, arrays)
    problems = _differences(
        {leaf.ours: leaf.our_shape for leaf in expected}, {path: np.shape(x) for path, x in arrays.items()}
    )
    if problems:
        raise ConvertError(_listed(f"these parameters are not those of a {family!r} model", problems))
    return {
        leaf.torch: np.asarray(leaf.layout.torch(np.asarray(arrays[leaf.ours], np.float32), leaf.shape), order="C")
        for leaf in expected
    }


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Differences between the tensors that a family expects and those of a state dict."""

    parts: set[str]
    sizes: dict[str, int]
    leaves: list[Leaf]
    problems: list[str]


def _plan(family: Family, state: Mapping[str, Any]) -> _Plan:
    if family.ignored:
        state = {name: value for name, value in state.items() if not re.search(family.ignored, name)}
    shapes = {name: value.shape for name, value in state.items() if isinstance(value, np.ndarray)}
    parts = {row.part for row in family.rows if row.torch.format(i=0) in state}
    # A state dict shows one of the two ways to pool; the norm of the other one is then unexpected.
    parts = whole_parts(parts - {"cls"} if "mean" in parts else parts | {"cls"})
    rows = family.rows_with(parts)
    sizes = sizes_shown(rows, shapes)
    expected = leaves(rows, sizes)
    got = {name: _described(value) for name, value in state.items()}
    return _Plan(parts, sizes, expected, _differences({leaf.torch: leaf.shape for leaf in expected}, got))


def _described(value: Any) -> Shape | str:
    """The shape of a tensor of real numbers; for other values a description."""
    if not isinstance(value, np.ndarray):
        return f"({printable(value.name) if isinstance(value, Opaque) else type(value).__name__}, not a tensor)"
    if value.dtype not in _FLOATS or not value.size:
        return f"{'empty' if value.dtype in _FLOATS else value.dtype.name} {value.shape}"
    return value.shape


def _differences(expected: Mapping[str, Shape], got: Mapping[str, Shape | str]) -> list[str]:
    """One line for each name that is missing, unexpected or of another shape."""
    missing = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in got]
    unexpected = [f"unexpected: {printable(name)} {shape}" for name, shape in got.items() if name not in expected]
    misshapen = [
        f"shape: {name} is {got[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in got and got[name] != shape
    ]
    return [*_first(missing), *_first(unexpected), *_first(misshapen)]


def _first(lines: list[str]) -> list[str]:
    rest = len(lines) - _MAX_LISTED
    return lines if rest <= 0 else [*lines[:_MAX_LISTED], f"... and {rest} more {lines[0].partition(':')[0]}"]


def _listed(what: str, problems: list[str]) -> str:
    return "\n  ".join([f"{what}:", *problems])


def family_of(name: str) -> Family:
    """The row of FAMILIES; a ValueError with the choices if there is none."""
    if name not in FAMILIES:
        raise unknown("family", name, FAMILIES)
    return FAMILIES[name]


def _hint(family: str, state: Mapping[str, Any]) -> str:
    """A hint: what the file may be instead, or which of its parts no family supports."""
    for name in fitting_families(state):
        if name != family:
            return f"\nIt looks like {name!r}: use --from {name}"
    if any(isinstance(value, Opaque) and value.name.startswith("numpy.") for value in state.values()):
        return (
            "\nIt holds numpy arrays, not tensors: save {name: torch.from_numpy(x) for name, x in state.items()}, or "
            "use safetensors.numpy.save_file"
        )
    if any(name.startswith("fpn1.") for name in state):
        return "\nIt is the encoder of a segmentation network: use --from tinymim_segmentation"
    found = [what for pattern, what in _UNSUPPORTED.items() if any(re.search(pattern, name) for name in state)]
    return f"\nModels of this family do not have {'; '.join(found)}" if found else ""


def fitting_families(state: Mapping[str, Any]) -> list[str]:
    """The rows of FAMILIES whose names and shapes are those of this state dict."""
    return [name for name, family in FAMILIES.items() if not _plan(family, state).problems]


def _fixed_tables(model: Mapping, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The fixed position tables that PyTorch's state dicts contain, except for those that are in `arrays`."""
    tables = {}  # by path: the width, and the number of tokens before the patches
    if model["encoder"]["pos_embed"] == "sincos":
        prefix = 2 if model["encoder"].get("dist_token") else 1
        tables["encoder/pos_embed"] = (model["encoder"]["embed_dim"], prefix)
    if "decoder" in model:
        tables["decoder/pos_embed"] = (model["decoder"]["embed_dim"], 1)
    absent = {path: table for path, table in tables.items() if path not in arrays}
    if not absent:
        return {}
    # Imported here because it imports jax, which nothing else in this package needs.
    from tinymim_jax.ops.posembed import sincos_table

    grid = grid_of(model["encoder"])
    return {path: sincos_table(width, grid, prefix) for path, (width, prefix) in absent.items()}


def _flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
