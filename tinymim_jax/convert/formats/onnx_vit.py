"""The ONNX graph of a Vision Transformer and of its classifier."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinymim_jax.convert.formats.network import Network
from tinymim_jax.convert.formats.onnx_graph import Graph
from tinymim_jax.convert.formats.runners import INPUT
from tinymim_jax.ops.relative_bias import bias_index

_WIDEN_EPS = 1e-5  # as in models.heads.Widen


def block_outputs(graph: Graph, network: Network) -> list[str]:
    """The outputs of all blocks, each [batch, tokens, dim]."""
    encoder, params = network.encoder, network.params["encoder"]
    dim, size = encoder.embed_dim, encoder.patch_size
    x = _conv_stem(graph, params["stem"]) if "stem" in params else _patches(graph, params, size, dim)
    batch = graph.node("Shape", "encoder/batch", INPUT, start=0, end=1)
    one = graph.node("Concat", "encoder/one_token", batch, graph.constant("one_token", [1, dim]), axis=0)
    leading = [name for name in ("cls_token", "dist_token") if name in params]
    wide = [
        graph.node("Expand", f"encoder/{name}/expand", graph.weight(f"encoder/{name}", params[name]), one)
        for name in leading
    ]
    x = graph.node("Concat", "encoder/tokens", *wide, x, axis=1)
    x = graph.node("Add", "encoder/positions", x, graph.weight("encoder/pos_embed", network.positions))
    places = _offset_rows(graph, network) if encoder.switches.relative_bias else ""
    outputs = []
    for i, heads in enumerate(encoder.block_heads):
        block, name = params[f"blocks_{i}"], f"encoder/blocks_{i}"
        bias = _relative_bias(graph, block["attn"]["relative_bias"], f"{name}/attn", places) if places else ""
        x = transformer_block(graph, x, block, name, heads, network.tokens, bias)
        outputs.append(x)
    return outputs


def finish(graph: Graph, network: Network, tokens: str, suffix: str = "") -> str:
    """As ViT.finish: the final norm, where there is one."""
    if not network.encoder.final_norm:
        return tokens
    return graph.norm(tokens, network.params["encoder"]["norm"], "encoder/norm", suffix=suffix)


def classifier(graph: Graph, network: Network, tokens: str) -> str:
    """As models.heads.Classifier: what each head reads, and the mean of the heads' logits."""
    parts, params, prefix = network.classifier, network.params, network.encoder.prefix
    if parts.pool == "cls":
        tokens = graph.slice(tokens, "leading", 0, prefix)
    if parts.hidden_dim and not parts.norm_first:
        tokens = widened(graph, params["widen"], tokens)
    if parts.pool == "cls":
        read = [graph.token(tokens, "cls", 0)]
    else:
        read = [graph.mean(graph.slice(tokens, "patches", prefix, network.tokens), "pool")]
    if prefix == 2:
        read.append(graph.token(tokens, "dist", 1))
    logits = []
    for x, head, suffix in zip(read, ("head", "head_dist"), ("", "_dist")):
        if parts.pool == "mean":
            x = graph.norm(x, params["fc_norm"], "fc_norm", suffix=suffix)
        if parts.norm_first:
            x = widened(graph, params["widen"], x, suffix)
        logits.append(graph.linear(x, params[head], head))
    if len(logits) == 1:
        return logits[0]
    total = graph.node("Add", "heads/sum", *logits)
    return graph.node("Mul", "heads/mean", total, graph.constant("half", 0.5, np.float32))


def widened(graph: Graph, params: Mapping[str, Any], x: str, suffix: str = "") -> str:
    """As models.heads.Widen."""
    x = graph.norm(x, params["norm"], "widen/norm", eps=_WIDEN_EPS, suffix=suffix)
    return graph.gelu(graph.linear(x, params["linear"], "widen/linear", suffix), f"widen/gelu{suffix}")


