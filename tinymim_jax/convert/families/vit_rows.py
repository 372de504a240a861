"""Rows that families share: timm's names for a plain ViT."""

import dataclasses

from tinymim_jax.convert.families.table import PATCHES, TRANSPOSED, Row, Rows


def part(name: str, *rows: Row) -> Rows:
    """The rows, as an optional part of the model."""
    return tuple(dataclasses.replace(row, part=name) for row in rows)


def linear(torch: str, ours: str, outputs: str, inputs: str) -> Rows:
    """nn.Linear; sizes as in `Row.shape`."""
    return (
        Row(f"{torch}.weight", f"{ours}/kernel", f"{outputs} {inputs}", TRANSPOSED),
        Row(f"{torch}.bias", f"{ours}/bias", outputs),
    )


def norm(torch: str, ours: str, width: str) -> Rows:
    """nn.LayerNorm."""
    return Row(f"{torch}.weight", f"{ours}/scale", width), Row(f"{torch}.bias", f"{ours}/bias", width)


def blocks(torch: str, ours: str, width: str, hidden: str) -> Rows:
    """The transformer blocks of an encoder or decoder."""
    torch, ours = torch + ".{i}", ours + "/blocks_{i}"
    return (
        *norm(f"{torch}.norm1", f"{ours}/norm1", width),
        *linear(f"{torch}.attn.qkv", f"{ours}/attn/qkv", f"3{width}", width),
        *linear(f"{torch}.attn.proj", f"{ours}/attn/proj", width, width),
        *norm(f"{torch}.norm2", f"{ours}/norm2", width),
        *linear(f"{torch}.mlp.fc1", f"{ours}/mlp/fc1", hidden, width),
        *linear(f"{torch}.mlp.fc2", f"{ours}/mlp/fc2", width, hidden),
    )


CLS = Row("cls_token", "encoder/cls_token", "1 1 d")
DIST = Row("dist_token", "encoder/dist_token", "1 1 d")
POSITIONS = Row("pos_embed", "encoder/pos_embed", "1 n d")
BODY = (
    Row("patch_embed.proj.weight", "encoder/patch_embed/kernel", "d 3 p p", PATCHES),
    Row("patch_embed.proj.bias", "encoder/patch_embed/bias", "d"),
    *blocks("blocks", "encoder", "d", "m"),
)
NORM = norm("norm", "encoder/norm", "d")

# Attention heads of ViT-T, -S, -B, -L and -H by width, in DeiT, timm and MAE alike.
VIT_HEADS = {192: (3, 3), 384: (6, 6), 768: (12, 12), 1024: (16, 16), 1280: (16, 16)}
