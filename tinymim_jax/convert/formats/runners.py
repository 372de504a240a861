"""Exported files in the runtimes they were made for, on the CPU.

Nothing here imports jax, except to run StableHLO, so that the memory of a process that runs a file is the runtime's.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

INPUT = "pixel_values"
"""What the input is called in ONNX and LiteRT files."""


@dataclasses.dataclass(frozen=True)
class Runner:
    """A loaded file.

    runtime: name and version of what runs it.
    prepare: normalised pixels float32 [batch, height, width, 3] as the runtime takes them.
    run: prepared pixels to the output, a numpy array.
    batch: the only batch size that it takes; None: any.
    """

    runtime: str
    prepare: Callable[[np.ndarray], Any]
    run: Callable[[Any], np.ndarray]
    batch: int | None = None

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """The output for any number of images; a file for one batch size is run repeatedly, padded at the end."""
        if self.batch is None:
            return np.asarray(self.run(self.prepare(pixels)))
        found = []
        for start in range(0, len(pixels), self.batch):
            some = pixels[start : start + self.batch]
            padding = np.zeros((self.batch - len(some), *pixels.shape[1:]), pixels.dtype)
            # A copy: runtimes may return the same memory from every call.
            found.append(np.array(self.run(self.prepare(np.concatenate([some, padding]))))[: len(some)])
        return np.concatenate(found)


def open_onnx(path: pathlib.Path, threads: int | None = None) -> Runner:
    """An ONNX file in onnxruntime; `threads` None: one for each core."""
    runtime = needs("onnxruntime", "pip install onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads or 0
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = f"onnxruntime {runtime.__version__}"
    return Runner(name, channels_first, lambda pixels: channels_last(session.run(None, {INPUT: pixels})[0]))


def open_openvino(path: pathlib.Path, threads: int | None = None) -> Runner:
    """An ONNX file in OpenVINO, computing in float32."""
    openvino = needs("openvino", "pip install openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    compiled = openvino.Core().compile_model(str(path), "CPU", settings)
    name = f"OpenVINO {openvino.__version__.split('-')[0]}"
    return Runner(name, channels_first, lambda pixels: channels_last(compiled([pixels])[0]))


def open_litert(path: pathlib.Path, threads: int | None = None) -> Runner:
    """A LiteRT file in its interpreter (XNNPACK)."""
    litert = needs("ai_edge_litert.interpreter", "pip install ai-edge-litert")
    interpreter = litert.Interpreter(model_path=str(path), num_threads=threads or os.cpu_count())
    interpreter.allocate_tensors()
    (given,), (returned,) = interpreter.get_input_details(), interpreter.get_output_details()

    def run(pixels: np.ndarray) -> np.ndarray:
        interpreter.set_tensor(given["index"], pixels)
        interpreter.invoke()
        return interpreter.get_tensor(returned["index"])

    name = f"LiteRT {importlib.metadata.version('ai-edge-litert')}"
    return Runner(name, np.ascontiguousarray, run, batch=int(given["shape"][0]))


def open_stablehlo(path: pathlib.Path, threads: int | None = None) -> Runner:
    """A file of jax.export on jax's default device; jax fixes the number of its threads when it starts."""
    needs("flatbuffers", "pip install 'tinymim-jax[stablehlo]'")
    import jax
    from jax import export

    step = jax.jit(export.deserialize(bytearray(path.read_bytes())).call)
    return Runner(f"jax.export in jax {jax.__version__}", np.asarray, lambda pixels: np.asarray(step(pixels)))


def open_hub(path: pathlib.Path, threads: int | None = None) -> Runner:
    """A hub folder in timm, or in transformers where it brings its own code."""
    torch = needs("torch", "pip install torch timm transformers")
    if json.loads((path / "config.json").read_text()).get("model_type") == "tinymim":
        library = needs("transformers", "pip install transformers")
        kind = library.AutoModelForImageClassification
        model = kind.from_pretrained(str(path), trust_remote_code=True).eval()
    else:
        library = needs("timm", "pip install timm")
        model = library.create_model(f"local-dir:{path}", pretrained=True).eval()
    if threads:
        torch.set_num_threads(threads)

    def run(pixels: Any) -> np.ndarray:
        with torch.inference_mode():
            found = model(pixels)
        return getattr(found, "logits", found).numpy()

    name = f"{library.__name__} {library.__version__}"
    return Runner(name, lambda pixels: torch.from_numpy(channels_first(pixels)), run)


RUNNERS: dict[str, Callable[[pathlib.Path, int | None], Runner]] = {
    "onnx": open_onnx,
    "litert": open_litert,
    "stablehlo": open_stablehlo,
    "hub": open_hub,
    "openvino": open_openvino,
}


def channels_first(pixels: np.ndarray) -> np.ndarray:
    """[batch, height, width, 3] as [batch, 3, height, width]."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))


def channels_last(output: np.ndarray) -> np.ndarray:
    """Logits of pixels [batch, classes, rows, columns] as [batch, rows, columns, classes]; others as they are."""
    return output.transpose(0, 2, 3, 1) if output.ndim == 4 else output


def needs(module: str, remedy: str) -> Any:
    """The imported module, which is not part of the core; ImportError with the remedy where it cannot be imported.

    Some packages raise other errors when they are imported beside a version that does not fit, as torchvision does.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        package = module.partition(".")[0]
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"{package} is missing: {remedy} ({error})") from error
        raise ImportError(
            f"{package} is installed but cannot be imported, perhaps beside another package's unfitting version "
            f"({type(error).__name__}: {error}): {remedy}, in a new environment"
        ) from error
