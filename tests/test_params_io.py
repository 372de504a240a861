"""Saving, loading from files and runs, and merging of parameters; messages of every mistake."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import output_of, run_python
from saved_states import flip_bit, lose_state, make_state, place, rewrite_manifest, truncate

from tinymim_jax.checkpoints import format as stored
from tinymim_jax.checkpoints.format import CheckpointError, digest
from tinymim_jax.checkpoints.manager import Checkpoints
from tinymim_jax.checkpoints.params import load_params, merge, save_params

# Reads that fail leave callbacks behind inside Orbax, which find their event loop closed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

MODEL = {"encoder": {"embed_dim": 8, "depth": 1, "heads": [2], "image_size": [32, 32]}, "source": {"family": "mae"}}


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "encoder": {
            "cls_token": rng.normal(size=(1, 1, 8)).astype(np.float32),
            "norm": {"scale": rng.normal(size=2**14).astype(np.float32)},
        },
        "head": {"kernel": rng.normal(size=(8, 3)).astype(jnp.bfloat16)},
    }


def assert_equal(got, want):
    assert stored.describe(got) == stored.describe(want)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(got))


def test_export_round_trip(tmp_path):
    save_params(tmp_path / "a" / "export", make_params(), MODEL)
    model, params = load_params(tmp_path / "a" / "export")
    assert model == MODEL
    assert_equal(params, make_params())
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["export"]
    # What was loaded, now from devices, makes an equal export.
    save_params(str(tmp_path / "b"), jax.device_put(params), model)
    assert json.loads((tmp_path / "b" / "model.json").read_text())["digest"] == digest(make_params())
    assert_equal(load_params(tmp_path / "b")[1], make_params())


def test_export_overwrites_only_exports_and_only_when_told(tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    save_params(export, make_params(0), MODEL)  # an empty directory is free
    with pytest.raises(CheckpointError, match="holds an export already"):
        save_params(export, make_params(1), MODEL)
    assert_equal(load_params(export)[1], make_params(0))
    save_params(export, make_params(1), MODEL, overwrite=True)
    assert_equal(load_params(export)[1], make_params(1))

    other = tmp_path / "thesis"
    other.mkdir()
    (other / "chapter1.tex").write_text("x")
    for path in (other, other / "chapter1.tex"):
        with pytest.raises(CheckpointError, match="exists and is not an export"):
            save_params(path, make_params(), MODEL, overwrite=True)
    assert (other / "chapter1.tex").read_text() == "x"


def test_failed_export_leaves_the_old_one_and_no_litter(tmp_path):
    save_params(tmp_path / "export", make_params(0), MODEL)
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        save_params(tmp_path / "export", make_params(1), MODEL | {"bad": object()}, overwrite=True)
    assert_equal(load_params(tmp_path / "export")[1], make_params(0))
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("damage", ["bit", "digest", "truncate", "model.json", "no model.json"])
def test_damaged_export_is_an_error(tmp_path, damage):
    export = tmp_path / "export"
    save_params(export, make_params(), MODEL)
    record = export / "model.json"
    if damage == "digest":
        record.write_text(record.read_text().replace(digest(make_params()), "0" * 16))
    elif damage == "model.json":
        record.write_text(record.read_text()[:-10])
    elif damage == "no model.json":
        record.unlink()
    else:
        (tmp_path / "state").symlink_to(export / "params")  # where `damage` looks for the numbers
        {"bit": flip_bit, "truncate": truncate}[damage](tmp_path)
    expected = {"model.json": "not an architecture record", "no model.json": "is missing"}.get(damage, "is damaged")
    with pytest.raises(CheckpointError, match=expected):
        load_params(export)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A workdir with checkpoints 1 and 2 of states with a moving average of the head."""
    workdir = tmp_path_factory.mktemp("run")
    (workdir / "model.json").write_text(json.dumps(MODEL))
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for step in (1, 2):
            state = make_state(step)
            state.extra["ema"]["head"] = {"bias": np.full(5, step, jnp.bfloat16)}
            checkpoints.save(step, place(state, 8), force=True)
    return workdir


@pytest.fixture
def run(finished_run, tmp_path):
    return pathlib.Path(shutil.copytree(finished_run, tmp_path / "run"))


def averaged(step):
    return make_state(step).params | {"head": {"bias": np.full(5, step, jnp.bfloat16)}}


def test_run_gives_its_newest_parameters_averaged_where_they_are(run):
    model, params = load_params(run)
    assert model == MODEL
    assert_equal(params, averaged(2))


