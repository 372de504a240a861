"""Files of other formats, truncated, compressed or damaged: refused with our error, or read correctly."""

import collections
import pickle
import random
import zipfile

import pytest
from torch_files import (
    same,
    save,
    storage,
    tensor,
)

from tinymim_jax.convert import ConvertError, read


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


def golden_bytes(golden) -> bytes:
    return golden.path("vit_cls.pth").read_bytes()


LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"hello", "neither a torch.save nor"),
        (b"<!DOCTYPE html>" + b" " * 100, "neither a torch.save nor"),
        (pickle.dumps({"a": 1}), "neither a torch.save nor"),
        (LEGACY, "cut off or damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"PK\x03\x04" + b"\0" * 50, "cut off or damaged"),
        (b"PK", "cut off or damaged"),
    ],
)
def test_files_of_another_kind(path, content, message):
    path.write_bytes(content)
    with pytest.raises(ConvertError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_paths_that_are_no_file(tmp_path):
    with pytest.raises(ConvertError, match="folder"):
        read(tmp_path)
    with pytest.raises(ConvertError, match="no such file"):
        read(tmp_path / "absent.pth")


@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 0.95, 0.999, 1.0])
def test_truncated_files(path, golden, share):
    data = golden_bytes(golden)
    path.write_bytes(data[: min(int(len(data) * share), len(data) - 1)])
    with pytest.raises(ConvertError, match="cut off or damaged"):
        read(path)


def test_a_flipped_bit_in_the_weights(path, golden):
    data = bytearray(golden_bytes(golden))
    weights = read(golden.path("vit_cls.pth"))["model"]["blocks.1.mlp.fc1.weight"].tobytes()
    data[data.index(weights) + 1000] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConvertError, match="wrong checksum"):
        read(path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"byteorder": b"big"}, "big-endian"),
        ({"constants.pkl": b"N."}, "TorchScript.*state_dict"),
        ({"code/__torch__/m.py": b""}, "TorchScript"),
        ({"data.pkl": None}, "holds no single data.pkl"),
    ],
)
def test_archives_of_another_kind(path, members, message):
    save(path, {"x": 1}, **members)
    with pytest.raises(ConvertError, match=message):
        read(path)


def test_archives_of_numpy(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("Transformer/encoder_norm/scale.npy", b"")
    with pytest.raises(ConvertError, match=r"google-research.*timm reads those: .*m\.load_pretrained.*--from vit"):
        read(path)


def test_ambiguous_archives(path):
    save(path, {"x": 1})
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("other/data.pkl", b"N.")
    with pytest.raises(ConvertError, match="no single"):
        read(path)
    save(path, {"x": 1})
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", b"N.")
    with pytest.raises(ConvertError, match="same name"):
        read(path)


def test_zip_bombs(path):
    save(
        path,
        tensor(storage("0", "uint8", 1 << 27), 0, (1,), (1,)),
        {"0": bytes(1 << 27)},
        compression=zipfile.ZIP_DEFLATED,
    )
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ConvertError, match="unpack to more than"):
        read(path)
    save(path, code=bytes((1 << 26) + 1), compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(ConvertError, match=r"data\.pkl has"):
        read(path)


def test_packed_and_encrypted_members(path):
    save(path, {"x": 1}, compression=zipfile.ZIP_BZIP2)
    with pytest.raises(ConvertError, match="encrypted or packed"):
        read(path)
    save(path, {"x": 1})
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\x01\x02") + 8] |= 1  # the flag in the table of contents
    path.write_bytes(data)
    with pytest.raises(ConvertError, match="encrypted or packed"):
        read(path)


def test_random_damage(path, golden):
    """A damaged file is either refused with our error or read to the same bits, and never anything else."""
    rng = random.Random(0)
    original, want = golden_bytes(golden), read(golden.path("vit_cls.pth"))["model"]
    contents = original.index(b"PK\x01\x02")  # half of the flips go to the table of contents
    outcomes = collections.Counter()
    for i in range(150):
        data = bytearray(original)
        for _ in range(rng.choice((1, 2, 4))):
            data[rng.randrange(contents if i % 2 else 0, len(data))] ^= rng.randrange(1, 256)
        path.write_bytes(data)
        try:
            assert same(read(path)["model"], want)
            outcomes["same"] += 1
        except ConvertError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100


def test_random_damage_of_the_pickle(path, golden):
    rng = random.Random(1)
    with zipfile.ZipFile(golden.path("vit_cls.pth")) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    storages = {name.removeprefix("data/"): data for name, data in members.items() if name.startswith("data/")}
    refused = 0
    for _ in range(150):
        code = bytearray(members["data.pkl"])
        for _ in range(rng.choice((1, 2, 4))):
            code[rng.randrange(len(code))] = rng.randrange(256)
        save(path, code=bytes(code), storages=storages)
        try:
            read(path)
        except ConvertError:
            refused += 1
    assert refused > 75
