"""What a student is compared with one teacher on, and the losses of it."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax

from tinymim_jax.models.blocks import Tap
from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.ops.masking import Masking
from tinymim_jax.ops.token_grid import visible_tokens
from tinymim_jax.tasks.distill.compare import compare
from tinymim_jax.tasks.distill.final import finished
from tinymim_jax.tasks.distill.hidden import Hidden, hidden_only
from tinymim_jax.tasks.distill.pairs import Pair
from tinymim_jax.tasks.distill.views import Inputs, compared
from tinymim_jax.tasks.task import Params


class Seen(NamedTuple):
    """What the student has made of a batch.

    params: of its encoder.
    taps: by block.
    masking: the patches that are left out of the encoder.
    hidden: the patches that a learned token stood for in a second pass.
    again: taps of that pass, by block.
    """

    student: ViT
    params: Params
    taps: Mapping[int, Tap]
    masking: Masking | None
    hidden: Hidden | None
    again: Mapping[int, Tap]

    def of(self, pair: Pair) -> Tap:
        """The tap that this pair compares."""
        return (self.again if pair.hidden else self.taps)[pair.blocks.student]


@dataclasses.dataclass(frozen=True)
class Teaching:
    """A frozen teacher: its input, the blocks that are compared, and on which targets.

    name: of the teacher; FIRST for that of `config.distill.teacher`.
    weight: of this comparison in the loss.
    images: see compare.compare.
    every: the pairs of the whole training, which has other `pairs` in other parts where a tap moves.
    int8: its weights are those of eight_bit.eight_bit.
    """

    name: str
    network: ViT | ConvNet
    pairs: tuple[Pair, ...]
    inputs: Inputs
    weight: float
    images: int
    every: tuple[Pair, ...]
    int8: bool = False

    @property
    def taps(self) -> tuple[int, ...]:
        """The blocks that are compared in any part of the training, counted from 1."""
        return tuple(sorted({pair.blocks.teacher for pair in self.every}))

    def run(
        self,
        frozen: Params,
        images: jax.Array,
        key: jax.Array,
        train: bool,
        *,
        blocks: Iterable[int],
        keep: jax.Array | None,
    ) -> dict[int, Tap]:
        """The teacher's taps of this batch, by block.

        Args:
          frozen: the weights of this teacher.
          keep: positions of the patches that it is shown, [batch, kept]; None: all.
        """
        blocks = tuple(dict.fromkeys(blocks))
        taps: Any = self.network.apply(
            {"params": frozen},
            self.inputs.teacher_view(images, key, train),
            tap=blocks,
            keep=keep,
            drop_key=fold_in_name(key, "teacher_drop_path") if train else None,
            method="encode",
        )
        return dict(zip(blocks, taps, strict=True))

    def losses(
        self,
        params: Params,
        frozen: Params,
        images: jax.Array,
        key: jax.Array,
        train: bool,
        by_student: Seen,
        taught: Mapping[int, Tap] | None,
    ) -> dict[str, Any]:
        """Those of `compare`, with the teacher's taps of this batch.

        Args:
          params: the "adapter" and "statistics" of this comparison.
          frozen: the weights of this teacher.
          taught: what `run` has returned for several students; None: it is run here.
        """
        prefix, masking, hidden = self.inputs.prefix, by_student.masking, by_student.hidden
        keep, student = masking.keep if masking else None, by_student.student
        taps = finished(student, by_student.params, self.pairs, [by_student.of(pair) for pair in self.pairs])
        seen = [compared(tap, student, prefix) for tap in taps]
        deepest = max(range(len(seen)), key=lambda i: self.pairs[i].blocks.student)
        chosen: Any = self.inputs.chosen(seen[deepest], prefix)
        if chosen is not None:
            seen = [jax.tree.map(lambda tokens: visible_tokens(tokens, chosen, prefix), tap) for tap in seen]
        blocks = [pair.blocks.teacher for pair in self.pairs]
        if taught is None:
            shown = keep if self.inputs.teacher_masked else chosen
            taught = self.run(frozen, images, key, train, blocks=blocks, keep=shown)
        theirs = finished(self.network, frozen, self.pairs, [taught[block] for block in blocks])
        wanted = [self.inputs.aligned(compared(tap, self.network, prefix), masking) for tap in theirs]
        if hidden is not None:
            seen, wanted = (hidden_only(self.pairs, taps, hidden, prefix) for taps in (seen, wanted))
        return compare(self.pairs, params, seen, wanted, prefix=prefix, images=self.images if train else 0)
