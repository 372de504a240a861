"""Checkpoints: bit-identical round trips, all kinds of damage, interrupted saves (kill -9, SIGTERM, a full disk)."""

import os
import pathlib
import re
import resource
import shutil
import signal
import textwrap
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from ml_collections import ConfigDict
from processes import free_port, output_of, run_python
from saved_states import (
    abstract,
    assert_same_bits,
    empty_step,
    flip_bit,
    lose_state,
    make_state,
    place,
    rewrite_manifest,
    truncate,
)

from tinymim_jax.checkpoints.format import CheckpointError, digest, read_arrays
from tinymim_jax.checkpoints.manager import Checkpoints
from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.checkpoints.read_back import read_back
from tinymim_jax.runtime.paths import check_output_path
from tinymim_jax.train import train

# Reads that fail leave callbacks behind inside Orbax, which find their event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory):
    """A directory with steps 1, 2 and 3, made from seeds 1, 2 and 3. Copy it; do not change it."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    with Checkpoints(directory) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, place(make_state(step), 2), force=True, extra={"teacher": f"t{step}"})
    return directory


@pytest.fixture
def run(three_steps, tmp_path):
    return pathlib.Path(shutil.copytree(three_steps, tmp_path / "checkpoints"))


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_restored_bit_by_bit_on_any_layout(three_steps, fsdp):
    want = place(make_state(3), fsdp)
    with Checkpoints(three_steps) as checkpoints:
        assert checkpoints.latest_step() == 3
        got = checkpoints.restore(abstract(want))
    assert_same_bits(got, want)
    assert jax.tree.map(lambda x: x.sharding, got) == jax.tree.map(lambda x: x.sharding, want)
    assert digest(got) == digest(make_state(3))
    assert checkpoints.extra == {"teacher": "t3"}


def test_nothing_saved_is_none(tmp_path):
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        assert checkpoints.restore(abstract(place(make_state(1), 1))) is None
        assert checkpoints.latest_step() is None
        assert checkpoints.extra == {}


DAMAGES = [flip_bit, truncate, empty_step, rewrite_manifest, lose_state]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_newest_is_set_aside_and_the_one_before_used(run, damage, caplog):
    damage(run / "3")
    want = place(make_state(2), 2)
    with Checkpoints(run) as checkpoints:
        assert_same_bits(checkpoints.restore(abstract(want)), want)
        assert checkpoints.extra == {"teacher": "t2"}
        assert checkpoints.latest_step() == 2
        assert sorted(path.name for path in run.iterdir()) == ["1", "2", "3.damaged"]
        assert "CHECKPOINT 3 IS DAMAGED" in caplog.text
        assert "3.damaged" in caplog.text
        # The run comes by step 3 again and saves it anew.
        again = place(make_state(3), 2)
        assert checkpoints.save(3, again, force=True)
        checkpoints.wait()
        assert_same_bits(checkpoints.restore(abstract(again)), again)


def test_a_flipped_bit_that_reads_without_complaint_is_caught_by_the_digest(tmp_path, caplog):
    rng = np.random.default_rng(0)  # uniform bits do not compress: they are stored as they are
    states = [place({"noise": rng.integers(2**31, size=2**16, dtype=np.int32)}, 1) for _ in range(2)]
    with Checkpoints(tmp_path) as checkpoints:
        for step, state in enumerate(states):
            checkpoints.save(step, state, force=True)
    flip_bit(tmp_path / "1")
    read = read_arrays(epath.Path(tmp_path) / "1" / "state", {"noise": None})["noise"]
    assert (read != np.asarray(states[1]["noise"])).sum() == 1
    with Checkpoints(tmp_path) as checkpoints:
        assert_same_bits(checkpoints.restore(abstract(states[0])), states[0])
    assert "1 of its arrays are not what was saved, the first is noise" in caplog.text


def test_two_damaged_the_second_time_as_well(run):
    (run / "3.damaged").mkdir()
    flip_bit(run / "3")
    empty_step(run / "2")
    with Checkpoints(run) as checkpoints:
        assert int(checkpoints.restore(abstract(place(make_state(1), 1))).step) == 1
    assert sorted(path.name for path in run.iterdir()) == ["1", "2.damaged", "3.damaged"]
    assert (run / "3.damaged" / "state").exists()


def test_all_damaged_is_an_error_and_changes_nothing(run):
    for step, damage in zip("123", (flip_bit, truncate, empty_step)):
        damage(run / step)
    for _ in range(2):  # a job that is started again must not find an empty directory and begin from scratch
        with Checkpoints(run) as checkpoints, pytest.raises(CheckpointError) as caught:
            checkpoints.restore(abstract(place(make_state(3), 1)))
        assert re.search(
            r"No checkpoint in .* is intact:\n  3: .*\n  2: .*\n  1: .*\nPut back a copy", str(caught.value)
        )
        assert sorted(path.name for path in run.iterdir()) == ["1", "2", "3"]


def test_another_architecture_is_an_error_that_lists_the_differences(run):
    other = make_state(3, width=16)
    other.params["encoder"]["norm"] = {"scale": np.ones(4, np.float32)}
    other.params["head"] = {"bias": np.zeros(5, np.float32)}
    other = other.replace(opt_state=())
    with Checkpoints(run) as checkpoints, pytest.raises(CheckpointError) as caught:
        checkpoints.restore(abstract(place(other, 1)))
    text = str(caught.value)
    assert "missing (wanted, not stored): 1\n    params/encoder/norm/scale" in text
    assert "unused (stored, not wanted): 5\n    opt_state/1/inner_state/0/count" in text
    assert "params/encoder/kernel: stored [512, 64], wanted [16, 64]" in text
    assert "params/head/bias: stored bfloat16, wanted float32" in text
    assert "another --workdir" in text
    assert sorted(path.name for path in run.iterdir()) == ["1", "2", "3"]  # not taken for damage


def test_saves_by_the_clock_and_keeps_the_last(tmp_path):
    now = [1000.0]
    state = place(make_state(0), 1)
    with Checkpoints(tmp_path, keep=2, every_seconds=600, clock=lambda: now[0]) as checkpoints:
        saved = []
        for step in range(1, 41):
            now[0] += 100
            if checkpoints.save(step, state, force=step == 40):
                saved.append(step)
                checkpoints.wait()
        assert saved == [6, 12, 18, 24, 30, 36, 40]
        assert not checkpoints.save(40, state, force=True)  # once is enough
        assert not checkpoints.preempted
    assert sorted(path.name for path in tmp_path.iterdir()) == ["36", "40"]
    # Starting anew starts the clock anew: nothing is saved at the first call.
    with Checkpoints(tmp_path, every_seconds=600, clock=lambda: now[0]) as checkpoints:
        checkpoints.restore(abstract(state))
        assert not checkpoints.save(41, state)


def test_a_state_may_be_donated_at_once(tmp_path):
    advance = jax.jit(lambda state: jax.tree.map(lambda x: x * 3 + 1, state), donate_argnums=0)
    rng = np.random.default_rng(0)
    state = place({f"p{i}": rng.normal(size=(512, 1024)).astype(np.float32) for i in range(8)}, 2)
    want = jax.tree.map(np.array, state)
    with Checkpoints(tmp_path) as checkpoints:
        layout = abstract(state)
        checkpoints.save(1, state, force=True)
        for _ in range(4):
            state = advance(state)
        checkpoints.wait()
        assert_same_bits(checkpoints.restore(layout), want)


def go_on(checkpoints, state):
    for step in range(3, 600):
        assert not checkpoints.save(step, state)
        time.sleep(0.05)


def test_full_disk_leaves_the_checkpoint_before_and_says_so(tmp_path):
    small = place(make_state(1), 1)
    large = place({"noise": np.random.default_rng(0).normal(size=(2**19,))}, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path, keep=1, every_seconds=1e9) as checkpoints:
        checkpoints.save(1, small, force=True)
        checkpoints.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, limits[1]))
        try:
            checkpoints.save(2, large, force=True)
            # It fails in the background; the next steps find out without being asked to save.
            with pytest.raises(CheckpointError, match="free some space") as caught:
                go_on(checkpoints, large)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "What was saved before is intact" in str(caught.value)
        assert checkpoints.latest_step() == 1
        assert_same_bits(checkpoints.restore(abstract(small)), small)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(2, small, force=True)
    assert only_steps(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("name", ["run[1]", "run\\1", "run*", "what?", "a[b/c"])
def test_paths_that_are_patterns_are_refused(tmp_path, name, monkeypatch):
    """Orbax would not find its own files there, and would raise no error."""
    with pytest.raises(ValueError, match=r"checkpoint directory .* cannot be kept.*Rename '"):
        Checkpoints(tmp_path / name / "checkpoints")
    with pytest.raises(ValueError, match=r"--output .* cannot be kept"):
        save_params(tmp_path / name, {"x": np.zeros(2)}, {})
    with pytest.raises(ValueError, match=r"--workdir .* cannot be kept"):
        train(ConfigDict(), str(tmp_path / name))
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / name)  # the working directory is part of a relative path
    with pytest.raises(ValueError, match="--workdir runs/x"):
        check_output_path("runs/x", "--workdir")
    check_output_path(tmp_path / "a b (v2) {x} 100% é !~#]", "--workdir")


def test_a_path_that_is_not_utf8_is_refused(tmp_path):
    """Orbax would fail at the first save."""
    with pytest.raises(ValueError, match=r"not valid UTF-8, because of 'wy\\udce9'"):
        check_output_path(tmp_path / os.fsdecode(b"wy\xe9") / "run", "--workdir")


def test_the_first_save_is_read_back(tmp_path, monkeypatch):
    """In such a folder Orbax loses its files without an error; the first save must raise one, not the restart."""
    monkeypatch.setattr("tinymim_jax.checkpoints.manager.check_output_path", lambda *_: None)
    state = place(make_state(1), 2)
    checkpoints = Checkpoints(tmp_path / "run[1]" / "checkpoints")
    checkpoints.save(1, state, force=True)
    with pytest.raises(CheckpointError, match=r"first checkpoint of this run, .*/1, is not what .*NOT_FOUND"):
        checkpoints.wait()


def test_the_first_save_is_read_back_before_the_next_one_may_delete_it(tmp_path, monkeypatch):
    """With keep=1 and saves that take longer than a step: the next save begins while the first is being written."""
    monkeypatch.setattr(ocp.CheckpointManager, "is_saving_in_progress", lambda self: True)
    read = []

    def read_and_note(directory, **options):
        read.append(sorted(path.name for path in tmp_path.iterdir() if path.name.isdigit()))
        read_back(directory, **options)

    monkeypatch.setattr("tinymim_jax.checkpoints.manager.read_back", read_and_note)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        for step in (1, 2, 3):
            assert checkpoints.save(step, place(make_state(step), 2), force=True)
    assert read == [["1"]]
    assert only_steps(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


def test_the_newest_step_of_a_run_that_deletes_it_meanwhile(run, monkeypatch, caplog):
    (run.parent / "model.json").write_text("{}")
    asked = []

    def read_late(directory, wanted):
        asked.append(directory.parent.name)
        if len(asked) == 1:  # the training saves a newer step and deletes all others
            (run / "3").rename(run / "4")
            shutil.rmtree(run / "2")
            shutil.rmtree(run / "1")
        return read_arrays(directory, wanted)

    monkeypatch.setattr("tinymim_jax.checkpoints.params.stored.read_arrays", read_late)
    _, params = load_params(run.parent)
    assert asked == ["3", "4"]
    assert_same_bits(params["encoder"], make_state(3).params["encoder"])
    assert "damaged" not in caplog.text


def test_bits_that_change_on_the_way_to_the_disk_are_found_at_once(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(
        1, place({"noise": np.random.default_rng(0).integers(2**31, size=2**16, dtype=np.int32)}, 1), force=True
    )
    checkpoints._manager.wait_until_finished()
    flip_bit(tmp_path / "1")
    with pytest.raises(CheckpointError, match=r"first checkpoint .* 1 of its arrays are not what .* first is noise"):
        checkpoints.wait()


class HttpError(Exception):
    """Like the error of gcsfs, which is no OSError."""


HttpError.__module__ = "gcsfs.retry"


@pytest.fixture
def bucket(monkeypatch):
    """Folders are treated as buckets, and pauses between attempts take no time."""
    monkeypatch.setattr("tinymim_jax.checkpoints.manager.is_remote", lambda path: True)
    monkeypatch.setattr("tinymim_jax.checkpoints.manager._PAUSES", (0, 0))


def failing(monkeypatch, what: str, times: int) -> None:
    """Makes a method of an Orbax class (`Class.method`) raise an HttpError in its next `times` calls."""
    owner, _, method = what.rpartition(".")
    target = getattr(ocp, owner)
    works, left = getattr(target, method), [times]

    def stumbles(*args, **kwargs):
        left[0] -= 1
        if left[0] >= 0:
            raise HttpError("Service Unavailable, 503")
        return works(*args, **kwargs)

    monkeypatch.setattr(target, method, stumbles)


def test_a_failed_save_in_a_bucket_is_repeated_and_training_goes_on(tmp_path, bucket, monkeypatch, caplog):
    now = [0.0]
    state = place(make_state(1), 1)
    with Checkpoints(tmp_path, every_seconds=600, clock=lambda: now[0]) as checkpoints:
        saved = []
        failing(monkeypatch, "CheckpointManager.save", 2)
        for step in range(1, 30):
            now[0] += 30
            if checkpoints.save(step, state):
                saved.append(step)
                checkpoints.wait()
        # Due at 600 s (step 20); repeated after a minute, twice.
        assert saved == [24]
        assert caplog.text.count("SAVING FAILED") == 2
        assert_same_bits(checkpoints.restore(abstract(state)), state)


def test_saving_in_a_bucket_that_never_works_is_an_error(tmp_path, bucket, monkeypatch):
    now = [0.0]
    with Checkpoints(tmp_path, every_seconds=60, clock=lambda: now[0]) as checkpoints:
        failing(monkeypatch, "CheckpointManager.save", 100)
        for step in range(1, 5):
            now[0] += 60
            assert not checkpoints.save(step, place(make_state(1), 1))
        now[0] += 60
        with pytest.raises(CheckpointError, match="503"):
            checkpoints.save(5, place(make_state(1), 1))


def test_the_last_save_and_reads_in_a_bucket_are_repeated(tmp_path, bucket, monkeypatch):
    state = place(make_state(1), 1)
    failing(monkeypatch, "JsonCheckpointHandler.finalize", 1)  # in the background
    with Checkpoints(tmp_path) as checkpoints:
        failing(monkeypatch, "CheckpointManager.save", 1)
        assert checkpoints.save(1, state, force=True)
        failing(monkeypatch, "PyTreeCheckpointHandler.restore", 2)
        assert_same_bits(checkpoints.restore(abstract(state)), state)
        failing(monkeypatch, "PyTreeCheckpointHandler.restore", 3)
        with pytest.raises(CheckpointError, match=r"Cannot read .*503"):  # not taken for damage
            checkpoints.restore(abstract(state))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1"]


def test_unwritable_directory_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="directory that you may write to"):
        Checkpoints(tmp_path / "file" / "checkpoints")


def test_an_exception_in_the_loop_is_not_hidden_and_the_save_is_completed(tmp_path):
    state = place(make_state(1), 1)
    stumble = pytest.raises(FloatingPointError)
    with stumble, Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, force=True)
        raise FloatingPointError
    with Checkpoints(tmp_path) as checkpoints:
        assert_same_bits(checkpoints.restore(abstract(state)), state)


LOOP = """
import sys, time
from tinymim_jax.runtime.distributed import initialize_distributed
from tinymim_jax.sharding import make_mesh, state_sharding
initialize_distributed()
import jax, jax.numpy as jnp
from tinymim_jax.checkpoints.manager import Checkpoints
mesh = make_mesh(2)
make = lambda step: {"params": {"w": jnp.arange(2.0 ** 18).reshape(512, 512) * step}, "step": step}
shardings = state_sharding(mesh, jax.eval_shape(make, jnp.int32(0)))
make = jax.jit(make, out_shardings=shardings)
advance = jax.jit(lambda state: make(state["step"] + 1), donate_argnums=0, out_shardings=shardings)
state = make(jnp.int32(0))
like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
with Checkpoints(sys.argv[1], every_seconds=float(sys.argv[2])) as checkpoints:
    restored = checkpoints.restore(like)
    state = state if restored is None else restored
    print("START", int(state["step"]), flush=True)
    for _ in range(100000):
        state = advance(state)
        step = int(state["step"])
        before = checkpoints.latest_step()
        if checkpoints.save(step, state) and before:
            print("SAVED", before, flush=True)
        if checkpoints.preempted:
            checkpoints.wait()
            print("STOPPED", step, flush=True)
            break
        time.sleep(0.005)
