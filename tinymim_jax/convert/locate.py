"""Where weights are: in a file, in a folder of the Hugging Face hub, or in its local cache."""

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np

from tinymim_jax.convert.errors import ConvertError, printable
from tinymim_jax.convert.readers import read_contents

_INDEX = re.compile(r".*\.(safetensors|bin)\.index\.json")
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".tar", ".npz")
_PREFERRED = ("model.safetensors", "open_clip_model.safetensors", "pytorch_model.bin")


@dataclasses.dataclass(frozen=True)
class Weights:
    """The files of one model.

    path: the file, or the first of several, beside which config.json may lie.
    files: all of them.
    name: for model.json.
    """

    path: pathlib.Path
    files: tuple[pathlib.Path, ...]
    name: str

    def read(self) -> tuple[Any, Mapping[str, str]]:
        """(what the files hold together, the metadata of a single safetensors file)."""
        if self.path.suffix == ".npz":
            return read_npz(self.path), {}
        contents = [read_contents(path) for path in self.files]
        if len(contents) == 1:
            return contents[0].data, contents[0].metadata
        merged: dict[str, Any] = {}
        for path, part in zip(self.files, contents):
            if both := sorted(set(merged) & set(part.data)):
                raise ConvertError(f"{path} holds {printable(both[0])}, which another file of the model holds as well")
            merged |= part.data
        return merged, {}

    def sha256(self) -> str:
        """SHA-256 of the file, 64 hexadecimal digits; of several, that of their digests one after another."""
        digests = []
        for path in self.files:
            with open(path, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def locate(given: str | pathlib.Path) -> Weights:
    """The weights that a path, or the id of a model on the Hugging Face hub such as facebook/dinov2-small, names.

    Nothing is downloaded: a model of the hub must be in the local cache.

    Raises:
      ConvertError: there is nothing, or a folder does not show which of its files holds the weights.
    """
    path = pathlib.Path(given).expanduser()
    if path.is_dir():
        return _in_folder(path, path.name or str(path))
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(given)):
        return _in_folder(_cached(str(given)), str(given))
    return Weights(path, (path,), path.name)


_MOST_COMPRESSED = 20  # times its size that a .npz file of weights may unpack to


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz file.

    Raises ConvertError if it is damaged, holds Python objects, or unpacks to far more than its size: weights can hardly
    be compressed, so that is no model, and its arrays might not fit into memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > _MOST_COMPRESSED * path.stat().st_size:
            raise ConvertError(f"{path} would unpack to {unpacked / 2**20:,.0f} MiB, which no weights of this size do")
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ConvertError(f"cannot read {path}: {printable(error)}") from error


def _in_folder(folder: pathlib.Path, name: str) -> Weights:
    found = sorted(path for path in folder.iterdir() if path.is_file() or path.is_symlink())
    if indices := [path for path in found if _INDEX.fullmatch(path.name)]:
        return _sharded(indices[0], name)
    weights = [path for path in found if path.suffix in _WEIGHTS]
    preferred = [folder / each for each in _PREFERRED if folder / each in weights]
    if not preferred and len(weights) != 1:
        choices = ", ".join(path.name for path in weights) or f"nothing with {', '.join(_WEIGHTS)}"
        raise ConvertError(f"{folder} does not show which file holds the weights: there is {choices}. Name the file")
    path = (preferred or weights)[0]
    return Weights(path, (path,), f"{name}/{path.name}")


def _sharded(index: pathlib.Path, name: str) -> Weights:
    """The files that an index of shards lists."""
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConvertError(f"{index} is no index of weights: {printable(error)}") from error
    files = tuple(index.parent / each for each in names if isinstance(each, str) and pathlib.Path(each).name == each)
    missing = [path.name for path in files if not path.exists()]
    if missing or len(files) != len(names) or not files:
        raise ConvertError(f"{index} lists files that are not beside it: {', '.join(missing[:5]) or 'none'}")
    return Weights(files[0], files, f"{name}/{index.name}")


def _cached(model: str) -> pathlib.Path:
    """The folder of a model's newest snapshot in the cache of huggingface_hub."""
    home = pathlib.Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser()
    cache = pathlib.Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    folder = cache / f"models--{model.replace('/', '--')}"
    main = folder / "refs" / "main"
    snapshots = sorted(folder.glob("snapshots/*"), key=lambda path: path.stat().st_mtime)
    if main.is_file() and (folder / "snapshots" / main.read_text().strip()).is_dir():
        return folder / "snapshots" / main.read_text().strip()
    if not snapshots:
        raise ConvertError(
            f"there is no file or folder {model}, and no such model in {cache}: download it by `hf download {model}`"
        )
    return snapshots[-1]
