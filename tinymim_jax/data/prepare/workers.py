"""Several processes that each write whole shards, and what they tell the one that started them."""

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
from tinymim_jax.data.worker import settle_in

GO_ON = "run the same command again to resume: finished shards are kept"
_POLL_SECONDS = 0.2
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(BaseException):
    """SIGTERM arrived inside `terminable`: for SIGTERM what KeyboardInterrupt is for SIGINT."""


class Progress(NamedTuple):
    """How far the work is: images of all shards, those read before this run included, and this run's speed."""

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
    """Writes `shards` with `workers` processes; with 0, a thread of this one does.

    `on_shard` is called here for each shard as it is finished and may raise to end the work. `on_progress` is
    called every `seconds_between` seconds.

    Raises:
        OSError: a shard cannot be written.
        RuntimeError: a worker died.
        KeyboardInterrupt, Terminated: the workers have ended by then.
    """
    context = multiprocessing.get_context("spawn")
    # Without locks, which a worker that is killed would take with it: each shard has one place, and one writer.
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
            "a worker process died without a word; the usual cause is that memory ran out (then take fewer "
            f"--workers), another a script that prepares outside `if __name__ == '__main__':`. Then {GO_ON}"
        ) from error
    finally:
        board.stop.value = 1
        pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises Terminated inside; for the main thread alone."""

    def stop(*_):
        raise Terminated

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class _Board(NamedTuple):
    """Memory shared with the workers: for each shard the images and bytes read so far; 1 asks all to stop."""

    images: Any
    bytes: Any
    stop: Any


class _Job(NamedTuple):
    sources: dict[str, Source]
    conversion: Conversion
    board: _Board


_job: _Job | None = None  # of this worker; sent once, not with every shard


def _start(sources: dict[str, Source], conversion: Conversion, board: _Board) -> None:
    global _job
    _job = _Job(sources, conversion, board)


def _start_process(sources: dict[str, Source], conversion: Conversion, board: _Board) -> None:
    settle_in()
    warnings.simplefilter("ignore")  # Pillow's, about odd files: what matters of them is in the report
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
    """Processes started inside never see these signals, not even before they can ignore them; we do, afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
