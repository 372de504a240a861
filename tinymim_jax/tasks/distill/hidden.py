"""A second pass of the student in which some patches are replaced by a learned token, and these are compared.

The patch objective of Proteus (arXiv 2407.10366), after iBOT: the student predicts the teacher's tokens of patches that
it does not see. `distill.mask_ratio` leaves hidden patches out of the encoder instead, as MAE does.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from tinymim_jax.models.blocks import Tap
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.ops.masking import kept_patches, random_masking
from tinymim_jax.ops.token_grid import Grid, visible_tokens
from tinymim_jax.tasks.distill.pairs import Pair
from tinymim_jax.tasks.distill.views import Inputs
from tinymim_jax.tasks.task import Params

MASK_TOKEN = "mask_token"
"""The learned token among the parameters of a run; it is used in training only."""


class Hidden(NamedTuple):
    """Which patches of each image are hidden, and their positions in ascending order."""

    which: Bool[Array, "batch patches"]
    positions: Int[Array, "batch hidden"]


def find_hidden(pairs: Sequence[Pair], student: ViT, inputs: Inputs) -> float:
    """The share of patches that `hidden=` of the targets hides; 0 for none. Raises ValueError where it is not possible.

    Args:
      pairs: of all teachers: there is one second pass.
    """
    shares = {pair.hidden for pair in pairs} - {0.0}
    if not shares:
        return 0.0
    if len(shares) > 1:
        raise ValueError(f"distill.target: hidden={', '.join(map(str, sorted(shares)))}: one pass hides one share")
    (share,) = shares
    patches = student.grid[0] * student.grid[1]
    if not 0 < share < 1:
        raise ValueError(f"distill.target: hidden={share} of {patches} patches: choose a share between 0 and 1")
    for key, value in (("mask_ratio", inputs.mask_ratio), ("teacher.drop_patches", inputs.dropped)):
        if value:
            raise ValueError(f"distill.target: hidden={share} is compared with a teacher of all patches: set {key}=0")
    if student.switches.stem == "conv":
        raise ValueError(
            f"distill.target: hidden={share}: through the convolutions of model.stem='conv' neighboring patches see a "
            "hidden one: set model.stem='linear'"
        )
    return share


def hidden_patches(key: jax.Array, batch: int, grid: Grid, share: float) -> Hidden:
    """Hidden patches, drawn for each image."""
    patches = grid[0] * grid[1]
    masking = random_masking(fold_in_name(key, "hidden"), batch, patches, share)
    count = patches - kept_patches(patches, share)
    return Hidden(masking.hidden, jnp.argsort(~masking.hidden, axis=1, stable=True)[:, :count])


def second_pass(
    student: ViT,
    params: Params,
    view: jax.Array,
    pairs: Sequence[Pair],
    hidden: Hidden,
    key: jax.Array | None,
) -> dict[int, Tap]:
    """Taps by block for the pairs that compare hidden patches, of a pass in which MASK_TOKEN is in their place.

    Args:
      params: of the run.
      view: the student's normalized pixels.
      key: for drop path; None disables it.
    """
    blocks = tuple(dict.fromkeys(pair.blocks.student for pair in pairs if pair.hidden))
    taps: Any = student.apply(
        {"params": params["encoder"]},
        view,
        tap=blocks,
        drop_key=None if key is None else fold_in_name(key, "hidden_drop_path"),
        replaced=(hidden.which, params[MASK_TOKEN]),
        method="encode",
    )
    return dict(zip(blocks, taps, strict=True))


def hidden_only(pairs: Sequence[Pair], taps: Sequence[Tap], hidden: Hidden, prefix: int) -> list[Tap]:
    """`taps` with the `prefix` tokens in front and the hidden patches alone, where a pair compares these."""

    def only(tap: Tap) -> Tap:
        return jax.tree.map(lambda tokens: visible_tokens(tokens, hidden.positions, prefix), tap)

    return [only(tap) if pair.hidden else tap for pair, tap in zip(pairs, taps, strict=True)]
