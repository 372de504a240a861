"""Semantic segmentation: an encoder and a head learn the class of every pixel."""

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tinymim_jax.models.convolutions import STATISTICS
from tinymim_jax.models.segmentation import SegmentationNetwork, variables
from tinymim_jax.models.taps import default_taps
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.ops.pixel_loss import pixel_cross_entropy
from tinymim_jax.tasks.pretrained import Loaded, load
from tinymim_jax.tasks.segment.data import evaluation_windows, mean_colour, segmentation_views, with_masks
from tinymim_jax.tasks.segment.encoder import segmentation_encoder
from tinymim_jax.tasks.segment.start import start_from
from tinymim_jax.tasks.segmenter import Segmenter
from tinymim_jax.tasks.stand_in import StandIn, init_stand_in
from tinymim_jax.tasks.task import RUNNING, Batch, Params, Task, TaskType

log = logging.getLogger(__name__)


def build(config: ConfigDict, class_names: Sequence[str]) -> Task:
    """The task of `config` for masks with these classes. Raises ValueError for a config that cannot be trained."""
    loaded = load(config.init) if config.init else None
    network = build_network(config, loaded, _classes(config, class_names))
    _check_training(config, network)
    method = Segmentation(
        network=network,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        auxiliary_weight=config.segment.auxiliary_weight,
        frozen_encoder=config.segment.frozen_encoder,
    )
    return Task(
        model={"encoder": network.encoder.record(), "segmenter": network.record()},
        init=method.init,
        losses=method.losses,
        names=method.names,
        start=functools.partial(start_from, loaded, network, class_names) if loaded else None,
        segmenter=Segmenter(
            method.logits,
            network.encoder.image_size,
            network.classes,
            mean_colour(config),
            evaluation_windows(config),
        ),
    )


def build_network(config: ConfigDict, loaded: Loaded | None, classes: int) -> SegmentationNetwork:
    """The network that `config` describes, with what the parameters of `loaded` need of its encoder's architecture."""
    settings = config.segment
    encoder = segmentation_encoder(config, loaded)
    taps = default_taps(settings.head, encoder.depth) if settings.taps is None else tuple(settings.taps)
    _check_taps(taps, encoder)
    published = settings.head == "upernet"
    return SegmentationNetwork(
        encoder,
        settings.head,
        classes,
        taps,
        channels=settings.channels,
        auxiliary=settings.auxiliary_channels if published and settings.auxiliary_weight else 0,
        dropout=settings.dropout,
        pyramid=settings.pyramid,
        widen=settings.widen,
    )


@dataclasses.dataclass(frozen=True)
class Segmentation:
    """A segmentation network and its loss.

    mean, std: by which its pixels are normalized.
    auxiliary_weight: of the auxiliary head's loss.
    frozen_encoder: the encoder keeps its values; only the head learns.
    """

    network: SegmentationNetwork
    mean: tuple[float, ...]
    std: tuple[float, ...]
    auxiliary_weight: float
    frozen_encoder: bool

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the values that `losses` returns."""
        return ("loss", "pixel_accuracy", *(("decode_loss", "auxiliary_loss") if self.network.auxiliary else ()))

    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; under STATISTICS the running statistics of batch norm, where the head has it."""
        image = jnp.zeros((1, *self.network.encoder.image_size, 3))
        return dict(self.network.init(key, image)["params"]) | self._fresh_statistics(image)

    def losses(self, params: Params, frozen: Params, batch: Batch, key: jax.Array, train: bool) -> dict[str, Any]:
        """See Task.losses. The batch has "pixel_labels", see ops.pixel_loss."""
        del frozen
        if self.frozen_encoder:
            params = params | {"encoder": jax.lax.stop_gradient(params["encoder"])}
        images = normalize(batch["image"], self.mean, self.std)
        apply = functools.partial(self.network.apply, variables(params), images, train=train, method="both")
        updated: dict[str, Any] = {}
        if train:
            result: Any = apply(drop_key=key, mutable=[STATISTICS])
            (logits, auxiliary), updated = result[0], {RUNNING: dict(result[1])} if result[1] else {}
        else:
            result = apply()
            logits, auxiliary = result
        loss, accuracy = pixel_cross_entropy(logits, batch["pixel_labels"])
        values = {"loss": loss, "pixel_accuracy": accuracy}
        if auxiliary is not None:
            weighted = self.auxiliary_weight * pixel_cross_entropy(auxiliary, batch["pixel_labels"])[0]
            values |= {"loss": loss + weighted, "decode_loss": loss, "auxiliary_loss": weighted}
        return values | updated

    def logits(self, params: Params, frozen: Params, pixels: jax.Array) -> jax.Array:
        """float32 logits [batch, rows, columns, classes] of uint8 pixels, without the auxiliary head."""
        del frozen
        result: Any = self.network.apply(variables(params), normalize(pixels, self.mean, self.std))
        return result

    def _fresh_statistics(self, image: jax.Array) -> Params:
        shapes = dict(jax.eval_shape(self.network.init, jax.random.key(0), image))
        del shapes["params"]
        fill = {"mean": jnp.zeros, "variance": jnp.ones}
        return jax.tree_util.tree_map_with_path(lambda path, x: fill[path[-1].key](x.shape, x.dtype), shapes)