"""


def loop(directory, every_seconds, **variables):
    return run_python(f"import sys; sys.argv[1:] = [{str(directory)!r}, '{every_seconds}']\n{LOOP}", **variables)


def read_until(process, word):
    for line in process.stdout:
        if line.startswith(word):
            return int(line.split()[1])
    raise AssertionError(f"no {word}: {output_of(process)[2]}")


def restored_loop_state(directory):
    want = place({"params": {"w": np.zeros((512, 512), np.float32)}, "step": np.int32(0)}, 4)
    with Checkpoints(directory) as checkpoints:
        state = checkpoints.restore(abstract(want))
    step = int(state["step"])
    np.testing.assert_array_equal(state["params"]["w"], np.arange(2.0**18, dtype=np.float32).reshape(512, 512) * step)
    return step


def only_steps(directory):
    """Whether there are only complete steps; leftovers of a killed save are deleted in the background."""
    for _ in range(200):
        if all(path.name.isdecimal() for path in directory.iterdir()):
            return True
        time.sleep(0.05)
    return False


def test_kill_in_the_middle_of_saves_loses_nothing(tmp_path):
    rng = np.random.default_rng(int.from_bytes(os.urandom(4), "little"))
    reached = 0
    for _ in range(2):
        process = loop(tmp_path, 0, devices=2)
        assert read_until(process, "START") >= reached
        complete = max(read_until(process, "SAVED") for _ in range(3))
        time.sleep(rng.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        complete = max([complete, *(int(line.split()[1]) for line in output_of(process)[1].splitlines())])
        reached = restored_loop_state(tmp_path)
        assert reached >= complete
        assert only_steps(tmp_path)


def test_sigterm_to_one_process_alone_saves_and_stops(tmp_path):
    process = loop(tmp_path, 1e9, devices=2)
    assert read_until(process, "START") == 0
    process.send_signal(signal.SIGTERM)
    stopped = read_until(process, "STOPPED")
    assert output_of(process)[0] == 0
    assert restored_loop_state(tmp_path) == stopped


def test_two_processes_save_together_and_set_aside_together(tmp_path):
    """Saves by process 0's clock, then by SIGTERM to process 1; each state is restored on other devices."""
    job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    like = {"params": {"w": np.zeros((512, 512), np.float32)}, "step": np.int32(0)}
    with Checkpoints(tmp_path) as checkpoints:
        for step in (5, 6):
            like["params"]["w"] = np.arange(2.0**18, dtype=np.float32).reshape(512, 512) * step
            checkpoints.save(step, place(like | {"step": np.int32(step)}, 8), force=True)
    truncate(tmp_path / "6")
    pair = [loop(tmp_path, every, devices=4, JAX_PROCESS_ID=str(p), **job) for p, every in enumerate((0.2, 0.0))]
    assert [read_until(process, "START") for process in pair] == [5, 5]
    assert (tmp_path / "6.damaged").exists()
    saved = [[read_until(process, "SAVED") for _ in range(2)] for process in pair]
    assert saved[0] == saved[1]
    pair[1].send_signal(signal.SIGTERM)
    stopped = [read_until(process, "STOPPED") for process in pair]
    assert stopped[0] == stopped[1]
    for process in pair:
        status, _, err = output_of(process)
        assert status == 0, err
    assert restored_loop_state(tmp_path) == stopped[0]


