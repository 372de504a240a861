"""The reader of PyTorch files: it returns what torch.save wrote."""

import argparse
import collections
import os
import pickle
import subprocess
import sys
import tracemalloc
import zipfile

import ml_dtypes
import numpy as np
import pytest
from torch_files import (
    CLASSES,
    Call,
    Global,
    same,
    save,
    save_arrays,
    storage,
    tensor,
    without_checksums,
)

from tinymim_jax.convert import Opaque, read


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("name", ["mae", "teacher", "student", "vit_gap", "vit_cls"])
def test_golden_files_hold_their_storages_in_order(golden, name):
    """torch.save numbers storages in the order of the tensors, and each of these tensors has its own."""
    data = read(golden.path(f"{name}.pth"))
    assert list(data) == ["model"]
    with zipfile.ZipFile(golden.path(f"{name}.pth")) as archive:
        for i, (key, array) in enumerate(data["model"].items()):
            assert array.tobytes() == archive.read(f"{name}/data/{i}"), key
            assert array.dtype == np.float32
            assert not array.flags.writeable
        assert f"{name}/data/{i + 1}" not in archive.namelist()
    width = golden.meta.get(name, golden.meta["vit"])["embed_dim"]
    assert data["model"]["blocks.0.attn.qkv.weight"].shape == (3 * width, width)


DTYPES = list(CLASSES)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(path, dtype):
    numbers = np.random.default_rng(0).normal(size=(3, 4)) * 3
    array = numbers.astype(getattr(ml_dtypes, dtype, dtype))
    save_arrays(path, {"x": array, "scalar": array[0, 0].reshape(()), "empty": array[:0]})
    got = read(path)["model"]
    assert got["x"].dtype == array.dtype
    assert got["x"].tobytes() == array.tobytes()
    assert got["scalar"].shape == ()
    assert got["empty"].shape == (0, 4)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"])
def test_dtypes_of_untyped_storages(path, dtype):
    array = np.arange(6).astype(getattr(ml_dtypes, dtype, dtype))
    args = (storage("0", "untyped", array.nbytes), 2, (2, 2), (2, 1), False, {}, Global("torch", dtype))
    save(path, Call(Global("torch._utils", "_rebuild_tensor_v3"), args), {"0": array})
    got = read(path)
    assert got.dtype == array.dtype
    assert got.tolist() == array[2:].reshape(2, 2).tolist()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (6, 8), (8, 1)),
        (0, (8, 6), (1, 8)),
        (16, (8,), (1,)),
        (1, (6, 3), (8, 3)),
        (8, (4, 8), (0, 1)),
        (47, (), ()),
    ],
    ids=["whole", "transposed", "row", "every third column", "expanded", "last"],
)
def test_views_of_a_shared_storage(path, offset, shape, strides):
    base = np.random.default_rng(1).normal(size=48).astype(np.float32)
    shared = storage("0", "float32", 48)
    save(path, {"base": tensor(shared, 0, (48,), (1,)), "view": tensor(shared, offset, shape, strides)}, {"0": base})
    data = read(path)
    want = np.lib.stride_tricks.as_strided(base[offset:], shape, [4 * s for s in strides])
    np.testing.assert_array_equal(data["view"], want)
    assert np.shares_memory(data["view"], data["base"])


def test_parameters_are_tensors(path):
    x = np.arange(6, dtype=np.float32)
    t = tensor(storage("0", "float32", 6), 0, (2, 3), (3, 1))
    save(
        path,
        {
            "parameter": Call(Global("torch._utils", "_rebuild_parameter"), (t, True, {})),
            "with state": Call(Global("torch._utils", "_rebuild_parameter_with_state"), (t, True, {}, {"note": "x"})),
            "with attributes": Call(
                Global("torch._tensor", "_rebuild_from_type_v2"),
                (t.function, Global("torch", "Tensor"), t.args, {"a": 1}),
            ),
        },
        {"0": x},
    )
    for name, value in read(path).items():
        np.testing.assert_array_equal(value, x.reshape(2, 3), err_msg=name)


def test_metadata_that_change_the_numbers_are_not_ignored(path):
    """A conjugated or negated view says so in its metadata alone."""
    t = tensor(storage("0", "complex64", 1), 0, (1,), (1,))
    save(path, Call(t.function, (*t.args, {"conj": True})), {"0": np.zeros(1, np.complex64)})
    assert isinstance(read(path), Opaque)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_plain_data_and_inert_objects(path, protocol):
    plain = {
        "lr": 0.1,
        "big": -(2**80),
        "text": "ü",
        "list": [1, (2, None), True],
        "set": {1, 2},
        "nested": {1: {2: 3}},
    }
    data = {
        "plain": plain,
        "ordered": collections.OrderedDict(b=1, a=2),
        "default": collections.defaultdict(list, {"x": [1]}),
        "frozen": frozenset([1, "a"]),
        "args": argparse.Namespace(epochs=3, number=np.float64(2.5), array=np.arange(3)),
        "function": os.path.join,
        "error": ValueError("x"),
    }
    save(path, code=pickle.dumps(data, protocol))
    got = read(path)
    assert got["plain"] == plain
    assert list(got["ordered"].items()) == [("b", 1), ("a", 2)]
    assert got["default"] == {"x": [1]}
    assert got["frozen"] == frozenset([1, "a"])
    assert isinstance(got["args"], Opaque)
    assert got["args"].state["epochs"] == 3
    assert isinstance(got["args"].state["number"], Opaque)
    assert (got["function"].name, got["function"].args) == ("posixpath.join", None)
    assert got["error"].name.endswith("ValueError")
    assert got["error"].args == ("x",)


def test_compressed_members_and_absent_checksums(path, golden):
    arrays = read(golden.path("vit_cls.pth"))["model"]
    save_arrays(path, arrays)
    stored = path.read_bytes()
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(path.with_name("z"), "w", zipfile.ZIP_DEFLATED) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    assert same(read(path.with_name("z"))["model"], arrays)
    path.write_bytes(without_checksums(stored))
    assert same(read(path)["model"], arrays)


def test_reading_takes_no_memory(path):
    save_arrays(path, {f"x{i}": np.zeros((8, 1024, 1024), np.float32) for i in range(3)})  # 96 MiB
    tracemalloc.start()
    data = read(path)["model"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert sum(x.nbytes for x in data.values()) == 96 << 20
    assert peak < 1 << 20


def test_neither_torch_nor_jax_is_needed(golden):
    script = (
        "import sys; from tinymim_jax.convert import read, from_torch, to_torch; "
        f"model, params = from_torch('mae', read({str(golden.path('teacher.pth'))!r}), heads=1); "
        "to_torch('mae', model, params); "
        "assert not {'torch', 'jax', 'flax', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
