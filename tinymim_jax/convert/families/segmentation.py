"""Segmentation networks of TinyMIM's release, as mmsegmentation names them: backbone, decode_head, auxiliary_head."""

from tinymim_jax.convert.families.table import CONV, PATCHES, UPSAMPLE, Family, Row, Rows
from tinymim_jax.convert.families.vit_rows import linear, norm, part

_STATISTICS = "batch_stats"
# Buffers that PyTorch's modules keep beside their weights; they follow from the architecture or are unused.
_BUFFERS = r"\.(relative_position_index|num_batches_tracked)$"


def _batch_norm(torch: str, ours: str, width: str) -> Rows:
    return (
        *norm(torch, ours, width),
        Row(f"{torch}.running_mean", f"{_STATISTICS}/{ours}/mean", width),
        Row(f"{torch}.running_var", f"{_STATISTICS}/{ours}/variance", width),
    )


def _conv(torch: str, ours: str, outputs: str, inputs: str, size: int, *, bias: bool) -> Rows:
    kernel = Row(f"{torch}.weight", f"{ours}/kernel", f"{outputs} {inputs} {size} {size}", CONV)
    return (kernel, Row(f"{torch}.bias", f"{ours}/bias", outputs)) if bias else (kernel,)


def _conv_norm(torch: str, ours: str, outputs: str, inputs: str, size: int) -> Rows:
    conv = _conv(f"{torch}.conv", f"{ours}/conv", outputs, inputs, size, bias=False)
    return (*conv, *_batch_norm(f"{torch}.bn", f"{ours}/norm", outputs))


def _upsample(torch: str, ours: str, inputs: str, outputs: str) -> Rows:
    return (
        Row(f"{torch}.weight", f"{ours}/kernel", f"{inputs} {outputs} 2 2", UPSAMPLE),
        Row(f"{torch}.bias", f"{ours}/bias", outputs),
    )


def _block() -> Rows:
    torch, ours = "backbone.blocks.{i}", "encoder/blocks_{i}"
    return (
        Row(f"{torch}.gamma_1", f"{ours}/scale1", "d"),
        Row(f"{torch}.gamma_2", f"{ours}/scale2", "d"),
        *norm(f"{torch}.norm1", f"{ours}/norm1", "d"),
        Row(f"{torch}.attn.relative_position_bias_table", f"{ours}/attn/relative_bias", "r h"),
        *linear(f"{torch}.attn.qkv", f"{ours}/attn/qkv", "3d", "d"),
        *linear(f"{torch}.attn.proj", f"{ours}/attn/proj", "d", "d"),
        *norm(f"{torch}.norm2", f"{ours}/norm2", "d"),
        *linear(f"{torch}.mlp.fc1", f"{ours}/mlp/fc1", "m", "d"),
        *linear(f"{torch}.mlp.fc2", f"{ours}/mlp/fc2", "d", "m"),
    )


def _quadruple(inputs: str, middle: str, outputs: str) -> Rows:
    return (
        *_upsample("backbone.fpn1.0", "pyramid/up4_first", inputs, middle),
        *_batch_norm("backbone.fpn1.1", "pyramid/up4_norm", middle),
        *_upsample("backbone.fpn1.3", "pyramid/up4_second", middle, outputs),
        *_upsample("backbone.fpn2.0", "pyramid/up2", inputs, outputs),
    )


def _heads(width: str) -> Rows:
    head, ours = "decode_head", "decode_head"
    rows = _conv(f"{head}.conv_seg", f"{ours}/classifier/conv", "k", "c", 1, bias=True)
    for i in range(4):
        rows += _conv_norm(f"{head}.psp_modules.{i}.1", f"{ours}/pool_{i}", "c", width, 1)
    rows += _conv_norm(f"{head}.bottleneck", f"{ours}/bottleneck", "c", f"{width}+4c", 3)
    for i in range(3):
        rows += _conv_norm(f"{head}.lateral_convs.{i}", f"{ours}/lateral_{i}", "c", width, 1)
    for i in range(3):
        rows += _conv_norm(f"{head}.fpn_convs.{i}", f"{ours}/fpn_{i}", "c", "c", 3)
    rows += _conv_norm(f"{head}.fpn_bottleneck", f"{ours}/fpn_bottleneck", "c", "4c", 3)
    head, ours = "auxiliary_head", "auxiliary_head"
    auxiliary = _conv(f"{head}.conv_seg", f"{ours}/classifier/conv", "k", "a", 1, bias=True)
    auxiliary += _conv_norm(f"{head}.convs.0", f"{ours}/conv", "a", width, 3)
    return rows + part("auxiliary", *auxiliary)


_TOKENS = (
    Row("backbone.cls_token", "encoder/cls_token", "1 1 d"),
    Row("backbone.pos_embed", "encoder/pos_embed", "1 n d"),
)
_PATCHES = (
    Row("backbone.patch_embed.proj.weight", "encoder/patch_embed/kernel", "d 3 p p", PATCHES),
    Row("backbone.patch_embed.proj.bias", "encoder/patch_embed/bias", "d"),
)

FAMILY = Family(
    (*_TOKENS, *_PATCHES, *_block(), *_quadruple("d", "d", "d"), *_heads("d")),
    heads={},
    ignored=_BUFFERS,
    pyramid="plain",
)

STAR = Family(
    (
        Row("backbone.dist_token", "encoder/dist_token", "1 1 d"),
        *_TOKENS,
        *_PATCHES,
        *norm("backbone.conv1x1.0", "widen/norm", "d"),
        *linear("backbone.conv1x1.1", "widen/linear", "w", "d"),
        *_block(),
        *_quadruple("d", "2d", "4d"),
        *_conv("backbone.fpn3", "pyramid/same", "4d", "d", 1, bias=True),
        *_conv("backbone.fpn4.0", "pyramid/down", "4d", "w", 3, bias=True),
        *_heads("4d"),
    ),
    heads={},
    ignored=_BUFFERS,
    pyramid="star",
)
