"""Pre-training by masked image modelling (MAE, arXiv 2111.06377): predict the pixels of hidden patches."""

from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from tinymim_jax.models.mae_decoder import MaskedAutoencoder
from tinymim_jax.ops.color import normalize
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.ops.losses import masked_pixel_loss
from tinymim_jax.ops.masking import greyed, random_masking
from tinymim_jax.ops.patches import patchify
from tinymim_jax.tasks.decoder import build_decoder, check_decodable, decoder_record, fill_decoder
from tinymim_jax.tasks.pretrained import fill_encoder, load, log_unused, started_encoder
from tinymim_jax.tasks.task import Batch, Params, PerExample, Task, TaskType


def build(config: ConfigDict, class_names: Sequence[str]) -> Task:
    """The task of `config`; labels are not used."""
    del class_names
    encoder = started_encoder(config)
    check_decodable(encoder)
    decoder = build_decoder(config.mae, encoder)
    network = MaskedAutoencoder(encoder, decoder)
    mask_ratio, normalize_pixels = config.mae.mask_ratio, config.mae.normalize_pixels
    mean, std = tuple(config.data.mean), tuple(config.data.std)
    patches = encoder.grid[0] * encoder.grid[1]

    def init(key: jax.Array) -> Params:
        masking = random_masking(key, 1, patches, mask_ratio)
        return network.init(key, jax.numpy.zeros((1, *encoder.image_size, 3)), masking)["params"]

    def losses(params: Params, frozen: Params, batch: Batch, key: jax.Array, train: bool) -> PerExample:
        images = normalize(batch["image"], mean, std)
        masking = random_masking(fold_in_name(key, "masking"), images.shape[0], patches, mask_ratio)
        drop_key = fold_in_name(key, "drop_path") if train else None
        prediction: Any = network.apply({"params": params}, images, masking, drop_key=drop_key)
        target = patchify(images, encoder.patch_size)
        return {"loss": masked_pixel_loss(prediction, target, masking.hidden, normalize=normalize_pixels)}

    def seen(batch: Batch, key: jax.Array) -> dict[str, jax.Array]:
        pixels = batch["image"].astype(jax.numpy.float32) / 255
        masking = random_masking(fold_in_name(key, "masking"), len(pixels), patches, mask_ratio)
        return {"encoder": greyed(pixels, masking.hidden, encoder.patch_size)}

    def start(params: Params) -> Params:
        loaded = load(config.init)
        log_unused(loaded, {"encoder", "decoder"})
        return fill_decoder(fill_encoder(params, loaded, encoder), loaded, decoder)

    return Task(
        model={"encoder": encoder.record(), "decoder": decoder_record(decoder)},
        init=init,
        losses=losses,
        names=("loss",),
        seen=seen,
        start=start if config.init else None,
    )


TASK = TaskType(build=build)
