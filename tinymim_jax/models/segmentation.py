"""Semantic segmentation: an encoder, a feature pyramid where the head needs one, and a head that labels pixels."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from tinymim_jax.errors import unknown
from tinymim_jax.models.convolutions import STATISTICS
from tinymim_jax.models.heads import Widen
from tinymim_jax.models.pixel_heads import LightHead, LinearHead, MaskHead
from tinymim_jax.models.pyramid import PYRAMIDS
from tinymim_jax.models.upernet import Fcn, UperNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.keys import fold_in_name

HEADS = ("upernet", "linear", "light", "mask")
BEHIND_FINAL_NORM = ("linear", "mask")  # heads that see the tapped tokens behind the encoder's final norm

Images = Float[Array, "batch height width 3"]
AnyMap = Float[Array, "batch _ _ _"]
Logits = Float[Array, "batch _ _ classes"]  # on grids that differ between the two heads


class SegmentationNetwork(nn.Module):
    """Logits of every class on a coarse grid of places: stride 4 for 'upernet' and 'light', else that of the patches.

    Its running statistics of batch norm are the collection STATISTICS, which 'mask' does not have; see `variables`.

    Attributes:
      encoder: its `final_norm` must be True for BEHIND_FINAL_NORM, else False.
      head: 'upernet' (published), 'linear', 'light' or 'mask', see models/upernet.py and models/pixel_heads.py.
      taps: blocks, counted from 1, whose outputs the head sees: four for 'upernet'.
      channels: of the head's convolutions, or of the tokens of 'mask'; 'linear' has none.
      auxiliary: channels of the FCN head that is trained beside 'upernet', on the third map; 0: none.
      dropout: probability of dropping a channel before the last convolution of a head, in training.
      pyramid: 'plain' (published for T, S and B) or 'star' (TinyMIM*-T); used by 'upernet'.
      widen: width of the layer between the last block and the pyramid 'star'; 0: none.
      pool_scales: of UPerNet.
    """

    encoder: ViT
    head: str
    classes: int
    taps: tuple[int, ...]
    channels: int = 768
    auxiliary: int = 0
    dropout: float = 0.1
    pyramid: str = "plain"
    widen: int = 0
    pool_scales: tuple[int, ...] = (1, 2, 3, 6)

    def record(self) -> dict[str, Any]:
        """The attributes besides the encoder, as plain JSON; see `from_record`."""
        record = {"head": self.head, "classes": self.classes, "taps": list(self.taps)}
        if self.head != "linear":
            record["channels"] = self.channels
        if self.head == "upernet":
            record |= {"auxiliary": self.auxiliary, "pyramid": self.pyramid, "widen": self.widen}
        return record

    @classmethod
    def from_record(
        cls, encoder: ViT, record: Mapping[str, Any], *, auxiliary: bool = True, dropout: float = 0.0
    ) -> "SegmentationNetwork":
        """The network described by `record`; without the auxiliary head, which only training needs, if so asked."""
        fields: dict[str, Any] = dict(record, taps=tuple(record["taps"]), dropout=dropout)
        if not auxiliary:
            fields["auxiliary"] = 0
        return cls(encoder, **fields)

    def setup(self):
        self._check()
        dtype = self.encoder.dtype
        if self.widen:
            self.widened = Widen(self.widen, dtype, name="widen")
        if self.head == "upernet":
            self.maps = PYRAMIDS[self.pyramid](dtype, name="pyramid")
            self.decode_head = UperNet(self.classes, self.channels, self.pool_scales, self.dropout, dtype)
            if self.auxiliary:
                self.auxiliary_head = Fcn(self.classes, self.auxiliary, self.dropout, dtype)
        elif self.head == "light":
            self.decode_head = LightHead(self.classes, self.channels, self.dropout, dtype)
        elif self.head == "mask":
            self.decode_head = MaskHead(self.classes, self.channels, self.dropout, dtype, self.encoder.attention)
        else:
            self.decode_head = LinearHead(self.classes, self.dropout)

    def __call__(self, images: Images) -> Logits:
        """float32 logits by running statistics, for evaluation."""
        maps = self.feature_maps(images)
        if self.auxiliary and self.is_initializing():
            self.auxiliary_head(maps[2], train=False)
        return self.decode_head(maps, train=False)

    def both(self, images: Images, *, train: bool, drop_key: jax.Array | None = None) -> tuple[Logits, Logits | None]:
        """float32 logits of the head and of the auxiliary head; None if there is none.

        Args:
          train: normalize by the batch's statistics; STATISTICS must then be mutable.
          drop_key: random key for drop path and dropout; None disables both.
        """
        maps = self.feature_maps(images, train=train, drop_key=drop_key)
        key = None if drop_key is None else fold_in_name(drop_key, "decode")
        logits = self.decode_head(maps, train=train, drop_key=key)
        if not self.auxiliary:
            return logits, None
        key = None if drop_key is None else fold_in_name(drop_key, "auxiliary")
        return logits, self.auxiliary_head(maps[2], train=train, drop_key=key)

    def feature_maps(
        self, images: Images, *, train: bool = False, drop_key: jax.Array | None = None
    ) -> tuple[AnyMap, ...]:
        """What the head sees: the pyramid's maps, or the tapped tokens as maps."""
        taps: Any = self.encoder.encode(images, tap=self.taps, drop_key=drop_key)
        tokens = [tap.output for tap in taps]
        if self.head in BEHIND_FINAL_NORM:
            tokens = [self.encoder.finish(each) for each in tokens]
        if self.widen:
            tokens[-1] = self.widened(tokens[-1])
        rows, columns = self.encoder.grid
        maps = [each[:, self.encoder.prefix :].reshape(each.shape[0], rows, columns, -1) for each in tokens]
        return self.maps(maps, train=train) if self.head == "upernet" else tuple(maps)

    def _check(self) -> None:
        if self.head not in HEADS:
            raise unknown("segment.head", self.head, HEADS)
        if self.pyramid not in PYRAMIDS:
            raise unknown("segment.pyramid", self.pyramid, PYRAMIDS)
        if self.head == "upernet" and len(self.taps) != 4:
            raise ValueError(f"segment.taps={self.taps}: head 'upernet' takes the outputs of four blocks")
        if self.encoder.final_norm != (self.head in BEHIND_FINAL_NORM):
            raise ValueError(f"head {self.head!r} needs an encoder with final_norm={self.head in BEHIND_FINAL_NORM}")
        if bool(self.widen) != (self.head == "upernet" and self.pyramid == "star"):
            raise ValueError(
                f"segment.widen={self.widen}: the layer belongs to head 'upernet' with pyramid 'star', which needs it"
            )


def variables(params: Mapping[str, Any]) -> dict[str, Any]:
    """What `apply` takes, from a dict of the parameters and, under STATISTICS, the running statistics."""
    return {"params": {name: tree for name, tree in params.items() if name != STATISTICS}} | {
        name: tree for name, tree in params.items() if name == STATISTICS
    }
