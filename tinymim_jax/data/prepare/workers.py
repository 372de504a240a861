"""Writes shards in parallel with worker processes that report their progress through shared memory."""

import concurrent.futures
import contextlib
import multiprocessing
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from tinymim_jax.data.prepare.shards import Conversion, Shard, Stopped, write_shard
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.worker import start_worker

GO_ON = "run the same command again to resume: finished shards are kept"
_POLL_SECONDS = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(BaseException):
    """Raised by SIGTERM inside `terminable`, as KeyboardInterrupt is by SIGINT."""


class Progress(NamedTuple):
    """Progress of the preparation.

    done: images processed, including those in shards that earlier runs finished.
    total: images in all shards.
    bytes_read: bytes read in this run.
    images_per_second: speed of this run.
    """

    done: int
    total: int
    bytes_read: int
    images_per_second: float


def write_shards(
    shards: Sequence[Shard],
    sources: dict[str, Source],
    conversion: Conversion,
    *,
    workers: int,
    done_before: int = 0,
    on_shard: Callable[[Shard], None],
    on_progress: Callable[[Progress], None] | None = None,
    seconds_between: float = 5.0,
) -> None:
    """Writes `shards` with `workers` processes, or with a thread of this process if `workers` is 0.

    Args:
        done_before: images in shards that are finished already, counted in the progress.
        on_shard: called in this process for each finished shard; an exception that it raises ends the work.
        on_progress: called every `seconds_between` seconds.

    Raises:
        OSError: a shard cannot be written.
        RuntimeError: a worker died.
        KeyboardInterrupt, Terminated: raised after the workers have ended.
    """
    context = multiprocessing.get_context("spawn")
    # Shared memory without locks, since a killed worker would never release one. Each entry has a single writer.
    board = _Board(context.RawArray("q", len(shards)), context.RawArray("q", len(shards)), context.RawValue("b", 0))
    places = {shard: place for place, shard in enumerate(shards)}
    if workers == 0:
        pool = concurrent.futures.ThreadPoolExecutor(1, initializer=_start, initargs=(sources, conversion, board))
    else:
        pool = concurrent.futures.ProcessPoolExecutor(
            min(workers, max(len(shards), 1)),
            context,
            initializer=_start_process,
            initargs=(sources, conversion, board),
        )
    total = done_before + sum(shard.last - shard.first for shard in shards)
    started = told = time.monotonic()
    try:
        with _signals_held():
            pending = {pool.submit(_work, shard, place): shard for shard, place in places.items()}
        while pending:
            done, _ = concurrent.futures.wait(
                pending, timeout=_POLL_SECONDS, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                future.result()
                on_shard(pending.pop(future))
            now = time.monotonic()
            if on_progress is not None and (now - told >= seconds_between or not pending):
                images = sum(board.images)
                on_progress(Progress(done_before + images, total, sum(board.bytes), images / (now - started)))
                told = now
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died without an error message; usually memory ran out (use fewer --workers), or a script "
            f"prepares outside `if __name__ == '__main__':`. Fix the cause, then {GO_ON}"
        ) from error
    finally:
        board.stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM raise Terminated inside the block. Use it in the main thread only."""

    def stop(*_):
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Board(NamedTuple):
    """Memory shared with the workers: images and bytes read so far, by shard; `stop` = 1 asks the workers to stop."""

    images: Any
    bytes: Any
    stop: Any


class _Job(NamedTuple):
    sources: dict[str, Source]
    conversion: Conversion
    board: _Board


_job: _Job | None = None  # set once in each worker, instead of being sent with every shard


def _start(sources: dict[str, Source], conversion: Conversion, board: _Board) -> None:
    global _job
    _job = _Job(sources, conversion, board)


def _start_process(sources: dict[str, Source], conversion: Conversion, board: _Board) -> None:
    start_worker()
    warnings.simplefilter("ignore")  # Pillow's, about unusual files; decoding problems are in the report
    _start(sources, conversion, board)


def _work(shard: Shard, place: int) -> None:
    assert _job is not None
    sources, conversion, board = _job

    def count(bytes_read: int) -> None:
        if board.stop.value:
            raise Stopped
        board.images[place] += 1
        board.bytes[place] += bytes_read

    write_shard(sources[shard.split], shard, conversion, count)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Blocks SIGINT and SIGTERM; processes started inside inherit that, also before they set up their own handling.

    This process receives signals that arrived meanwhile when the block ends.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
