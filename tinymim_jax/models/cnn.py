"""ConvNeXt and ResNet as frozen teachers: the feature maps of their stages."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from tinymim_jax.models.blocks import OutputTap
from tinymim_jax.models.switches import Switches
from tinymim_jax.ops.gelu import gelu
from tinymim_jax.ops.layer_norm import layer_norm
from tinymim_jax.ops.products import full_precision

Params = Any  # nested dicts of arrays
Maps = Float[Array, "batch rows columns channels"]

KINDS = ("convnext", "resnet")
_BATCH_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class ConvNet:
    """A convolutional network without its classifier, with what distillation needs of a teacher (see models.vit.ViT).

    kind: one of KINDS. ConvNeXt (arXiv 2201.03545) with LayerNorms of eps 1e-6; ResNet as of torchvision, with blocks
      of two or three convolutions and the running statistics of batch norm.
    widths, blocks: output channels and number of blocks of each stage.
    image_size: (height, width) in pixels, multiples of `patch_size`.
    dtype: of the computation.
    """

    kind: str
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    image_size: tuple[int, int] = (224, 224)
    dtype: Any = jnp.float32

    @property
    def patch_size(self) -> int:
        """Pixels along each side of a position of the last stage's map."""
        return 4 * 2 ** (self.depth - 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Positions (rows, columns) of the last stage's map."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def embed_dim(self) -> int:
        return self.widths[-1]

    @property
    def depth(self) -> int:
        """Number of stages."""
        return len(self.widths)

    @property
    def block_heads(self) -> tuple[int, ...]:
        """One for each stage: there is no attention, and relations are of whole positions."""
        return (1,) * self.depth

    prefix = 0
    switches = Switches(cls_tokens=0, positions="none")

    def record(self) -> dict[str, Any]:
        """The architecture as plain JSON, the inverse of `from_record`."""
        return {
            "kind": self.kind,
            "widths": list(self.widths),
            "blocks": list(self.blocks),
            "image_size": list(self.image_size),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any], **overrides: Any) -> "ConvNet":
        fields: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in record.items()}
        return cls(**(fields | overrides))

    def apply(
        self,
        variables: Params,
        images: Float[Array, "batch height width 3"],
        *,
        tap: Sequence[int],
        keep: Any = None,
        drop_key: jax.Array | None = None,
        method: str = "encode",
    ) -> tuple[OutputTap, ...]:
        """The last stage's map as the output of a tap, [batch, rows * columns, embed_dim], once for each of `tap`.

        Called as flax calls ViT.encode.
        """
        del drop_key
        if keep is not None or method != "encode" or set(tap) != {self.depth}:
            raise ValueError(
                f"a {self.kind} shows the map of its last stage, {self.depth}, for whole images; got {tap}"
            )
        maps = self.stages(variables["params"], images)[-1]
        output = maps.reshape(maps.shape[0], -1, maps.shape[-1])
        return (OutputTap(output=output),) * len(tap)

    def stages(self, params: Params, images: Float[Array, "batch height width 3"]) -> tuple[Maps, ...]:
        """The maps after the stem and after each stage of a ResNet; after each stage of a ConvNeXt."""
        x = images.astype(self.dtype)
        return tuple((_convnext if self.kind == "convnext" else _resnet)(params, x, self.blocks))


def _convnext(params: Params, x: Array, blocks: tuple[int, ...]) -> list[Array]:
    x = _layer_norm(params["stem"]["1"], _conv(params["stem"]["0"], x, 4))
    found = []
    for i, count in enumerate(blocks):
        stage = params["stages"][str(i)]
        if "downsample" in stage:
            x = _conv(stage["downsample"]["1"], _layer_norm(stage["downsample"]["0"], x), 2)
        for j in range(count):
            block = stage["blocks"][str(j)]
            y = _conv(block["conv_dw"], x, 1, padding=3, groups=x.shape[-1])
            y = gelu(_linear(block["mlp"]["fc1"], _layer_norm(block["norm"], y)))
            y = _linear(block["mlp"]["fc2"], y)
            x = x + (y * block["gamma"].astype(y.dtype) if "gamma" in block else y)
        found.append(x)
    return found


def _resnet(params: Params, x: Array, blocks: tuple[int, ...]) -> list[Array]:
    x = jax.nn.relu(_batch_norm(params["bn1"], _conv(params["conv1"], x, 2, padding=3)))
    found = [x]
    x = jax.lax.reduce_window(
        x, jnp.array(-jnp.inf, x.dtype), jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0))
    )
    for i, count in enumerate(blocks):
        for j in range(count):
            x = _resnet_block(params[f"layer{i + 1}"][str(j)], x, 2 if i and not j else 1)
        found.append(x)
    return found


def _resnet_block(params: Params, x: Array, stride: int) -> Array:
    """Of two 3 x 3 convolutions, or of a 1 x 1, a 3 x 3 with the stride, and a 1 x 1."""
    deep = "conv3" in params
    strides = (1, stride, 1) if deep else (stride, 1)
    y = x
    for number, step in enumerate(strides, 1):
        size = params[f"conv{number}"]["weight"].shape[0]
        y = _batch_norm(params[f"bn{number}"], _conv(params[f"conv{number}"], y, step, padding=size // 2))
        y = jax.nn.relu(y) if number < len(strides) else y
    if "downsample" in params:
        x = _batch_norm(params["downsample"]["1"], _conv(params["downsample"]["0"], x, stride))
    return jax.nn.relu(x + y)


def _conv(params: Params, x: Array, stride: int, *, padding: int = 0, groups: int = 1) -> Array:
    y = jax.lax.conv_general_dilated(
        x,
        params["weight"].astype(x.dtype),
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=full_precision(x.dtype),
    )
    return y + params["bias"].astype(x.dtype) if "bias" in params else y


def _linear(params: Params, x: Array) -> Array:
    y = jnp.matmul(x, params["weight"].astype(x.dtype), precision=full_precision(x.dtype))
    return y + params["bias"].astype(x.dtype)


def _layer_norm(params: Params, x: Array) -> Array:
    return layer_norm(x, params["weight"], params["bias"]).astype(x.dtype)


def _batch_norm(params: Params, x: Array) -> Array:
    """With the running statistics, in float32."""
    scale = params["weight"] * jax.lax.rsqrt(params["running_var"] + _BATCH_NORM_EPS)
    return ((x.astype(jnp.float32) - params["running_mean"]) * scale + params["bias"]).astype(x.dtype)
