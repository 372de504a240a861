"""Exit statuses, the watchdog, the lock, who is expected, what time is lost to: each by itself, without a training."""

import http.server
import json
import logging
import os
import subprocess
import sys
import textwrap
import threading

import pytest
from etils import epath
from processes import output_of, run_python
from test_cli import run

from tinymim_jax import sharding
from tinymim_jax.cli.prepare import one_by_one
from tinymim_jax.config import load_config
from tinymim_jax.resume import as_json
from tinymim_jax.runtime import distributed, heartbeat, hosts, workdir
from tinymim_jax.runtime.exits import STALLED
from tinymim_jax.runtime.goodput import LOSSES, Goodput, describe, shares
from tinymim_jax.runtime.heartbeat import Heartbeat, read_status
from tinymim_jax.runtime.hosts import Job, find_job, find_slice
from tinymim_jax.runtime.locks import Busy, holder, locked
from tinymim_jax.runtime.workdir import owner
from tinymim_jax.sweeps.children import Children
from tinymim_jax.sweeps.points import Point, Stage, make_runs
from tinymim_jax.sweeps.sweep import exit_status

# ------------------------------------------------------------------------------------------------- watchdog

STUCK = """
import sys, time
from etils import epath
from tinymim_jax.runtime.heartbeat import Heartbeat
def a_function_that_never_returns():
    time.sleep(1e6)
with Heartbeat(epath.Path(sys.argv[1]), stall_seconds=1.0) as heart:
    heart.note(stage="training")
    heart.watch()
    heart.compiled()
    a_function_that_never_returns()
"""


def test_a_stuck_process_shows_its_stacks_and_exits_with_86(tmp_path):
    status, out, err = output_of(run_python(f"import sys; sys.argv[1:] = [{str(tmp_path)!r}]\n{STUCK}"))
    assert status == STALLED == 86
    assert "a_function_that_never_returns" in err
    assert "nothing was finished for" in out + err
    found = read_status(tmp_path)
    assert found["stage"] == "stalled"
    assert "run the same command again" in out + err


