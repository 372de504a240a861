"""The mesh, the parameter rule, batches of one and of two processes, and joining a job."""

import pathlib
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counted_scenes import Scenes, counted
from jax.sharding import AxisType, PartitionSpec
from processes import free_port, output_of, run_python

from tinymim_jax.runtime.distributed import initialize_distributed
from tinymim_jax.sharding import (
    batch_sharding,
    make_mesh,
    place_batch,
    replicated,
    state_sharding,
)


@pytest.mark.parametrize("fsdp", [1, 2, 4, 8])
def test_mesh_is_data_by_fsdp_with_auto_axes(fsdp):
    mesh = make_mesh(fsdp)
    assert mesh.axis_names == ("data", "fsdp")
    assert dict(mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp}
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)


def test_mesh_is_laid_out_process_by_process():
    class Device:
        platform = "tpu"

        def __init__(self, process_index, id):
            self.process_index, self.id = process_index, id

    shuffled = [Device(process, id) for process, id in [(1, 2), (0, 5), (1, 0), (0, 1)]]
    rows = make_mesh(2, shuffled).devices
    assert [[(d.process_index, d.id) for d in row] for row in rows] == [[(0, 1), (0, 5)], [(1, 0), (1, 2)]]


@pytest.mark.parametrize("fsdp", [3, 0, -1, 16])
def test_mesh_names_the_choices(fsdp):
    with pytest.raises(ValueError, match=rf"fsdp={fsdp} does not divide the 8 devices. Choices: 1, 2, 4, 8$"):
        make_mesh(fsdp)


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((768, 2304), (None, "fsdp")),
        ((3072, 768), ("fsdp",)),
        ((768, 768), (None, "fsdp")),  # the last of equals
        ((12, 768, 770), (None, "fsdp")),  # the largest, 770, does not divide by 4
        ((1026, 1027), ()),  # nothing divides
        ((16, 16), ()),  # small
        ((), ()),
    ],
)
def test_parameter_rule_by_shape(shape, spec):
    leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert state_sharding(make_mesh(4), leaf).spec == PartitionSpec(*spec)
    assert state_sharding(make_mesh(1), leaf).spec == PartitionSpec()


def test_parameter_rule_is_one_for_parameters_and_moments():
    params = {"kernel": jnp.zeros((512, 1024)), "bias": jnp.zeros((1024,))}
    shardings = state_sharding(
        make_mesh(8), {"params": params, "opt_state": (params, {"mu": params}), "step": jnp.int32(0)}
    )
    for tree in (shardings["params"], shardings["opt_state"][0], shardings["opt_state"][1]["mu"]):
        assert tree["kernel"].spec == PartitionSpec(None, "fsdp")
        assert tree["bias"].spec == PartitionSpec()
    assert shardings["step"].spec == PartitionSpec()
    placed = jax.device_put(params, shardings["params"])
    assert placed["kernel"].addressable_shards[0].data.shape == (512, 128)


def test_batch_is_split_over_all_devices_in_order():
    mesh = make_mesh(2)
    images = np.arange(16 * 4, dtype=np.uint8).reshape(16, 2, 2, 1)
    with jax.transfer_guard("disallow"):
        batch = place_batch(mesh, {"image": images, "valid": np.arange(16) < 13})
    assert batch["image"].sharding == batch_sharding(mesh)
    assert batch["image"].dtype == jnp.uint8
    shards = sorted(batch["image"].addressable_shards, key=lambda shard: shard.device.id)
    np.testing.assert_array_equal(np.concatenate([shard.data for shard in shards]), images)
    assert int(batch["valid"].sum()) == 13
    assert replicated(mesh).is_fully_replicated


def test_batch_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(ValueError, match=r"batch\['label'\] has 12 rows for the 8 devices.* multiple of 8"):
        place_batch(make_mesh(), {"label": np.zeros(12, np.int32)})


JOIN = """
import logging, sys
sys.path.insert(0, {tests!r})
logging.basicConfig(level=logging.INFO)
from tinymim_jax.runtime.distributed import initialize_distributed
from tinymim_jax.sharding import make_mesh, place_batch, replicated
{before}
initialize_distributed()
initialize_distributed()
import jax, numpy as np
from jax.experimental import multihost_utils
mesh = make_mesh(2)
first = 8 * jax.process_index()
batch = place_batch(mesh, {{"label": np.arange(first, first + 8)}})
rows = jax.jit(lambda x: 2 * x, out_shardings=replicated(mesh))(batch["label"])
{after}
print("JOINED", jax.distributed.is_initialized(), jax.process_count(), jax.device_count(), np.asarray(rows).tolist())
"""


COUNT = 'from counted_scenes import counted; print("COUNTED", counted(mesh).tolist())'


def joining(before: str = "", after: str = "") -> str:
    return JOIN.format(tests=str(pathlib.Path(__file__).parent), before=before, after=after)


def test_two_processes_make_one_global_batch_and_one_confusion_matrix():
    """11 images over 8 devices of two processes: in the last round the second process has none."""
    counts = counted(make_mesh(devices=jax.devices()[:1])).tolist()
    assert sum(map(sum, counts)) == sum(int((Scenes()[i]["pixel_labels"] != 255).sum()) for i in range(11))
    job = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
    processes = [run_python(joining(after=COUNT), devices=4, JAX_PROCESS_ID=str(p), **job) for p in range(2)]
    for status, out, err in map(output_of, processes):
        assert status == 0, err
        assert f"JOINED True 2 8 {list(range(0, 32, 2))}" in out
        assert f"COUNTED {counts}" in out
        assert "Waiting up to 30 minutes for all 2 processes" in err


def test_alone_and_what_stands_in_the_way():
    in_a_slurm_step = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "absent", "SLURM_NTASKS": "1"}
    dead_proxy = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    cases = {
        "alone": run_python(joining(), devices=2, **in_a_slurm_step, **dead_proxy),
        "late": run_python(joining(before="import jax; jax.devices()"), devices=2),
        "half": run_python(joining(), JAX_COORDINATOR_ADDRESS="localhost:1", JAX_NUM_PROCESSES=""),
    }
    results = {name: output_of(process) for name, process in cases.items()}

    status, out, err = results["alone"]
    assert status == 0, err
    assert "JOINED True 1 2" in out
    status, out, err = results["late"]
    assert status == 0, err
    assert "JOINED False 1 2" in out
    assert "SIGTERM ends it unsaved" in err
    status, _, err = results["half"]
    assert status == 1
    assert "Got JAX_COORDINATOR_ADDRESS='localhost:1', JAX_NUM_PROCESSES=''" in err
    assert "Set all three in each process" in err


def test_a_misspelt_variable_is_named(monkeypatch):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "two")
    with pytest.raises(ValueError, match="JAX_NUM_PROCESSES='two' is not a number"):
        initialize_distributed()


PAUSED = """
import time
from tinymim_jax.runtime import distributed
distributed._HEARTBEAT_SECONDS = 1
distributed.initialize_distributed()
print("started", flush=True)
time.sleep(5)
print("alive", flush=True)
"""


def test_a_process_alone_outlives_a_pause():
    """Suspended by Ctrl-Z or with its machine, for longer than the timeout of hosts in a job."""
    process = run_python(PAUSED)
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    process.send_signal(signal.SIGCONT)
    status, out, err = output_of(process)
    assert (status, out) == (0, "alive\n"), err
