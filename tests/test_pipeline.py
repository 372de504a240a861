"""Batches: independent of the numbers of processes, workers and restarts; exact counts; damaged images."""

import collections
import io
import logging
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from PIL import Image

from tinymim_jax.data import rows
from tinymim_jax.data.draws import ShuffledIndices, philox
from tinymim_jax.data.pipeline import eval_batches, train_batches
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.views.decoding import Picture
from tinymim_jax.data.views.transforms import Augment, EvalView, ImageView

VIEW = EvalView(8, 8)
AUGMENT = Augment(8)


def pixels(index: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)


class Numbered(Source):
    """Record i is a small noise image of label i, or no image at all where i is damaged."""

    def __init__(self, length: int, damaged=()):
        self.name, self.split = "numbered", "train"
        self.class_names = tuple(map(str, range(length)))
        self.damaged = frozenset(damaged)

    def __len__(self):
        return len(self.class_names)

    def __getitem__(self, index):
        if index in self.damaged:
            return {"image": b"damaged", "label": index}
        buffer = io.BytesIO()
        Image.fromarray(pixels(index)).save(buffer, "BMP")
        return {"image": buffer.getvalue(), "label": index}


class Unreadable(Numbered):
    def __getitem__(self, index):
        if index in self.damaged:
            raise OSError(f"no shard holds {index}")
        return super().__getitem__(index)


class FailingView(ImageView):
    size = (8, 8)

    def __call__(self, image, rng):
        raise ZeroDivisionError("a mistake in a view")


def take(batches, count: int) -> dict[str, np.ndarray]:
    """The next `count` batches, one after the other, as one."""
    with batches:
        taken = [next(batches) for _ in range(count)]
    return {key: np.concatenate([batch[key] for batch in taken]) for key in taken[0]}


def train_on(batches, count: int) -> None:
    for _ in range(count):
        next(batches)


def train(source, count, **options):
    defaults = {"augment": AUGMENT, "batch_size": 8, "seed": 0}
    return take(train_batches(source, **(defaults | options)), count)


