"""The teacher for `tinymim distill`: converts PyTorch files and chooses the block whose relations are learned."""

import dataclasses
import json
import logging
import pathlib
from typing import Any

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.checkpoints.params import is_checkpoint, load_params, save_params
from tinymim_jax.convert import ConvertError, convert_file
from tinymim_jax.convert.detect import AUTO
from tinymim_jax.runtime.files import write_json
from tinymim_jax.tasks.distill.teachers import TEACHERS, how_to_get

log = logging.getLogger(__name__)

_DEEP = 12  # deeper teachers are not tapped at their last blocks


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A teacher that can be loaded.

    path: path of the run or converted checkpoint.
    record: content of its model.json.
    tap, why_tap: the block whose relations are learned, counted from 1, and the reason.
    """

    path: str
    record: dict[str, Any]
    tap: int
    why_tap: str

    @property
    def encoder(self) -> dict[str, Any]:
        """The record of its encoder."""
        return self.record["encoder"]


def find_teacher(given: str, converted: pathlib.Path) -> Teacher:
    """Reads a run, a student in it or a converted checkpoint, or converts a PyTorch file or a folder of the hub.

    Args:
      converted: folder for the converted checkpoint. A JSON file beside it names the files it was made from; if they
        are unchanged, the checkpoint of an earlier call is used.

    Raises ValueError or OSError, with a remedy, if it is not a Vision Transformer that can be read.
    """
    path = pathlib.Path(given).expanduser()
    if not path.exists():
        if given in TEACHERS:
            raise FileNotFoundError(
                f"--teacher {given} names a published teacher; its file is needed:\n{how_to_get(given, given)}\n"
                f"and then --teacher {given}, or --teacher with the downloaded file"
            )
        raise FileNotFoundError(
            f"--teacher {given} does not exist: give the workdir of a run, what `tinymim convert` wrote, a PyTorch "
            f"file, or a folder of the Hugging Face hub. Published teachers: {', '.join(TEACHERS)}"
        )
    if is_checkpoint(path):
        where = path
    else:
        where, stamp, files = converted, converted.with_name(f"{converted.name}.json"), _files_of(path)
        if not (is_checkpoint(converted) and stamp.exists() and json.loads(stamp.read_text()) == files):
            model, params = _convert(path)
            converted.parent.mkdir(parents=True, exist_ok=True)
            save_params(converted, params, model, overwrite=True)
            write_json(stamp, files)
            log.info("%s: converted to %s", given, converted)
    try:
        record, _ = load_params(where, cnn=True)
    except CheckpointError as error:
        raise CheckpointError(f"--teacher {given}: {error}") from error
    if "backbone" in record:
        raise ValueError(
            f"--teacher {given} is a {record['backbone']['kind']}: this command distils relations of attention, which "
            "convolutional networks do not have. Give a Vision Transformer; or train by hand on its features: `tinymim "
            f"train --config configs/distill_images.py:s,5k distill.target=output distill.teacher.path={where} ...`"
        )
    tap, why = choose_tap(record)
    return Teacher(str(where.resolve()), record, tap, why)


def choose_tap(record: dict[str, Any]) -> tuple[int, str]:
    """(block, reason) for a teacher with this record.

    The paper uses block 18 of 24 of ViT-L and the last block of ViT-B: the last blocks of a deep network are
    specialized for its own task.
    """
    depth = record["encoder"]["depth"]
    if depth > _DEEP:
        return round(0.75 * depth), f"three quarters of its {depth} blocks, as in the paper for MAE ViT-L"
    if "decoder" in record and depth < _DEEP and depth > 2:
        return round(2 * depth / 3), f"two thirds of its {depth} blocks: the last ones serve MAE's decoder"
    return depth, "its last block, as in the paper for MAE ViT-B"


def _files_of(path: pathlib.Path) -> list[list[Any]]:
    """[path, size, time of the last change] of a file, or of each file in a folder."""
    found = sorted(each for each in path.iterdir() if each.is_file()) if path.is_dir() else [path]
    return [[str(each.resolve()), each.stat().st_size, each.stat().st_mtime_ns] for each in found]


def _convert(path: pathlib.Path) -> tuple[dict, dict]:
    """(record, parameters) of a PyTorch file or a hub folder, whose family is detected by the names of its tensors."""
    if path.suffix == ".onnx":
        from tinymim_jax.convert.formats.onnx import read_file

        return read_file(path)
    if path.is_dir() and not (path / "config.json").is_file():
        inside = sorted(file for file in path.iterdir() if file.suffix in (".pth", ".pt", ".bin", ".safetensors"))
        if len(inside) != 1:
            raise ValueError(
                f"--teacher {path} is a folder without model.json (a run, or what `tinymim convert` wrote) and without "
                f"config.json (the Hugging Face hub), and holds {len(inside)} PyTorch files: give the file itself"
            )
        path = inside[0]
    try:
        if path.is_dir() and json.loads((path / "config.json").read_text()).get("model_type") == "tinymim":
            from tinymim_jax.convert.formats.hub import read_folder

            return read_folder(path)
        return convert_file(AUTO, path)
    except ConvertError as error:
        raise ConvertError(
            f"--teacher {path} is not a Vision Transformer that can be read: {error}\n`tinymim convert --help` lists "
            "what can be, and options for unusual files; of another kind of network, choose a ViT"
        ) from error
