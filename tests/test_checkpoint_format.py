"""Digests against an independent numpy version, the changes that they must detect, and messages of differences."""

import hashlib
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from etils import epath

from tinymim_jax.checkpoints import bits
from tinymim_jax.checkpoints import format as stored
from tinymim_jax.checkpoints.format import CheckpointError, Damaged, Leaf, digest
from tinymim_jax.sharding import make_mesh, state_sharding


def arrays():
    rng = np.random.default_rng(0)
    return {
        "float32": rng.normal(size=(16, 24)).astype(np.float32),
        "bfloat16": rng.normal(size=(7, 3)).astype(ml_dtypes.bfloat16),
        "float16": rng.normal(size=(5,)).astype(np.float16),
        "int32": np.int32(-7),
        "int8": rng.integers(-128, 128, (2, 3, 4, 5)).astype(np.int8),
        "bool": rng.random((9,)) < 0.5,
        "empty": np.zeros((0, 3), np.float32),
    }


def reference_digest(tree):
    """The digest computed from its definition, word by word."""

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ (x >> 15)) * 0x846CA68B & 0xFFFFFFFF
        return x ^ (x >> 16)

    lines = []
    for name, x in tree.items():
        x = np.asarray(x)
        size = min(x.dtype.itemsize, 4)
        raw = x.tobytes()
        words = [int.from_bytes(raw[i : i + size], "little") for i in range(0, len(raw), size)]
        bits = sum(mix(word ^ mix(place)) for place, word in enumerate(words)) % 2**32
        lines.append(f"{name} {x.dtype.name}{list(x.shape)} {bits:08x}")
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:16]


def test_digest_agrees_with_a_definition_in_plain_python():
    tree = arrays() | {"float64": np.pi * np.arange(6.0).reshape(2, 3), "int64": np.int64(2**40)}
    assert digest(tree) == reference_digest(tree)


@pytest.mark.parametrize("small", [bits._SMALL, -1])
def test_digest_does_not_depend_on_where_or_how_the_arrays_lie(small, monkeypatch):
    """Nor on whether numpy or a program of jax adds them up."""
    monkeypatch.setattr(bits, "_SMALL", small)
    tree = arrays()
    expected = digest(tree)
    assert digest(jax.tree.map(jnp.asarray, tree)) == expected
    for fsdp in (1, 2, 8):
        sharded = jax.device_put(tree, state_sharding(make_mesh(fsdp), tree, min_size=1))
        assert digest(sharded) == expected
    assert digest(dict(reversed(tree.items()))) == expected
    matrix = tree["float32"]
    assert digest({"float32": np.asfortranarray(matrix)}) == digest({"float32": matrix})
    assert digest({"float32": matrix.astype(">f4")}) == digest({"float32": matrix})


def test_sums_over_several_cpu_devices_run_one_after_another(monkeypatch):
    """Two at the same time may deadlock, even in one process, so the next starts when the last is ready."""
    tree = {f"w{n}": np.full((512, 512), n, np.float32) for n in range(6)}
    tree = jax.device_put(tree, state_sharding(make_mesh(2), tree, min_size=1))
    fold, sums = bits._fold, []

    def noted(x):
        assert all(sum.is_ready() for sum in sums)
        sums.append(fold(x))
        return sums[-1]

    waited = []
    monkeypatch.setattr(bits, "_fold", noted)
    wait = jax.block_until_ready
    monkeypatch.setattr(jax, "block_until_ready", lambda x: waited.append(x) or wait(x))
    assert len(stored.describe(tree)) == 6
    assert [id(x) for x in waited] == [id(x) for x in sums]


def test_digest_of_large_arrays_on_the_host_and_on_a_device():
    """The arrays have several chunks and an incomplete one."""
    x = np.random.default_rng(3).normal(size=(3, 200_001)).astype(np.float32)
    assert digest({"x": x}) == digest({"x": jnp.asarray(x)})


def test_digest_notices_every_bit():
    rng = np.random.default_rng(1)
    for name, x in arrays().items():
        raw = np.frombuffer(x.tobytes(), np.uint8)
        for _ in range(20 if raw.size and name != "bool" else 0):
            flipped = raw.copy()
            flipped[rng.integers(raw.size)] ^= 1 << rng.integers(8)
            assert digest({"x": flipped.view(x.dtype).reshape(x.shape)}) != digest({"x": x})


