"""Conversion of state dicts to our parameters and back, strict in names, shapes and bits."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from tinymim_jax.convert.architecture import Heads, grid_of, make_record, parts_of, sizes_of, whole_parts
from tinymim_jax.convert.errors import ConvertError, printable
from tinymim_jax.convert.inert_pickle import Opaque
from tinymim_jax.convert.names import FAMILIES, Family, Leaf, Shape, leaves, sizes_shown
from tinymim_jax.errors import unknown

_FLOATS = tuple(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32, np.float64)))
_MAX_LISTED = 8
# Where training programs put the state dict in what they save, and what wrappers put before its names.
_NESTS = ("model", "state_dict")
_PREFIXES = ("module.", "_orig_mod.")


def from_torch(
    family: str,
    data: Any,
    *,
    heads: Heads | None = None,
    decoder_heads: int | None = None,
    image_size: tuple[int, int] | None = None,
) -> tuple[dict, dict]:
    """Our architecture record and parameters from a PyTorch state dict.

    Args:
      family: a name in FAMILIES.
      data: numpy arrays by name; or what a training program saves, with that under 'model' or 'state_dict'. Names
        may begin with 'module.'.
      heads: attention heads, which no tensor shows: one number, or one for each block ([2, 2, 4], '2,2,4',
        '2*11,4'). The default is that of the published model of this width.
      decoder_heads: the same for the decoder of an MAE.
      image_size: (height, width) in pixels; by default the grid of the position table is taken to be square.

    Returns:
      The record (plain JSON; see `model.json`) and the nested dict of float32 arrays, which own their memory.
      Half-precision files are widened.

    Raises:
      ConvertError: a name is missing, unexpected or misshapen (all are listed), or heads or image_size do not fit.
    """
    state = _state_dict(data)
    plan = _plan(_family(family), state)
    if plan.problems:
        others = [name for name in FAMILIES if name != family and not _plan(FAMILIES[name], state).problems]
        hint = f"\nIt looks like {others[0]!r}: use --from {others[0]}" if others else ""
        raise ConvertError(_listed(f"the file does not hold a {family!r} model", plan.problems) + hint)
    model = make_record(FAMILIES[family], plan.parts, plan.sizes, heads, decoder_heads, image_size)
    params: dict = {}
    for leaf in plan.leaves:
        *folders, name = leaf.ours.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        # Always a copy: the file may go, and nobody can write through to it.
        node[name] = np.array(leaf.layout.ours(state[leaf.torch]), np.float32, order="C", copy=True)
    return model, params


def to_torch(family: str, model: Mapping, params: Mapping) -> dict[str, np.ndarray]:
    """The PyTorch state dict of our parameters: the inverse of `from_torch`, bit for bit.

    Args:
      family: a name in FAMILIES.
      model: the architecture record.
      params: nested dict of arrays (numpy or jax). Fixed position tables, which are no parameters of ours, are put in.

    Returns:
      float32 arrays by name, contiguous, in the order of PyTorch's state dict.

    Raises:
      ConvertError: the parameters are not those of this model in this family; all differences are listed.
    """
    expected = leaves(_family(family).rows_with(parts_of(model)), sizes_of(model))
    # What the record says that distillation added for the time of its training has no name in PyTorch.
    added = {"adapter"} & set(model)
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
    """What a family expects of a state dict, and how that differs from what is there."""

    parts: set[str]
    sizes: dict[str, int]
    leaves: list[Leaf]
    problems: list[str]


def _plan(family: Family, state: Mapping[str, Any]) -> _Plan:
    shapes = {name: value.shape for name, value in state.items() if isinstance(value, np.ndarray)}
    parts = {row.part for row in family.rows if row.torch.format(i=0) in state}
    # Of the two ways to pool, the state dict shows one: the norm of the other is then unexpected.
    parts = whole_parts(parts - {"cls"} if "mean" in parts else parts | {"cls"})
    rows = family.rows_with(parts)
    sizes = sizes_shown(rows, shapes)
    expected = leaves(rows, sizes)
    got = {name: _described(value) for name, value in state.items()}
    return _Plan(parts, sizes, expected, _differences({leaf.torch: leaf.shape for leaf in expected}, got))


def _described(value: Any) -> Shape | str:
    """The shape of a tensor of real numbers; what else it is, in words."""
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


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise unknown("family", name, FAMILIES)
    return FAMILIES[name]


def _state_dict(data: Any) -> dict[str, Any]:
    """The names and tensors in what a file holds, without what wrappers added."""
    for _ in _NESTS:
        inner = [data[nest] for nest in _NESTS if nest in data] if isinstance(data, dict) else []
        # Beside the weights, 'model' may be the name of the architecture, or the pickled model itself.
        inner = [x for x in inner if isinstance(x, dict)] or [x for x in inner if isinstance(x, Opaque)]
        data = inner[0] if inner else data
    if isinstance(data, Opaque):
        raise ConvertError(
            f"the file holds a whole pickled object ({printable(data.name)}), not its state dict: load it where that "
            "class is defined and save torch.save({'model': model.state_dict()}, 'NEW')"
        )
    if not isinstance(data, dict) or not data:
        found = "nothing" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise ConvertError(f"the file holds no state dict but {found}")
    for prefix in _PREFIXES:
        if all(isinstance(name, str) and name.startswith(prefix) for name in data):
            data = {name.removeprefix(prefix): value for name, value in data.items()}
    return {name if isinstance(name, str) else f"{name!r} (not a text)": value for name, value in data.items()}


def _fixed_tables(model: Mapping, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The position tables that PyTorch keeps among its tensors and we compute: those that `arrays` does not have."""
    tables = {}  # width, and tokens before the patches
    if model["encoder"]["pos_embed"] == "sincos":
        prefix = 2 if model["encoder"].get("dist_token") else 1
        tables["encoder/pos_embed"] = (model["encoder"]["embed_dim"], prefix)
    if "decoder" in model:
        tables["decoder/pos_embed"] = (model["decoder"]["embed_dim"], 1)
    absent = {path: table for path, table in tables.items() if path not in arrays}
    if not absent:
        return {}
    # Here, because it brings jax along, which nothing else in this package needs.
    from tinymim_jax.ops.posembed import sincos_table

    grid = grid_of(model["encoder"])
    return {path: sincos_table(width, grid, prefix) for path, (width, prefix) in absent.items()}


def _flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value
