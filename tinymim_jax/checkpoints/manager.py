"""Checkpoints of a training run: saved in the background by the clock, verified bit by bit when restored."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from tinymim_jax.checkpoints import format as stored
from tinymim_jax.checkpoints.format import CheckpointError, Damaged

_MIN_SLICE_BYTES = 2**20

_log = logging.getLogger(__name__)


class Checkpoints:
    """The newest few states of one training run, in `directory/<step>/`. Every process makes one.

    A step holds `state/`, the tree as nested dicts by name, and `manifest/`, a digest of each of its arrays. Only the
    training process may open such a directory (it removes what a killed save left behind); others read it with
    `params_io.load_params`. Use it as a context manager, or call `close`.

    Args:
      directory: shared by all processes; made if missing.
      keep: how many are kept; an older one goes only after a newer one is complete.
      every_seconds: time between saves.
      clock: seconds, monotonic.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        keep: int = 3,
        every_seconds: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.extra: dict[str, Any] = {}
        """What was given to `save` as `extra` with the restored state."""
        self._directory = epath.Path(directory).expanduser().resolve()
        self._every_seconds = every_seconds
        self._clock = clock
        self._saved_at = clock()
        self._preempted = False
        self._writing = False
        self._failures: list[BaseException] = []
        self._asked, self._next_check, self._checked_at = 0, 1, self._saved_at
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # does not stumble over a damaged step
        )
        with stored.writing(self._directory):
            self._manager = ocp.CheckpointManager(
                self._directory, options=options, item_handlers=_handlers(self._failures)
            )
        if not self._directory.exists():  # process 0 has made it
            raise CheckpointError(
                f"Process {jax.process_index()} does not see {self._directory}: it must lie on storage that all "
                f"processes share. Choose another --workdir."
            )

    @property
    def preempted(self) -> bool:
        """True from the call of `save` that saved because the machine is being taken away: wait, then stop."""
        return self._preempted

    def latest_step(self) -> int | None:
        """The newest step saved or being saved, None without any. Whether it is intact, `restore` finds out."""
        return self._manager.latest_step()

    def restore(self, abstract_state: Any) -> Any | None:
        """The newest state whose bits are those that were saved; None when nothing was ever saved.

        Damaged steps that are newer are renamed to `<step>.damaged` and reported; should every step be damaged,
        nothing is touched.

        Args:
          abstract_state: the state with jax.ShapeDtypeStruct, each with a sharding, at its leaves. The
            number of devices and their layout may differ from those of the saved run.

        Raises:
          CheckpointError: the state differs from the stored one in names, shapes or dtypes (listed), or no
            step is intact.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                state, self.extra = self._read(step, abstract_state)
            except Damaged as error:
                damaged[step] = str(error).split("\n")[0][:300]
                _log.error("CHECKPOINT %d IS DAMAGED, trying the one before it: %s", step, damaged[step])
                continue
            self._set_aside(damaged)
            self._saved_at = self._clock()
            return state
        if damaged:
            reasons = "".join(f"\n  {step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"No checkpoint in {self._directory} is intact:{reasons}\n"
                f"Put back a copy, or start afresh in another --workdir (or delete this directory)."
            )
        return None

    def save(self, step: int, state: Any, *, force: bool = False, extra: Mapping[str, Any] | None = None) -> bool:
        """Saves when it is time to; call it after every step, on every process, with consecutive steps.

        It is time when `every_seconds` have passed since the last save or the start, when the machine is about to be
        taken away (see `preempted`), or when `force` says so, which all processes must agree on. A step is saved only
        once. The state is copied before the call returns and may then be donated; it is written in the background.
        Deciding costs microseconds, and with several processes a broadcast now and then.

        Args:
          extra: a few JSON values kept beside the state.

        Returns:
          Whether a save was begun.

        Raises:
          CheckpointError: this save or the one before it failed; those before that are intact.
        """
        self._raise_failure()
        if self._writing and not self._manager.is_saving_in_progress():
            self.wait()  # at once; raises what went wrong in the background
        preempted = self._manager.reached_preemption(step)
        self._preempted |= preempted
        due = self._due()
        if not (force or preempted or due) or step in self._manager.all_steps():
            return False
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(stored.nested(stored.named(state))),
            manifest=ocp.args.JsonSave(stored.manifest(state, step=step, extra=dict(extra or {}))),
        )
        self._wait_unless_failed()
        with stored.writing(self._directory):
            self._manager.save(step, args=args, force=True)
        self._writing = True
        self._saved_at = self._clock()
        return True

    def wait(self) -> None:
        """Returns when the last save is complete on disk; raises CheckpointError if it failed."""
        self._wait_unless_failed()
        self._writing = False
        with stored.writing(self._directory):
            try:
                self._manager.wait_until_finished()
            except Exception:
                self._manager.reload()  # it had counted on the new step and forgotten the oldest
                raise

    def close(self) -> None:
        """Waits and lets go; raises CheckpointError if the last save failed."""
        self._wait_unless_failed()
        self._writing = False
        with stored.writing(self._directory):
            self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if kind is None:
            self.close()
        elif jax.process_count() == 1:  # with several, the others would have to take part
            try:
                self.close()
            except CheckpointError:
                _log.exception("The last checkpoint failed too.")

    def _wait_unless_failed(self) -> None:
        """Orbax's own waiting keeps to itself, for ten minutes, that this process failed while its peers did not."""
        if jax.process_count() > 1:
            while self._manager.is_saving_in_progress():
                self._raise_failure()
                time.sleep(0.02)

    def _raise_failure(self) -> None:
        # A process alone hears of it from Orbax, which tidies up first.
        if self._failures and jax.process_count() > 1:
            with stored.writing(self._directory):
                raise self._failures[0]

    def _due(self) -> bool:
        """Whether the clock says so: process 0's clock, so that all processes agree."""
        now = self._clock()
        due = now - self._saved_at >= self._every_seconds and not self._manager.is_saving_in_progress()
        if jax.process_count() == 1:
            return due
        self._asked += 1
        if self._asked < self._next_check:
            return False
        # The next check is so many calls away as last about a twentieth of the interval.
        rate = self._asked / max(now - self._checked_at, 1e-6)
        calls = int(np.clip(rate * self._every_seconds / 20, 1, 256))
        due, calls = multihost_utils.broadcast_one_to_all(np.array([due, calls], np.int32))
        self._asked, self._next_check, self._checked_at = 0, int(calls), now
        return bool(due)

    def _read(self, step: int, abstract_state: Any) -> tuple[Any, dict[str, Any]]:
        """(state, extra) of one step; Damaged on all processes if it is so on any."""
        directory = self._directory / str(step)
        leaves, more = _together(lambda: stored.read_manifest(directory / "manifest"))
        if difference := stored.compare(leaves, stored.outline(abstract_state)):
            raise CheckpointError(
                f"{directory} holds a different model or optimizer than this configuration:\n{difference}\n"
                f"Train with the configuration that wrote it, or choose another --workdir."
            )
        wanted = stored.named(abstract_state)
        arrays = _together(lambda: stored.read_arrays(directory / "state", wanted))
        stored.verify(arrays, leaves)
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [arrays[n] for n in wanted]), more["extra"]

    def _set_aside(self, damaged: Mapping[int, str]) -> None:
        if not damaged:
            return
        if jax.process_index() == 0:
            for step in damaged:
                source, target = self._directory / str(step), self._directory / f"{step}.damaged"
                with stored.writing(self._directory):
                    if target.exists():
                        target.rmtree()
                    source.rename(target)
                _log.error("Set aside as %s; delete it when you have looked at it.", target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manager.reload()


def _together(read: Callable[[], Any]) -> Any:
    """The result of `read`; Damaged on all processes if it was raised on any."""
    result, error = None, None
    try:
        result = read()
    except Damaged as damaged:
        error = damaged
    if jax.process_count() > 1:
        intact = multihost_utils.process_allgather(np.array(error is None))
        if error is None and not intact.all():
            error = Damaged(f"process {int(np.argmin(intact))} found damage")
    if error is not None:
        raise error
    return result


def _handlers(failures: list[BaseException]) -> dict[str, ocp.CheckpointHandler]:
    """Orbax's own, but copies of small arrays are not cut so that each device may write a slice.

    That cutting compiles a program for every shape and device: seconds of the first save, for nothing.

    Args:
      failures: what goes wrong in the background on this process is appended.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return {
        "state": _reporting(ocp.PyTreeCheckpointHandler(type_handler_registry=registry), failures),
        "manifest": _reporting(ocp.JsonCheckpointHandler(), failures),
    }


def _reporting(handler: Any, failures: list[BaseException]) -> ocp.CheckpointHandler:
    """The handler, which from now on notes in `failures` what goes wrong while it writes. A subclass Orbax refuses."""
    async_save, finalize = handler.async_save, handler.finalize

    async def reported_save(*args: Any, **kwargs: Any) -> list[Any]:
        return [_Reported(future, failures) for future in await async_save(*args, **kwargs) or ()]

    def reported_finalize(*args: Any, **kwargs: Any) -> None:
        with _noting(failures):
            finalize(*args, **kwargs)

    handler.async_save, handler.finalize = reported_save, reported_finalize
    return handler


class _Reported:
    """An Orbax future that notes its failure."""

    def __init__(self, future: Any, failures: list[BaseException]):
        self._future, self._failures = future, failures

    def result(self, timeout: float | None = None) -> Any:
        with _noting(self._failures):
            return self._future.result(timeout)

    def cancel(self) -> Any:
        return self._future.cancel()


@contextlib.contextmanager
def _noting(failures: list[BaseException]) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        failures.append(error)
        raise
