"""Memory of the step: micro-batches that fit, and what is said when it is exhausted."""

import jax
import pytest
from runs import small_config

from tinymim_jax import memory
from tinymim_jax.experiment import batch_shapes, build_experiment
from tinymim_jax.metrics import read
from tinymim_jax.sharding import make_mesh
from tinymim_jax.state import trained_paths
from tinymim_jax.train import train


@pytest.fixture(scope="module")
def pieces(data_dir):
    """(experiment, frozen weights, trained parameters, mesh) of an MAE run with 64 images on one device."""
    config = small_config("mae_student", "train.batch_size=64", "train.accumulate=0")
    experiment = build_experiment(config, data_dir=data_dir)
    frozen = experiment.task.load_frozen()
    return (
        experiment,
        frozen,
        trained_paths(experiment.task, frozen, batch_shapes(experiment)),
        make_mesh(1, jax.devices()[:1]),
    )


def needed(pieces, accumulate: int) -> int:
    """Bytes of the compiled step, as the compiler says."""
    step, arguments = memory.abstract_step(*pieces, accumulate)
    return sum(memory.bytes_needed(step.lower(*arguments).compile()).values())


def test_the_smallest_number_of_micro_batches_that_fits(pieces, monkeypatch):
    by_count = {count: needed(pieces, count) for count in (1, 2, 4)}
    assert by_count[1] > by_count[2] > by_count[4]
    for count in (1, 2, 4):
        monkeypatch.setattr(memory, "device_memory", lambda mesh, count=count: int(by_count[count] / memory.USABLE) + 1)
        assert memory.smallest_accumulate(*pieces) == count


def test_nothing_fits(pieces, monkeypatch):
    monkeypatch.setattr(memory, "device_memory", lambda mesh: 2**10)
    with pytest.raises(memory.OutOfMemory, match=r"train.batch_size=64 with train.accumulate=64 on 1 device"):
        memory.smallest_accumulate(*pieces)


def test_a_device_that_does_not_tell_its_memory(pieces, caplog):
    with caplog.at_level("INFO", logger="tinymim_jax"):
        assert memory.smallest_accumulate(*pieces) == 1
    assert "does not report its memory; 1 micro-batch" in caplog.text


def test_counts_leave_every_device_whole_images():
    assert memory.micro_batch_counts(64, 8) == [1, 2, 4, 8]
    assert memory.micro_batch_counts(24, 2) == [1, 2, 3, 4, 6, 12]
    assert memory.micro_batch_counts(12, 8) == []


# As libtpu, XLA's GPU allocator and XLA on CPUs put it.
@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.25G of 15.75G hbm.", int(33.25 * 2**30)),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.", 2**31),
        (
            "RESOURCE_EXHAUSTED: Failed to allocate request for 1.50GiB (1610612736B) on device ordinal 0",
            int(1.5 * 2**30),
        ),
        ("RESOURCE_EXHAUSTED: Out of memory", 0),
        ("INTERNAL: something else", None),
    ],
)
def test_bytes_in_the_message_of_a_refusal(text, found):
    assert memory.bytes_refused(text) == found
    if "allocate" in text:  # an allocator knows its last request alone
        assert memory.bytes_refused(text, held=2**20) == found + 2**20


def test_exhausted_memory_is_explained_with_numbers(data_dir, tmp_path, monkeypatch):
    """From the first step, through train(): what was asked for, and each remedy as words for the command line."""

    def exhausted(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.")

    monkeypatch.setattr("tinymim_jax.train.make_train_step", lambda *args, **kwargs: exhausted)
    config = small_config("mae_student", "train.batch_size=64")
    with pytest.raises(memory.OutOfMemory) as caught:
        train(config, tmp_path / "run", data_dir=data_dir)
    message = str(caught.value)
    assert "train.batch_size=64 with train.accumulate=1 on 8 devices" in message
    assert "puts 8 images at a time on each" in message
    assert "2.00 GiB are needed" in message
    for remedy in (
        "train.accumulate=2:",
        "model.remat=dots:",
        "--fsdp 8:",
        "train.batch_size=32:",
        "train.accumulate=0 finds",
    ):
        assert remedy in message, remedy


def test_other_errors_of_the_device_pass(data_dir, tmp_path, monkeypatch):
    def failing(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel failed")

    monkeypatch.setattr("tinymim_jax.train.make_train_step", lambda *args, **kwargs: failing)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a kernel failed"):
        train(small_config("mae_student"), tmp_path / "run", data_dir=data_dir)


def test_the_number_that_was_found_is_kept_for_resuming(data_dir, tmp_path, monkeypatch):
    found = []

    def smallest(*args):
        found.append(2)
        return 2

    monkeypatch.setattr("tinymim_jax.train.smallest_accumulate", smallest)
    words = ("train.batch_size=16", "train.accumulate=0", "checkpoint.every_minutes=0.0")
    train(small_config("mae_student", *words), tmp_path / "run", data_dir=data_dir)
    train(
        small_config("mae_student", *words, "train.duration=5 steps"), tmp_path / "run", data_dir=data_dir, extend=True
    )
    assert found == [2]
    assert [row["step"] for row in read(tmp_path / "run" / "metrics.jsonl") if "train/loss" in row] == [1, 2, 3, 4, 5]