def transformer_block(
    graph: Graph, x: str, params: Mapping[str, Any], name: str, heads: int, tokens: int, bias: str = ""
) -> str:
    """The output of models.blocks.Block. `bias`: added to the logits of attention; empty for none."""
    dim = params["attn"]["qkv"]["kernel"].shape[0]
    y = graph.norm(x, params["norm1"], f"{name}/norm1")
    y = graph.linear(y, params["attn"]["qkv"], f"{name}/attn/qkv")
    attend = _attention_operator if graph.opset >= 23 else _attention
    y = attend(graph, y, f"{name}/attn", heads, dim // heads, tokens, bias)
    y = graph.linear(y, params["attn"]["proj"], f"{name}/attn/proj")
    x = graph.node("Add", f"{name}/middle", x, _scaled(graph, y, params, name, "scale1"))
    y = graph.norm(x, params["norm2"], f"{name}/norm2")
    y = graph.gelu(graph.linear(y, params["mlp"]["fc1"], f"{name}/mlp/fc1"), f"{name}/mlp/gelu")
    y = graph.linear(y, params["mlp"]["fc2"], f"{name}/mlp/fc2")
    return graph.node("Add", f"{name}/output", x, _scaled(graph, y, params, name, "scale2"))


def _patches(graph: Graph, params: Mapping[str, Any], size: int, dim: int) -> str:
    """The patch embedding as a convolution, [batch, patches, dim]."""
    kernel = np.asarray(params["patch_embed"]["kernel"]).reshape(size, size, 3, dim).transpose(3, 2, 0, 1)
    x = graph.node(
        "Conv",
        "encoder/patch_embed",
        INPUT,
        graph.weight("encoder/patch_embed/kernel", kernel),
        graph.weight("encoder/patch_embed/bias", params["patch_embed"]["bias"]),
        kernel_shape=[size, size],
        strides=[size, size],
    )
    x = graph.node("Reshape", "encoder/flatten", x, graph.constant("flat", [0, dim, -1]))
    return graph.node("Transpose", "encoder/patches", x, perm=[0, 2, 1])


def _conv_stem(graph: Graph, params: Mapping[str, Any]) -> str:
    """As models.stem.ConvStem, [batch, patches, dim]; convolutions have channels first, norms have them last."""
    x, i, dim = INPUT, 0, params["proj"]["bias"].shape[0]
    while (name := f"conv_{i}") in params:
        path = f"encoder/stem/{name}"
        x = graph.convolution(x, params[name], path, stride=2)
        x = graph.node("Transpose", f"{path}/last", x, perm=[0, 2, 3, 1])
        x = graph.norm(x, params[f"norm_{i}"], f"encoder/stem/norm_{i}")
        x = graph.gelu(x, f"encoder/stem/gelu_{i}")
        i += 1
        if f"conv_{i}" in params:
            x = graph.node("Transpose", f"{path}/first", x, perm=[0, 3, 1, 2])
    x = graph.node("Reshape", "encoder/stem/flatten", x, graph.constant("flat_last", [0, -1, dim]))
    return graph.linear(x, params["proj"], "encoder/stem/proj")


def _scaled(graph: Graph, branch: str, params: Mapping[str, Any], name: str, scale: str) -> str:
    """The branch times its LayerScale, where it has one."""
    if scale not in params:
        return branch
    return graph.node("Mul", f"{name}/{scale}/mul", branch, graph.weight(f"{name}/{scale}", params[scale]))


def _offset_rows(graph: Graph, network: Network) -> str:
    """relative_bias.bias_index as int32 [1, tokens, tokens], computed in the graph: stored, it could be megabytes."""
    (rows, columns), prefix = network.encoder.grid, network.encoder.prefix
    index = bias_index((rows, columns), prefix)
    down, right = np.divmod(np.arange(rows * columns), columns)
    place = down * (2 * columns - 1) + right
    centre = (rows - 1) * (2 * columns - 1) + columns - 1
    queries = graph.constant("offsets/queries", place[:, None] + centre, np.int32)
    between = graph.node("Sub", "offsets/sub", queries, graph.constant("offsets/keys", place[None], np.int32))
    left = graph.constant("offsets/left", index[prefix:, :prefix], np.int32)
    top = graph.constant("offsets/top", index[:prefix], np.int32)
    below = graph.node("Concat", "offsets/below", left, between, axis=1)
    whole = graph.node("Concat", "offsets/whole", top, below, axis=0)
    return graph.node("Unsqueeze", "offsets/unsqueeze", whole, graph.constant("at0", [0]))


def _relative_bias(graph: Graph, table: np.ndarray, name: str, places: str) -> str:
    """The biases of one block, [1, heads, tokens, tokens]."""
    weight = graph.weight(f"{name}/relative_bias", table)
    biases = graph.node("Gather", f"{name}/biases", weight, places, axis=0)  # [1, tokens, tokens, heads]
    return graph.node("Transpose", f"{name}/biases_by_head", biases, perm=[0, 3, 1, 2])


def _attention_operator(graph: Graph, qkv: str, name: str, heads: int, head_dim: int, tokens: int, bias: str) -> str:
    """Opset 23's Attention on [batch, tokens, dim]; its mask is what is added to the logits."""
    lengths = graph.constant(f"thirds{heads * head_dim}", [heads * head_dim] * 3)
    parts = graph.node("Split", f"{name}/split", qkv, lengths, axis=-1, outputs=3)
    scale, given = head_dim**-0.5, [*parts, *([bias] if bias else [])]
    return graph.node("Attention", f"{name}/core", *given, q_num_heads=heads, kv_num_heads=heads, scale=scale)


def _attention(graph: Graph, qkv: str, name: str, heads: int, head_dim: int, tokens: int, bias: str) -> str:
    shape = graph.constant(f"split{tokens}x{heads}x{head_dim}", [0, tokens, 3, heads, head_dim])
    parts = graph.node("Reshape", f"{name}/reshape", qkv, shape)
    parts = graph.node("Transpose", f"{name}/transpose", parts, perm=[2, 0, 3, 1, 4])  # q|k|v first
    parts = graph.node("Split", f"{name}/split", parts, graph.constant("ones3", [1, 1, 1]), axis=0, outputs=3)
    first = graph.constant("at0", [0])
    q, k, v = (graph.node("Squeeze", f"{name}/{part}", x, first) for part, x in zip("qkv", parts))
    scale = graph.constant(f"scale{head_dim}", head_dim**-0.5, np.float32)
    q = graph.node("Mul", f"{name}/scaled_q", q, scale)
    k = graph.node("Transpose", f"{name}/transposed_k", k, perm=[0, 1, 3, 2])
    logits = graph.node("MatMul", f"{name}/logits", q, k)
    logits = graph.node("Add", f"{name}/biased", logits, bias) if bias else logits
    weights = graph.node("Softmax", f"{name}/softmax", logits, axis=-1)
    y = graph.node("MatMul", f"{name}/average", weights, v)  # [batch, heads, tokens, head_dim]
    y = graph.node("Transpose", f"{name}/merge", y, perm=[0, 2, 1, 3])
    shape = graph.constant(f"merged{tokens}x{heads * head_dim}", [0, tokens, heads * head_dim])
    return graph.node("Reshape", f"{name}/merged", y, shape)
