"""An experiment as it can be planned: without data, checkpoints or devices, by shapes alone."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.config import from_json
from tinymim_jax.experiment import Experiment, assemble, batch_shapes, build_optimizer
from tinymim_jax.flops import step_flops
from tinymim_jax.metrics import no_averages
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.platform import compiling_for
from tinymim_jax.sharding import batch_sharding, replicated, state_sharding
from tinymim_jax.state import init_state, make_train_step, trained_paths
from tinymim_jax.sweeps.checks import open_anyway
from tinymim_jax.tasks.distill.teachers import TEACHERS, find_teacher
from tinymim_jax.tasks.pretrained import Loaded, build_encoder, keeping_checkpoints

_VIT_B = ViT(embed_dim=768, depth=12, heads=12)
_PATCH_SIZES = {"mae_vit_huge": 14}  # of published teachers; 16 where they are not named here


@dataclasses.dataclass(frozen=True)
class Planned:
    """What can be known of a training before there is anything to train with.

    config: as it was given.
    experiment: with what stands in for data and checkpoints.
    frozen: shapes of the weights that are not trained.
    paths: of the trained parameters.
    notes: what was stood in for, in sentences.
    data_dir: where its data was looked for.
    """

    config: ConfigDict
    experiment: Experiment
    frozen: Any
    paths: frozenset
    notes: tuple[str, ...]
    data_dir: str | None = None

    def params(self) -> Any:
        """Shapes of all parameters."""
        return jax.eval_shape(self.experiment.task.init, jax.random.key(0))

    @functools.cached_property
    def flops(self) -> tuple[float, float]:
        """Of one step on the whole batch: (what the method needs, with what `model.remat` computes again)."""
        executed, config = self._flops(), self.experiment.config
        if config.model.get("remat", "none") == "none":
            return executed, executed
        return plan_experiment(changed(config, {"model.remat": "none"}), data_dir=self.data_dir)._flops(), executed

    def _flops(self) -> float:
        with compiling_for("tpu"):  # in plain form, as for all accelerators
            return step_flops(self.experiment.task, self.frozen, batch_shapes(self.experiment))

    def step(self, mesh: Any) -> tuple[Any, tuple]:
        """(the jitted step that training runs, its arguments as shapes with their shardings on `mesh`).

        Of an AbstractMesh only the arguments are of use.
        """
        experiment, train = self.experiment, self.experiment.config.train
        task, optimizer = experiment.task, build_optimizer(experiment, self.paths)
        state, _ = init_state(task, optimizer, self.paths, mesh, jax.random.key(0), ema=train.ema)
        step = make_train_step(task, optimizer, self.paths, mesh, accumulate=train.accumulate, ema=train.ema)
        recorded = jax.eval_shape(lambda: no_averages((*task.names, "gradient_norm")))
        key = jax.eval_shape(lambda: jax.random.key(0))
        batch = {name: _placed(x, batch_sharding(mesh)) for name, x in batch_shapes(experiment).items()}
        whole = replicated(mesh)
        arguments = (
            state,
            jax.tree.map(lambda x: _placed(x, whole), recorded),
            jax.tree.map(_placed, self.frozen, state_sharding(mesh, self.frozen)),
            batch,
            _placed(key, whole),
        )
        return step, arguments


def plan_experiment(config: ConfigDict, *, data_dir: str | None = None) -> Planned:
    """Builds the experiment of `config` as training would.

    Data that is not here has ImageNet's length and classes; a checkpoint that is not here is zeros of its shapes: a
    teacher by its row in TEACHERS, a classifier that teaches or an encoder that is probed as a ViT-B, another `init` as
    the config's own encoder.

    Raises:
      ValueError: training would not start either, or nothing says what the missing teacher looks like.
    """
    notes: list[str] = []
    given, config = config, from_json(json.loads(json.dumps(config.to_dict())))
    with keeping_checkpoints() as kept:
        sources = open_anyway(config, data_dir=data_dir)
        if sources[0].name == "stand-in":
            notes.append(f"data.source={config.data.source!r} is not here: taken as 1,281,167 images of 1000 classes")
        if config.task == "distill":
            _stand_in_teacher(config, kept, notes)
        if config.task == "classify" and config.classify.distillation != "none":
            _stand_in_classifier(config, kept, notes, classes=len(sources[0].class_names))
        _stand_in_init(config, kept, notes)
        experiment = assemble(config, *sources)
        frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), experiment.task.load_frozen())
        paths = trained_paths(experiment.task, frozen, batch_shapes(experiment))
    return Planned(given, experiment, frozen, paths, tuple(notes), data_dir)


def changed(config: ConfigDict, changes: dict[str, Any]) -> ConfigDict:
    """A copy of a config with dotted keys set."""
    copied = from_json(config.to_dict())
    for key, value in changes.items():
        *parents, name = key.split(".")
        section = functools.reduce(getattr, parents, copied)
        section[name] = value
    return copied


def _stand_in_teacher(config: ConfigDict, kept: dict[str, Loaded], notes: list[str]) -> None:
    name, path = config.distill.teacher.name, config.distill.teacher.path
    if path and pathlib.Path(path).exists():
        return
    if not name:
        raise ValueError(
            f"distill.teacher.path={path!r} is not here and distill.teacher.name is empty, so the teacher's size is "
            f"not known: give one of them. Names: {', '.join(TEACHERS)}"
        )
    row, path = find_teacher(name), path or f"the {name} of TEACHERS"
    config.distill.teacher.path = path
    patch_size = _PATCH_SIZES.get(name, 16)
    kept[path] = _zeros(ViT(row.embed_dim, row.depth, row.embed_dim // 64, patch_size), path)
    notes.append(f"the teacher is not here: zeros of {name}'s shapes stand in for it")


def _stand_in_init(config: ConfigDict, kept: dict[str, Loaded], notes: list[str]) -> None:
    probed = config.task == "probe"  # whose encoder is of any size: the config does not say which
    path = config.init or ("an encoder" if probed else "")
    if not path or pathlib.Path(path).exists():
        return
    config.init = path
    kept[path] = _zeros(_VIT_B if probed else build_encoder(config.model), path)
    notes.append(f"init={path} is not here: taken as {'a ViT-B' if probed else 'an encoder of this config'}")


def _stand_in_classifier(config: ConfigDict, kept: dict[str, Loaded], notes: list[str], *, classes: int) -> None:
    teacher = config.classify.teacher
    if teacher.path and pathlib.Path(teacher.path).exists():
        return
    path = teacher.path = teacher.path or "a classifier"
    network = Classifier(_VIT_B.clone(final_norm=False), classes)
    params = _zeros_of(network)
    kept[path] = Loaded(path, {"encoder": network.encoder.record(), "classifier": network.record()}, params)
    notes.append(f"classify.teacher.path={path} is not here: taken as a ViT-B")


def _zeros(encoder: ViT, path: str) -> Loaded:
    return Loaded(path, {"encoder": encoder.record()}, {"encoder": _zeros_of(encoder)})


def _zeros_of(network: Any) -> Any:
    """Weights of these shapes that take no memory."""
    image = np.zeros((1, *getattr(network, "encoder", network).image_size, 3), np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), image)["params"]
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), shapes)


def _placed(shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)
