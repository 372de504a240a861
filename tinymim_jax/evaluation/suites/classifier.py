"""A checkpoint's classifier on all devices: its predictions for a data set, its size and its speed."""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tinymim_jax.data.pipeline import eval_batches
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.views.transforms import EvalView
from tinymim_jax.errors import unknown
from tinymim_jax.evaluation.collect import collect, row_step
from tinymim_jax.evaluation.predictor import load
from tinymim_jax.evaluation.suites.scores import Answers
from tinymim_jax.flops import matmul_flops
from tinymim_jax.ops.color import normalize
from tinymim_jax.sharding import make_mesh, place_batch
from tinymim_jax.state import place_frozen
from tinymim_jax.tasks.pretrained import DTYPES

BATCH, CPU_BATCH = 256, 64  # for each device, unless another is asked for
_TOP = 5  # predictions kept of each image
_TIMED_SECONDS = 1.0


class SuiteClassifier:
    """The classifier of a checkpoint on all devices, compiled once for all data sets.

    Images are preprocessed as the checkpoint's record says, or as published where it says nothing.

    Args:
      checkpoint: workdir of a run, or what `tinymim convert` wrote.
      batch_size: over all devices; by default 256 for each, 64 on CPUs.
      dtype: of the computation, 'float32' or 'bfloat16'.
      workers: processes that decode images.
      mesh: by default of all devices.

    Raises ValueError if the checkpoint has no classifier.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        batch_size: int | None = None,
        dtype: str = "float32",
        workers: int = 0,
        mesh: Mesh | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        self.mesh = make_mesh() if mesh is None else mesh
        own = CPU_BATCH if jax.default_backend() == "cpu" else BATCH
        self.batch_size = own * self.mesh.size if batch_size is None else batch_size
        if self.batch_size < 1 or self.batch_size % self.mesh.size:
            raise ValueError(f"batch_size={batch_size}: give a multiple of {self.mesh.size}, the number of devices")
        model = load(checkpoint, dtype=DTYPES[dtype])
        self.classifier = model.classifier()
        self.checkpoint, self.dtype, self.workers = checkpoint, dtype, workers
        self.record, self.preprocessing, self.class_names = model.record, model.preprocessing, model.class_names
        self.classes = model.record["classifier"]["classes"]
        self._params = place_frozen(jax.device_get(model.params), self.mesh)
        self._step = row_step(self._answer, self.mesh)

    def answers(self, source: Source, *, allowed: np.ndarray | None = None, whole: bool = False) -> tuple[Answers, int]:
        """Answers for all images of `source`, in its order and with its labels; and how many were substituted.

        Args:
          allowed: bool `[classes]`, the classes to choose among; by default all.
          whole: see registry.Suite.
        """
        size = tuple(self.preprocessing["image_size"])
        batches = eval_batches(
            source,
            view=EvalView(
                size, max(size) if whole else self.preprocessing["resize"], self.preprocessing["interpolation"]
            ),
            batch_size=self.batch_size,
            upright=self.preprocessing["upright"],
            tolerated=0,
            workers=self.workers,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        arguments = (self._params, self._mask(allowed))
        rows, substituted = collect(self._step, arguments, batches, self.mesh, examples=len(source))
        return Answers(*rows), substituted

    def images_per_second(self) -> float:
        """Throughput of the compiled forward pass alone, after a first call, on images that are on the devices."""
        size = (self.batch_size // jax.process_count(), *self.preprocessing["image_size"], 3)
        images = np.random.default_rng(0).integers(0, 256, size, np.uint8)
        batch = {"image": images, "label": np.zeros(len(images), np.int32), "valid": np.ones(len(images), bool)}
        placed, arguments = place_batch(self.mesh, batch), (self._params, self._mask(None))
        before = jax.block_until_ready(self._step(arguments, placed))
        steps = 1
        while True:
            began = time.perf_counter()
            for _ in range(steps):
                # As in `collect`, at most two steps are in flight.
                after = self._step(arguments, placed)
                jax.block_until_ready(before)
                before = after
            jax.block_until_ready(before)
            # All hosts must take part in the same number of steps, so one clock decides.
            seconds = float(multihost_utils.broadcast_one_to_all(np.float32(time.perf_counter() - began)))
            if seconds >= _TIMED_SECONDS:
                return steps * self.batch_size / seconds
            steps *= 2

    def describe(self) -> dict[str, Any]:
        """The model's size, preprocessing and throughput, with the device it was measured on, as plain JSON."""
        encoder, (height, width) = self.record["encoder"], self.preprocessing["image_size"]
        image = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
        kept = ("embed_dim", "depth", "heads", "patch_size")
        return {
            "checkpoint": self.checkpoint,
            "model": {key: encoder[key] for key in kept}
            | {
                "classes": self.classes,
                "parameters": sum(leaf.size for leaf in jax.tree.leaves(self._params)),
                "forward_flops": matmul_flops(self.classifier, self._params, image),
            },
            "preprocessing": {key: value for key, value in self.preprocessing.items() if key != "class_names"},
            "throughput": {
                "images_per_second": self.images_per_second(),
                "batch_size": self.batch_size,
                "dtype": self.dtype,
                "device": self.mesh.devices.flat[0].device_kind,
                "devices": self.mesh.size,
            },
        }

    def _answer(self, arguments: Any, batch: dict[str, jax.Array]) -> Answers:
        params, allowed = arguments
        pixels = normalize(batch["image"], tuple(self.preprocessing["mean"]), tuple(self.preprocessing["std"]))
        logits = self.classifier(params, pixels).astype(jnp.float32)
        finite = jnp.isfinite(logits).all(axis=1)
        logits = jnp.where(allowed, logits, -jnp.inf)
        # Among equal logits the first class ranks first, as in the evaluation during training.
        best = jax.lax.top_k(logits, min(_TOP, self.classes))[1]
        confidence = jax.nn.softmax(logits).max(axis=1)
        return Answers(batch["label"], jnp.where(finite[:, None], best, -1), jnp.where(finite, confidence, 0.0))

    def _mask(self, allowed: np.ndarray | None) -> jax.Array:
        return place_frozen(np.ones(self.classes, bool) if allowed is None else allowed, self.mesh)
