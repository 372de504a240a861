"""ONNX: the network as a graph of standard operators, written with the `onnx` package alone.

Opset 17 runs everywhere; opset 23 has an Attention operator. The batch size is free. Weights keep our names and layouts
(see `model.json`), so that `read_file` finds them again; only the patch embedding is stored as a convolution's.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.formats.network import Network, check_params
from tinymim_jax.convert.formats.runners import INPUT, needs
from tinymim_jax.ops.layer_norm import EPS

OPSETS = (17, 23)
_IR_VERSIONS = {17: 8, 23: 11}
_WIDEN_EPS = 1e-5  # as in models.heads.Widen
_LARGEST = 2**31 - 2**20  # bytes; protobuf cannot hold more
_EXTRA = "pip install 'tinymim-jax[onnx]'"


def write(path: pathlib.Path, network: Network, *, int8: bool = False, opset: int = OPSETS[0]) -> None:
    """Writes the graph of `network` to `path`.

    Args:
      int8: the weights of all matrix products are stored as int8 with a scale for each output channel, and their
        inputs are quantized while it runs, with a scale for each call. Everything else stays float32.
      opset: version of the operator set, one of OPSETS.
    """
    onnx = needs("onnx", _EXTRA)
    if opset not in OPSETS:
        raise ConvertError(f"opset={opset} is unknown. Choices: {', '.join(map(str, OPSETS))}")
    if changed := sorted(set(network.record["encoder"].get("switches", {})) - {"stem"}):
        raise ConvertError(
            f"the ONNX graph is that of a plain ViT, and this encoder differs from it ({', '.join(changed)}): "
            "export it --to stablehlo or litert"
        )
    graph = _Graph(onnx, opset, int8)
    output, shape = _outputs(graph, network)
    height, width = network.image_size
    tensor = onnx.TensorProto.FLOAT
    batch = "batch"
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.renamed(output, name := "logits" if network.output == "logits" else "features"),
            "tinymim",
            [onnx.helper.make_tensor_value_info(INPUT, tensor, [batch, 3, height, width])],
            [onnx.helper.make_tensor_value_info(name, tensor, [batch, *shape])],
            list(graph.weights.values()),
        ),
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        producer_name="tinymim-jax",
        ir_version=_IR_VERSIONS[opset],
    )
    onnx.helper.set_model_props(model, network.description() | {"int8": str(int8).lower()})
    if model.ByteSize() > _LARGEST:
        raise ConvertError("ONNX files hold 2 GB at most and this network is larger: export it --to stablehlo or hub")
    path.write_bytes(model.SerializeToString())
    del model, graph  # the checker reads the file: less memory than another copy of the weights here
    onnx.checker.check_model(str(path), full_check=True)


def read_file(path: str | pathlib.Path, *, given: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(architecture record, parameters) of a float32 file of `write`, as `convert_file` returns them.

    Args:
      given: a preprocessing.Given, what is known better than the file.

    Raises:
      ConvertError: the file is another program's, damaged, or int8: rounding cannot be undone.
    """
    from tinymim_jax.convert.files import sha256
    from tinymim_jax.convert.preprocessing import Given, complete_preprocessing
    from tinymim_jax.convert.sidecar import Sidecar

    onnx = needs("onnx", _EXTRA)
    path = pathlib.Path(path).expanduser()
    try:
        model = onnx.load_model(str(path))
    except OSError:
        raise
    except Exception as error:  # protobuf's DecodeError is a subclass of nothing else
        raise ConvertError(f"cannot read {path}: not an ONNX file, or it is damaged ({error})") from error
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if properties.get("producer") != "tinymim-jax":
        raise ConvertError(f"cannot read {path}: only ONNX files that `tinymim export` wrote can be converted back")
    if properties.get("int8") != "false":
        raise ConvertError(f"cannot read {path}: its weights were rounded to int8; convert the float32 file")
    try:
        record = json.loads(properties["model"])
        exported = json.loads(properties["preprocessing"]) | {"class_names": json.loads(properties["class_names"])}
        if properties["output"] != "logits":
            record.pop("classifier", None)
        arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        params = _params_of(arrays, learned_positions=record["encoder"]["pos_embed"] == "learned")
        check_params(record, params)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ConvertError):
            raise ConvertError(f"cannot read {path}: {error}") from error
        raise ConvertError(f"cannot read {path}: its metadata are damaged ({error!r})") from error
    record["preprocessing"] = complete_preprocessing(record, given or Given(), exported, Sidecar())
    record["source"] = {"family": "onnx", "file": path.name, "sha256": sha256(path)}
    return record, params


