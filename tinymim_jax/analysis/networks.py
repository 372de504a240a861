"""The encoders of a checkpoint and its teacher, and their taps of all blocks."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.evaluation.similarity import attention_weights
from tinymim_jax.models.blocks import OutputTap, Tap
from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import IMAGENET_MEAN, IMAGENET_STD, normalize
from tinymim_jax.ops.relative_bias import relative_bias
from tinymim_jax.ops.token_grid import resize_images
from tinymim_jax.tasks.pretrained import Loaded, fit_positions, load

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Network:
    """An encoder with its weights and preprocessing.

    name: "student", "teacher", or "encoder" for a checkpoint without a teacher.
    vit: a Vision Transformer, or a convolutional network, whose stages count as blocks.
    mean, std: of the normalization of its pixels.
    """

    name: str
    vit: ViT | ConvNet
    params: Any
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def attends(self) -> bool:
        """Whether its blocks have attention, and thus relations of q, k and v."""
        return isinstance(self.vit, ViT)

    def taps(self, params: Any, images: jax.Array, blocks: Sequence[int] | None = None) -> tuple[Tap, ...]:
        """The taps of all blocks, or of `blocks`. To be called under jit with `params` as an argument.

        Stages of a convolutional network have outputs [batch, positions, channels] of different sizes.

        Args:
          images: uint8 [batch, height, width, 3]; resized if the network's input has another size.
        """
        size = (self.vit.image_size[0], self.vit.image_size[1])
        if images.shape[1:3] != size:
            images = resize_images(images.astype(jnp.float32), size)
        wanted = tuple(blocks or range(1, self.vit.depth + 1))
        pixels = normalize(images, self.mean, self.std)
        if isinstance(self.vit, ConvNet):
            maps = self.vit.stages(params, pixels)[-self.vit.depth :]  # of a ResNet, that of the stem is left out
            flat = [OutputTap(output=each.reshape(each.shape[0], -1, each.shape[-1])) for each in maps]
            return tuple(flat[block - 1] for block in wanted)
        taps: Any = self.vit.apply({"params": params}, pixels, tap=wanted, method="encode")
        return taps

    def attention(self, params: Any, taps: Sequence[Tap]) -> list[jax.Array]:
        """Attention weights [batch, heads, queries, keys] of the taps of all blocks, with relative position biases."""
        vit, weights = self.vit, []
        for i, tap in enumerate(taps):
            bias = None
            if vit.switches.relative_bias:
                table = params[f"blocks_{i}"]["attn"]["relative_bias"]
                bias = relative_bias(table, vit.grid, vit.prefix)
            weights.append(attention_weights(tap.q, tap.k, bias))
        return weights


@dataclasses.dataclass(frozen=True)
class Networks:
    """The encoder of one checkpoint, and then its teacher's, if there is one.

    compared: the pairs of blocks (student, teacher), counted from 1, that it was trained on; () if unknown.
    """

    members: tuple[Network, ...]
    compared: tuple[tuple[int, int], ...] = ()

    @property
    def student(self) -> Network:
        return self.members[0]

    @property
    def teacher(self) -> Network | None:
        return self.members[1] if len(self.members) > 1 else None


def find_networks(checkpoint: str, *, image_size: tuple[int, int], teacher: str | None = None) -> Networks:
    """The encoder of a checkpoint, and that of its teacher if it was distilled and the teacher still exists.

    Args:
      checkpoint: a run, or what `tinymim convert` wrote.
      image_size: (height, width) of the images.
      teacher: another checkpoint to compare with in place of the recorded teacher. Of several recorded teachers the
        first is taken, and the log names the others.

    Raises CheckpointError if the checkpoint, or the given `teacher`, cannot be read.
    """
    loaded = load(checkpoint, cnn=True)
    record = loaded.model.get("teacher", {})
    path = teacher or record.get("checkpoint")
    pixels = loaded.model.get("preprocessing", {})
    if not path:
        return Networks((_network("encoder", loaded, image_size, pixels),))
    if not teacher and (others := loaded.model.get("teachers")):
        paths = ", ".join(each["checkpoint"] for each in others.values())
        log.info("of several teachers the first, %s, is compared; for the others use --teacher: %s", path, paths)
    student = _network("student", loaded, image_size, pixels)
    try:
        theirs = load(path, cnn=True)
    except CheckpointError as error:
        if teacher:
            raise
        log.warning("the teacher is not compared: %s", error)
        return Networks((dataclasses.replace(student, name="encoder"),))
    if teacher:
        record = {}
    size = tuple(record.get("image_size", image_size))
    members = (student, _network("teacher", theirs, size, theirs.model.get("preprocessing", {}) | record))
    return Networks(members, tuple((int(s), int(t)) for s, t in record.get("blocks", ())))


def _network(name: str, loaded: Loaded, image_size: tuple[int, ...], pixels: dict[str, Any]) -> Network:
    mean, std = tuple(pixels.get("mean") or IMAGENET_MEAN), tuple(pixels.get("std") or IMAGENET_STD)
    if "backbone" in loaded.model:
        network = ConvNet.from_record(loaded.model["backbone"])
        step = network.patch_size
        size = (-(-image_size[0] // step) * step, -(-image_size[1] // step) * step)
        network = dataclasses.replace(network, image_size=size)
        return Network(name, network, jax.device_put(loaded.params["backbone"]), mean, std)
    encoder = ViT.from_record(loaded.model["encoder"], image_size=image_size)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), fit_positions(loaded, encoder))
    return Network(name, encoder, jax.device_put(params), mean, std)
