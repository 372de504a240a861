"""Malicious or damaged pickles: no code runs, no other file is read; the result is our error or plain data."""

import os
import pickle
import sys

import numpy as np
import pytest
from torch_files import (
    Call,
    Global,
    Persistent,
    Raw,
    instructions,
    save,
    storage,
    tensor,
)

from tinymim_jax.convert import ConvertError, Opaque, read


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


class Runs:
    """Runs a command when it is unpickled by Python's pickle."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_is_executed(path, tmp_path, protocol):
    proof = tmp_path / "proof"
    save(path, code=pickle.dumps({"model": Runs(f"touch {proof}"), "x": 1}, protocol))
    data = read(path)
    assert not proof.exists()
    assert data["model"].name == "posix.system"
    assert data["model"].args == (f"touch {proof}",)
    pickle.loads(pickle.dumps(Runs(f"touch {proof}")))
    assert proof.exists(), "the test would have seen it"


def test_nothing_is_imported_nor_given_attributes(path):
    evil = {"__class__": "x", "__setattr__": 1, "name": "builtins.eval", "args": None, "data": b""}
    x = tensor(storage("0", "float32", 1), 0, (1,), (1,))
    save(
        path,
        {
            "module": Global("antigravity", "fly"),
            "absent": Call(Global("no_such_module.at_all", "f"), (1,)),
            "old instance": Raw(b"(cos\nsystem\nS'true'\no"),
            "older instance": Raw(b"(S'true'\nios\nsystem\n"),
            "chain": Call(Call(Global("builtins", "getattr"), (Global("os", "system"), "__call__")), ("true",)),
            "tensor": Call(x.function, x.args, evil),
            "dict": Call(Global("collections", "OrderedDict"), (), evil),
            "storage": Raw(instructions(x.args[0]) + instructions(evil) + b"b"),
        },
        {"0": np.ones(1, np.float32)},
    )
    before = set(sys.modules)
    data = read(path)
    assert set(sys.modules) == before
    assert data["absent"].name == "no_such_module.at_all.f"
    assert data["old instance"].name == data["older instance"].name == "os.system"
    assert data["chain"].name == "builtins.getattr"
    assert data["tensor"].tolist() == [1.0]
    assert data["dict"] == {}
    assert bytes(data["storage"].data) == np.ones(1, np.float32).tobytes()


def test_a_result_cannot_pass_for_a_function_of_ours(path):
    """The placeholder of a call has the name of our function but is not that function."""
    t = tensor(storage("0", "float32", 1), 0, (1,), (1,))
    save(path, Call(Call(t.function, (1,)), t.args), {"0": np.ones(1, np.float32)})
    assert isinstance(read(path), Opaque)


FLOAT = storage("0", "float32", 4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (tensor(FLOAT, 0, (5,), (1,)), "ends at byte 20 of a storage of 16"),
        (tensor(FLOAT, 1, (4,), (1,)), "ends at byte 20"),
        (tensor(FLOAT, 0, (2, 2), (3, 1)), "ends at byte 20"),
        (tensor(FLOAT, -1, (1,), (1,)), "offset"),
        (tensor(FLOAT, 0, (-1,), (1,)), "shape"),
        (tensor(FLOAT, 3, (2,), (-1,)), "strides"),
        (tensor(FLOAT, 0, (2**63,), (0,)), "shape"),
        (tensor(FLOAT, 0, (2,), (2**61,)), "ends at byte"),
        (tensor(FLOAT, 2**61, (1,), (1,)), "ends at byte"),
        (tensor(FLOAT, 0, (2**31, 2**31), (0, 0)), "far more than the 16 bytes"),
        (tensor(FLOAT, 0, (0, 2**60), (1, 1)), "far more"),
        (tensor(FLOAT, 0, (2,), (1, 1)), "1 dimensions and 2 strides"),
        (tensor(FLOAT, 0, (1,) * 65, (1,) * 65), "not a short list"),
        (tensor(FLOAT, 0, (True,), (1,)), "shape"),
        (tensor(FLOAT, 0, ("4",), (1,)), "shape"),
        (tensor(FLOAT, 0.0, (4,), (1,)), "offset"),
        (tensor(FLOAT, 0, 4, (1,)), "shape"),
        (tensor(storage("0", "float32", 5), 0, (1,), (1,)), "should have 5 elements"),
        (tensor(storage("0", "float64", 4), 0, (1,), (1,)), "should have 4 elements"),
        (tensor(storage("0", "float32", -4), 0, (1,), (1,)), "size"),
        (tensor(storage("9", "float32", 4), 0, (1,), (1,)), "data/9 is missing"),
        (tensor(storage("../0", "float32", 4), 0, (1,), (1,)), "is missing"),
        (Persistent("0"), "names a storage"),
        (Persistent(("storage", "FloatStorage", "0", "cpu", 4)), "names a storage"),
        (Persistent(("module", Global("torch", "FloatStorage"), "0", "cpu", 4)), "names a storage"),
        (Persistent(("storage", Global("torch", "FloatStorage"), 0, "cpu", 4)), "names a storage"),
        (Raw(b"P0\n"), "PERSID"),
        (Call(Global("torch._utils", "_rebuild_parameter"), ()), "without a tensor"),
    ],
)
def test_tensors_stay_inside_their_storage(path, value, message):
    save(path, {"x": value}, {"0": np.zeros(4, np.float32)})
    with pytest.raises(ConvertError, match=message):
        read(path)


@pytest.mark.parametrize(
    "value",
    [
        tensor(Persistent(("storage", Global("torch", "QInt8Storage"), "0", "cpu", 4)), 0, (1,), (1,)),
        tensor("a text", 0, (4,), (1,)),
        Call(Global("torch._utils", "_rebuild_tensor_v2"), (1,)),
        Call(Global("torch._utils", "_rebuild_tensor_v3"), (FLOAT, 0, (1,), (1,), False, {}, Global("torch", "bits8"))),
        Call(Global("torch._utils", "_rebuild_sparse_tensor"), (Global("torch", "sparse_coo"), ())),
        Call(Global("torch._tensor", "_rebuild_from_type_v2"), (Global("os", "system"), None, ("true",), None)),
    ],
    ids=["quantised", "no storage", "no arguments", "unknown dtype", "sparse", "other function"],
)
def test_other_tensors_are_inert(path, value):
    save(path, {"x": value}, {"0": np.zeros(4, np.float32)})
    assert isinstance(read(path)["x"], Opaque)


def deep(depth: int) -> bytes:
    return b"\x80\x02" + b"N" + b"\x85" * depth + b"."


LONG = b"](" + b"K\x01" * 50_000 + b"e"  # a list of 50,000 numbers
HUGE = b"\x8b" + (100_000).to_bytes(4, "little") + b"\x7f" * 100_000  # an integer of 800,000 bits

MANY = b"\x80\x04(" + b"N" * 50_000 + b"t"  # a tuple of 50,000, to be copied by NEWOBJ_EX
SHORTER = b"\x80\x04\x8d" + (1000).to_bytes(8, "little") + b"a" * 1000  # a name of a thousand letters
NAME = b"\x80\x04\x8d" + (1 << 20).to_bytes(8, "little") + b"a" * (1 << 20)  # a name of a million letters
TUPLE_KEY = b"I%d\n\x85Ns"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (deep(500_000), "nested more than 200 deep"),
        (b"\x80\x02" + b"]" * 300 + b"a" * 299 + b".", "nested more than 200 deep"),
        (b"\x80\x02" + b"N0" * 1_100_000 + b"N.", "more than 1000000 steps"),
        (b"\x80\x02" + LONG + b"q\x00" + b"c__builtin__\nset\n(h\x00tR0" * 1000 + b".", "more than 1000000 steps"),
        (b"\x80\x02" + HUGE + b".", "integer of 799999 bits"),
        (b"\x80\x02}(" + b"K\x01" * 20 + b"tNs.", "key of 20 parts"),
        (b"\x80\x02}X\xd0\x07\x00\x00" + b"a" * 2000 + b"Ns.", "key of 2000 characters"),
        (b"\x80\x02}" + b"\x8a\x09" + (1 << 64).to_bytes(9, "little") + b"Ns.", "integer of 65 bits in a key"),
        (b"\x80\x02}" + b"".join(TUPLE_KEY % i for i in range(3000)) + b".", "more than 1000000 steps"),
        (b"\x80\x02}" + b"ca\nb\n" * 300 + b"N" + b"\x85R" * 300 + b"Ns.", "nested more than 200 deep"),
        (NAME + b"q\x000" + b"h\x00h\x00\x930" * 1000 + b"N.", "names a class by 2097152 characters"),
        (SHORTER + b"q\x000" + b"h\x00h\x00\x930" * 50_000 + b"N.", "more than 1000000 steps"),  # 100 MB of names
        (b"\x80\x02c" + b"m" * 2000 + b"\nf\n.", "names a class by 2001 characters"),
        (b"\x80\x02(i" + b"m" * 2000 + b"\nf\n.", "damaged|names a class by 2001 characters"),
        (MANY + b"q\x000" + b"cos\nsystem\nq\x010" + b"h\x01h\x00}\x920" * 100 + b"N.", "more than 1000000 steps"),
        (b"\x80\x02}]Ns.", "a list in a key"),
        (b"\x80\x02}})s.", "a dict in a key"),
        (b"\x80\x02}K\x01\x85\x85Ns.", "a tuple in a key"),
        (b"\x80\x02NNR.", "not a function"),
        (b"\x80\x02Na.", "stack|appends|damaged"),
        (b"\x80\x02NNa.", "appends to a NoneType"),
        (b"\x80\x02NNNs.", "sets items of a NoneType"),
        (b"\x80\x02ccollections\nOrderedDict\nK\x01\x85R.", "builds a container"),
        (b"\x80\x02ccollections\nOrderedDict\n]K\x01a\x85R.", "from something else than pairs"),
        (b"\x80\x04NN\x93.", "something else than text"),
        (b"\x80\x02h\x07.", "damaged"),
        (b"\x80\x02t.", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02N", "damaged"),
        (b"", "damaged"),
        (b"\xff\xff", "damaged"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"x.", "damaged"),
    ],
)
def test_harmful_and_damaged_pickles(path, code, message):
    save(path, code=code)
    with pytest.raises(ConvertError, match=message):
        read(path)


def test_pickles_that_look_harmful_and_are_not(path):
    """A memo index of four billion, a structure that contains itself, and 2^100 paths through 100 shared lists."""
    save(path, code=b"\x80\x02]r\xff\xff\xff\xff.")
    assert read(path) == []
    save(path, code=b"\x80\x02]q\x00h\x00a.")
    data = read(path)
    assert data[0] is data
    save(path, code=b"\x80\x02]" + b"2\x86" * 100 + b".")
    assert len(read(path)) == 2


def test_repeated_elements_are_limited_in_total(path):
    """Strides of 0: 64 tensors of 64 MiB each, made of 16 bytes. Reading takes no memory, copying would take 4 GB."""
    repeated = tensor(FLOAT, 0, (4096, 4096), (0, 0))
    save(path, {f"x{i}": repeated for i in range(64)}, {"0": np.zeros(4, np.float32)})
    with pytest.raises(ConvertError, match=r"its tensors claim more than 67108864 bytes"):
        read(path)
    save(path, {"x": repeated}, {"0": np.zeros(4, np.float32)})
    assert read(path)["x"].shape == (4096, 4096)


def test_a_flat_parameter_and_its_views_are_read(path):
    """FSDP has one storage of which all parameters are views."""
    flat = np.arange(1 << 16, dtype=np.float32)
    whole = storage("0", "float32", flat.size)
    views = {f"x{i}": tensor(whole, i * 1024, (1024,), (1,)) for i in range(64)}
    save(path, {"flat": tensor(whole, 0, flat.shape, (1,)), **views}, {"0": flat})
    assert read(path)["x63"].tolist() == flat[-1024:].tolist()
