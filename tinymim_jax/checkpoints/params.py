"""Parameters without a training state: saved as an export, loaded from an export or a run, merged into a model."""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from tinymim_jax.checkpoints import format as stored
from tinymim_jax.checkpoints.format import CheckpointError, Damaged, digest
from tinymim_jax.checkpoints.linear_probes import fold_batch_norm, probed_params
from tinymim_jax.runtime.paths import check_output_path

_log = logging.getLogger(__name__)

STUDENTS = "students"
"""Of a run with several students: the key of the parameters of all but the first, and the folder with their records."""

_CONVERT = "tinymim convert --input {file} --output DIRECTORY"


def save_params(directory: epath.PathLike, params: Any, model: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Writes an export: `directory/params/` and `directory/model.json`, the latter with a digest of the former.

    Either the whole export appears or nothing. Called on one process.

    Args:
      params: nested dicts of arrays that this process holds in full.
      model: the architecture and what else model.json shall have, JSON values.
      overwrite: replace an export that is already there; other directories are never replaced.

    Raises:
      CheckpointError: the directory is in use, or cannot be written.
      ValueError: Orbax cannot write to such a path, see `check_output_path`.
    """
    directory = _resolved(directory)
    check_free(directory, overwrite=overwrite)
    temporary = directory.parent / f".{directory.name}.writing-{os.getpid()}"
    old = directory.parent / f".{directory.name}.old-{os.getpid()}"
    params, this = jax.device_get(params), jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"export{this}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    with stored.writing(directory):
        try:
            temporary.mkdir(parents=True)
            with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
                checkpointer.save(temporary / "params", args=ocp.args.PyTreeSave(params))
            record = {**model, "digest": digest(params)}
            (temporary / "model.json").write_text(json.dumps(record, indent=2) + "\n")
            if directory.exists():
                directory.rename(old)
            temporary.rename(directory)
            if old.exists():
                old.rmtree()
        finally:
            if temporary.exists():
                temporary.rmtree()


def check_free(directory: epath.PathLike, *, overwrite: bool = False) -> None:
    """Raises the error of `save_params` if `directory` is in use or not allowed, before there is anything to save."""
    check_output_path(directory, "--output")
    directory = _resolved(directory)
    if not directory.exists():
        return
    is_export = (directory / "model.json").exists() and (directory / "params").is_dir()
    if is_export and not overwrite:
        raise CheckpointError(f"{directory} holds an export already. Delete it, or choose another directory.")
    if not is_export and (not directory.is_dir() or any(directory.iterdir())):
        raise CheckpointError(f"{directory} exists and is not an export. Choose another directory.")


def load_params(path: epath.PathLike, *, cnn: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """(content of model.json, parameters as nested dicts of numpy arrays) of an export or of a training run.

    Of a run, the newest intact checkpoint is used and only its parameters are read, in place of which the moving
    average is taken where there is one. Nothing is changed on disk, so the run may still be training. A linear probe's
    run holds its head alone; the encoder is read from the checkpoint that was probed. Of a run with several students,
    the parameters are those of the first one, or of the one whose folder RUN/students/NAME is given.

    Args:
      path: a directory written by `save_params` (or `tinymim convert`), the workdir of a run, or the folder of a
        student in it.
      cnn: whether a convolutional network ("backbone" in model.json), which can only be a teacher, is accepted.

    Raises:
      CheckpointError: it is neither, or none of it is intact, or it is a convolutional network.
    """
    path = _resolved(path)
    if (path / "params").is_dir():
        model, params = _load_export(path)
        if "backbone" in model and not cnn:
            raise CheckpointError(
                f"{path} is a {model['backbone']['kind']}, which can only be a teacher: distill.teacher.path={path}. "
                "Give a Vision Transformer"
            )
        return model, params
    if (path / "checkpoints").is_dir():
        model, params = _read_model(path), _load_run(path / "checkpoints")
        return model, _with_probed_encoder(path, model, params) if "probe" in model else params
    if _is_student(path):
        return _read_model(path), _load_run(path.parent.parent / "checkpoints", student=path.name)
    raise CheckpointError(_not_a_checkpoint(path))


def is_checkpoint(path: epath.PathLike) -> bool:
    """Whether this folder is an export, a run or a student of a run, which `load_params` reads."""
    path = _resolved(path)
    parts = (path / "params").is_dir() or (path / "checkpoints").is_dir() or _is_student(path)
    return parts and (path / "model.json").is_file()


def load_record(path: epath.PathLike) -> dict[str, Any]:
    """The content of model.json of an export or a run, without its parameters. Raises CheckpointError without one."""
    path = _resolved(path)
    if not path.exists():
        raise CheckpointError(_not_a_checkpoint(path))
    return _read_model(path)


def student_path(run: epath.PathLike, name: str) -> str:
    """The path of one of the further students of a run; `load_params` reads its parameters from the run."""
    return f"{run}/{STUDENTS}/{name}"


def merge(
    initial: Mapping[str, Any],
    loaded: Mapping[str, Any],
    *,
    allow_missing: tuple[str, ...] = (),
    allow_unused: tuple[str, ...] = (),
) -> dict[str, Any]:
    """The tree of `initial` with its values replaced by those of `loaded`.

    Args:
      allow_missing: names (`head`, `encoder/norm`) that may keep their initial values, including all names below them.
      allow_unused: names in `loaded` that the model may lack, including all names below them.

    Raises:
      CheckpointError: other names are missing or unused, or any shape or dtype differs; all are listed.
    """
    found = stored.compare(stored.outline(loaded), stored.outline(initial))
    difference = stored.Difference(
        [name for name in found.missing if not _below(name, allow_missing)],
        [name for name in found.unused if not _below(name, allow_unused)],
        found.changed,
    )
    if difference:
        raise CheckpointError(
            f"The loaded parameters do not fit this model:\n{difference}\n"
            f"Give the model the architecture in the checkpoint's model.json, or load another checkpoint."
        )
    values = stored.leaves_by_name(loaded)
    return stored.nested({name: values.get(name, own) for name, own in stored.leaves_by_name(initial).items()})


def _load_export(path: epath.Path) -> tuple[dict[str, Any], dict[str, Any]]:
    model = _read_model(path)
    expected = model.pop("digest", None)
    try:
        params = stored.nested(stored.read_arrays(path / "params"))
        if (got := digest(params)) != expected:
            raise Damaged(f"the digest of its parameters is {got}, model.json says {expected}")
    except Damaged as error:
        raise CheckpointError(f"{path} is damaged: {error}\nConvert or export it again.") from error
    return model, params


def _load_run(directory: epath.Path, student: str = "") -> dict[str, Any]:
    """The parameters of the newest intact step. A training run may delete steps and save new ones meanwhile.

    Args:
      student: the name of one of the further students; "": the first one.
    """
    damaged, deleted = {}, set()
    while steps := set(ocp.utils.checkpoint_steps(directory)) - damaged.keys() - deleted:
        step = max(steps)
        try:
            return _load_step(directory / str(step), student)
        except Damaged as error:
            if step not in ocp.utils.checkpoint_steps(directory):
                deleted.add(step)
                continue
            damaged[step] = error
            _log.error("Checkpoint %d in %s is damaged, trying the one before it: %s", step, directory, error)
    if damaged:
        reasons = "".join(f"\n  {step}: {error}" for step, error in damaged.items())
        raise CheckpointError(f"No checkpoint in {directory} is intact:{reasons}\nPut back a copy.")
    raise CheckpointError(f"{directory} holds no checkpoint yet. Wait until the run has saved one.")


def _with_probed_encoder(path: epath.Path, model: dict[str, Any], params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a Classifier: the probed checkpoint's, and the probe's head with its batch norm folded in."""
    probed = model["probe"]["checkpoint"]
    try:
        their_model, theirs = load_params(probed)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is a linear probe of {probed}, which cannot be read: {error}") from error
    if digest(theirs["encoder"]) != model["probe"]["digest"]:
        raise CheckpointError(f"{path} is a linear probe of {probed}, which has changed since. Probe it again.")
    frozen = probed_params(
        their_model, theirs, image_size=tuple(model["encoder"]["image_size"]), pool=model["classifier"]["pool"]
    )
    return frozen | {"head": fold_batch_norm(params["head"], params["batch_norm"])}


def _load_step(directory: epath.Path, student: str) -> dict[str, Any]:
    leaves, _ = stored.read_manifest(directory / "manifest")
    sources: dict[str, str] = {}
    for tree in ("params/", "extra/ema/"):  # the moving average takes the place of the parameters
        start = f"{tree}{STUDENTS}/{student}/" if student else tree
        found = {name.removeprefix(start): name for name in leaves if name.startswith(start)}
        sources |= {name: source for name, source in found.items() if student or not name.startswith(f"{STUDENTS}/")}
    arrays = stored.read_arrays(directory / "state", dict.fromkeys(sources.values()))
    stored.verify(arrays, leaves)
    return stored.nested({name: arrays[source] for name, source in sources.items()})


def _read_model(path: epath.Path) -> dict[str, Any]:
    file = path / "model.json"
    try:
        model = json.loads(file.read_text())
        if not isinstance(model, dict):
            raise ValueError(f"it holds a {type(model).__name__}")
        return model
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing. Put it back, or convert or train again.") from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not an architecture record: {error}. Put back a copy.") from error


