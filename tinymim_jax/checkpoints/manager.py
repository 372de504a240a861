"""Checkpoints of a training run: saved in the background at intervals, verified bit by bit when restored."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from tinymim_jax.checkpoints import format as stored
from tinymim_jax.checkpoints.format import CheckpointError, Damaged
from tinymim_jax.checkpoints.handlers import make_handlers
from tinymim_jax.checkpoints.preemption import Manager, reached_preemption
from tinymim_jax.checkpoints.read_back import read_back
from tinymim_jax.checkpoints.restoring import read_step
from tinymim_jax.checkpoints.timer import SaveTimer
from tinymim_jax.runtime.files import is_remote
from tinymim_jax.runtime.paths import check_output_path

# Seconds between attempts to read or to save for the last time, and before a failed save is repeated (buckets only).
_PAUSES = (2, 10, 30)
_RETRY_SECONDS = 60.0
_MAX_FAILED_SAVES = 5

_log = logging.getLogger(__name__)


class Checkpoints:
    """The newest few states of one training run, in `directory/<step>/`. Every process makes one.

    A step holds `state/`, the tree as nested dicts by name, and `manifest/`, a digest of each of its arrays. Only the
    training process may open such a directory (it removes what a killed save left behind); others read it with
    `params.load_params`. Use it as a context manager, or call `close`.

    The first save into an empty directory is read back and compared, so that storage which loses data is noticed then.
    In a bucket (gs://) reads are repeated when the network fails, and so are the saves of a single process: one that
    failed is logged and repeated soon, and training goes on; after `_MAX_FAILED_SAVES` in a row it is an error.

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
        check_output_path(directory, "checkpoint directory")
        self._directory = epath.Path(directory).expanduser().resolve()
        self._remote = is_remote(self._directory)
        self._timer = SaveTimer(every_seconds, clock)
        self._preempted = False
        self._writing = False
        self._failures: list[BaseException] = []
        self._failed_in_a_row = 0
        options = ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # a damaged step raises no error here
        )

        def open_manager() -> Manager:
            with stored.writing(self._directory):
                handlers = make_handlers(self._failures)
                return Manager(self._directory, options=options, item_handlers=handlers)

        self._manager = self._repeated(open_manager)
        # The step to be read back after it is saved: the first one of a directory that was empty.
        self._unread: int | None = None
        self._first = not self._manager.all_steps()
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
        """The newest step saved or being saved, None without any. `restore` finds out whether it is intact."""
        return self._manager.latest_step()

    def restore(self, abstract_state: Any) -> Any | None:
        """The newest state whose bits are those that were saved; None when nothing was ever saved.

        Damaged steps that are newer are renamed to `<step>.damaged` and reported. If every step is damaged, nothing is
        changed.

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
                state, self.extra = read_step(self._directory / str(step), abstract_state, attempt=self._repeated)
            except Damaged as error:
                damaged[step] = str(error).split("\n")[0][:300]
                _log.error("CHECKPOINT %d IS DAMAGED, trying the one before it: %s", step, damaged[step])
                continue
            self._set_aside(damaged)
            self._timer.restart()
            return state
        if damaged:
            reasons = "".join(f"\n  {step}: {reason}" for step, reason in damaged.items())
            raise CheckpointError(
                f"No checkpoint in {self._directory} is intact:{reasons}\n"
                f"Put back a copy, or start afresh in another --workdir (or delete this directory)."
            )
        return None

    def save(self, step: int, state: Any, *, force: bool = False, extra: Mapping[str, Any] | None = None) -> bool:
        """Saves if a save is due; call it after every step, on every process, with consecutive steps.

        A save is due when `every_seconds` have passed since the last one or the start, when the machine is about to be
        taken away (see `preempted`), or with `force`, which must be the same on all processes. A step is saved only
        once. The state is copied before the call returns and may then be donated; it is written in the background.
        The decision takes microseconds, and with several processes an occasional broadcast.

        Args:
          extra: a few JSON values kept beside the state.

        Returns:
          Whether a save was begun.

        Raises:
          CheckpointError: this save or the one before it failed; those before that are intact.
        """
        self._raise_failure()
        if self._writing and not self._manager.is_saving_in_progress():
            with self._tolerating_failure():
                self.wait()  # returns at once, or raises the error of the save in the background
        preempted = reached_preemption()
        self._preempted |= preempted
        due = self._timer.due(saving=self._manager.is_saving_in_progress())
        if not (force or preempted or due) or step in self._manager.all_steps():
            return False
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(stored.nested(stored.leaves_by_name(state))),
            manifest=ocp.args.JsonSave(stored.manifest(state, step=step, extra=dict(extra or {}))),
        )
        final = force or preempted
        if final and self._remote and jax.process_count() == 1:
            # There may be no later step at which to try again, so the result is waited for.
            self._repeated(lambda: (self._begin(step, args), self.wait()))
            return True
        with contextlib.nullcontext() if final else self._tolerating_failure():
            self._begin(step, args)
            return True
        return False

    def _begin(self, step: int, args: ocp.args.Composite) -> None:
        if self._unread is not None:
            self.wait()  # reads it back now: the save that begins here may delete it
        self._wait_unless_failed()
        with stored.writing(self._directory):
            self._manager.save(step, args=args, force=True)
        self._writing = True
        self._timer.restart()
        if self._first:
            self._first, self._unread = False, step

    def wait(self) -> None:
        """Returns when the last save is complete on disk; raises CheckpointError if it failed."""
        self._wait_unless_failed()
        self._writing = False
        with stored.writing(self._directory):
            try:
                self._manager.wait_until_finished()
            except Exception:
                self._manager.reload()  # its list of steps has the new one already, and no longer the oldest
                self._first, self._unread = self._first or self._unread is not None, None
                raise
        self._failed_in_a_row = 0
        self._read_first_save_back()

    def close(self) -> None:
        """Waits for the last save and frees the directory; raises CheckpointError if it failed."""
        try:
            self.wait()
        finally:
            with stored.writing(self._directory):
                self._manager.close()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        if kind is None:
            self.close()
        elif jax.process_count() == 1:  # with several, closing would wait for the others
            try:
                self.close()
            except CheckpointError:
                _log.exception("The last checkpoint failed too.")

    def _wait_unless_failed(self) -> None:
        """Waits for a save, but not on for the others (ten minutes in Orbax) after this process failed."""
        if jax.process_count() > 1:
            while self._manager.is_saving_in_progress():
                self._raise_failure()
                time.sleep(0.02)

    def _raise_failure(self) -> None:
        # To a single process Orbax itself raises the error, after it has removed what was written.
        if self._failures and jax.process_count() > 1:
            with stored.writing(self._directory):
                raise self._failures[0]

    @contextlib.contextmanager
    def _tolerating_failure(self) -> Iterator[None]:
        """Logs the failure of a save in a bucket and lets training go on; another save is due soon."""
        try:
            yield
        except CheckpointError as error:
            self._failed_in_a_row += 1
            # With several processes, all would have to learn of the failure.
            hopeless = not self._remote or not stored.is_transient(error) or jax.process_count() > 1
            if hopeless or self._failed_in_a_row >= _MAX_FAILED_SAVES:
                raise
            soon = self._timer.due_within(_RETRY_SECONDS)
            _log.error("SAVING FAILED (%d in a row), trying again in %.0f s: %s", self._failed_in_a_row, soon, error)

    def _repeated(self, action: Callable[[], Any]) -> Any:
        """The result of `action`; in a bucket it is tried several times if it fails because of the network."""
        for pause in _PAUSES if self._remote and jax.process_count() == 1 else ():
            try:
                return action()
            except CheckpointError as error:
                if not stored.is_transient(error):
                    raise
                _log.error("Trying again in %d s: %s", pause, error)
                time.sleep(pause)
        return action()

    def _read_first_save_back(self) -> None:
        """Process 0 does so for all; later calls do nothing."""
        step, self._unread = self._unread, None
        if step is None or jax.process_index() > 0:
            return
        directory = self._directory / str(step)
        try:
            read_back(directory, attempt=self._repeated)
        except Damaged as error:
            raise CheckpointError(
                f"The first checkpoint of this run, {directory}, is not what was saved: {str(error)[:300]}\n"
                "This storage does not keep checkpoints. Choose another --workdir."
            ) from error

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
