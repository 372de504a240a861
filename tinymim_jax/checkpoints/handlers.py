"""Orbax's handlers as the checkpoint manager uses them: they tell which save failed, and do not slice small arrays."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp

_MIN_SLICE_BYTES = 2**20


def make_handlers(failures: list[BaseException]) -> dict[str, ocp.CheckpointHandler]:
    """Orbax's handlers, set to write small replicated arrays whole instead of in slices from several devices.

    Slicing compiles a program for each shape and device, which takes seconds in the first save and gains nothing.

    Args:
      failures: errors in the background on this process are appended.
    """
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_SLICE_BYTES)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return {
        "state": _reporting(ocp.PyTreeCheckpointHandler(type_handler_registry=registry), failures),
        "manifest": _reporting(ocp.JsonCheckpointHandler(), failures),
    }


def _reporting(handler: Any, failures: list[BaseException]) -> ocp.CheckpointHandler:
    """The handler, changed so that errors while it writes are appended to `failures`. Orbax accepts no subclass."""
    async_save, finalize = handler.async_save, handler.finalize

    async def reported_save(*args: Any, **kwargs: Any) -> list[Any]:
        return [_Reported(future, failures) for future in await async_save(*args, **kwargs) or ()]

    def reported_finalize(*args: Any, **kwargs: Any) -> None:
        with _noting(failures):
            finalize(*args, **kwargs)

    handler.async_save, handler.finalize = reported_save, reported_finalize
    return handler


class _Reported:
    """An Orbax future that appends its error to `failures`."""

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
