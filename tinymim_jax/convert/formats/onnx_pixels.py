"""The ONNX graph of the heads that label pixels, on maps [batch, channels, rows, columns]."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinymim_jax.convert.formats.network import Network
from tinymim_jax.convert.formats.onnx_graph import Graph
from tinymim_jax.convert.formats.onnx_vit import block_outputs, finish, transformer_block, widened
from tinymim_jax.models.convolutions import STATISTICS
from tinymim_jax.models.pixel_heads import MASK_BLOCKS, UNIT_EPS, mask_heads
from tinymim_jax.models.segmentation import BEHIND_FINAL_NORM
from tinymim_jax.ops.pooling import bin_means
from tinymim_jax.ops.segmentation import labels_dtype
from tinymim_jax.ops.token_grid import bilinear_matrix

_HEAD = "decode_head"
Grid = tuple[int, int]


def pixel_logits(graph: Graph, network: Network) -> str:
    """As models.segmentation.SegmentationNetwork: [batch, classes, rows, columns], on the head's grid."""
    heads = {"upernet": _upernet, "light": _light, "linear": _linear, "mask": _mask}
    return heads[network.segmenter.head](_Layers(graph, network.params), _feature_maps(graph, network), network)


def class_map(graph: Graph, network: Network, logits: str, grid: Grid) -> str:
    """The most probable class of every pixel of the image, [batch, height, width], uint8 or uint16."""
    x = _resized(graph, logits, "class_map/resize", grid, network.image_size)
    x = graph.node("ArgMax", "class_map/argmax", x, axis=1, keepdims=0)
    dtype = np.dtype(labels_dtype(network.segmenter.classes))
    return graph.node("Cast", "class_map/cast", x, to=graph.onnx.helper.np_dtype_to_tensor_dtype(dtype))


class _Layers:
    """Layers of models/convolutions.py by the path of their parameters, such as "decode_head/fuse"."""

    def __init__(self, graph: Graph, params: Mapping[str, Any]):
        self.graph, self._params = graph, params

    def convolution(self, x: str, path: str, *, stride: int = 1) -> str:
        return self.graph.convolution(x, self._of(path), path, stride=stride)

    def norm(self, x: str, path: str) -> str:
        return self.graph.batch_norm(x, self._of(path), self._of(f"{STATISTICS}/{path}"), path)

    def block(self, x: str, path: str) -> str:
        """ConvNormRelu."""
        x = self.norm(self.convolution(x, f"{path}/conv"), f"{path}/norm")
        return self.graph.node("Relu", f"{path}/relu", x)

    def upsample(self, x: str, path: str) -> str:
        params = self._of(path)
        kernel = self.graph.weight(f"{path}/kernel", np.asarray(params["kernel"]).transpose(0, 3, 1, 2))
        bias = self.graph.weight(f"{path}/bias", params["bias"])
        return self.graph.node("ConvTranspose", path, x, kernel, bias, kernel_shape=[2, 2], strides=[2, 2])

    def classifier(self, x: str) -> str:
        """The last layer of every head."""
        return self.convolution(x, f"{_HEAD}/classifier/conv")

    def _of(self, path: str) -> Mapping[str, Any]:
        found = self._params
        for name in path.split("/"):
            found = found[name]
        return found


def _feature_maps(graph: Graph, network: Network) -> list[str]:
    """The tapped tokens of the patches as maps, all of the encoder's grid."""
    segmenter, encoder = network.segmenter, network.encoder
    outputs, maps = block_outputs(graph, network), []
    for number, tap in enumerate(segmenter.taps):
        x, width = outputs[tap - 1], encoder.embed_dim
        if segmenter.head in BEHIND_FINAL_NORM:
            x = finish(graph, network, x, f"_{number}")
        if segmenter.widen and number == len(segmenter.taps) - 1:
            x, width = widened(graph, network.params["widen"], x), segmenter.widen
        x = graph.slice(x, f"maps/{number}/patches", encoder.prefix, network.tokens)
        x = graph.node("Transpose", f"maps/{number}/transpose", x, perm=[0, 2, 1])
        shape = graph.constant(f"map{width}", [0, width, *encoder.grid])
        maps.append(graph.node("Reshape", f"maps/{number}", x, shape))
    return maps


def _linear(layers: _Layers, maps: list[str], network: Network) -> str:
    return layers.classifier(layers.norm(_joined(layers.graph, maps), f"{_HEAD}/norm"))


