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

from tinymim_jax.convert import ConvertError, read, safetensors_file, to_safetensors


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}), "beyond the end"),
        (header({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]}}), "has 8 bytes and should have 4"),
        (header({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}), "ends at byte 16"),
        (header({"x": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}), "shape"),
        (header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}), "position"),
        (header({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}), "beyond the end"),
        (header({"x": {"dtype": "F3", "shape": [2], "data_offsets": [0, 8]}}), "dtype F3; known are"),
        (header({"x": {"dtype": "F32", "shape": [2]}}), "entry of x is damaged"),
        (header({"x": 3}), "entry of x is damaged"),
        (header(b"{" * 3), "header is damaged"),
        (header(b'{"a":' * 100_000), "header is damaged"),
        ((10**9).to_bytes(8, "little") + b"{}", "cut off"),
        (b"{}", "cut off"),
    ],
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

    monkeypatch.setattr(safetensors_file, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        to_safetensors(path, {"x": np.zeros(3, np.float32)})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
