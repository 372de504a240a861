"""Fine-tuning: an encoder and a new head learn the labels."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.class_names import ClassMismatch
from tinymim_jax.errors import unknown
from tinymim_jax.models.heads import Classifier, needs_final_norm
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import denormalize, normalize
from tinymim_jax.ops.erasing import random_erasing
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.ops.layer_norm import EPS
from tinymim_jax.ops.losses import binary_cross_entropy, soft_cross_entropy, soft_targets
from tinymim_jax.ops.mixup import draw_mix, mix_images, mix_targets
from tinymim_jax.ops.top_k import in_top
from tinymim_jax.tasks.classify.last_block import check_last_block, with_last_block, without_last_block
from tinymim_jax.tasks.classify.teacher import SupervisedTeacher, reorder_heads, supervised_teacher, teacher_stand_in
from tinymim_jax.tasks.pretrained import (
    OFFICIAL_HEADS,
    Loaded,
    class_order,
    fill_encoder,
    load,
    log_unused,
    started_encoder,
)
from tinymim_jax.tasks.stand_in import StandIn, init_stand_in
from tinymim_jax.tasks.task import Batch, Params, PerExample, Task, TaskType, nothing_frozen

log = logging.getLogger(__name__)

LOSSES = ("softmax", "bce")
# (key, normalized images, soft targets) -> images and targets
Augmentation = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def build(config: ConfigDict, class_names: Sequence[str]) -> Task:
    """The task of `config` for a data set with these classes. Raises ValueError if it has none."""
    classes = len(class_names)
    if classes == 0:
        raise ValueError(
            f"data.source={config.data.source!r} has no labels to classify by: choose a labelled set, or a task that "
            "needs none: mae, distill"
        )
    classify = config.classify
    loaded = load(config.init) if config.init else None
    encoder = _encoder(config, loaded)
    network = Classifier(
        encoder,
        classes,
        classify.pool,
        classify.hidden_dim,
        classify.norm_first,
        head_std=classify.head_std,
        norm_eps=_norm_eps(loaded, classify.pool),
    )
    teacher = supervised_teacher(config, class_names)
    method = Classification(
        network=network,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        smoothing=classify.label_smoothing,
        criterion=_criterion(classify, classes),
        augment=_augmentation(classify),
        teacher=teacher,
    )

    def start(params: Params) -> Params:
        assert loaded is not None
        source = with_last_block(loaded, classify.last_block)
        filled = fill_encoder(params, source, encoder, same_heads=classify.heads == "keep")
        return filled | _loaded_heads(params, loaded, network, class_names, config.data.source)

    return Task(
        model={"encoder": encoder.record(), "classifier": network.record()},
        init=method.init,
        losses=method.losses,
        names=method.names,
        seen=method.seen,
        load_frozen=teacher.weights if teacher else nothing_frozen,
        start=start if loaded else None,
        origin=teacher.origin if teacher else {},
    )


@dataclasses.dataclass(frozen=True)
class Classification:
    """A classifier and its loss.

    mean, std: by which the network's pixels are normalized.
    smoothing: label smoothing in training.
    criterion: (logits, soft targets) -> float32 [batch].
    augment: see _augmentation; None if nothing is erased or mixed.
    teacher: None without distillation. With one the loss is (1 - alpha) times that of the labels, on the first head,
      plus alpha times that of the teacher's answers, on the DIST token's head; without a DIST token one head learns
      both.
    """

    network: Classifier
    mean: tuple[float, ...]
    std: tuple[float, ...]
    smoothing: float
    criterion: Callable[[jax.Array, jax.Array], jax.Array]
    augment: Augmentation | None
    teacher: SupervisedTeacher | None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values that `losses` returns."""
        return ("loss", "top1", "top5", *(("label_loss", "teacher_loss", "teacher_top1") if self.teacher else ()))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters."""
        return self.network.init(key, jnp.zeros((1, *self.network.encoder.image_size, 3)))["params"]

    def seen(self, batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        """The mixed and erased images, see Task.seen."""
        images = normalize(batch["image"], self.mean, self.std)
        if self.augment:
            images, _ = self.augment(key, images, soft_targets(batch["label"], self.network.classes, smoothing=0.0))
        return {"network": denormalize(images, self.mean, self.std)}

    def losses(self, params: Params, frozen: Params, batch: Batch, key: jax.Array, train: bool) -> PerExample:
        """See Task.losses; `frozen` are the teacher's weights."""
        images, labels = normalize(batch["image"], self.mean, self.std), batch["label"]
        targets = soft_targets(labels, self.network.classes, smoothing=self.smoothing if train else 0.0)
        if train and self.augment:
            images, targets = self.augment(key, images, targets)
            labels = jnp.argmax(targets, axis=1)  # for a mixed image, the label of larger weight
        drop_key = fold_in_name(key, "drop_path") if train else None
        both: Any = self.network.apply({"params": params}, images, drop_key=drop_key, method="logits")
        first, second = both
        logits = first if second is None else (first + second) / 2
        values = {"top1": in_top(logits, labels, 1), "top5": in_top(logits, labels, 5)}
        if self.teacher is None:
            return {"loss": self.criterion(logits, targets), **values}
        answers, alpha = self.teacher.logits(frozen, images), self.teacher.alpha
        label_loss = self.criterion(first, targets)
        teacher_loss = self.teacher.distance(first if second is None else second, answers)
        values |= {"label_loss": label_loss, "teacher_loss": teacher_loss, "teacher_top1": in_top(answers, labels, 1)}
        return {"loss": (1 - alpha) * label_loss + alpha * teacher_loss, **values}