def assert_same(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for key in want:
        np.testing.assert_array_equal(got[key], want[key], err_msg=key)


# ---------------------------------------------------------------------------------------------- training


def test_a_batch_is_what_its_contract_says():
    with train_batches(Numbered(20), augment=Augment((6, 10)), batch_size=4, seed=0) as batches:
        batch = next(batches)
    assert {key: (value.dtype, value.shape) for key, value in batch.items()} == {
        "image": (np.uint8, (4, 6, 10, 3)),
        "label": (np.int32, (4,)),
        "valid": (np.bool_, (4,)),
    }
    assert all(type(value) is np.ndarray and value.flags.writeable for value in batch.values())
    assert batch["valid"].all()


def test_image_and_label_belong_together():
    batch = train(Numbered(20), 5, augment=VIEW)
    for image, label in zip(batch["image"], batch["label"]):
        np.testing.assert_array_equal(image, pixels(label))


def test_every_epoch_is_a_new_permutation():
    labels = train(Numbered(21), 21)["label"].reshape(8, 21)  # batches of 8 run across the epochs' ends
    for epoch in labels:
        assert sorted(epoch) == list(range(21))
    assert len({tuple(epoch) for epoch in labels}) == 8


def test_the_order_is_pinned():
    # A run must resume in the order it began with, whatever numpy or Grain is installed by then.
    order = ShuffledIndices(10, seed=0)
    assert [order[n] for n in range(20)] == [
        *(8, 7, 4, 2, 6, 5, 9, 0, 1, 3),
        *(0, 1, 5, 4, 6, 9, 2, 8, 3, 7),
    ]


def test_every_place_in_an_epoch_is_equally_likely():
    order = ShuffledIndices(5, seed=0)
    places = [[order[5 * epoch + place] for place in range(5)].index(0) for epoch in range(2000)]
    assert np.all(np.abs(np.bincount(places) - 400) < 4.5 * (2000 * 0.2 * 0.8) ** 0.5)  # 4.5 sigma


def test_seeds_share_no_epoch():
    epochs = [tuple(epoch) for seed in range(4) for epoch in train(Numbered(24), 9, seed=seed)["label"].reshape(3, 24)]
    assert len(set(epochs)) == 12


def test_views_change_with_epoch_and_seed():
    def view_of_three(batch, occurrence):
        return batch["image"][np.flatnonzero(batch["label"] == 3)[occurrence]]

    batch, again, other = (train(Numbered(16), 4, seed=seed) for seed in (7, 7, 2**64 - 1))
    assert_same(again, batch)
    assert not np.array_equal(view_of_three(batch, 0), view_of_three(batch, 1))
    assert not np.array_equal(view_of_three(batch, 0), view_of_three(other, 0))


@pytest.mark.parametrize("start", [1, 5, 6, 13])
def test_resuming_continues(start):
    source = Numbered(21)
    want = {key: value[start * 8 :] for key, value in train(source, 15).items()}
    assert_same(train(source, 15 - start, start_step=start), want)


def test_a_late_step_is_reached_at_once():
    started = time.process_time()  # other processes on the machine do not count
    assert sorted(train(Numbered(8), 1, start_step=10**9)["label"]) == list(range(8))
    assert time.process_time() - started < 5


@pytest.mark.parametrize("process_count", [2, 4])
def test_processes_hold_the_rows_of_one_global_batch(process_count):
    source = Numbered(21, damaged={5})
    want = train(source, 6)
    per_process = [train(source, 6, process_index=index, process_count=process_count) for index in range(process_count)]
    local = 8 // process_count
    got = {
        key: np.stack([part[key].reshape(6, local, *part[key].shape[1:]) for part in per_process], axis=1).reshape(
            want[key].shape
        )
        for key in want
    }
    assert_same(got, want)


def test_workers_change_nothing():
    source = Numbered(21, damaged={4})
    want = train(source, 7, start_step=2)
    with train_batches(source, augment=AUGMENT, batch_size=8, seed=0, start_step=2, workers=2) as batches:
        taken = [next(batches) for _ in range(7)]
        assert len(multiprocessing.active_children()) == 2
        substitutions = batches.substitutions
    assert multiprocessing.active_children() == []
    assert_same({key: np.concatenate([batch[key] for batch in taken]) for key in want}, want)
    assert all(type(value) is np.ndarray for value in taken[0].values())
    assert 2 <= substitutions <= 3  # 56 rows of 21 records


def test_threads_and_parts_change_nothing(monkeypatch):
    source = Numbered(50)
    want = train(source, 4, batch_size=20, process_count=2, process_index=1)
    monkeypatch.setattr(rows, "MAX_PART_ROWS", 3)  # 10 local rows in parts of 2 and 3
    for options in ({"threads": 1, "prefetch": 1}, {"threads": 4, "prefetch": 7}):
        assert_same(train(source, 4, batch_size=20, process_count=2, process_index=1, **options), want)


def test_a_batch_may_be_larger_than_the_source():
    batch = train(Numbered(3), 1, batch_size=10)
    assert sorted(np.bincount(batch["label"])) == [3, 3, 4]
    assert train(Numbered(1), 2, batch_size=2)["label"].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9, "process_count": 2}, "batch_size=9 .* multiple of process_count=2"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"process_index": 2, "process_count": 2}, "process_index=2 must be 0 to 1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "seed=.* must be 0 to"),
        ({"start_step": -1}, "start_step=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"threads": 0}, "threads=0"),
        ({"prefetch": 0}, "prefetch=0"),
    ],
)
def test_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        train(Numbered(20), 1, **options)


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="numbered/train is empty"):
        train(Numbered(0), 1)
    with pytest.raises(ValueError, match="batch_size=0"):
        eval_batches(Numbered(3), view=VIEW, batch_size=0)


