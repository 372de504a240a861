"""Safetensors files, read and written."""

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from torch_files import (
    CLASSES,
    same,
)

from tinymim_jax.convert import ConvertError, read, to_safetensors
from tinymim_jax.convert.formats import safetensors as safetensors_format


def test_safetensors(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.normal(size=(3, 4)).astype(getattr(ml_dtypes, name, name)) for name in CLASSES if name != "complex128"
    }
    arrays |= {"scalar": np.ones((), np.float32), "empty": np.zeros((0, 3), np.float32)}
    save_file(arrays, tmp_path / "w.safetensors", {"note": "x"})
    assert same(read(tmp_path / "w.safetensors"), arrays)
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.safetensors").read_bytes())
    assert same(read(tmp_path / "w.bin"), arrays), "recognised by its content"


def header(entries, data=b"\0" * 8) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape, begin, end) -> dict:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header({"x": entry([3], 0, 12)}), "file not fully covered"),
        (header({"x": entry([1], 0, 8)}), "invalid shape, data type, or offset"),
        (header({"x": entry([4], 0, 8)}), "invalid shape, data type, or offset"),
        (header({"x": entry([-2], 0, 8)}), "integer `-2`, expected usize"),
        (header({"x": entry([2], -8, 0)}), "integer `-8`, expected usize"),
        (header({"x": entry([2], 8, 0)}), "invalid offset for tensor `x`"),
        (header({"x": entry([2], 0, 8) | {"dtype": "F3"}}), "unknown variant `F3`"),
        (header({"x": {"dtype": "F32", "shape": [2]}}), "missing field `data_offsets`"),
        (header({"x": 3}), "invalid type: integer `3`"),
        (header(b"{" * 3), "invalid JSON in header"),
        (header(b'{"a":' * 100_000), "recursion limit"),
        ((10**9).to_bytes(8, "little") + b"{}", "cut off.*header too large"),
        (b"{}", "cut off.*header too small"),
        (header({"x": entry([2], 0, 8), "y": entry([1], 4, 8)}), "invalid offset"),
        (header({"x": entry([1], 0, 4), "y": entry([1], 8, 12)}, bytes(12)), "invalid offset for tensor `y`"),
        (header({"x": entry([1], 0, 4)}), "file not fully covered"),
        (header({"x": entry([8], 0, 8) | {"dtype": "F8_E4M3"}}), "type that numpy does not have.*save it as float16"),
    ],
    ids=lambda value: None if isinstance(value, bytes) else value[:20],
)
def test_damaged_safetensors(tmp_path, content, message):
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ConvertError, match=message):
        read(tmp_path / "w.safetensors")


def test_writing_safetensors(tmp_path):
    path = tmp_path / "w.safetensors"
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    to_safetensors(path, {"x": x.T, "scalar": np.float32(3)}, {"family": "mae"})
    got = load_file(path)
    np.testing.assert_array_equal(got["x"], x.T)
    assert got["scalar"] == 3
    head = path.read_bytes()
    assert json.loads(head[8 : 8 + int.from_bytes(head[:8], "little")])["__metadata__"] == {
        "format": "pt",
        "family": "mae",
    }


def test_a_failed_write_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    to_safetensors(path, {"x": np.ones(3, np.float32)})
    before = path.read_bytes()

    def full(arrays, name, metadata):
        with open(name, "wb") as file:
            file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_format, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        to_safetensors(path, {"x": np.zeros(3, np.float32)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
