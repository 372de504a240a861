"""TinyMIM (arXiv 2301.01296): a small student learns the token relations of a frozen, MIM pre-trained teacher."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.params import merge
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks.decoder import decoder_record, fill_decoder
from tinymim_jax.tasks.distill.compare import comparison_record
from tinymim_jax.tasks.distill.distillation import Distillation, build_distillations
from tinymim_jax.tasks.distill.eight_bit import remark_on_cost
from tinymim_jax.tasks.distill.hidden import MASK_TOKEN
from tinymim_jax.tasks.distill.moving import PartOfTraining, parts_of_training
from tinymim_jax.tasks.distill.one_teacher import Teaching
from tinymim_jax.tasks.distill.parts import read_parts
from tinymim_jax.tasks.distill.settings import FIRST, errors_of, key_of, teacher_settings
from tinymim_jax.tasks.distill.teacher_networks import frozen_weights, load_teacher, used_weights
from tinymim_jax.tasks.distill.teachers import teacher_stand_in
from tinymim_jax.tasks.pretrained import Loaded, fill_encoder, load, log_unused, same_part, teacher_record
from tinymim_jax.tasks.stand_in import StandIn, init_stand_in
from tinymim_jax.tasks.task import Batch, Params, Phase, Task, TaskType


def build(config: ConfigDict, class_names: Sequence[str]) -> Task:
    """The task of `config`; labels are not used. Raises ValueError where student, teachers and targets do not fit."""
    del class_names
    parts = parts_of_training(config)
    settings, loaded = teacher_settings(parts[-1].config), {}
    for name, own in settings.items():
        with errors_of(name):
            read_parts(own.distill.target)  # a misspelled target is reported before a missing teacher
    for name, own in settings.items():
        with errors_of(name):
            loaded[name] = load_teacher(own.distill.teacher)
    methods = build_distillations([teacher_settings(part.config) for part in parts], loaded)
    method = methods[-1]
    model = _record(settings, method)
    return Task(
        model=model,
        init=method.init,
        losses=method.losses,
        names=method.names,
        seen=method.seen,
        load_frozen=lambda: _frozen(method, loaded),
        start=(lambda params: _filled(params, load(config.init), method, model)) if config.init else None,
        phases=_phases(parts, methods),
        remark=_remark(method, loaded),
        origin=_origin(method, loaded),
    )


def _phases(parts: Sequence[PartOfTraining], methods: Sequence[Distillation]) -> tuple[Phase, ...]:
    if len(parts) == 1:
        return ()
    labels = [", ".join(f"{name} {block}" for name, block in method.taps.items()) for method in methods]
    return tuple(
        Phase(part.begins, method.losses, label) for part, method, label in zip(parts, methods, labels, strict=True)
    )


def _record(settings: Mapping[str, ConfigDict], method: Distillation) -> dict[str, Any]:
    record: dict[str, Any] = {"encoder": method.student.record()}
    parts = jax.eval_shape(method.init_comparisons, jax.random.key(0))
    for part in {"adapter", "statistics"} & set(parts):
        found = {
            teaching.name: comparison_record(settings[teaching.name].distill, teaching.every, teaching.network)
            for teaching in method.teachings
            if not method.several or teaching.name in parts[part]
        }
        record[part] = found if method.several else found[FIRST]
    if method.hidden:
        record[MASK_TOKEN] = {"embed_dim": method.student.embed_dim}
    if method.mim:
        record["decoder"] = decoder_record(method.mim.decoder)
    return record


def _origin(method: Distillation, loaded: Mapping[str, Loaded]) -> dict[str, Any]:
    """See Task.origin: of each teacher its checkpoint, pixels, image size, and pairs of blocks, the last ones first."""
    found = {each.name: _taught(each, loaded[each.name]) for each in method.teachings}
    return {"teacher": found.pop(FIRST)} | ({"teachers": found} if found else {})


def _taught(teaching: Teaching, loaded: Loaded) -> dict[str, Any]:
    pairs = dict.fromkeys((p.blocks.student, p.blocks.teacher) for p in (*teaching.pairs, *teaching.every))
    inputs = teaching.inputs
    record = teacher_record(loaded, (inputs.teacher_mean, inputs.teacher_std))
    return record | {"image_size": list(teaching.network.image_size), "blocks": [list(pair) for pair in pairs]}


def _frozen(method: Distillation, loaded: Mapping[str, Loaded]) -> Params:
    found = {}
    for each in method.teachings:
        final = any(pair.target.final for pair in each.every)
        found[each.name] = frozen_weights(loaded[each.name], each.network, each.taps[-1], final=final, int8=each.int8)
    return found if method.several else found[FIRST]


def _remark(method: Distillation, loaded: Mapping[str, Loaded]) -> Callable[[Batch], str] | None:
    """See Task.remark: a line for each teacher of 8 bits."""
    rounded = [each for each in method.teachings if each.int8]

    def remark(batch: Batch) -> str:
        return "\n".join(_cost_of_int8(each, loaded[each.name], batch) for each in rounded)

    return remark if rounded else None


def _cost_of_int8(teaching: Teaching, loaded: Loaded, batch: Batch) -> str:
    network = teaching.network
    assert isinstance(network, ViT)
    exact = used_weights(loaded, network, teaching.taps[-1])

    def view(images: jax.Array) -> jax.Array:
        return teaching.inputs.teacher_view(images, jax.random.key(0), False)

    return remark_on_cost(key_of(teaching.name), network, teaching.taps, exact, batch["image"], view)


def _filled(params: Params, source: Loaded, method: Distillation, model: dict[str, Any]) -> Params:
    """`params` with the checkpoint's encoder, and its adapters and the like where they are those of this task."""
    params = fill_parts(fill_encoder(params, source, method.student), source, model)
    if method.mim:
        params = fill_decoder(params, source, method.mim.decoder)
    log_unused(source, model)
    return params


def fill_parts(params: Params, source: Loaded, model: dict[str, Any]) -> Params:
    """`params` with the checkpoint's adapters, statistics and MASK_TOKEN where they are those of the record `model`."""
    for part in ("adapter", "statistics", MASK_TOKEN):
        if part in model and same_part(source, part, model[part]):
            params = params | merge({part: params[part]}, {part: source.params[part]})
    return params


def _stand_ins(config: ConfigDict, classes: int) -> list[StandIn]:
    del classes
    found = []
    for name, own in teacher_settings(config).items():
        with errors_of(name):
            found += teacher_stand_in(own.distill.teacher, key_of(name))
    return found + init_stand_in(config)


TASK = TaskType(build=build, stand_ins=_stand_ins)
