"""A teacher with 8-bit weights and activations, and what that costs: the KL of its relations to the float32 teacher."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.int8 import in_int8
from tinymim_jax.tasks.distill.relations import relations
from tinymim_jax.tasks.task import Params

# Relations of the published target; they are compared whatever the run's own target is.
_RELATIONS = ("qk", "vv")
_IMAGES = 8

Costs = dict[str, dict[str, float]]


def check_eight_bit(teacher: ViT | ConvNet) -> None:
    """Raises ValueError for a teacher that has no 8-bit form."""
    if isinstance(teacher, ConvNet):
        raise ValueError(
            f"distill.teacher.int8=True is for the linear layers of a ViT, but the teacher is a {teacher.kind}: set it "
            "to False"
        )


def eight_bit(params: Params, dtype: Any) -> Params:
    """The encoder's weights with those of its blocks' linear layers in 8 bits; all others in `dtype`."""
    return {
        name: in_int8(leaf, dtype) if name.startswith("blocks_") else _cast(leaf, dtype)
        for name, leaf in params.items()
    }


def relation_cost(teacher: ViT, taps: Sequence[int], exact: Params, view: jax.Array) -> Costs:
    """KL(float32 teacher || teacher) of each relation, averaged over images and tapped blocks.

    Args:
      teacher: in the dtype of the run.
      taps: tapped blocks, counted from 1.
      exact: float weights of its blocks up to the last tap.
      view: normalized pixels.

    Returns, for "8 bits" and for the run's dtype without them, the KL by relation.
    """
    target = relations(*_RELATIONS, form="dense")

    @jax.jit
    def costs(exact: Params, rounded: Params, low: Params, view: jax.Array) -> dict[str, dict[str, jax.Array]]:
        def seen(network: ViT, params: Params) -> Any:
            return network.apply({"params": params}, view, tap=tuple(taps), method="encode")

        # The attention kernels are for bfloat16.
        wanted = seen(teacher.clone(dtype=jnp.float32, attention="dense"), exact)
        found = {}
        for name, params in (("8 bits", rounded), (jnp.dtype(teacher.dtype).name, low)):
            pairs = [
                target.loss(target.extract(own), target.extract(right))
                for own, right in zip(seen(teacher, params), wanted, strict=True)
            ]
            found[name] = {each: jnp.mean(jnp.stack([pair[each] for pair in pairs])) for each in _RELATIONS}
        return found

    weights = _cast(exact, np.float32), eight_bit(exact, teacher.dtype), _cast(exact, teacher.dtype)
    found = jax.device_get(costs(*weights, view))
    return {name: {each: float(value) for each, value in kinds.items()} for name, kinds in found.items()}


def remark_on_cost(
    key: str,
    teacher: ViT,
    taps: Sequence[int],
    exact: Params,
    images: np.ndarray,
    view: Callable[[jax.Array], jax.Array],
) -> str:
    """`relation_cost` on the first images as a line for the log.

    Args:
      key: the section of the config that describes the teacher.
      images: uint8 [batch, height, width, 3].
      view: images -> the teacher's view of them.
    """
    some = jnp.asarray(images[:_IMAGES])
    costs = relation_cost(teacher, taps, exact, view(some))
    parts = [
        f"{', '.join(f'{each} {value:.2e}' for each, value in kinds.items())} with {name}"
        for name, kinds in costs.items()
    ]
    return (
        f"{key}.int8: KL of the teacher's relations to those of its float32 form on {len(some)} images: "
        f"{'; '.join(parts)}"
    )


def _cast(params: Params, dtype: Any) -> Params:
    return jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)
