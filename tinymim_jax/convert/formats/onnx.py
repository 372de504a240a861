"""ONNX: the network as a graph of standard operators, written with the `onnx` package alone.

Opset 17 runs everywhere; opset 23 has an Attention operator. The batch size is free. Weights keep our names and layouts
(see `model.json`), so that `read_file` finds them again; only kernels of convolutions, the patch embedding's included,
are stored in the layout of ONNX.
"""

import json
import pathlib
from typing import Any

import numpy as np

from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.formats.network import Network, check_params, refuse_two_pools
from tinymim_jax.convert.formats.onnx_graph import Graph
from tinymim_jax.convert.formats.onnx_pixels import class_map, pixel_logits
from tinymim_jax.convert.formats.onnx_vit import block_outputs, classifier, finish
from tinymim_jax.convert.formats.runners import INPUT, needs

OPSETS = (17, 23)
_IR_VERSIONS = {17: 8, 23: 11}
# What the graph has of models.switches; the start of LayerScale is of no use once it is trained.
_SWITCHES = {"stem", "relative_bias", "layer_scale", "layer_scale_start"}
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
    if changed := sorted(set(network.record["encoder"].get("switches", {})) - _SWITCHES):
        raise ConvertError(
            f"the ONNX graph is that of a plain ViT, and this encoder differs from it ({', '.join(changed)}): "
            "export it --to stablehlo or litert"
        )
    refuse_two_pools(network)
    graph = Graph(onnx, opset, int8)
    shape, dtype = network.output_shape()
    output = _output(graph, network)
    height, width = network.image_size
    if network.output == "logits" and network.labels_pixels:
        shape = (shape[-1], *shape[:-1])
    model = onnx.helper.make_model(
        onnx.helper.make_graph(
            graph.renamed(output, name := network.output_name),
            "tinymim",
            [onnx.helper.make_tensor_value_info(INPUT, onnx.TensorProto.FLOAT, ["batch", 3, height, width])],
            [onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(dtype), ["batch", *shape])],
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
    except Exception as error:  # protobuf's DecodeError derives directly from Exception
        raise ConvertError(f"cannot read {path}: not an ONNX file, or it is damaged ({error})") from error
    properties = {entry.key: entry.value for entry in model.metadata_props}
    if properties.get("producer") != "tinymim-jax":
        raise ConvertError(f"cannot read {path}: only ONNX files that `tinymim export` wrote can be converted back")
    if properties.get("int8") != "false":
        raise ConvertError(f"cannot read {path}: its weights were rounded to int8; convert the float32 file")
    try:
        record = json.loads(properties["model"])
        exported = json.loads(properties["preprocessing"]) | {"class_names": json.loads(properties["class_names"])}
        if properties["output"] not in ("logits", "class_map"):
            record = {name: part for name, part in record.items() if name not in ("classifier", "segmenter")}
        params = _params_of(onnx, model.graph, learned_positions=record["encoder"]["pos_embed"] == "learned")
        check_params(record, params)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        if isinstance(error, ConvertError):
            raise ConvertError(f"cannot read {path}: {error}") from error
        raise ConvertError(f"cannot read {path}: its metadata are damaged ({error!r})") from error
    record["preprocessing"] = complete_preprocessing(record, given or Given(), exported, Sidecar())
    record["source"] = {"family": "onnx", "file": path.name, "sha256": sha256(path)}
    return record, params


def _params_of(onnx: Any, graph: Any, *, learned_positions: bool) -> dict[str, Any]:
    """The nested parameters among the initializers of a graph."""
    used_by = {node.input[1]: node.op_type for node in graph.node if len(node.input) > 1}
    params: dict[str, Any] = {}
    for tensor in graph.initializer:
        name, array = tensor.name, onnx.numpy_helper.to_array(tensor)
        if name.startswith("constant/") or (name == "encoder/pos_embed" and not learned_positions):
            continue
        if used_by.get(name) == "Conv":
            array = array.transpose(2, 3, 1, 0)
        elif used_by.get(name) == "ConvTranspose":
            array = array.transpose(0, 2, 3, 1)
        if name == "encoder/patch_embed/kernel":
            array = array.reshape(-1, array.shape[-1])
        *folders, leaf = name.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = np.array(array, np.float32)
    return params


def _output(graph: Graph, network: Network) -> str:
    """The value that the graph returns."""
    if network.labels_pixels:
        logits = pixel_logits(graph, network)
        return logits if network.output == "logits" else class_map(graph, network, logits, network.logits_grid)
    x = finish(graph, network, block_outputs(graph, network)[-1])
    if network.output == "logits":
        return classifier(graph, network, x)
    if network.output == "cls":
        return graph.token(x, "pool", 0)
    if network.output == "mean":
        return graph.mean(graph.slice(x, "patches", network.encoder.prefix, network.tokens), "pool")
    return x
