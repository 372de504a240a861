"""A supervised teacher: a frozen classifier whose answers to a batch a student learns (DeiT, arXiv 2012.12877)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.errors import unknown
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.ops.losses import hard_distillation, soft_distillation
from tinymim_jax.ops.token_grid import resize_images
from tinymim_jax.tasks.pretrained import (
    Loaded,
    Numbers,
    class_order,
    compute_dtype,
    fit_positions,
    load,
    teacher_pixels,
    teacher_record,
)
from tinymim_jax.tasks.stand_in import VIT_B, StandIn, classifier_zeros, is_missing
from tinymim_jax.tasks.task import Params

DISTILLATION = ("none", "soft", "hard")
_HEADS = ("head", "head_dist")  # of a Classifier; their parameters end in [..., classes]


@dataclasses.dataclass(frozen=True)
class SupervisedTeacher:
    """A classifier, its weights on the host, and the loss by which a student learns from it.

    alpha: share of the distillation in the loss; the labels have the rest.
    distance: (student's logits, teacher's logits) -> float32 [batch].
    order: int [classes], for each class of the data set the teacher's output.
    shown, own: mean and standard deviation by which the student's pixels are normalized, and the teacher's.
    """

    loaded: Loaded
    network: Classifier
    alpha: float
    distance: Callable[[jax.Array, jax.Array], jax.Array]
    order: np.ndarray
    shown: tuple[Numbers, Numbers]
    own: tuple[Numbers, Numbers]

    @property
    def origin(self) -> dict[str, Any]:
        """See Task.origin."""
        return {"teacher": teacher_record(self.loaded, self.own)}

    def weights(self) -> Params:
        """The frozen weights for the training step; the encoder's in the dtype of the computation."""
        encoder, dtype = fit_positions(self.loaded, self.network.encoder), self.network.encoder.dtype
        params = self.loaded.params | {"encoder": jax.tree.map(lambda leaf: np.asarray(leaf, dtype), encoder)}
        return reorder_heads(params, self.order)

    def logits(self, frozen: Params, images: jax.Array) -> jax.Array:
        """float32 [batch, classes], without a gradient.

        Args:
          frozen: from `weights`.
          images: the student's, augmented and normalized; they are brought to the teacher's pixel scale and size.
        """
        encoder = self.network.encoder
        if self.shown != self.own or images.shape[1:3] != encoder.image_size:
            mean, std = (np.asarray(values, np.float32) for values in self.shown)
            pixels = 255 * (images * std + mean)
            # Resizing clips to 0..255, so the noise of random erasing, which lies outside, differs where sizes do.
            images = normalize(resize_images(pixels, encoder.image_size), *self.own)
        logits: Any = self.network.apply({"params": frozen}, images)
        return jax.lax.stop_gradient(logits)


def reorder_heads(params: Params, order: np.ndarray) -> Params:
    """A classifier's parameters with its classes in the order `order`: output i is what output order[i] was."""
    heads = {name: jax.tree.map(lambda leaf: leaf[..., order], params[name]) for name in _HEADS if name in params}
    return params | heads


def supervised_teacher(config: ConfigDict, class_names: Sequence[str]) -> SupervisedTeacher | None:
    """What `config.classify.distillation` asks for; None for 'none'.

    Raises ValueError if the teacher does not fit the config, and ClassMismatch (a ValueError) where its classes are
    not those of the data. The same classes in another order are put in the order of the data.
    """
    classify, classes = config.classify, len(class_names)
    kind, alpha, tau, path = classify.distillation, classify.alpha, classify.tau, classify.teacher.path
    size, mean, std = classify.teacher.image_size, classify.teacher.mean, classify.teacher.std
    if kind not in DISTILLATION:
        raise unknown("classify.distillation", kind, DISTILLATION)
    if not 0 <= alpha <= 1 or tau <= 0:
        raise ValueError(f"classify.alpha={alpha}, classify.tau={tau}: choose a share from 0 to 1, and a tau above 0")
    if kind == "none":
        if path:
            raise ValueError(
                f"classify.teacher.path={path!r} is given, but classify.distillation='none' asks no teacher: set it "
                "to 'hard' or 'soft', or clear the path"
            )
        return None
    loaded = _load(kind, path)
    record = loaded.model.get("classifier") or {}
    if record.get("classes", 0) != classes or "head" not in loaded.params:
        has = f"{record['classes']} classes" if record.get("classes") else "no classifier"
        raise ValueError(
            f"classify.teacher.path: {path} has {has}, but {config.data.source!r} has {classes} classes: name a "
            "classifier that was fine-tuned on them"
        )
    encoder = ViT.from_record(
        loaded.model["encoder"],
        image_size=tuple(size or config.model.image_size),
        dtype=compute_dtype(config.model),
        scan=config.model.scan,
        attention=config.model.attention,
    )
    if any(side % encoder.patch_size for side in encoder.image_size):
        raise ValueError(
            f"classify.teacher.image_size: images of {encoder.image_size[0]}x{encoder.image_size[1]} cannot be cut "
            f"into the teacher's patches of {encoder.patch_size}: choose multiples of it; it is shown the student's "
            "images at that size"
        )
    return SupervisedTeacher(
        loaded=loaded,
        network=Classifier(encoder, **record),
        alpha=alpha,
        distance=hard_distillation if kind == "hard" else lambda mine, wanted: soft_distillation(mine, wanted, tau=tau),
        order=class_order(loaded, class_names, config.data.source),
        shown=(tuple(map(float, config.data.mean)), tuple(map(float, config.data.std))),
        own=teacher_pixels(loaded, mean, std, "classify.teacher"),
    )


def teacher_stand_in(classify: ConfigDict, classes: int) -> list[StandIn]:
    """For the missing teacher of `config.classify`, if it asks for one: a ViT-B classifier of zeros."""
    if classify.distillation == "none" or not is_missing(classify.teacher.path):
        return []
    path = classify.teacher.path or "a classifier"
    loaded = classifier_zeros(path, Classifier(VIT_B.clone(final_norm=False), classes))
    return [StandIn("classify.teacher.path", loaded, f"classify.teacher.path={path} is not here: taken as a ViT-B")]


def _load(kind: str, path: str) -> Loaded:
    if not path:
        raise ValueError(
            f"classify.distillation={kind!r} needs a teacher, but classify.teacher.path is empty: name a classifier, "
            "a run of ours or a converted file, for example classify.teacher.path=runs/b_finetuned"
        )
    try:
        return load(path)
    except CheckpointError as error:
        raise CheckpointError(f"classify.teacher.path: {error}") from error
