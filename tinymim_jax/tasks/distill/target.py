"""Target: one way to compare two taps; and the choice of a loss by name."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

from jaxtyping import Array, Float

from tinymim_jax.errors import unknown
from tinymim_jax.models.blocks import Tap
from tinymim_jax.ops.losses import mean_squared, smooth_l1

Extracted = dict[str, Array]
Comparison = Callable[[Array, Array], Float[Array, "batch"]]


@dataclasses.dataclass(frozen=True)
class Target:
    """One way to compare two taps.

    names: the parts of the loss.
    extract: tap -> the arrays that are compared, by name; nothing else of the network is computed.
    loss: (student, teacher) -> float32 [batch] for each name; training minimizes the mean of their unweighted sum.
    adapter: what is applied to the student's arrays before `loss`, see adapters.ADAPTERS; "" for nothing.
    standardized: the teacher's arrays are standardized before `loss`, by statistics of their channels.
    final: `tap.output` is to be that after the network's final norm; the last block of both is compared.
    """

    names: tuple[str, ...]
    extract: Callable[[Tap], Extracted]
    loss: Callable[[Extracted, Extracted], dict[str, Float[Array, "batch"]]]
    adapter: str = ""
    standardized: bool = False
    final: bool = False

    @property
    def adapted(self) -> bool:
        """Whether the student's arrays pass an adapter."""
        return self.adapter not in ("", "none")


def distances(beta: float) -> dict[str, Comparison]:
    """The losses that compare arrays element by element, by name."""
    if not beta > 0:
        raise ValueError(f"distill.beta={beta} must be positive: smooth-L1 is linear beyond it; the paper has 2")
    return {"smooth_l1": functools.partial(smooth_l1, beta=beta), "mse": mean_squared}


def chosen(key: str, name: str, choices: Mapping[str, Comparison]) -> Comparison:
    """The loss of that name; the error for another one names the config's key."""
    if name not in choices:
        raise unknown(f"distill.{key}", name, choices)
    return choices[name]