def _classes(config: ConfigDict, class_names: Sequence[str]) -> int:
    asked, named = config.segment.num_classes, len(class_names)
    if asked is not None and named and asked != named:
        raise ValueError(
            f"segment.num_classes={asked}, but data.source={config.data.source!r} has {named} classes: set it to None"
        )
    classes = asked or named
    if classes < 2:
        raise ValueError(
            f"{classes} classes: the softmax over classes needs at least two, of which one may be the background; "
            "data.source must name them, or segment.num_classes count them"
        )
    return classes


def _check_taps(taps: tuple[int, ...], encoder: ViT) -> None:
    if not taps or any(not 1 <= tap <= encoder.depth for tap in taps) or list(taps) != sorted(taps):
        raise ValueError(f"segment.taps={taps}: choose ascending blocks from 1 to {encoder.depth}")


def _check_training(config: ConfigDict, network: SegmentationNetwork) -> None:
    settings, parts = config.segment, config.train.accumulate
    if settings.frozen_encoder and not config.init:
        raise ValueError("segment.frozen_encoder=True without init: name the encoder's checkpoint, init=runs/b")
    if not 0 <= settings.dropout < 1:
        raise ValueError(f"segment.dropout={settings.dropout} is a probability below 1")
    if settings.auxiliary_weight < 0:
        raise ValueError(f"segment.auxiliary_weight={settings.auxiliary_weight}: choose a positive number, or 0: off")
    if network.encoder.patch_size != 16 and network.head in ("upernet", "light"):
        log.info("patches of %d pixels: the head's strides are in proportion", network.encoder.patch_size)
    if network.head == "mask":
        return  # it has no batch norm
    if parts == 0:
        raise ValueError(
            "train.accumulate=0 would let the memory of the devices decide over how many images batch norm averages: "
            "choose the number of micro-batches, 1 if possible"
        )
    images = config.train.batch_size // parts
    if images < 2 and network.head == "upernet":
        raise ValueError(
            f"train.batch_size={config.train.batch_size} in {parts} micro-batches: batch norm of the map that is "
            "pooled to one value needs at least two images at a time"
        )
    if parts > 1:
        log.warning(
            "train.accumulate=%d: batch norm averages over %d images at a time and not over the batch of %d, so this "
            "is not the same training as without micro-batches",
            parts,
            images,
            config.train.batch_size,
        )


def _stand_ins(config: ConfigDict, classes: int) -> list[StandIn]:
    del classes
    return init_stand_in(config, needed=config.segment.frozen_encoder)


TASK = TaskType(
    build=build,
    sources=with_masks,
    class_views=segmentation_views,
    batch_norm=True,
    images_per_core=70,  # crops of 512
    usual_data=(20_210, 150),  # ADE20K
    stand_ins=_stand_ins,
)