@pytest.mark.parametrize(
    "other",
    [
        {"b": np.arange(6.0, dtype=np.float32)},
        {"a": np.arange(6.0, dtype=np.float32).reshape(2, 3)},
        {"a": np.arange(6.0, dtype=np.float32).view(np.int32)},
        {"a": np.array([1, 0, 2, 3, 4, 5], np.float32)},
        {"a": np.array([-0.0, 1, 2, 3, 4, 5], np.float32)},
        {"a": np.arange(6.0, dtype=np.float32), "b": np.zeros(0, np.float32)},
    ],
    ids=["name", "shape", "dtype", "order", "sign of zero", "an empty array more"],
)
def test_digest_notices(other):
    assert digest(other) != digest({"a": np.arange(6.0, dtype=np.float32)})


def test_names_follow_fields_keys_and_places():
    tree = {"opt_state": ({"mu": [np.zeros(1), np.zeros(2)]}, ()), "step": np.int32(0)}
    assert list(stored.leaves_by_name(tree)) == ["opt_state/0/mu/0", "opt_state/0/mu/1", "step"]
    assert stored.nested({"a/b": 1, "a/c": 2, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}


def test_difference_lists_each_kind_and_is_false_without_any():
    f32 = "float32"
    had = {"a": Leaf((2, 3), f32), "b": Leaf((4,), f32), "gone": Leaf((1,), f32)}
    wanted = {"a": Leaf((3, 2), f32), "b": Leaf((4,), "bfloat16"), **{f"new{i:02}": Leaf((), f32) for i in range(20)}}
    difference = stored.compare(had, wanted)
    assert difference
    assert difference.missing == [f"new{i:02}" for i in range(20)]
    assert difference.unused == ["gone"]
    assert difference.changed == ["a: stored [2, 3], wanted [3, 2]", "b: stored float32, wanted bfloat16"]
    text = str(difference)
    assert "missing (wanted, not stored): 20" in text
    assert "new11" in text
    assert "new12" not in text
    assert "... and 8 more" in text
    assert not stored.compare(wanted, wanted)


def test_manifest_is_read_back_and_any_change_to_it_is_noticed(tmp_path):
    record = stored.manifest({"a": np.ones((2, 3), np.float32)}, step=5, extra={"note": "é"})
    path = tmp_path / "metadata"
    path.write_text(json.dumps(record))
    leaves, more = stored.read_manifest(epath.Path(tmp_path))
    assert leaves == stored.describe({"a": np.ones((2, 3), np.float32)})
    assert more == {"step": 5, "extra": {"note": "é"}}

    text = json.dumps(record)
    for damaged in (text.replace("[2, 3]", "[3, 2]"), text.replace("float32", "float64"), text[:-9], "", "[]", "{}"):
        path.write_text(damaged)
        with pytest.raises(Damaged):
            stored.read_manifest(epath.Path(tmp_path))
    path.unlink()
    with pytest.raises(Damaged, match="not found"):
        stored.read_manifest(epath.Path(tmp_path))


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(28, "No space left on device"), "free some space"),
        (ValueError("RESOURCE_EXHAUSTED: ... No space left on device [os_error_code='28']"), "free some space"),
        (OSError(30, "Read-only file system"), "may write to"),
        (RuntimeError("strange"), "Check the storage"),
    ],
)
def test_storage_errors_say_what_to_do(error, remedy):
    with pytest.raises(CheckpointError, match=remedy) as caught, stored.writing(epath.Path("/somewhere")):
        raise error
    assert "/somewhere" in str(caught.value)
    assert caught.value.__cause__ is error


def test_trouble_of_the_storage_is_not_taken_for_damage(monkeypatch, tmp_path):
    class HttpError(Exception):
        """Like the error of gcsfs, which is no OSError."""

    HttpError.__module__ = "gcsfs.retry"
    troubles = (PermissionError(13, "denied"), ValueError("PERMISSION_DENIED: x"), MemoryError())
    for trouble in (*troubles, HttpError("503"), ConnectionResetError(), TimeoutError()):

        def fail(*_, trouble=trouble, **__):
            raise RuntimeError("reading") from trouble

        monkeypatch.setattr("orbax.checkpoint.PyTreeCheckpointHandler.restore", fail)
        with pytest.raises(CheckpointError, match="Remove the cause"):
            stored.read_arrays(epath.Path(tmp_path), {"a": None})
