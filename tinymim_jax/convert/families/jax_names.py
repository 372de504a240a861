"""Files of Google's vision_transformer and big_vision (.npz), rewritten with timm's names and PyTorch's layouts.

Names: older files count the layers of a block together (MlpBlock_3, LayerNorm_2); the parameters lie at the top, or
below `params/`, `opt/target/` or `params/img/` (SigLIP's image tower); with `scan` one array holds all blocks.
"""

import re
from collections.abc import Mapping

import numpy as np

from tinymim_jax.convert.errors import ConvertError, printable

_ROOTS = ("params/img/", "params/", "opt/target/", "")
_BLOCKS = "Transformer/encoderblock"
_TABLES = ("pos_embedding", "Transformer/posembed_input/pos_embedding")
_IGNORED = re.compile(r"(head|pre_logits|MAPHead_0)/.*")


def to_timm(arrays: Mapping[str, np.ndarray], grid: tuple[int, int] | None) -> tuple[dict[str, np.ndarray], list[str]]:
    """(a state dict with timm's names, names that were left out).

    Args:
      grid: patches (rows, columns), for models with a fixed position table, which is not in the file.

    Raises:
      ConvertError: unknown names, or `grid` is needed.
    """
    root = next((root for root in _ROOTS if f"{root}embedding/kernel" in arrays), None)
    if root is None:
        raise ConvertError("the file has no embedding/kernel: it is not one of vision_transformer or big_vision")
    own = {name.removeprefix(root): np.asarray(x, np.float32) for name, x in arrays.items() if name.startswith(root)}
    left_out = [name for name in arrays if not name.startswith(root)]
    needed = ("embedding/kernel", "embedding/bias", *(f"Transformer/encoder_norm/{name}" for name in ("scale", "bias")))
    if missing := [name for name in needed if name not in own]:
        raise ConvertError(f"the file lacks {', '.join(missing)}, which every ViT has")
    kernel = own.pop("embedding/kernel")
    state = {
        "patch_embed.proj.weight": kernel.transpose(3, 2, 0, 1),
        "patch_embed.proj.bias": own.pop("embedding/bias"),
    }
    if "cls" in own:
        state["cls_token"] = own.pop("cls")
    table = next((own.pop(name) for name in _TABLES if name in own), None)
    if table is None:
        if grid is None:
            raise ConvertError("its position table is not in the file: give the image size, --image_size 224 224")
        table = fixed_table(kernel.shape[-1], grid)
    state["pos_embed"] = table
    for ours, theirs in (("weight", "scale"), ("bias", "bias")):
        state[f"norm.{ours}"] = own.pop(f"Transformer/encoder_norm/{theirs}")
    for i, block in enumerate(_blocks(own)):
        state |= {f"blocks.{i}.{name}": x for name, x in _block(block).items()}
    rest = [name for name in own if not name.startswith(_BLOCKS)]
    if strange := [printable(name) for name in rest if not _IGNORED.fullmatch(name)]:
        raise ConvertError(f"these arrays are not known: {', '.join(strange[:8])}")
    return state, [*left_out, *rest]


def fixed_table(width: int, grid: tuple[int, int]) -> np.ndarray:
    """big_vision's sin-cos table, float32 [1, patches, width]: its frequencies end at 1/10000, unlike MAE's."""
    row, column = (x.reshape(-1, 1) for x in np.mgrid[: grid[0], : grid[1]])
    frequency = 1 / 10000 ** (np.arange(width // 4) / (width // 4 - 1))
    parts = [np.sin(column * frequency), np.cos(column * frequency), np.sin(row * frequency), np.cos(row * frequency)]
    return np.concatenate(parts, axis=1)[None].astype(np.float32)


def _blocks(own: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The arrays of each block by name."""
    stacked = {n.removeprefix(f"{_BLOCKS}/"): x for n, x in own.items() if n.startswith(f"{_BLOCKS}/")}
    if stacked:
        depth = len(next(iter(stacked.values())))
        return [{name: x[i] for name, x in stacked.items()} for i in range(depth)]
    found: dict[int, dict[str, np.ndarray]] = {}
    for name, x in own.items():
        if match := re.fullmatch(rf"{_BLOCKS}_(\d+)/(.*)", name):
            found.setdefault(int(match[1]), {})[match[2]] = x
    if missing := sorted(set(range(max(found, default=0))) - found.keys()):
        raise ConvertError(f"the file has no block {missing[0]}, and has block {max(found)}: it is not whole")
    return [found[i] for i in sorted(found)]


def _block(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A block with timm's names. Raises ConvertError for missing or unexpected arrays."""
    rest = {re.sub(r"^(?!LayerNorm)(\w+?)_\d+/", r"\1/", name): x for name, x in arrays.items()}
    norms = sorted({name.partition("/")[0] for name in arrays if name.startswith("LayerNorm")})
    try:
        kernels, biases = (
            {name: rest.pop(f"MultiHeadDotProductAttention/{name}/{leaf}") for name in ("query", "key", "value", "out")}
            for leaf in ("kernel", "bias")
        )
        width = len(kernels["query"])
        first, second = norms
        block = {
            "attn.qkv.weight": np.concatenate([kernels[n].reshape(width, -1).T for n in ("query", "key", "value")]),
            "attn.qkv.bias": np.concatenate([biases[n].reshape(-1) for n in ("query", "key", "value")]),
            "attn.proj.weight": kernels["out"].reshape(-1, width).T,
            "attn.proj.bias": biases["out"],
        }
        for ours, theirs in (("norm1", first), ("norm2", second)):
            block |= {f"{ours}.weight": rest.pop(f"{theirs}/scale"), f"{ours}.bias": rest.pop(f"{theirs}/bias")}
        for ours, theirs in (("mlp.fc1", "MlpBlock/Dense_0"), ("mlp.fc2", "MlpBlock/Dense_1")):
            block |= {f"{ours}.weight": rest.pop(f"{theirs}/kernel").T, f"{ours}.bias": rest.pop(f"{theirs}/bias")}
    except (KeyError, ValueError) as error:
        raise ConvertError(f"a block of the file is not that of a ViT: {error}") from error
    if rest:
        raise ConvertError(f"a block of the file has what no ViT has: {', '.join(map(printable, sorted(rest)))}")
    return block