def _criterion(classify: ConfigDict, classes: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(logits, soft targets) -> float32 [batch]."""
    kind, threshold = classify.loss, classify.bce_threshold
    if kind not in LOSSES:
        raise unknown("classify.loss", kind, LOSSES)
    if kind == "softmax":
        return soft_cross_entropy
    lowest = classify.label_smoothing / classes  # the smoothed target of every class but the image's own
    if threshold is not None and not lowest <= threshold < 1:
        raise ValueError(
            f"classify.bce_threshold={threshold} would turn the targets of all classes into 1, or all into 0: choose "
            f"one from {lowest:.3g} (classify.label_smoothing over the classes) to below 1, or None for soft targets"
        )
    return functools.partial(binary_cross_entropy, threshold=threshold)


def _augmentation(classify: ConfigDict) -> Augmentation | None:
    """Random erasing, then mixup or cutmix; None if all are off.

    In timm's order: its data loader erases, and batches are mixed after that.
    """
    mixup, cutmix, erase = classify.mixup, classify.cutmix, classify.erase
    prob, switch_prob = classify.mixup_prob, classify.switch_prob
    for name, value in (("mixup", mixup), ("cutmix", cutmix)):
        if value < 0:
            raise ValueError(
                f"classify.{name}={value}: choose a positive parameter of the Beta distribution, or 0: off"
            )
    for name, value in (("mixup_prob", prob), ("switch_prob", switch_prob), ("erase", erase)):
        if not 0 <= value <= 1:
            raise ValueError(f"classify.{name}={value} is a probability: choose 0 to 1")
    if not (mixup or cutmix or erase):
        return None

    def augment(key: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        if erase:
            images = random_erasing(fold_in_name(key, "erase"), images, prob=erase)
        if mixup or cutmix:
            size = (images.shape[1], images.shape[2])
            draw_key = fold_in_name(key, "mixup")
            mix = draw_mix(draw_key, size, mixup=mixup, cutmix=cutmix, prob=prob, switch_prob=switch_prob)
            images, targets = mix_images(images, mix), mix_targets(targets, mix.lam)
        return images, targets

    return augment


def _encoder(config: ConfigDict, loaded: Loaded | None) -> ViT:
    """The encoder to fine-tune, with the attention heads that `classify.heads` chooses."""
    choice, last_block = config.classify.heads, config.classify.last_block
    check_last_block(last_block, pretrained=loaded is not None)
    final_norm = needs_final_norm(config.classify.pool, config.classify.hidden_dim)
    encoder = started_encoder(config, final_norm=final_norm)
    if last_block == "drop":
        encoder = without_last_block(encoder)
    if choice == "official":
        if encoder.embed_dim not in OFFICIAL_HEADS:
            raise ValueError(f"classify.heads='official' is published for widths {tuple(OFFICIAL_HEADS)} only")
        heads, asked = OFFICIAL_HEADS[encoder.embed_dim], config.model.heads
        if asked not in (None, heads):
            raise ValueError(
                f"model.heads={asked!r}, but classify.heads='official' has {heads} heads in every block: set "
                "model.heads=None, or classify.heads='keep'"
            )
        return encoder.clone(heads=heads)
    if choice not in ("keep", "uniform"):
        raise unknown("classify.heads", choice, ("keep", "official", "uniform"))
    if loaded is None:
        return encoder.clone(heads=encoder.block_heads[0] if choice == "uniform" else encoder.block_heads)
    heads = tuple(with_last_block(loaded, last_block).model["encoder"]["heads"])
    _check_model_heads(config, heads, loaded.path)
    return encoder.clone(heads=heads[0] if choice == "uniform" else heads)


def _norm_eps(loaded: Loaded | None, pool: str) -> float:
    """The eps of the norm behind the pooling: that of a classifier of another author that is trained further."""
    record = (loaded.model.get("classifier") if loaded else None) or {}
    return record.get("norm_eps", EPS) if pool == "mean" else EPS


def _check_model_heads(config: ConfigDict, heads: tuple[int, ...], path: str) -> None:
    """Raises ValueError if `model.heads` asks for other heads than the checkpoint's, which classify.heads takes.

    One number need not be that of every block: distillation gives some of them the teacher's heads.
    """
    asked = config.model.heads
    if asked is None or asked in heads or (not isinstance(asked, int) and tuple(asked) == heads):
        return
    raise ValueError(
        f"model.heads={asked!r}, but {path} was trained with {list(heads)}, block by block, and classify.heads="
        f"{config.classify.heads!r} takes those: set model.heads=None, or to that list"
    )


def _loaded_heads(params: Params, loaded: Loaded, network: Classifier, class_names: Sequence[str], data: str) -> Params:
    """The loaded checkpoint's heads and norms, its classes in the order of `class_names`.

    Where its architecture or its classes are others, nothing is taken: the heads keep their initial values, and a
    warning says so.
    """
    record = loaded.model.get("classifier")
    if record is None:
        log_unused(loaded, {"encoder"})
        return {}
    same_tokens = bool(loaded.model["encoder"].get("dist_token")) == network.encoder.dist_token
    if record != network.record() or not same_tokens:
        log.warning("the head of %s (%s) does not fit and is initialized anew", loaded.path, record)
        return {}
    try:
        order = class_order(loaded, class_names, data)
    except ClassMismatch as error:
        log.warning("the head of %s is initialized anew: %s", loaded.path, error)
        return {}
    found = {name: jax.tree.map(np.asarray, loaded.params[name]) for name in params if name != "encoder"}
    return reorder_heads(found, order)


def _for_evaluation(config: ConfigDict) -> ConfigDict:
    """Without the supervised teacher, which may no longer be there: evaluation compares with the labels alone."""
    if config.classify.get("distillation", "none") != "none":
        config.classify.distillation, config.classify.teacher.path = "none", ""
    return config


def _stand_ins(config: ConfigDict, classes: int) -> list[StandIn]:
    return teacher_stand_in(config.classify, classes) + init_stand_in(config)


TASK = TaskType(build=build, needs_labels=True, for_evaluation=_for_evaluation, stand_ins=_stand_ins)
