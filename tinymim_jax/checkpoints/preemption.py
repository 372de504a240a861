"""Whether the processes of a job have to save and stop, because the machine is about to be taken away."""

import itertools

import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

_calls = itertools.count(1)


def reached_preemption() -> bool:
    """Whether to save and stop now; True once, in the same call on all processes. Every process calls it at each step.

    After a notice (SIGTERM) JAX chooses the call after the latest one of any process, which is the first call if there
    was none, and compares its number with the one that it is given. So it is given the number of calls in this process:
    the training step would be far above 1 in a run that is resumed, and a notice before its first step would be missed.
    """
    return multihost_utils.reached_preemption_sync_point(next(_calls))


class Manager(ocp.CheckpointManager):
    """Orbax's manager, which does not ask JAX by itself: it would give it numbers of steps, also of earlier ones."""

    def reached_preemption(self, step: int) -> bool:
        """False: whoever saves has asked already. Orbax itself only counts such saves."""
        return False