def _mask(layers: _Layers, maps: list[str], network: Network) -> str:
    graph, params, classes = layers.graph, network.params[_HEAD], network.segmenter.classes
    (rows, columns), width = network.encoder.grid, network.encoder.embed_dim * len(maps)
    count, channels = rows * columns, params["class_tokens"].shape[-1]
    x = graph.node("Reshape", f"{_HEAD}/flat", _joined(graph, maps), graph.constant(f"flat{width}", [0, width, count]))
    x = graph.node("Transpose", f"{_HEAD}/tokens", x, perm=[0, 2, 1])
    x = graph.linear(x, params["project"], f"{_HEAD}/project")
    shape = graph.node("Shape", f"{_HEAD}/batch", x, start=0, end=1)
    shape = graph.node("Concat", f"{_HEAD}/shape", shape, graph.constant("class_tokens", [classes, channels]), axis=0)
    own = graph.weight(f"{_HEAD}/class_tokens", params["class_tokens"])
    x = graph.node("Concat", f"{_HEAD}/all", x, graph.node("Expand", f"{_HEAD}/expand", own, shape), axis=1)
    for i in range(MASK_BLOCKS):
        name = f"blocks_{i}"
        x = transformer_block(graph, x, params[name], f"{_HEAD}/{name}", mask_heads(channels), count + classes)
    x = graph.norm(x, params["norm"], f"{_HEAD}/norm")
    both = []
    for name, start, stop in (("patches", 0, count), ("queries", count, count + classes)):
        part = graph.linear(graph.slice(x, f"{_HEAD}/{name}/slice", start, stop), params[name], f"{_HEAD}/{name}")
        both.append(graph.unit(part, f"{_HEAD}/{name}/unit", eps=UNIT_EPS))
    own = graph.node("Transpose", f"{_HEAD}/queries/transpose", both[1], perm=[0, 2, 1])
    x = graph.norm(graph.node("MatMul", f"{_HEAD}/cosines", both[0], own), params["mask_norm"], f"{_HEAD}/mask_norm")
    x = graph.node("Transpose", f"{_HEAD}/masks", x, perm=[0, 2, 1])
    return graph.node("Reshape", f"{_HEAD}/logits", x, graph.constant("masks", [0, classes, rows, columns]))


def _joined(graph: Graph, maps: list[str]) -> str:
    return graph.node("Concat", f"{_HEAD}/concat", *maps, axis=1) if len(maps) > 1 else maps[0]


def _light(layers: _Layers, maps: list[str], network: Network) -> str:
    projected = [layers.block(x, f"{_HEAD}/project_{i}") for i, x in enumerate(maps)]
    x = layers.graph.node("Concat", f"{_HEAD}/concat", *projected, axis=1)
    x = layers.block(layers.block(x, f"{_HEAD}/fuse"), f"{_HEAD}/mix")
    x = layers.norm(layers.upsample(x, f"{_HEAD}/up_first"), f"{_HEAD}/up_norm")
    x = layers.upsample(layers.graph.gelu(x, f"{_HEAD}/gelu"), f"{_HEAD}/up_second")
    x = layers.graph.node("Relu", f"{_HEAD}/relu", layers.norm(x, f"{_HEAD}/last_norm"))
    return layers.classifier(x)


def _upernet(layers: _Layers, taps: list[str], network: Network) -> str:
    graph, segmenter = layers.graph, network.segmenter
    rows, columns = network.encoder.grid
    maps = _PYRAMIDS[segmenter.pyramid](layers, taps)
    # A stride of 2 with padding, of the pyramid 'star', keeps an odd last row; pooling, of 'plain', leaves it out.
    odd = segmenter.pyramid == "star"
    coarse = (rows + odd) // 2, (columns + odd) // 2
    grids = [(4 * rows, 4 * columns), (2 * rows, 2 * columns), (rows, columns), coarse]
    pooled = [maps[-1]]
    for i, size in enumerate(segmenter.pool_scales):
        name, (height, width) = f"{_HEAD}/pool_{i}", grids[-1]
        x = graph.both_sides(maps[-1], f"{name}/mean", bin_means(height, size), bin_means(width, size))
        pooled.append(_resized(graph, layers.block(x, name), f"{name}/resize", (size, size), grids[-1]))
    merged = [layers.block(graph.node("Concat", f"{_HEAD}/context", *pooled, axis=1), f"{_HEAD}/bottleneck")]
    for i in reversed(range(len(maps) - 1)):  # from coarse to fine
        above = _resized(graph, merged[0], f"{_HEAD}/merge_{i}/resize", grids[i + 1], grids[i])
        lateral = layers.block(maps[i], f"{_HEAD}/lateral_{i}")
        merged.insert(0, graph.node("Add", f"{_HEAD}/merge_{i}", lateral, above))
    fused = [layers.block(x, f"{_HEAD}/fpn_{i}") for i, x in enumerate(merged[:-1])] + merged[-1:]
    fused = [
        _resized(graph, x, f"{_HEAD}/fused_{i}/resize", grid, grids[0]) for i, (x, grid) in enumerate(zip(fused, grids))
    ]
    x = graph.node("Concat", f"{_HEAD}/fused", *fused, axis=1)
    return layers.classifier(layers.block(x, f"{_HEAD}/fpn_bottleneck"))


def _plain_pyramid(layers: _Layers, taps: list[str]) -> list[str]:
    coarsest = layers.graph.node("MaxPool", "pyramid/pool", taps[3], kernel_shape=[2, 2], strides=[2, 2])
    return [_quadruple(layers, taps[0]), layers.upsample(taps[1], "pyramid/up2"), taps[2], coarsest]


def _star_pyramid(layers: _Layers, taps: list[str]) -> list[str]:
    second, third = layers.upsample(taps[1], "pyramid/up2"), layers.convolution(taps[2], "pyramid/same")
    return [_quadruple(layers, taps[0]), second, third, layers.convolution(taps[3], "pyramid/down", stride=2)]


_PYRAMIDS = {"plain": _plain_pyramid, "star": _star_pyramid}


def _quadruple(layers: _Layers, x: str) -> str:
    x = layers.norm(layers.upsample(x, "pyramid/up4_first"), "pyramid/up4_norm")
    return layers.upsample(layers.graph.gelu(x, "pyramid/gelu"), "pyramid/up4_second")


def _resized(graph: Graph, x: str, name: str, old: Grid, new: Grid) -> str:
    """As ops.segmentation.resize_bilinear."""
    if old == new:
        return x
    return graph.both_sides(x, name, bilinear_matrix(old[0], new[0]), bilinear_matrix(old[1], new[1]))