def _is_student(path: epath.Path) -> bool:
    return path.parent.name == STUDENTS and path.is_dir() and (path.parent.parent / "checkpoints").is_dir()


def _not_a_checkpoint(path: epath.Path) -> str:
    choices = "an export (a directory with model.json and params/) or the --workdir of a run"
    students = path if path.name == STUDENTS else path.parent
    run = students.parent
    if students.name == STUDENTS and (run / "checkpoints").is_dir():
        names = sorted(student.name for student in students.iterdir()) if students.is_dir() else []
        others = f"its further students: {', '.join(str(students / name) for name in names)}" if names else ""
        return f"{path} is not a student of the run {run}. Give {run}" + (f", or one of {others}" if others else "")
    if not path.exists():
        return f"{path} does not exist. Give {choices}; an export is made by\n  {_CONVERT.format(file='FILE.pth')}"
    if path.is_file():
        return f"{path} is a file, not {choices}. If it comes from PyTorch, convert it:\n  {_CONVERT.format(file=path)}"
    workdir = next((parent.parent for parent in (path, *path.parents) if parent.name == "checkpoints"), None)
    hint = f" Did you mean {workdir}?" if workdir else ""
    return f"{path} is not {choices}.{hint}"


def _below(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}/") for prefix in prefixes)


def _resolved(path: epath.PathLike) -> epath.Path:
    return epath.Path(path).expanduser().resolve()