def test_run_without_an_average_gives_its_parameters(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, place(make_state(7).replace(extra={}), 2), force=True)
    assert_equal(load_params(tmp_path)[1], make_state(7).params)


def test_run_with_a_damaged_newest_checkpoint_gives_the_one_before_and_is_left_alone(run, caplog):
    lose_state(run / "checkpoints" / "2")
    assert_equal(load_params(run)[1], averaged(1))
    assert "Checkpoint 2" in caplog.text
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["1", "2"]
    rewrite_manifest(run / "checkpoints" / "1")
    with pytest.raises(CheckpointError, match=r"No checkpoint in .* is intact:\n  2: .*\n  1: "):
        load_params(run)


def test_run_is_read_on_other_devices_and_without_its_optimizer(tmp_path):
    """The bytes that the process has read are counted by the kernel."""
    (tmp_path / "model.json").write_text(json.dumps(MODEL))
    noise = np.random.default_rng(0).normal(size=(2, 2**21)).astype(np.float32)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(
            1, place({"params": make_params(), "opt_state": {"mu": noise[0], "nu": noise[1]}}, 8), force=True
        )
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) > 12e6
    code = f"""
from tinymim_jax.checkpoints.params import load_params
from tinymim_jax.checkpoints.format import digest
def bytes_read():
    return int(open("/proc/self/io").read().split("rchar: ")[1].split()[0])
digest({{}})
before = bytes_read()
model, params = load_params({str(tmp_path)!r})
print("READ", bytes_read() - before, digest(params))
"""
    status, out, err = output_of(run_python(code, devices=1))
    assert status == 0, err
    _, count, got = out.split()
    assert got == digest(make_params())
    assert int(count) < 4e6, "the optimizer was read"


def test_what_is_no_checkpoint_gets_advice(run, tmp_path):
    (tmp_path / "mae.pth").write_bytes(b"PK")
    (tmp_path / "photos").mkdir()
    bare = tmp_path / "bare"
    (bare / "checkpoints").mkdir(parents=True)
    (bare / "model.json").write_text("{}")
    for path, advice in [
        (tmp_path / "nowhere", "does not exist.*tinymim convert --input FILE.pth --output"),
        (tmp_path / "mae.pth", f"is a file.*tinymim convert --input {tmp_path}/mae.pth --output"),
        (tmp_path / "photos", "is not an export .* or the --workdir of a run"),
        (run / "checkpoints", f"Did you mean {run}"),
        (run / "checkpoints" / "2", f"Did you mean {run}"),
        (bare, "holds no checkpoint yet"),
    ]:
        with pytest.raises(CheckpointError, match=f"(?s){advice}"):
            load_params(path)


def test_merge_takes_every_loaded_value():
    merged = merge(make_params(0), make_params(1))
    assert_equal(merged, make_params(1))


def test_merge_lists_what_does_not_fit():
    loaded = make_params(1)
    loaded["encoder"] = {"cls_token": np.zeros((1, 1, 9), np.float32), "blocks_0": {"bias": np.zeros(2)}}
    loaded["head"]["kernel"] = np.zeros((8, 3), np.float32)
    with pytest.raises(CheckpointError) as caught:
        merge(make_params(0), loaded)
    text = str(caught.value)
    assert "missing (wanted, not stored): 1\n    encoder/norm/scale" in text
    assert "unused (stored, not wanted): 1\n    encoder/blocks_0/bias" in text
    assert "encoder/cls_token: stored [1, 1, 9], wanted [1, 1, 8]" in text
    assert "head/kernel: stored float32, wanted bfloat16" in text


def test_merge_allows_what_it_is_told_to():
    initial, loaded = make_params(0), make_params(1)
    del loaded["head"]
    loaded["decoder"] = {"norm": {"scale": np.ones(3)}, "pred": np.ones(2)}
    loaded["encoder"]["norm1"] = np.ones(1)
    merged = merge(initial, loaded, allow_missing=("head",), allow_unused=("decoder", "encoder/norm1"))
    assert_equal(merged["head"], initial["head"])
    assert_equal(merged["encoder"]["cls_token"], loaded["encoder"]["cls_token"])
    assert merged.keys() == initial.keys()
    # A prefix ends where a name ends, and never excuses a shape.
    with pytest.raises(CheckpointError, match="encoder/norm1"):
        merge(initial, loaded, allow_missing=("head",), allow_unused=("decoder", "encoder/norm"))
    loaded["head"] = {"kernel": np.zeros((8, 4), jnp.bfloat16)}
    with pytest.raises(CheckpointError, match="head/kernel: stored"):
        merge(initial, loaded, allow_missing=("head",), allow_unused=("decoder", "encoder/norm1", "head"))
