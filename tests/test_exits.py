"""Exit statuses, stall detection, locks, jobs of several processes and goodput: each without a training."""

import collections
import fcntl
import http.server
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from commands import run
from etils import epath
from processes import output_of, run_python

from tinymim_jax import sharding
from tinymim_jax.cli.prepare import one_by_one
from tinymim_jax.config import load_config
from tinymim_jax.resume import as_json
from tinymim_jax.runtime import distributed, files, heartbeat, hosts, locks, workdir
from tinymim_jax.runtime.exits import STALLED, TERMINATED
from tinymim_jax.runtime.goodput import LOSSES, Goodput, describe, shares
from tinymim_jax.runtime.heartbeat import Heartbeat, read_status
from tinymim_jax.runtime.hosts import Job, find_job, find_slice
from tinymim_jax.runtime.locks import Busy, holder, locked
from tinymim_jax.runtime.workdir import owner
from tinymim_jax.sweeps import children
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


def test_progress_and_compiling_are_no_stall(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(heartbeat, "exit_at_once", lambda *_, **__: ended.set())
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
    monkeypatch.setattr(heartbeat, "exit_at_once", lambda *_, **__: ended.set())
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


class HttpError(Exception):
    """As gcsfs raises them: no OSError."""


def test_the_heartbeat_outlives_any_error_of_writing(tmp_path, monkeypatch, caplog):
    calls, enough = [], threading.Event()
    write = heartbeat.write_json

    def fail_twice(path, value, **options):
        calls.append(value)
        if len(calls) in (2, 3):
            raise HttpError("503")
        write(path, value, **options)
        if len(calls) > 4:
            enough.set()

    monkeypatch.setattr(heartbeat, "write_json", fail_twice)
    monkeypatch.setattr(heartbeat, "WRITE_SECONDS", 0.01)
    with Heartbeat(epath.Path(tmp_path), stall_seconds=0) as heart:
        assert enough.wait(60)
        heart.note(stage="training")
    assert read_status(tmp_path)["stage"] == "training"
    assert caplog.text.count("cannot write") == 1
    assert "HttpError('503')" in caplog.text


def test_a_failing_status_file_is_logged_once(tmp_path, caplog):
    heart = Heartbeat(epath.Path(tmp_path / "gone"), stall_seconds=0)
    for _ in range(3):
        heart._write()
    assert caplog.text.count("cannot write") == 1


# -------------------------------------------------------------------------------------------------- signals

WITHOUT_END = """
import argparse, os, signal, time
import jax
from tinymim_jax.cli.options import start_jax
from tinymim_jax.runtime.exits import end_on_sigterm
start_jax(argparse.Namespace(compile_cache=""))
child = os.fork()
if child == 0:
    time.sleep(60)
    os._exit(0)
os.kill(child, signal.SIGTERM)
assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM  # and this process goes on
print("READY", flush=True)
jax.block_until_ready(jax.jit(lambda x: jax.lax.while_loop(lambda v: v >= 0, lambda v: (v + 1) % 7, x))(0))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_command_that_saves_nothing_at_once(number):
    """Its main thread waits inside JAX for a computation without an end."""
    process = run_python(f"import signal\nsignal.signal(signal.SIGHUP, signal.SIG_DFL)\n{WITHOUT_END}")
    assert process.stdout.readline() == "READY\n"
    time.sleep(0.5)
    process.send_signal(number)
    assert output_of(process)[0] == TERMINATED == 143


def test_sighup_makes_a_training_save_and_stop_unless_it_is_ignored():
    code = """
        import argparse, signal, sys, time
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        from tinymim_jax.cli.options import start_jax
        from jax.experimental import multihost_utils
        start_jax(argparse.Namespace(compile_cache=""), resumable=True)
        signal.raise_signal(signal.SIGHUP)
        end = time.monotonic() + 100
        step = 0
        while not multihost_utils.reached_preemption_sync_point(step):
            assert time.monotonic() < end
            step += 1
            time.sleep(0.01)
        print("PREEMPTED", flush=True)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        from tinymim_jax.runtime.exits import treat_sighup_as_sigterm
        treat_sighup_as_sigterm()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    """
    status, out, err = output_of(run_python(textwrap.dedent(code)))
    assert (status, out) == (0, "PREEMPTED\n"), err


def test_a_process_ends_although_its_last_message_blocks():
    code = """
        import threading
        from tinymim_jax.runtime import exits
        exits._EXIT_SECONDS = 0.5
        exits.exit_at_once(86, "", before=threading.Event().wait)
    """
    assert output_of(run_python(textwrap.dedent(code)))[0] == STALLED


def test_a_child_ends_with_its_parent_by_a_wrapper_too():
    child = """
        import os, time
        from tinymim_jax.runtime.parent import PARENT_VARIABLE, end_with_parent_of_environment
        end_with_parent_of_environment()
        assert PARENT_VARIABLE not in os.environ
        print("CHILD", flush=True)
        time.sleep(1e6)
    """
    code = f"""
        import os, subprocess, sys
        os.environ["TINYMIM_PARENT"] = str(os.getpid())
        wrapper = ["sh", "-c", '"$@"; echo ended with $?', "sh"] if sys.argv[1:] else []
        subprocess.run([*wrapper, sys.executable, "-c", {textwrap.dedent(child)!r}])
    """
    for arguments in ("", "'wrapped'"):
        process = run_python(f"import sys; sys.argv[1:] = [{arguments}]\n{textwrap.dedent(code)}")
        assert process.stdout.readline() == "CHILD\n"
        process.kill()
        assert output_of(process)[1] == ("ended with 87\n" if arguments else "")  # returns once the child has gone


# ---------------------------------------------------------------------------------------------------- files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"é": 1})
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}

    def fail():
        with files.replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert json.loads(path.read_text(encoding="utf-8")) == {"é": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_synced_before_it_is_renamed(tmp_path, monkeypatch):
    synced, path = [], tmp_path / "a.txt"
    monkeypatch.setattr(
        files.os, "fsync", lambda fd: synced.append((os.readlink(f"/proc/self/fd/{fd}"), path.exists()))
    )
    files.write_text(path, "text")
    ((written, existed),) = synced
    assert not existed
    assert os.path.dirname(written) == str(tmp_path)
    assert path.read_text() == "text"


def test_an_access_to_a_bucket_is_repeated(tmp_path, monkeypatch, caplog):
    waits, answers = [], iter([KeyError("503"), KeyError("503"), None])
    monkeypatch.setattr(files.time, "sleep", waits.append)

    def action():
        if error := next(answers, KeyError("503")):
            raise error
        return 7

    assert files.with_retries(action, "reading gs://b/x") == 7
    assert waits == [1, 2]
    assert caplog.text.count("reading gs://b/x failed, trying again: KeyError: '503'") == 2
    with pytest.raises(OSError, match="reading gs://b/x failed 5 times: KeyError"):
        files.with_retries(action, "reading gs://b/x")


# --------------------------------------------------------------------------------------------------- output


class Broken:
    """A stream that cannot be written to."""

    def __init__(self, error):
        self.error = error

    def write(self, _):
        raise self.error

    def flush(self):
        raise self.error

    def fileno(self):
        raise OSError("no file")


@pytest.mark.parametrize(
    "error",
    [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left"), UnicodeEncodeError("ascii", "é", 0, 1, "no")],
)
def test_all_output_of_a_child_is_read_even_if_it_cannot_be_copied(error, tmp_path, monkeypatch):
    lines, tail = iter([f"line {i}\n" for i in range(1000)]), collections.deque(maxlen=2)
    monkeypatch.setattr(sys, "stdout", Broken(error))
    children._copy(lines, Broken(error), "000 | ", tail)
    assert list(tail) == ["line 998", "line 999"]


def test_names_in_another_encoding_are_written_as_escapes(tmp_path):
    files.write_text(tmp_path / "page.html", os.fsdecode(b"<p>cl\xe9</p>") + "é")
    assert (tmp_path / "page.html").read_text("utf-8") == "<p>cl\\udce9</p>é"


def test_a_log_that_cannot_be_written_says_nothing_on_standard_error():
    code = """
        import logging, os, sys
        reader, writer = os.pipe()
        os.dup2(writer, 1)
        os.close(reader)
        from tinymim_jax.runtime.startup import print_line, start_logging
        start_logging()
        for i in range(3):
            logging.getLogger("tinymim_jax").info("line %d", i)
            print_line("é")
        os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        logging.getLogger("tinymim_jax").info("line")
        print_line("x")
        print("END", file=sys.stderr, flush=True)
        os._exit(0)
    """
    assert output_of(run_python(textwrap.dedent(code))) == (0, "", "END\n")


# ----------------------------------------------------------------------------------------------------- lock


def test_a_lock_excludes_other_processes_until_its_process_ends(tmp_path):
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


def test_a_lock_is_tried_again_while_another_process_reads_its_holder(tmp_path, monkeypatch):
    """`holder` takes a shared lock for a moment, which must not prevent a run from starting in its folder."""
    with (tmp_path / locks.LOCK).open("a+") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        monkeypatch.setattr(locks.time, "sleep", lambda _: fcntl.flock(looking, fcntl.LOCK_UN))
        with locked(tmp_path):
            assert f"process {os.getpid()}" in holder(tmp_path)


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("tinymim_jax.runtime.locks.fcntl.flock", unsupported)
    with locked(tmp_path):
        pass
    assert "make sure that only one run uses this folder" in caplog.text


def test_the_owner_comes_from_the_status_file_where_locks_cannot_be_seen(tmp_path):
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
    """Removes all variables of jobs, except those given."""
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
def test_the_job_is_found_in_the_environment(environment, variables, job):
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


def test_incomplete_variables_of_slurm_are_named(environment):
    environment(SLURM_STEP_NODELIST="n[1-2]", SLURM_NTASKS="8", SLURM_LOCALID="0")
    with pytest.raises(ValueError, match=r"SLURM_JOB_ID, SLURM_PROCID are not\. .* JAX_NUM_PROCESSES=1"):
        distributed.initialize_distributed()
    environment(SLURM_STEP_NODELIST="")  # an interactive shell of a job: it runs alone
    assert hosts.missing_slurm_variables() == []


def test_several_tasks_without_srun_are_warned_of(environment, monkeypatch, caplog):
    started = []
    monkeypatch.setattr(distributed, "_initialize_alone", lambda initialize: started.append("alone"))
    monkeypatch.setattr(distributed.jax.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(distributed.jax.distributed, "initialize", _no_cluster)
    environment(SLURM_JOB_ID="7", SLURM_NTASKS="1")
    distributed.initialize_distributed()
    assert "srun" not in caplog.text
    environment(SLURM_NTASKS="4")
    distributed.initialize_distributed()
    assert "job 7 has 4 tasks" in caplog.text
    assert "put srun before the command" in caplog.text
    assert started == ["alone", "alone"]
    caplog.clear()
    environment(JAX_NUM_PROCESSES="1")  # the user's word
    distributed.initialize_distributed()
    assert "srun" not in caplog.text


def _no_cluster(**_):
    raise ValueError("coordinator_address should be defined.")


def test_devices_of_other_processes_than_joined(monkeypatch):
    monkeypatch.setattr(sharding, "joined_processes", lambda: 4)
    with pytest.raises(RuntimeError, match="4 processes joined this job, but its devices belong to 1"):
        sharding.make_mesh()


def test_missing_processes_are_logged(monkeypatch, caplog):
    monkeypatch.setattr(distributed, "_REMIND_SECONDS", 0.01)
    spoken = threading.Event()

    class Listener(logging.Handler):
        def emit(self, record):
            if "Not all 2 processes have started" in record.getMessage():
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
    """A result of a step that becomes ready on command."""

    def __init__(self):
        self._done = threading.Event()
        self.block_until_ready = self._done.wait
        self.is_ready = self._done.is_set
        self.end = self._done.set


def test_waiting_is_lost_only_while_the_device_is_idle():
    now = [0.0]
    goodput = Goodput(clock=lambda: now[0])

    def wait(seconds):
        with goodput.lost_if_idle("input"):
            now[0] += seconds

    wait(2.0)  # nothing is under way yet: lost
    first, second = Result(), Result()
    goodput.dispatched(first)
    wait(3.0)  # the step lasts longer
    with goodput._recorded:
        first.end()
        assert goodput._recorded.wait_for(lambda: goodput._finished == 1, timeout=60)
    now[0] += 1.0
    wait(4.0)  # the device has been idle for a second already: the wait is lost, what came before it is not its fault
    goodput.dispatched(second)
    second.end()
    with goodput.lost_to("evaluation"):
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
    """A chain of one stage that needs no training."""
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
    with locked(point.runs[0].workdir), Children() as running:
        state = running.run_point(point)
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
def test_sweeps_and_chains_refuse_a_job_of_several_processes(words, remedy, environment, tmp_path, capsys):
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
