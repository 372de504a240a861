"""How good the features are while a model trains: k-NN accuracy and effective rank on a part of the images."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from tinymim_jax.checkpoints.params import STUDENTS
from tinymim_jax.data.pipeline import eval_batches
from tinymim_jax.data.sources.examples import Source, Subset
from tinymim_jax.evaluation.collect import Collected, RowStep, collect, row_step
from tinymim_jax.evaluation.knn import TEMPERATURE, knn_scores
from tinymim_jax.evaluation.similarity import effective_rank
from tinymim_jax.experiment import Experiment, evaluation_batch_size
from tinymim_jax.models.heads import pool_tokens
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.tasks.pretrained import compute_dtype

_MOST_NEIGHBORS = 20


class LiveProbe:
    """Measures the encoder's features (mean of the patch tokens, without augmentation) when it is called.

    Images are evenly spaced ones of both splits: `train.probe_images` of the training split, in which neighbors are
    sought, and half as many of the evaluation split, which are classified. They are decoded once and stay in memory, 3
    bytes a pixel. Nothing of the training depends on it, except its end by `enough`.

    Args:
      history: k-NN accuracies of earlier probes of this run, in order.

    Raises ValueError if the task has no encoder of its own, or `train.probe_patience` is set for images without
    labels.
    """

    def __init__(self, experiment: Experiment, mesh: Mesh, *, history: Sequence[float] = ()):
        settings, self._experiment, self._mesh = experiment.config.train, experiment, mesh
        if settings.probe_images < 2 or settings.probe_patience < 0:
            raise ValueError(
                f"train.probe_images={settings.probe_images}, train.probe_patience={settings.probe_patience}: give at "
                "least 2 images, and a patience of 0 (never stop) or more"
            )
        self._bank = self._decoded(_spaced(experiment.train_source, settings.probe_images))
        self._queries = self._decoded(_spaced(experiment.eval_source, settings.probe_images // 2))
        # Classes of masks, which sources of segmentation have, are no labels of images.
        known = self._bank.labelled > 0 and self._queries.labelled > 0
        self._classes = experiment.train_source.classes if known else 0
        if settings.probe_patience and self._classes < 2:
            raise ValueError(
                f"train.probe_patience={settings.probe_patience} stops by k-NN accuracy, which needs labels, and "
                f"{experiment.train_source.name!r} has none: set it to 0"
            )
        self._patience = settings.probe_patience
        self._history = list(history)
        self._step = self._extracting(experiment.task.model)
        self._steps = {name: self._extracting(student.model) for name, student in experiment.task.students.items()}

    def __call__(self, params: Any) -> dict[str, float]:
        """The figures of these parameters: "effective_rank", and "knn" (top-1, 0 to 1) where there are labels.

        Of further students the same after their names: "NAME_knn".
        """
        if "encoder" not in params:
            raise ValueError("train.probe_every: this task trains no encoder; set it to '0 epochs'")
        figures = self._figures(self._step, params["encoder"])
        if "knn" in figures:
            self._history.append(figures["knn"])
        for name, step in self._steps.items():
            own = self._figures(step, params[STUDENTS][name]["encoder"])
            figures |= {f"{name}_{figure}": value for figure, value in own.items()}
        return figures

    def _extracting(self, model: dict[str, Any]) -> RowStep:
        config = self._experiment.config
        encoder = ViT.from_record(
            model["encoder"],
            image_size=tuple(config.model.image_size),
            dtype=compute_dtype(config.model),
            attention=config.model.get("attention", "auto"),
        )
        mean, std = tuple(config.data.mean), tuple(config.data.std)

        def extract(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
            tokens: Any = encoder.apply({"params": params}, normalize(batch["image"], mean, std))
            return pool_tokens(tokens, "mean", encoder), batch["label"]

        return row_step(extract, self._mesh)

    def _figures(self, step: RowStep, encoder: Any) -> dict[str, float]:
        features, labels = self._features(step, self._queries, encoder)
        figures = {"effective_rank": effective_rank(features.astype(np.float64))}
        if self._classes > 1:
            bank, known = self._features(step, self._bank, encoder)
            labelled, wanted = known >= 0, labels >= 0
            k = max(1, min(_MOST_NEIGHBORS, int(labelled.sum()) // self._classes))
            scores = knn_scores(
                bank[labelled],
                known[labelled],
                features[wanted],
                classes=self._classes,
                neighbors=(k,),
                temperature=TEMPERATURE,
                mesh=self._mesh,
            )[k]
            figures["knn"] = float((scores.argmax(axis=1) == labels[wanted]).mean())
        return figures

    def enough(self) -> bool:
        """Whether the best k-NN accuracy is older than the last `train.probe_patience` probes.

        Process 0 decides for all of a job: the others may not have read the same history from the shared folder, and
        all must end at the same step. Call it on every process.
        """
        best_before = max(self._history[: -self._patience], default=np.inf) if self._patience else np.inf
        ended = max(self._history[-self._patience :], default=0.0) <= best_before < np.inf
        return bool(multihost_utils.broadcast_one_to_all(np.array(ended))) if jax.process_count() > 1 else ended

    def _features(self, step: RowStep, images: "_Kept", encoder: Any) -> tuple[np.ndarray, np.ndarray]:
        batches: Any = images
        found: Collected = collect(step, encoder, batches, self._mesh, examples=images.examples)
        features, labels = found.rows
        return np.asarray(features, np.float32), labels

    def _decoded(self, source: Source) -> "_Kept":
        config, views = self._experiment.config, self._experiment.views
        batches = eval_batches(
            source,
            view=views.eval,
            batch_size=evaluation_batch_size(config, self._mesh.size),
            upright=config.data.upright,
            workers=0,  # a few images, once
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        return _Kept(batches, len(source))


class _Kept:
    """Batches that can be iterated again: `collect` takes them in place of a pipeline.

    `examples` is the number of images, `labelled` how many of them have a label, in all processes together.
    """

    substitutions = 0  # a few damaged images do not matter here; the evaluation of the run counts them

    def __init__(self, batches: Any, examples: int):
        with batches:
            self._batches = [{name: batch[name] for name in ("image", "label", "valid")} for batch in batches]
        self.examples = examples
        labelled = sum(int((batch["label"][batch["valid"]] >= 0).sum()) for batch in self._batches)
        self.labelled = int(np.sum(multihost_utils.process_allgather(np.int32(labelled))))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return iter(self._batches)

    def __enter__(self) -> "_Kept":
        return self

    def __exit__(self, *_) -> None:
        pass


def _spaced(source: Source, count: int) -> Source:
    """`count` examples at equal distances, so that all classes occur even if the source is sorted by class."""
    if len(source) <= count:
        return source
    return Subset(source, np.linspace(0, len(source) - 1, count).astype(np.int64))
