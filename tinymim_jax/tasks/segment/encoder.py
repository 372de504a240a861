"""The encoder of a segmentation network: relative position biases and scaled branches, and whose attention heads."""

import dataclasses

from ml_collections import ConfigDict

from tinymim_jax.errors import unknown
from tinymim_jax.models.segmentation import BEHIND_FINAL_NORM
from tinymim_jax.models.switches import PLAIN, Switches
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks.pretrained import OFFICIAL_HEADS, Loaded, build_encoder

HEADS = ("keep", "official")


def segmentation_encoder(config: ConfigDict, loaded: Loaded | None) -> ViT:
    """The encoder that `config` describes, with the switches of the pre-trained one.

    `segment.relative_bias` and `segment.layer_scale` add to each block what the published segmentation adds: biases of
    attention that start at 0, and factors of the branches that start at 1, so that nothing changes at first.
    """
    settings = config.segment
    encoder = build_encoder(config.model, final_norm=settings.head in BEHIND_FINAL_NORM)
    switches = Switches.from_record(loaded.model["encoder"].get("switches", {})) if loaded else PLAIN
    if config.model.stem != PLAIN.stem:
        switches = dataclasses.replace(switches, stem=config.model.stem)
    if switches.last_dim:
        raise ValueError(
            f"init={config.init}: its last block is {switches.last_dim} wide and the others {encoder.embed_dim} "
            "(distill.wide_last), and a segmentation network reads blocks of one width: start from another encoder"
        )
    if settings.layer_scale and not switches.layer_scale:
        switches = dataclasses.replace(switches, layer_scale=True, layer_scale_start=1.0)
    if settings.relative_bias:
        switches = dataclasses.replace(switches, relative_bias=True)
    return encoder.clone(heads=_heads(config, encoder, loaded), switches=switches)


def _heads(config: ConfigDict, encoder: ViT, loaded: Loaded | None) -> tuple[int, ...]:
    choice, asked = config.segment.heads, config.model.heads
    if choice not in HEADS:
        raise unknown("segment.heads", choice, HEADS)
    if choice == "official":
        if encoder.embed_dim not in OFFICIAL_HEADS:
            raise ValueError(f"segment.heads='official' is published for widths {tuple(OFFICIAL_HEADS)} only")
        return (OFFICIAL_HEADS[encoder.embed_dim],) * encoder.depth
    if loaded is None:
        return encoder.block_heads
    heads = tuple(loaded.model["encoder"]["heads"])
    # A single number may be that of some blocks only: distillation gives the tapped blocks the teacher's heads.
    if asked is None or asked in heads or (not isinstance(asked, int) and tuple(asked) == heads):
        return heads
    raise ValueError(
        f"model.heads={asked!r}, but {loaded.path} was trained with {list(heads)}, block by block, and segment.heads="
        f"'keep' takes those: set model.heads=None, or to that list"
    )