# ---------------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    ("length", "batch_size", "process_count", "workers"),
    [(13, 8, 1, 0), (13, 8, 2, 0), (13, 8, 4, 0), (3, 8, 4, 0), (16, 8, 2, 0), (13, 8, 1, 3)],
)
def test_evaluation_counts_every_example_once(length, batch_size, process_count, workers):
    per_process = []
    for index in range(process_count):
        with eval_batches(
            Numbered(length),
            view=VIEW,
            batch_size=batch_size,
            process_index=index,
            process_count=process_count,
            workers=workers,
        ) as batches:
            per_process.append(list(batches))
            assert next(batches, "exhausted") == "exhausted"
    assert {len(batches) for batches in per_process} == {-(-length // batch_size)}
    seen = []
    for step in range(len(per_process[0])):
        for batches in per_process:
            batch = batches[step]
            assert len(batch["valid"]) == batch_size // process_count
            seen += batch["label"][batch["valid"]].tolist()
            for image, label, valid in zip(batch["image"], batch["label"], batch["valid"]):
                np.testing.assert_array_equal(image, pixels(label) if valid else np.zeros((8, 8, 3)))
    assert seen == list(range(length))


# ---------------------------------------------------------------------------------------------- several crops


def test_crops_show_each_record_so_many_times_in_a_row_in_other_views():
    epoch = train(Numbered(8), 3, crops=3, batch_size=12)  # 4 records in each batch
    labels = epoch["label"].reshape(12, 3)
    assert (labels == labels[:, :1]).all()
    assert sorted(labels[:8, 0]) == list(range(8))
    order = ShuffledIndices(8, 0)
    assert labels[:, 0].tolist() == [order[position] for position in range(12)]
    for n in range(36):  # view n is drawn at (seed, n), whatever the record
        rng = np.random.Generator(philox(0, "view", n))
        np.testing.assert_array_equal(epoch["image"][n], AUGMENT(pixels(epoch["label"][n]), rng))


@pytest.mark.parametrize("process_count", [2, 4])
def test_crops_may_straddle_processes(process_count):
    whole = train(Numbered(8), 2, crops=6, batch_size=12)
    shares = [
        train(Numbered(8), 2, crops=6, batch_size=12, process_index=index, process_count=process_count)
        for index in range(process_count)
    ]
    local = 12 // process_count
    for key in whole:
        steps = [share[key].reshape(2, local, *share[key].shape[1:]) for share in shares]
        np.testing.assert_array_equal(np.concatenate(steps, axis=1).reshape(whole[key].shape), whole[key])


def test_each_record_is_decoded_once_for_all_its_crops(monkeypatch):
    opened = []

    def open_picture(data: bytes, **options) -> Picture:
        opened.append(threading.get_ident())
        return Picture(data, **options)

    monkeypatch.setattr(rows, "Picture", open_picture)
    batches = rows.Rows(Numbered(8), AUGMENT, batch_size=8, seed=0, process_index=0, process_count=1, crops=4)
    assert len(set(batches[0]["label"].tolist())) == 2
    # Grain's threads of an earlier test may still decode what they had begun.
    assert opened.count(threading.get_ident()) == 2


def test_crops_of_a_damaged_record_are_all_replaced():
    with train_batches(Numbered(8, damaged={3}), augment=AUGMENT, batch_size=8, crops=4, seed=0) as batches:
        labels = np.concatenate([next(batches)["label"] for _ in range(4)])
    assert (labels == 4).sum() == 8
    assert (labels == 3).sum() == 0


def test_crops_must_fit_the_batch():
    with pytest.raises(ValueError, match="crops=3 must divide batch_size=8"):
        train(Numbered(8), 1, crops=3)


# ---------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", [Numbered, Unreadable])
def test_a_damaged_record_is_replaced_by_the_next_good_one(kind, caplog):
    source = kind(10, damaged={3, 4, 9})
    with caplog.at_level(logging.WARNING), eval_batches(source, view=VIEW, batch_size=5) as batches:
        taken = list(batches)
    assert np.concatenate([batch["label"] for batch in taken]).tolist() == [0, 1, 2, 5, 5, 5, 6, 7, 8, 0]
    np.testing.assert_array_equal(taken[0]["image"][4], pixels(5))
    assert all(batch["valid"].all() for batch in taken)
    assert batches.substitutions == 3
    logged = [record.getMessage() for record in caplog.records if "used in its place" in record.getMessage()]
    assert len(logged) == 3
    reason = "UnidentifiedImageError" if kind is Numbered else "OSError: no shard holds 3"
    assert re.match(f"cannot decode record 3 of numbered/train: {reason}", logged[0])


def test_each_damaged_record_is_logged_once_and_every_use_is_counted(caplog):
    with (
        caplog.at_level(logging.WARNING),
        train_batches(Numbered(8, damaged={3}), augment=AUGMENT, batch_size=8, seed=0) as batches,
    ):
        for epoch in range(1, 6):
            next(batches)
            assert batches.substitutions == epoch
    assert sum("used in its place" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize(("length", "allowed"), [(40, 3), (6000, 6)])
def test_too_much_damage_stops_the_run_with_a_list(length, allowed):
    fine = eval_batches(Numbered(length, damaged=range(0, 2 * allowed, 2)), view=VIEW, batch_size=40)
    with fine:
        next(fine)
        assert fine.substitutions == allowed
    damaged = range(0, 2 * allowed + 2, 2)
    batches = eval_batches(Numbered(length, damaged=damaged), view=VIEW, batch_size=40)
    with pytest.raises(RuntimeError, match=f"{allowed + 1} of {length} records cannot be decoded") as error:
        next(batches)
    for index in damaged:
        assert f"record {index} of numbered/train: UnidentifiedImageError" in str(error.value)
    with pytest.raises(ValueError, match="closed"):
        next(batches)


@pytest.mark.parametrize("length", [5, 300])
def test_a_source_without_a_good_record_stops_at_once(length):
    with (
        eval_batches(Unreadable(length, damaged=range(length)), view=VIEW, batch_size=4) as batches,
        pytest.raises(RuntimeError, match=r"(?s)step 0.*neither record 0 of .* \(OSError: no shard holds 0\)"),
    ):
        next(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_any_other_error_reaches_the_caller(workers):
    batches = eval_batches(Numbered(9), view=FailingView(), batch_size=4, workers=workers)
    with pytest.raises(RuntimeError, match=r"(?s)before step 0.*ZeroDivisionError: a mistake in a view"):
        next(batches)
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    assert multiprocessing.active_children() == []


# ---------------------------------------------------------------------------------------------- processes


@pytest.mark.parametrize(("parts", "refused"), [(1.9, True), (3.9, False), (4.1, None)])
def test_shared_memory_that_is_too_small_is_refused_before_a_worker_is_killed(parts, refused, monkeypatch, caplog):
    part = 8 * (8 * 8 * 3 + 4 + 1)  # 8 rows of image, label, valid
    usage = collections.namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, int(parts * part)))
    options = {"augment": AUGMENT, "batch_size": 8, "seed": 0, "workers": 2}
    if refused:
        with pytest.raises(RuntimeError, match=r"/dev/shm has 0 MiB free, and 2 workers .*--shm-size=16g.*--workers"):
            train_batches(Numbered(9), **options)
    else:
        train_batches(Numbered(9), **options).close()
        assert ("if a worker dies" in caplog.text) == (refused is False)
    assert multiprocessing.active_children() == []


def test_closing_twice_is_harmless_and_final():
    batches = train_batches(Numbered(9), augment=AUGMENT, batch_size=4, seed=0)
    next(batches)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)


def test_a_worker_outlives_sigterm_and_is_missed_when_killed():
    source = Numbered(9)
    with train_batches(source, augment=AUGMENT, batch_size=4, seed=0, workers=1) as batches:
        next(batches)
        (worker,) = multiprocessing.active_children()
        os.kill(worker.pid, signal.SIGTERM)
        train_on(batches, 20)  # more than was read ahead when the signal came
        assert worker.is_alive()
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match=r"worker died before step .* exit code -9.*/dev/shm"):
            train_on(batches, 20)


def test_workers_end_with_a_main_process_that_leaves_without_goodbye(tmp_path):
    script, pid_file = tmp_path / "leaves.py", tmp_path / "pid"
    script.write_text(
        textwrap.dedent("""
        import multiprocessing, os, sys
        from test_pipeline import AUGMENT, Numbered, train_batches
        if __name__ == "__main__":
            batches = train_batches(Numbered(9), augment=AUGMENT, batch_size=4, seed=0, workers=1)
            next(batches)
            with open(sys.argv[1], "w") as file:
                file.write(str(multiprocessing.active_children()[0].pid))
            os._exit(7)
        """)
    )
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    # No pipe for its output: the worker inherits it, and reading would last as long as the worker does.
    done = subprocess.run(
        [sys.executable, script, pid_file], env=environment, stdout=subprocess.DEVNULL, stderr=None, timeout=120
    )
    assert done.returncode == 7
    worker = int(pid_file.read_text())
    deadline = time.monotonic() + 60
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    if alive(worker):
        os.kill(worker, signal.SIGKILL)
        pytest.fail("the worker stayed behind")


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
