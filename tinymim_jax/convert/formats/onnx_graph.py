"""Building blocks of an ONNX graph: weights, operators, and the layers that networks here are made of."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinymim_jax.models.convolutions import BATCH_NORM_EPS, STATISTICS
from tinymim_jax.ops.layer_norm import EPS

# On x86 without VNNI, onnxruntime adds two products of uint8 inputs and int8 weights in 16 bits, and saturates: with
# weights up to 127 a classifier of digits kept 205 of 256 answers. 2 * 255 * 64 fits.
ONNX_INT8_LIMIT = 64


class Graph:
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
        if "bias" not in params:
            return y
        return self.node("Add", f"{path}{suffix}/add", y, self.weight(f"{path}/bias", params["bias"]))

    def _product(self, x: str, kernel: np.ndarray, path: str, name: str) -> str:
        return self.node("MatMul", f"{name}/matmul", x, self.weight(f"{path}/kernel", kernel))

    def _int8_product(self, x: str, kernel: np.ndarray, path: str, name: str) -> str:
        values, scale, zero = self.node("DynamicQuantizeLinear", f"{name}/quantize", x, outputs=3)
        rounded, channel_scale = quantize(kernel, axis=0, limit=ONNX_INT8_LIMIT)
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

    def convolution(self, x: str, params: Mapping[str, np.ndarray], path: str, *, stride: int = 1) -> str:
        """A square convolution as models.convolutions.Conv, on maps [batch, channels, rows, columns]."""
        kernel = np.asarray(params["kernel"]).transpose(3, 2, 0, 1)
        bias = [self.weight(f"{path}/bias", params["bias"])] if "bias" in params else []
        size, weight = kernel.shape[2], self.weight(f"{path}/kernel", kernel)
        sides = {"kernel_shape": [size] * 2, "strides": [stride] * 2, "pads": [size // 2] * 4}
        return self.node("Conv", path, x, weight, *bias, **sides)

    def batch_norm(self, x: str, params: Mapping[str, Any], statistics: Mapping[str, Any], path: str) -> str:
        """By running statistics, which are stored under STATISTICS."""
        values = [self.weight(f"{path}/{name}", params[name]) for name in ("scale", "bias")]
        values += [self.weight(f"{STATISTICS}/{path}/{name}", statistics[name]) for name in ("mean", "variance")]
        return self.node("BatchNormalization", path, x, *values, epsilon=BATCH_NORM_EPS)

    def both_sides(self, x: str, name: str, rows: np.ndarray, columns: np.ndarray) -> str:
        """rows x columns^T for each map of [batch, channels, height, width]: a resized or pooled map.

        A matrix product, since runtimes round the positions of their Resize operators in ways of their own.
        """
        x = self.node("MatMul", f"{name}/rows", self.matrix(rows), x)
        return self.node("MatMul", f"{name}/columns", x, self.matrix(columns.T))

    def matrix(self, values: np.ndarray) -> str:
        """A constant float32 matrix, stored once however often it is used."""
        values = np.ascontiguousarray(values, np.float32)
        digest = hashlib.sha256(values.tobytes()).hexdigest()[:12]
        return self.constant(f"matrix{values.shape[0]}x{values.shape[1]}_{digest}", values, np.float32)

    def unit(self, x: str, name: str, *, eps: float) -> str:
        """Vectors along the last axis, divided by their length."""
        y = self.node("Mul", f"{name}/square", x, x)
        y = self.node("ReduceSum", f"{name}/sum", y, self.constant("last", [-1]), keepdims=1)
        y = self.node("Add", f"{name}/above_zero", y, self.constant(f"eps{eps}", eps, np.float32))
        return self.node("Div", f"{name}/unit", x, self.node("Sqrt", f"{name}/length", y))

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


def quantize(kernel: np.ndarray, *, axis: int, limit: int = 127) -> tuple[np.ndarray, np.ndarray]:
    """Integers in -limit .. limit as int8, and float32 scales, one for each channel; `axis` is the one summed over."""
    largest = np.abs(kernel).max(axis=axis, keepdims=True)
    scale = np.where(largest > 0, largest, 1.0).astype(np.float32) / np.float32(limit)
    return np.clip(np.rint(kernel / scale), -limit, limit).astype(np.int8), np.squeeze(scale, axis)
