"""Switches: how Vision Transformers, mostly of other authors, differ from the plain one."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tinymim_jax.errors import unknown
from tinymim_jax.ops.rope import Rope

CHOICES = {
    "stem": ("linear", "conv"),
    "norm": ("layer", "rms"),
    "positions": ("all", "patches", "none"),
    "table": ("bicubic", "square"),
    "qkv_bias": ("qkv", "qv", "none"),
    "mlp": ("plain", "gated"),
    "activation": ("gelu", "gelu_tanh", "quick_gelu", "silu"),
}


@dataclasses.dataclass(frozen=True)
class Switches:
    """Variations of the encoder; the defaults are the plain ViT of timm and MAE.

    stem: what makes patch tokens of pixels: a linear layer, or convolutions (models/stem.py).
    eps: added to the variance in every norm of the encoder.
    norm: 'layer', or 'rms' (no mean is subtracted and there is no bias).
    cls_tokens, registers: number of learned tokens of each kind in front of the patches; registers have no position.
    positions: the position table has a row for CLS, DIST and each patch ('all'), for patches only ('patches'), or there
      is no table ('none').
    table: how the position table is brought to another grid: 'bicubic', or 'square', that is bilinearly to a square
      with the longer side of the grid, of which the grid takes the upper left part (RADIO).
    rope: rotary position embedding of q and k; None for none.
    relative_bias: each block adds learned biases to the logits, by the offset between two patches (BEiT).
    patch_bias, patch_norm: a bias in the patch projection; a norm after it.
    pre_norm: a norm before the first block.
    qkv_bias: which of the three projections have a bias: 'qkv', 'qv' or 'none'.
    linear_bias: biases in the projection after attention and in the MLP.
    attention_norm: a norm before the projection after attention.
    layer_scale: each branch is multiplied by a learned vector before it is added to the residual stream.
    layer_scale_start: the initial value of that vector.
    mlp: 'plain' is fc2(f(fc1(x))), 'gated' is fc2(f(gate(x)) * fc1(x)).
    mlp_norm: a norm before fc2.
    activation: f; 'gelu' is exact, 'gelu_tanh' its tanh approximation, 'quick_gelu' is x sigmoid(1.702 x).
    last_dim: width of the last block and of what comes after it, behind a linear layer on its input; 0: the encoder's
      (WideLast, arXiv 2511.15572).
    """

    stem: str = "linear"
    eps: float = 1e-6
    norm: str = "layer"
    cls_tokens: int = 1
    registers: int = 0
    positions: str = "all"
    table: str = "bicubic"
    rope: Rope | None = None
    relative_bias: bool = False
    patch_bias: bool = True
    patch_norm: bool = False
    pre_norm: bool = False
    qkv_bias: str = "qkv"
    linear_bias: bool = True
    attention_norm: bool = False
    layer_scale: bool = False
    layer_scale_start: float = 1e-5
    mlp: str = "plain"
    mlp_norm: bool = False
    activation: str = "gelu"
    last_dim: int = 0

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown(f"switches.{name}", getattr(self, name), choices)

    def record(self) -> dict[str, Any]:
        """The switches that differ from the plain ViT, as plain JSON."""
        changed: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                changed[field.name] = value.record() if isinstance(value, Rope) else value
        return changed

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Switches":
        """The inverse of `record`."""
        fields: dict[str, Any] = dict(record)
        if fields.get("rope"):
            fields["rope"] = Rope.from_record(fields["rope"])
        return cls(**fields)


PLAIN = Switches()
