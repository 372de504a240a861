"""The MAE decoder in tasks: building it, loading it from a checkpoint, and its loss beside distillation."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.params import merge
from tinymim_jax.models.mae_decoder import MaeDecoder
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.ops.losses import masked_pixel_loss
from tinymim_jax.ops.masking import Masking, random_masking
from tinymim_jax.ops.patches import patchify
from tinymim_jax.ops.token_grid import without_extra_tokens
from tinymim_jax.tasks.pretrained import Loaded, same_part
from tinymim_jax.tasks.task import Params


def build_decoder(sizes: ConfigDict, encoder: ViT) -> MaeDecoder:
    """A decoder for this encoder.

    Args:
      sizes: `config.mae` or `config.distill.mim`.
    """
    return MaeDecoder(
        grid=encoder.grid,
        patch_size=encoder.patch_size,
        embed_dim=sizes.decoder_dim,
        depth=sizes.decoder_depth,
        heads=sizes.decoder_heads,
        scan=encoder.scan,
        remat=encoder.remat,
        attention=encoder.attention,
        dtype=encoder.dtype,
        cls=encoder.switches.cls_tokens > 0,
    )


def check_decodable(encoder: ViT) -> None:
    """Raises ValueError for an encoder that cannot be trained with hidden patches and a decoder of pixels."""
    if encoder.dist_token:
        raise ValueError(
            "model.dist_token=True: a decoder of pixels reads the CLS and patch tokens only; set it to False. "
            "The token serves classify, and distill without distill.mim_weight"
        )
    check_maskable(encoder, "mae.mask_ratio")


def check_maskable(encoder: ViT, key: str) -> None:
    """Raises ValueError for an encoder that needs all patches; `key` is the config's key that hides some."""
    if encoder.switches.relative_bias:
        raise ValueError(
            f"{key} hides patches, but the encoder has relative position biases, which are for all patches (BEiT, "
            "data2vec, segmentation networks): start from another checkpoint, or hide nothing"
        )


def decoder_record(decoder: MaeDecoder) -> dict[str, Any]:
    """The architecture as plain JSON."""
    record = {"embed_dim": decoder.embed_dim, "depth": decoder.depth, "heads": decoder.heads}
    return record | ({} if decoder.cls else {"cls": False})


def fill_decoder(params: Params, loaded: Loaded, decoder: MaeDecoder) -> Params:
    """`params` with the checkpoint's decoder; unchanged, with a log line, where it has none of this architecture."""
    if not same_part(loaded, "decoder", decoder_record(decoder)):
        return params
    # Converted files hold the decoder's fixed position table as well.
    return params | {"decoder": merge(params["decoder"], loaded.params["decoder"], allow_unused=("pos_embed",))}


@dataclasses.dataclass(frozen=True)
class PixelPrediction:
    """MAE's loss as an addition to distillation: the student's own view is masked, and its hidden patches predicted.

    weight: factor of this loss in the sum.
    mask_ratio: share of the patches that is hidden.
    normalize_pixels: each target patch is normalized by its own mean and standard deviation.
    """

    student: ViT
    decoder: MaeDecoder
    weight: float
    mask_ratio: float
    normalize_pixels: bool

    def init(self, key: jax.Array) -> Params:
        """Parameters of the decoder, as in an MAE run."""
        masking = random_masking(key, 1, self.student.grid[0] * self.student.grid[1], self.mask_ratio)
        latent = jnp.zeros((1, int(self.decoder.cls) + masking.keep.shape[1], self.student.widths[-1]))
        return {"decoder": self.decoder.init(fold_in_name(key, "decoder"), latent, masking.restore)["params"]}

    def losses(self, params: Params, tokens: jax.Array, images: jax.Array, masking: Masking) -> jax.Array:
        """float32 [batch].

        Args:
          params: "encoder" and "decoder".
          tokens: the student's last block output for the visible patches.
          images: the normalized pixels of the whole view.
          masking: which patches were hidden.
        """
        tokens = without_extra_tokens(tokens, self.student.prefix, int(self.decoder.cls))
        latent: Any = self.student.apply({"params": params["encoder"]}, tokens, method="finish")
        prediction: Any = self.decoder.apply({"params": params["decoder"]}, latent, masking.restore)
        target = patchify(images, self.student.patch_size)
        return masked_pixel_loss(prediction, target, masking.hidden, normalize=self.normalize_pixels)


def pixel_prediction(distill: ConfigDict, student: ViT) -> PixelPrediction | None:
    """The loss that `distill.mim_weight` and `distill.mim` configure; None if the weight is 0."""
    weight, ratio = distill.mim_weight, distill.mask_ratio
    normalize_pixels, decoder = distill.mim.normalize_pixels, build_decoder(distill.mim, student)
    if weight < 0:
        raise ValueError(f"distill.mim_weight={weight} must not be negative: 0 leaves the loss out")
    if not weight:
        return None
    check_decodable(student)
    if not ratio:
        raise ValueError(
            f"distill.mim_weight={weight} asks for the pixels of hidden patches, but distill.mask_ratio={ratio} hides "
            "none: set it, for example to 0.75"
        )
    return PixelPrediction(student, decoder, weight, ratio, normalize_pixels)
