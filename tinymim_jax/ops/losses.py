"""Losses for each image, computed in float32 whatever the dtype of the inputs."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

Features = Float[Array, "batch *rest"]


def masked_pixel_loss(
    prediction: Float[Array, "batch patches pixels"],
    patches: Float[Array, "batch patches pixels"],
    hidden: Bool[Array, "batch patches"],
    *,
    normalize: bool,
) -> Float[Array, "batch"]:
    """Mean squared error over the hidden patches of each image (MAE release, models_mae.py: forward_loss).

    Every image hides equally many patches, so the mean over the batch is the published loss.

    Args:
      prediction: the decoder's output.
      patches: the true pixels of each patch.
      hidden: True where the patch was removed from the encoder.
      normalize: normalize the target pixels of each patch to mean 0 and (unbiased) variance 1.
    """
    target = patches.astype(jnp.float32)
    if normalize:
        mean = target.mean(axis=-1, keepdims=True)
        variance = target.var(axis=-1, keepdims=True, ddof=1)
        target = (target - mean) / jnp.sqrt(variance + 1e-6)
    error = jnp.mean((prediction.astype(jnp.float32) - target) ** 2, axis=-1)  # [batch, patches]
    return jnp.sum(error * hidden, axis=1) / jnp.sum(hidden, axis=1)


def smooth_l1(student: Features, teacher: Features, *, beta: float) -> Float[Array, "batch"]:
    """torch's smooth_l1_loss, averaged over each image: squared differences / (2 beta) up to beta, linear beyond."""
    distance = jnp.abs(student.astype(jnp.float32) - teacher.astype(jnp.float32))
    near = jnp.minimum(distance, beta)
    return _image_mean(0.5 * near**2 / beta + (distance - near))


def mean_squared(student: Features, teacher: Features) -> Float[Array, "batch"]:
    """Squared differences, averaged over each image."""
    return _image_mean((student.astype(jnp.float32) - teacher.astype(jnp.float32)) ** 2)


def cosine_distance(student: Features, teacher: Features) -> Float[Array, "batch"]:
    """1 - cosine of the vectors on the last axis, averaged over each image; a zero vector has cosine 0."""
    return _image_mean(1.0 - jnp.sum(_unit(student) * _unit(teacher), axis=-1))


def _unit(vectors: Features) -> Features:
    vectors = vectors.astype(jnp.float32)
    return vectors * jax.lax.rsqrt(jnp.maximum(jnp.sum(vectors**2, axis=-1, keepdims=True), 1e-12))


def _image_mean(values: Features) -> Float[Array, "batch"]:
    return jnp.mean(values, axis=tuple(range(1, values.ndim)))


def soft_cross_entropy(
    logits: Float[Array, "batch classes"], targets: Float[Array, "batch classes"]
) -> Float[Array, "batch"]:
    """Cross-entropy of each example with the distribution `targets`."""
    return optax.softmax_cross_entropy(logits.astype(jnp.float32), targets)


def binary_cross_entropy(
    logits: Float[Array, "batch classes"],
    targets: Float[Array, "batch classes"],
    *,
    threshold: float | None = None,
) -> Float[Array, "batch"]:
    """Binary cross-entropy of each class, averaged over the classes as timm's BinaryCrossEntropy does by default.

    Args:
      threshold: targets above it become 1 and the others 0, so that both classes of a mixed image count in full
        (ResNet strikes back, arXiv 2110.00476: 0.2; DeiT III, arXiv 2204.07118: 0); None keeps soft targets.
    """
    if threshold is not None:
        targets = (targets > threshold).astype(jnp.float32)
    return jnp.mean(optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), targets), axis=-1)


def hard_distillation(
    student: Float[Array, "batch classes"], teacher: Float[Array, "batch classes"]
) -> Float[Array, "batch"]:
    """Cross-entropy with the class that the teacher's logits rank first (DeiT, arXiv 2012.12877, equation 3)."""
    return optax.softmax_cross_entropy_with_integer_labels(student.astype(jnp.float32), jnp.argmax(teacher, axis=-1))


def soft_distillation(
    student: Float[Array, "batch classes"], teacher: Float[Array, "batch classes"], *, tau: float
) -> Float[Array, "batch"]:
    """tau^2 KL(teacher || student) of softmax(logits / tau), summed over the classes (DeiT, equation 2).

    DeiT's released code divides by the number of classes as well.
    """
    student, teacher = (jax.nn.log_softmax(logits.astype(jnp.float32) / tau) for logits in (student, teacher))
    return tau**2 * jnp.sum(jnp.exp(teacher) * (teacher - student), axis=-1)


def soft_targets(labels: Int[Array, "batch"], classes: int, *, smoothing: float) -> Float[Array, "batch classes"]:
    """One-hot labels in float32, with a share of `smoothing` spread evenly over all classes."""
    one_hot = (labels[:, None] == jnp.arange(classes)).astype(jnp.float32)
    return optax.smooth_labels(one_hot, smoothing)