def test_a_heart_that_beats_is_not_stopped_nor_one_that_compiles(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(heartbeat, "exit_at_once", lambda *_: ended.set())
    now = [0.0]
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback", lambda **_: None)
    heart = Heartbeat(None, stall_seconds=60)
    checks = iter([False] * 6 + [True])

    def check(_):
        now[0] += 50
        return next(checks)

    monkeypatch.setattr(heart._stop, "wait", check)
    heart._run()  # nothing is watched before the loop
    assert not ended.is_set()
    checks = iter([False] * 6 + [True])
    heart.watch()
    heart._run()  # five minutes of compiling
    assert not ended.is_set()
    checks = iter([False, True])
    heart.compiled()
    heart._run()  # 50 seconds
    assert not ended.is_set()
    checks = iter([False, True])
    heart._run()  # 100
    assert ended.is_set()


def test_a_pause_of_the_whole_process_is_no_stall(monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(heartbeat, "exit_at_once", lambda *_: ended.set())
    now, steps = [0.0], iter([40.0, 3600.0, 10.0])  # seconds until the thread runs again
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(heartbeat.faulthandler, "dump_traceback", lambda **_: None)
    heart = Heartbeat(None, stall_seconds=60)
    heart.watch()
    heart.compiled()

    def check(_):
        step = next(steps, None)
        now[0] += step or 0.0
        return step is None

    monkeypatch.setattr(heart._stop, "wait", check)
    heart._run()  # an hour that nobody saw, and 50 seconds
    assert not ended.is_set()
    steps = iter([20.0])
    heart._run()
    assert ended.is_set()


def test_status_cannot_be_written_is_said_once(tmp_path, caplog):
    heart = Heartbeat(epath.Path(tmp_path / "gone"), stall_seconds=0)
    for _ in range(3):
        heart._write()
    assert caplog.text.count("cannot write") == 1


# ----------------------------------------------------------------------------------------------------- lock


def test_a_lock_keeps_the_others_out_and_dies_with_its_process(tmp_path):
    code = f"""
        import time
        from tinymim_jax.runtime.locks import locked
        with locked({str(tmp_path)!r}):
            print("LOCKED", flush=True)
            time.sleep(1e6)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "LOCKED\n"
        assert f"process {process.pid} on " in holder(tmp_path)
        with (
            pytest.raises(Busy, match=f"in use by process {process.pid} on .* choose another --workdir"),
            locked(tmp_path),
        ):
            pytest.fail("it was not kept out")
        free = threading.Event()

        def wait():
            with locked(tmp_path, wait=True):
                free.set()

        waiter = threading.Thread(target=wait)
        waiter.start()
        assert not free.wait(0.2)
        process.kill()
        waiter.join(timeout=60)
        assert free.is_set()
    finally:
        process.kill()
        process.wait()
    assert holder(tmp_path) is None
    with locked(tmp_path):
        assert f"process {os.getpid()}" in holder(tmp_path)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("tinymim_jax.runtime.locks.fcntl.flock", unsupported)
    with locked(tmp_path):
        pass
    assert "see to it that one run alone uses it" in caplog.text


def test_whose_a_folder_is_by_its_status_where_the_lock_cannot_be_seen(tmp_path):
    import time

    def status(**facts):
        (tmp_path / "status.json").write_text(json.dumps({"host": "elsewhere", "pid": 7, "time": time.time()} | facts))

    status(stage="training")
    assert owner(tmp_path) == "process 7 on elsewhere"
    status(stage="training", time=time.time() - 3600)
    assert owner(tmp_path) is None
    status(stage="interrupted")
    assert owner(tmp_path) is None


# -------------------------------------------------------------------------------------------------- the job


@pytest.fixture
def environment(monkeypatch):
    """Variables of jobs, unset but for those given."""
    for name in list(os.environ):
        if name.startswith(("JAX_NUM", "JAX_PROCESS", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "GCE_")):
            monkeypatch.delenv(name)
    return lambda **variables: [monkeypatch.setenv(name, value) for name, value in variables.items()]


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, Job()),
        ({"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "2"}, Job(4, 2, "JAX_NUM_PROCESSES")),
        ({"SLURM_NTASKS": "8"}, Job()),  # of sbatch itself: no task yet
        ({"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, Job(8, 3, "SLURM_NTASKS")),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}, Job(2, 1, "OMPI_COMM_WORLD_SIZE")),
    ],
)
def test_the_job_as_its_surroundings_say(environment, variables, job):
    environment(**variables)
    assert find_job() == job


def test_hosts_of_a_tpu_slice(environment, monkeypatch):
    environment(TPU_WORKER_HOSTNAMES="t0,t1,t2,t3", TPU_WORKER_ID="1")
    assert find_job() == Job()  # there is no TPU here
    monkeypatch.setattr(hosts, "_has_tpu", lambda: True)
    assert find_job() == Job(4, 1, "TPU_WORKER_HOSTNAMES")
    environment(MEGASCALE_NUM_SLICES="2", MEGASCALE_SLICE_ID="1")
    assert find_job() == Job(8, 5, "TPU_WORKER_HOSTNAMES")


def test_hosts_of_a_tpu_slice_by_the_metadata_server(environment, monkeypatch):
    class Metadata(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            answers = {"worker-network-endpoints": "x:y:10.0.0.1,x:y:10.0.0.2", "agent-worker-number": "1"}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answers[self.path.rsplit("/", 1)[-1]].encode())

        def log_message(self, *_):
            pass

    monkeypatch.setattr(hosts, "_has_tpu", lambda: True)
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment(GCE_METADATA_IP=f"127.0.0.1:{server.server_port}")
        assert find_slice() == Job(2, 1, "this machine's metadata")
        server.shutdown()
    assert find_slice() == Job()  # nobody answers


def test_one_host_of_a_slice_alone_is_warned_before_it_hangs(environment, monkeypatch, caplog):
    monkeypatch.setattr(hosts, "_has_tpu", lambda: True)
    environment(TPU_WORKER_HOSTNAMES="t0,t1", JAX_NUM_PROCESSES="1")
    distributed._warn_of_absent_hosts(find_job())
    assert "JAX_NUM_PROCESSES says 1 processes, but this is a host of a TPU slice of 2" in caplog.text


def test_devices_of_other_processes_than_joined(monkeypatch):
    monkeypatch.setattr(sharding, "joined_processes", lambda: 4)
    with pytest.raises(RuntimeError, match="4 processes joined this job, but its devices belong to 1"):
        sharding.make_mesh()


def test_missing_processes_are_spoken_of(monkeypatch, caplog):
    monkeypatch.setattr(distributed, "_REMIND_SECONDS", 0.01)
    spoken = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record):
            if "Not all 2 processes have come" in record.getMessage():
                spoken.set()

    logging.getLogger("tinymim_jax.runtime.distributed").addHandler(listener := Listener())
    try:
        with caplog.at_level("INFO"), distributed._remind_while_waiting(Job(2, 1, "JAX_NUM_PROCESSES")):
            assert spoken.wait(60)
    finally:
        logging.getLogger("tinymim_jax.runtime.distributed").removeHandler(listener)
    assert "This is process 1 of 2." in caplog.text


# -------------------------------------------------------------------------------------------------- goodput


class Result:
    """A step that ends when told to."""

    def __init__(self):
        self._done = threading.Event()
        self.block_until_ready = self._done.wait
        self.is_ready = self._done.is_set
        self.end = self._done.set


def test_waiting_is_lost_only_while_the_device_is_idle():
    now = [0.0]
    goodput = Goodput(clock=lambda: now[0])

    def wait(seconds):
        with goodput.idling("input"):
            now[0] += seconds

    wait(2.0)  # nothing is under way yet: lost
    first, second = Result(), Result()
    goodput.dispatched(first)
    wait(3.0)  # the step lasts longer
    with goodput._noted:
        first.end()
        assert goodput._noted.wait_for(lambda: goodput._finished == 1, timeout=60)
    now[0] += 1.0
    wait(4.0)  # the device has been idle for a second already: the wait is lost, what came before it is not its fault
    goodput.dispatched(second)
    second.end()
    with goodput.losing("evaluation"):
        now[0] += 5.0
        assert goodput.seconds()["evaluation"] == 5.0  # while it goes on
    seconds = goodput.seconds()
    assert (seconds["input"], seconds["evaluation"], seconds["steps"]) == (6.0, 5.0, 4.0)
    assert sum(seconds.values()) == now[0]
    goodput.close()


def test_earlier_attempts_count_with_what_was_lost_between():
    now = [0.0]
    before = dict.fromkeys(LOSSES, 0.0) | {"steps": 100.0, "compile": 20.0}
    goodput = Goodput(before, clock=lambda: now[0])
    goodput.charge("redone", 30.0)
    goodput.charge("downtime", 50.0)
    goodput.charge("downtime", -86400.0)  # the machine's clock was set back
    now[0] = 30.0
    seconds = goodput.seconds()
    assert seconds == dict.fromkeys(LOSSES, 0.0) | {"steps": 100.0, "compile": 20.0, "redone": 30.0, "downtime": 50.0}
    assert shares(seconds)["goodput"] == 0.5
    assert sum(shares(seconds).values()) == pytest.approx(1)
    text = "50.0% of 3m20s went into steps; lost to downtime 25.0% (50s), redone 15.0% (30s), compile 10.0% (20s)"
    assert describe(seconds) == text
    goodput.charge("redone", 1e9)
    assert goodput.seconds()["steps"] == 30.0  # no more than there were
    goodput.close()


# ------------------------------------------------------------------------- one folder, several commands


@pytest.fixture
def point(tmp_path):
    """A chain of one stage, which nothing needs to be trained for."""
    stages = [Stage("a", "configs/digits.py:finetune", {})]
    return Point("", 0, None, {}, {}, make_runs(stages, tmp_path))


def test_a_second_run_in_a_workdir_refuses(tmp_path):
    with (
        locked(tmp_path),
        pytest.raises(Busy, match=f"in use by process {os.getpid()}"),
        workdir.claimed(epath.Path(tmp_path), as_json(load_config("configs/digits.py:finetune"))),
    ):
        pytest.fail("it was not kept out")
    assert not (tmp_path / "config.json").exists()


def test_a_point_that_another_command_trains_is_left_to_it(point):
    point.runs[0].workdir.mkdir()
    with locked(point.runs[0].workdir), Children() as children:
        state = children.run_point(point)
    assert state.name == "running"
    assert f"process {os.getpid()}" in state.detail
    assert exit_status([state]) == 75
    assert sorted(path.name for path in point.runs[0].workdir.iterdir()) == [".lock"]  # nothing was started or recorded


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["sweep", "configs/digits.py:finetune", "--run", "local"], "--index N, each of them over all processes"),
        (["chain", "configs/chain.py:digits"], "with `tinymim train`, each of them over all processes"),
    ],
)
def test_what_is_for_one_process_says_so_to_several(words, remedy, environment, tmp_path, capsys):
    environment(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0")
    code, _, err = run(capsys, *words, "--workdir", tmp_path)
    assert code == 1
    assert "is for one process, but JAX_NUM_PROCESSES says 2" in err
    assert remedy in err
    environment(JAX_NUM_PROCESSES="1")
    code, _, err = run(capsys, *words, "--workdir", "gs://bucket/runs")
    assert code == 1
    assert "needs a folder" in err


def test_processes_of_a_job_prepare_one_after_another(environment, tmp_path):
    environment(JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
    came = threading.Event()

    def second():
        with one_by_one(str(tmp_path)):
            came.set()

    with one_by_one(str(tmp_path)):
        thread = threading.Thread(target=second)
        thread.start()
        assert not came.wait(0.2)
    thread.join(timeout=60)
    assert came.is_set()