def _params_of(arrays: Mapping[str, np.ndarray], *, learned_positions: bool) -> dict[str, Any]:
    """The nested parameters among the initializers of a graph."""
    params: dict[str, Any] = {}
    for name, array in arrays.items():
        if name.startswith("constant/") or (name == "encoder/pos_embed" and not learned_positions):
            continue
        if name == "encoder/patch_embed/kernel":
            array = array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
        elif name.startswith("encoder/stem/conv_") and name.endswith("kernel"):
            array = array.transpose(2, 3, 1, 0)
        *folders, leaf = name.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = np.array(array, np.float32)
    return params


class _Graph:
    """Nodes and weights under construction. A value is the name of a tensor."""

    def __init__(self, onnx: Any, opset: int, int8: bool):
        self.onnx, self.opset, self.int8 = onnx, opset, int8
        self.nodes: list[Any] = []
        self.weights: dict[str, Any] = {}

    def weight(self, name: str, array: np.ndarray) -> str:
        if name not in self.weights:
            self.weights[name] = self.onnx.numpy_helper.from_array(np.asarray(array, order="C"), name)
        return name

    def constant(self, name: str, value: Any, dtype: Any = np.int64) -> str:
        return self.weight(f"constant/{name}", np.asarray(value, dtype))

    def node(self, kind: str, name: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Adds an operator; returns the name of its output, or a list of names."""
        names = [f"{name}:{i}" for i in range(outputs)] if outputs > 1 else [f"{name}:out"]
        self.nodes.append(self.onnx.helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names if outputs > 1 else names[0]

    def renamed(self, value: str, name: str) -> list[Any]:
        """The nodes, where the last one's output `value` is called `name`."""
        self.nodes[-1].output[list(self.nodes[-1].output).index(value)] = name
        return self.nodes

    def linear(self, x: str, params: Mapping[str, np.ndarray], path: str, suffix: str = "") -> str:
        """`path` names the weights; where they are used twice, `suffix` tells the nodes apart."""
        product = self._int8_product if self.int8 else self._product
        y = product(x, np.asarray(params["kernel"]), path, path + suffix)
        return self.node("Add", f"{path}{suffix}/add", y, self.weight(f"{path}/bias", params["bias"]))

    def _product(self, x: str, kernel: np.ndarray, path: str, name: str) -> str:
        return self.node("MatMul", f"{name}/matmul", x, self.weight(f"{path}/kernel", kernel))

    def _int8_product(self, x: str, kernel: np.ndarray, path: str, name: str) -> str:
        values, scale, zero = self.node("DynamicQuantizeLinear", f"{name}/quantize", x, outputs=3)
        rounded, channel_scale = quantize(kernel, axis=0)
        weight = self.weight(f"{path}/kernel", rounded)
        zeros = self.weight(f"{path}/kernel_zero", np.zeros(kernel.shape[1], np.int8))
        y = self.node("MatMulInteger", f"{name}/matmul", values, weight, zero, zeros)
        y = self.node("Cast", f"{name}/cast", y, to=self.onnx.TensorProto.FLOAT)
        both = self.node("Mul", f"{name}/scales", scale, self.weight(f"{path}/kernel_scale", channel_scale))
        return self.node("Mul", f"{name}/scaled", y, both)

    def norm(self, x: str, params: Mapping[str, np.ndarray], path: str, *, eps: float = EPS, suffix: str = "") -> str:
        scale, bias = self.weight(f"{path}/scale", params["scale"]), self.weight(f"{path}/bias", params["bias"])
        return self.node("LayerNormalization", path + suffix, x, scale, bias, axis=-1, epsilon=eps)

    def gelu(self, x: str, name: str) -> str:
        if self.opset >= 20:
            return self.node("Gelu", name, x)
        y = self.node("Div", f"{name}/div", x, self.constant("sqrt2", np.sqrt(2.0), np.float32))
        y = self.node("Erf", f"{name}/erf", y)
        y = self.node("Add", f"{name}/add", y, self.constant("one", 1.0, np.float32))
        y = self.node("Mul", f"{name}/mul", x, y)
        return self.node("Mul", f"{name}/half", y, self.constant("half", 0.5, np.float32))

    def slice(self, x: str, name: str, start: int, stop: int) -> str:
        """Tokens start to stop."""
        bounds = [self.constant(f"at{number}", [number]) for number in (start, stop, 1)]
        return self.node("Slice", name, x, *bounds)

    def mean(self, x: str, name: str) -> str:
        """The mean over tokens, [batch, dim]."""
        if self.opset >= 18:
            return self.node("ReduceMean", name, x, self.constant("at1", [1]), keepdims=0)
        return self.node("ReduceMean", name, x, axes=[1], keepdims=0)

    def token(self, x: str, name: str, index: int) -> str:
        return self.node("Gather", name, x, self.constant(f"token{index}", index), axis=1)


def quantize(kernel: np.ndarray, *, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 values and float32 scales, symmetric, one scale for each channel; `axis` is the one that is summed over."""
    largest = np.abs(kernel).max(axis=axis, keepdims=True)
    scale = np.where(largest > 0, largest, 1.0).astype(np.float32) / np.float32(127)
    return np.clip(np.rint(kernel / scale), -127, 127).astype(np.int8), np.squeeze(scale, axis)


def _outputs(graph: _Graph, network: Network) -> tuple[str, tuple[int, ...]]:
    """The output's name and its shape behind the batch."""
    encoder, prefix = network.encoder, network.encoder.prefix
    tokens = prefix + encoder.grid[0] * encoder.grid[1]
    x = _encoder(graph, network, tokens)
    if network.output == "logits":
        return _classifier(graph, network, x, tokens), (network.record["classifier"]["classes"],)
    if network.output == "cls":
        return graph.token(x, "pool", 0), (encoder.embed_dim,)
    if network.output == "mean":
        return graph.mean(graph.slice(x, "patches", prefix, tokens), "pool"), (encoder.embed_dim,)
    return x, (tokens, encoder.embed_dim)


def _encoder(graph: _Graph, network: Network, tokens: int) -> str:
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
    for i, heads in enumerate(encoder.block_heads):
        x = _block(graph, x, params[f"blocks_{i}"], f"encoder/blocks_{i}", heads, dim, tokens)
    return graph.norm(x, params["norm"], "encoder/norm") if encoder.final_norm else x


def _patches(graph: _Graph, params: Mapping[str, Any], size: int, dim: int) -> str:
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


def _conv_stem(graph: _Graph, params: Mapping[str, Any]) -> str:
    """As models.stem.ConvStem, [batch, patches, dim]; convolutions have channels first, norms have them last."""
    x, i, dim = INPUT, 0, params["proj"]["bias"].shape[0]
    while (name := f"conv_{i}") in params:
        path = f"encoder/stem/{name}"
        kernel = graph.weight(f"{path}/kernel", np.asarray(params[name]["kernel"]).transpose(3, 2, 0, 1))
        bias = graph.weight(f"{path}/bias", params[name]["bias"])
        x = graph.node("Conv", path, x, kernel, bias, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        x = graph.node("Transpose", f"{path}/last", x, perm=[0, 2, 3, 1])
        x = graph.norm(x, params[f"norm_{i}"], f"encoder/stem/norm_{i}")
        x = graph.gelu(x, f"encoder/stem/gelu_{i}")
        i += 1
        if f"conv_{i}" in params:
            x = graph.node("Transpose", f"{path}/first", x, perm=[0, 3, 1, 2])
    x = graph.node("Reshape", "encoder/stem/flatten", x, graph.constant("flat_last", [0, -1, dim]))
    return graph.linear(x, params["proj"], "encoder/stem/proj")


def _block(graph: _Graph, x: str, params: Mapping[str, Any], name: str, heads: int, dim: int, tokens: int) -> str:
    y = graph.norm(x, params["norm1"], f"{name}/norm1")
    y = graph.linear(y, params["attn"]["qkv"], f"{name}/attn/qkv")
    attend = _attention_operator if graph.opset >= 23 else _attention
    y = attend(graph, y, f"{name}/attn", heads, dim // heads, tokens)
    y = graph.linear(y, params["attn"]["proj"], f"{name}/attn/proj")
    x = graph.node("Add", f"{name}/middle", x, y)
    y = graph.norm(x, params["norm2"], f"{name}/norm2")
    y = graph.gelu(graph.linear(y, params["mlp"]["fc1"], f"{name}/mlp/fc1"), f"{name}/mlp/gelu")
    y = graph.linear(y, params["mlp"]["fc2"], f"{name}/mlp/fc2")
    return graph.node("Add", f"{name}/output", x, y)


def _attention_operator(graph: _Graph, qkv: str, name: str, heads: int, head_dim: int, tokens: int) -> str:
    """Opset 23's Attention on [batch, tokens, dim]."""
    lengths = graph.constant(f"thirds{heads * head_dim}", [heads * head_dim] * 3)
    parts = graph.node("Split", f"{name}/split", qkv, lengths, axis=-1, outputs=3)
    scale = head_dim**-0.5
    return graph.node("Attention", f"{name}/core", *parts, q_num_heads=heads, kv_num_heads=heads, scale=scale)


def _attention(graph: _Graph, qkv: str, name: str, heads: int, head_dim: int, tokens: int) -> str:
    shape = graph.constant(f"split{heads}x{head_dim}", [0, tokens, 3, heads, head_dim])
    parts = graph.node("Reshape", f"{name}/reshape", qkv, shape)
    parts = graph.node("Transpose", f"{name}/transpose", parts, perm=[2, 0, 3, 1, 4])  # q|k|v first
    parts = graph.node("Split", f"{name}/split", parts, graph.constant("ones3", [1, 1, 1]), axis=0, outputs=3)
    first = graph.constant("at0", [0])
    q, k, v = (graph.node("Squeeze", f"{name}/{part}", x, first) for part, x in zip("qkv", parts))
    scale = graph.constant(f"scale{head_dim}", head_dim**-0.5, np.float32)
    q = graph.node("Mul", f"{name}/scaled_q", q, scale)
    k = graph.node("Transpose", f"{name}/transposed_k", k, perm=[0, 1, 3, 2])
    weights = graph.node("Softmax", f"{name}/softmax", graph.node("MatMul", f"{name}/logits", q, k), axis=-1)
    y = graph.node("MatMul", f"{name}/average", weights, v)  # [batch, heads, tokens, head_dim]
    y = graph.node("Transpose", f"{name}/merge", y, perm=[0, 2, 1, 3])
    return graph.node("Reshape", f"{name}/merged", y, graph.constant("merged", [0, tokens, heads * head_dim]))


def _classifier(graph: _Graph, network: Network, tokens: str, count: int) -> str:
    """As models.heads.Classifier: what each head reads, and the mean of the heads' logits."""
    classifier, params, prefix = network.classifier, network.params, network.encoder.prefix

    def widened(x: str, suffix: str = "") -> str:
        x = graph.norm(x, params["widen"]["norm"], "widen/norm", eps=_WIDEN_EPS, suffix=suffix)
        return graph.gelu(graph.linear(x, params["widen"]["linear"], "widen/linear", suffix), f"widen/gelu{suffix}")

    if classifier.pool == "cls":
        tokens = graph.slice(tokens, "leading", 0, prefix)
    if classifier.hidden_dim and not classifier.norm_first:
        tokens = widened(tokens)
    if classifier.pool == "cls":
        read = [graph.token(tokens, "cls", 0)]
    else:
        read = [graph.mean(graph.slice(tokens, "patches", prefix, count), "pool")]
    if prefix == 2:
        read.append(graph.token(tokens, "dist", 1))
    logits = []
    for x, head, suffix in zip(read, ("head", "head_dist"), ("", "_dist")):
        if classifier.pool == "mean":
            x = graph.norm(x, params["fc_norm"], "fc_norm", suffix=suffix)
        if classifier.norm_first:
            x = widened(x, suffix)
        logits.append(graph.linear(x, params[head], head))
    if len(logits) == 1:
        return logits[0]
    total = graph.node("Add", "heads/sum", *logits)
    return graph.node("Mul", "heads/mean", total, graph.constant("half", 0.5, np.float32))