def test_a_notice_before_the_first_step_of_a_resumed_run_is_not_missed(tmp_path):
    """The run is resumed at step 900; the notice comes before its first call of `save`."""
    code = f"""
        import os, signal, time
        from tinymim_jax.runtime.distributed import initialize_distributed
        initialize_distributed()
        import jax.numpy as jnp
        from tinymim_jax.checkpoints.manager import Checkpoints
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(4)  # until JAX has chosen the call to stop at
        with Checkpoints({str(tmp_path)!r}, every_seconds=1e9) as checkpoints:
            for step in range(901, 1100):
                saved = checkpoints.save(step, {{"step": jnp.int32(step)}})
                assert saved == checkpoints.preempted
                if saved:
                    break
                time.sleep(0.05)
        print("STOPPED", step, flush=True)
    """
    status, out, err = output_of(run_python(textwrap.dedent(code)))
    assert status == 0, err
    assert 901 <= int(out.split()[-1]) < 1099


DIGEST = """
from tinymim_jax.runtime.distributed import initialize_distributed
from tinymim_jax.sharding import make_mesh, state_sharding
initialize_distributed()
import jax, numpy as np
from tinymim_jax.checkpoints.format import digest
tree = {f"w{n}": np.arange(4096, dtype=np.float32).reshape(8, 512) * n for n in range(60)}
shardings = state_sharding(make_mesh(8), tree, min_size=64)
place = jax.jit(lambda tree: tree, out_shardings=shardings)
print("DIGEST", digest(place(tree)), not place(tree)["w0"].is_fully_addressable, flush=True)
"""


def test_digest_of_arrays_that_are_split_over_processes():
    """Sixty sums over all devices at once; the processes must not wait for different ones."""
    tree = {f"w{n}": np.arange(4096, dtype=np.float32).reshape(8, 512) * n for n in range(60)}
    job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    pair = [run_python(DIGEST, devices=4, JAX_PROCESS_ID=str(p), **job) for p in range(2)]
    for status, out, err in map(output_of, pair):
        assert status == 0, err
        assert f"DIGEST {digest(tree)} True" in out
