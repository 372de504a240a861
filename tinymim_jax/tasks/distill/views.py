"""The views of a batch for student and teacher, and the alignment of the teacher's tokens with the student's."""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tinymim_jax.models.blocks import Tap
from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import color_jitter, denormalize, normalize
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.ops.masking import Masking, greyed, kept_patches, most_attended, random_masking
from tinymim_jax.ops.token_grid import Grid, resize_images, resize_tokens, visible_tokens, without_extra_tokens
from tinymim_jax.tasks.decoder import check_maskable
from tinymim_jax.tasks.pretrained import Numbers


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The views of student and one teacher, and the mask. Both views are of the same crop.

    jitter, teacher_jitter: strengths of each view's own ColorJitter.
    mean, std, teacher_mean, teacher_std: by which the pixels of each view are normalized.
    mask_ratio: share of the patches that is hidden from the student; 0 hides nothing.
    teacher_masked: the same patches are hidden from the teacher. Otherwise it sees the whole image, and only its tokens
      at the student's visible patches are compared.
    dropped: share of the patches that the teacher is not shown: those to which the student's CLS token attends least.
    grid, teacher_grid: patches (rows, columns) of each.
    teacher_size: height and width of the teacher's images, in pixels.
    prefix: tokens before the patches that are compared, see `compared_prefix`.
    """

    jitter: dict[str, float]
    teacher_jitter: dict[str, float]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    teacher_mean: tuple[float, ...]
    teacher_std: tuple[float, ...]
    mask_ratio: float
    teacher_masked: bool
    dropped: float
    grid: Grid
    teacher_grid: Grid
    teacher_size: tuple[int, int]
    prefix: int = 1

    def student_view(self, images: jax.Array, key: jax.Array, train: bool) -> jax.Array:
        """Normalized pixels for the student from uint8 [batch, height, width, 3]."""
        images = _jittered(fold_in_name(key, "jitter"), images, self.jitter) if train else images
        return normalize(images, self.mean, self.std)

    def teacher_view(self, images: jax.Array, key: jax.Array, train: bool) -> jax.Array:
        """Normalized pixels for the teacher, of its image size."""
        images = _jittered(fold_in_name(key, "teacher_jitter"), images, self.teacher_jitter) if train else images
        if images.shape[1:3] != self.teacher_size:
            images = resize_images(images.astype(jnp.float32), self.teacher_size)
        return normalize(images, self.teacher_mean, self.teacher_std)

    def student_seen(self, images: jax.Array, key: jax.Array, patch_size: int) -> jax.Array:
        """What the student is shown in a training step, see Task.seen; patches of its size."""
        shown = denormalize(self.student_view(images, key, True), self.mean, self.std)
        masking = self.masking(key, len(images))
        return shown if masking is None else greyed(shown, masking.hidden, patch_size)

    def teacher_seen(self, images: jax.Array, key: jax.Array) -> jax.Array:
        """What the teacher is shown in a training step, see Task.seen."""
        shown = denormalize(self.teacher_view(images, key, True), self.teacher_mean, self.teacher_std)
        masking = self.masking(key, len(images))
        if masking is None or not self.teacher_masked:
            return shown
        return greyed(shown, masking.hidden, self.teacher_size[0] // self.teacher_grid[0])

    def masking(self, key: jax.Array, batch: int) -> Masking | None:
        """The patches hidden from the student, drawn for each image; None where all are visible."""
        if not self.mask_ratio:
            return None
        return random_masking(fold_in_name(key, "masking"), batch, self.grid[0] * self.grid[1], self.mask_ratio)

    def chosen(self, tap: Tap, prefix: int) -> jax.Array | None:
        """Positions of the patches that the teacher is shown, [batch, kept]; None for all of them.

        Args:
          tap: the student's deepest tap, with all patches.
        """
        if not self.dropped:
            return None
        kept = kept_patches(self.grid[0] * self.grid[1], self.dropped)
        return most_attended(tap.q, tap.k, prefix=prefix, kept=kept)

    def aligned(self, tap: Tap, masking: Masking | None) -> Tap:
        """The teacher's `compared` tap on the student's tokens: on the student's grid, the visible patches only."""
        if self.teacher_grid != self.grid:
            tap = jax.tree.map(lambda tokens: resize_tokens(tokens, self.teacher_grid, self.grid, self.prefix), tap)
        if masking is not None and not self.teacher_masked:
            tap = jax.tree.map(lambda tokens: visible_tokens(tokens, masking.keep, self.prefix), tap)
        return tap


def compared(tap: Tap, network: ViT | ConvNet, prefix: int = 1) -> Tap:
    """The tap of `network` with the tokens on which student and teacher are compared: those that both have.

    These are the CLS token (of several the first), where `prefix` is 1, and the patches. No softmax of a relation
    includes a DIST token (the authors pre-train without it and add it for fine-tuning) or a register.
    """
    return jax.tree.map(lambda tokens: without_extra_tokens(tokens, network.prefix, prefix), tap)


def compared_prefix(student: ViT, teacher: ViT | ConvNet) -> int:
    """Number of tokens before the patches in `compared` taps of these networks: 1, or 0 where one has no CLS token."""
    return min(1, student.switches.cls_tokens, teacher.switches.cls_tokens)


def build_inputs(config: ConfigDict, student: ViT, teacher: ViT | ConvNet, pixels: tuple[Numbers, Numbers]) -> Inputs:
    """The inputs of `config` for these networks.

    Args:
      pixels: mean and standard deviation of the pixels that the teacher was trained on.

    Raises ValueError where the masks of `config` do not fit the networks.
    """
    distill = config.distill
    ratio, masked = distill.mask_ratio, distill.teacher.masked
    kept_patches(student.grid[0] * student.grid[1], ratio)
    if masked and not ratio:
        raise ValueError(
            "distill.teacher.masked=True hides the student's hidden patches from the teacher, but "
            f"distill.mask_ratio={ratio}: set it, for example to 0.75, or distill.teacher.masked=False"
        )
    if ratio:
        check_maskable(student, f"distill.mask_ratio={ratio}")
    if masked and isinstance(teacher, ViT):
        check_maskable(teacher, "distill.teacher.masked=True")
    if masked and student.grid != teacher.grid:
        raise ValueError(
            f"distill.teacher.masked=True needs the same grid of patches for both, but the student's is {student.grid} "
            f"and the teacher's {teacher.grid}: set distill.teacher.masked=False, or give both the same patches"
        )
    if dropped := distill.teacher.drop_patches:
        kept_patches(student.grid[0] * student.grid[1], dropped)
        if ratio or student.grid != teacher.grid:
            raise ValueError(
                f"distill.teacher.drop_patches={dropped} needs a student that sees all patches, and the same grid of "
                f"patches for both; distill.mask_ratio={ratio}, the grids are {student.grid} and {teacher.grid}"
            )
    return Inputs(
        jitter=dict(distill.jitter),
        teacher_jitter=dict(distill.teacher.jitter),
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        teacher_mean=pixels[0],
        teacher_std=pixels[1],
        mask_ratio=ratio,
        teacher_masked=masked,
        dropped=dropped,
        grid=student.grid,
        teacher_grid=teacher.grid,
        teacher_size=(teacher.image_size[0], teacher.image_size[1]),
        prefix=compared_prefix(student, teacher),
    )


def _jittered(key: jax.Array, images: jax.Array, strengths: dict[str, float]) -> jax.Array:
    return color_jitter(key, images, **strengths) if any(strengths.values()) else images
