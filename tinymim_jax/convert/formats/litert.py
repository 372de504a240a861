"""LiteRT (TensorFlow Lite): StableHLO, converted without TensorFlow; one file for one batch size.

The converter has no public entry, so its version is pinned: litert-converter 0.5.
"""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.convert.errors import ConvertError
from tinymim_jax.convert.formats.network import Network
from tinymim_jax.convert.formats.onnx_graph import quantize
from tinymim_jax.convert.formats.runners import INPUT, needs
from tinymim_jax.ops.platform import compiling_for

_EXTRA = "pip install 'tinymim-jax[litert]'; there are wheels for Linux (x86-64, aarch64) and macOS"
_SIGNATURE = "serving_default"


def write(path: pathlib.Path, network: Network, *, int8: bool = False, batch: int = 1) -> None:
    """Writes `network` for images float32 [batch, height, width, 3].

    Args:
      int8: the weights of linear layers are stored as int8 with a scale for each output channel; their inputs are
        quantized while it runs.
      batch: images of one call.
    """
    if batch < 1:
        raise ConvertError(f"batch={batch}: a LiteRT file is for one batch size, 1 or more")
    api = needs("litert_converter.converter_api_ext", _EXTRA)
    mlir = needs("litert_converter.mlir.ir", _EXTRA)
    passes = needs("litert_converter.mlir.passmanager", _EXTRA)
    with mlir.Context() as context:
        api.prepare_mlir_context(context)
        module = mlir.Module.parse(_stablehlo(network, batch))
        output = "logits" if network.output == "logits" else "features"
        api.set_signature(module.operation, _SIGNATURE, [INPUT], [output])
        api.run_convert_to_tfl_passes(module, passes.PassManager(), api.ConvertToTFLConfig())
        content = api.export_flatbuffer_to_bytes(module.operation)
    path.write_bytes(_with_int8_weights(content) if int8 else content)


def _stablehlo(network: Network, batch: int) -> str:
    pixels = jax.ShapeDtypeStruct((batch, *network.image_size, 3), jnp.float32)
    with compiling_for("litert"), jax.default_matmul_precision(None):
        text = jax.jit(network.function()).lower(pixels).as_text()
    # The converter does not support these attributes of the module.
    return re.sub(r"mhlo\.num_(?:partitions|replicas) = \d+ : i32(?:, )?", "", text)


def _with_int8_weights(content: bytes) -> bytes:
    """The file with the constant weights of every FULLY_CONNECTED as int8, [outputs, inputs], a scale per output."""
    schema = needs("litert_converter.schema_py_generated", _EXTRA)
    flatbuffers = needs("flatbuffers", _EXTRA)
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(content))
    codes = [code.builtinCode for code in model.operatorCodes]
    done = 0
    for graph in model.subgraphs:
        for operator in graph.operators:
            if codes[operator.opcodeIndex] == schema.BuiltinOperator.FULLY_CONNECTED:
                done += _round_weights(schema, model, graph.tensors[operator.inputs[1]])
    if not done:
        raise ConvertError("no linear layer with float32 weights was found in the LiteRT file")
    # Hybrid kernels came with version 3 of the operator; 12 has scales per channel.
    for code in model.operatorCodes:
        if code.builtinCode == schema.BuiltinOperator.FULLY_CONNECTED:
            code.version = max(code.version, 12)
    builder = flatbuffers.Builder(len(content))
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _round_weights(schema: Any, model: Any, tensor: Any) -> bool:
    if tensor.type != schema.TensorType.FLOAT32 or tensor.buffer == 0:
        return False
    data = model.buffers[tensor.buffer].data
    if data is None or not len(data):
        return False
    weights = np.frombuffer(np.asarray(data, np.uint8).tobytes(), np.float32).reshape(tensor.shape)
    rounded, scale = quantize(weights, axis=1)
    model.buffers[tensor.buffer].data = np.frombuffer(rounded.tobytes(), np.uint8)
    tensor.type = schema.TensorType.INT8
    tensor.quantization = schema.QuantizationParametersT()
    tensor.quantization.scale = scale
    tensor.quantization.zeroPoint = np.zeros(len(scale), np.int64)
    tensor.quantization.quantizedDimension = 0
    return True
