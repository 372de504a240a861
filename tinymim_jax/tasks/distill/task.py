"""TinyMIM (arXiv 2301.01296): a small student learns the token relations of a frozen, MIM pre-trained teacher."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from tinymim_jax.checkpoints.params import merge, student_path
from tinymim_jax.models.vit import ViT
from tinymim_jax.tasks.decoder import decoder_record, fill_decoder
from tinymim_jax.tasks.distill.compare import comparison_record
from tinymim_jax.tasks.distill.distillation import Distillation, build_distillations
from tinymim_jax.tasks.distill.eight_bit import remark_on_cost
from tinymim_jax.tasks.distill.family import Family, build_families, own_params, with_own_params
from tinymim_jax.tasks.distill.hidden import MASK_TOKEN
from tinymim_jax.tasks.distill.moving import PartOfTraining, parts_of_training
from tinymim_jax.tasks.distill.one_teacher import Teaching
from tinymim_jax.tasks.distill.parts import read_parts
from tinymim_jax.tasks.distill.settings import (
    FIRST,
    FIRST_STUDENT,
    errors_of,
    errors_of_student,
    key_of,
    student_settings,
    teacher_settings,
)
from tinymim_jax.tasks.distill.teacher_networks import frozen_weights, load_teacher, used_weights
from tinymim_jax.tasks.distill.teachers import teacher_stand_in
from tinymim_jax.tasks.pretrained import (
    Loaded,
    Numbers,
    fill_encoder,
    load,
    log_unused,
    same_part,
    teacher_pixels,
    teacher_record,
)
from tinymim_jax.tasks.stand_in import StandIn, init_stand_in
from tinymim_jax.tasks.task import Batch, Params, Phase, Student, Task, TaskType


def build(config: ConfigDict, class_names: Sequence[str]) -> Task:
    """The task of `config`; labels are not used. Raises ValueError where student, teachers and targets do not fit."""
    del class_names
    parts = parts_of_training(config)
    settings = [student_settings(part.config) for part in parts]
    for name, own in settings[-1].items():
        with errors_of_student(name):
            _check_targets(own)  # a misspelled target is reported before a missing teacher
    (loaded, pixels), methods = _load_teachers(config), {}
    for name in settings[-1]:
        with errors_of_student(name):
            methods[name] = build_distillations([teacher_settings(own[name]) for own in settings], loaded, pixels)
    students = {
        name: _student(config, name, own, methods[name][-1], loaded) for name, own in student_settings(config).items()
    }
    trained = build_families(methods) if len(methods) > 1 else methods[FIRST_STUDENT]
    method = trained[-1]
    return Task(
        model=students[FIRST_STUDENT].model,
        init=method.init,
        losses=method.losses,
        names=method.names,
        seen=method.seen,
        load_frozen=lambda: _frozen(method.teachings, loaded),
        start=_start(students, {name: own[-1] for name, own in methods.items()}),
        phases=_phases(parts, trained),
        remark=_remark(method.teachings, loaded),
        origin=students[FIRST_STUDENT].origin,
        students={name: student for name, student in students.items() if name != FIRST_STUDENT},
    )


def _check_targets(config: ConfigDict) -> None:
    for name, own in teacher_settings(config).items():
        with errors_of(name):
            read_parts(own.distill.target)


def _load_teachers(config: ConfigDict) -> tuple[dict[str, Loaded], dict[str, tuple[Numbers, Numbers]]]:
    """The checkpoints of the teachers, and the mean and standard deviation of what each is shown, by their names."""
    loaded, pixels = {}, {}
    for name, own in teacher_settings(config).items():
        with errors_of(name):
            teacher = own.distill.teacher
            loaded[name] = load_teacher(teacher)
            pixels[name] = teacher_pixels(loaded[name], teacher.mean, teacher.std, key_of(name))
    return loaded, pixels


def _student(
    config: ConfigDict, name: str, own: ConfigDict, method: Distillation, loaded: Mapping[str, Loaded]
) -> Student:
    """The student of this name; `own` is the config in which it is the only one."""
    scale = 1.0 if name == FIRST_STUDENT else config.distill.students[name].lr_scale
    return Student(own, _record(teacher_settings(own), method), _origin(method, loaded), scale)


def _start(students: Mapping[str, Student], methods: Mapping[str, Distillation]) -> Callable[[Params], Params] | None:
    """See Task.start: each student starts from the checkpoint that its own config names."""
    given = {name: student for name, student in students.items() if student.config.init}

    def start(params: Params) -> Params:
        for name, student in given.items():
            with errors_of_student(name):
                source = load(student.config.init)
                own = _filled(own_params(params, name), source, methods[name], student.model)
            params = with_own_params(params, name, own)
        return params

    return start if given else None


def _phases(parts: Sequence[PartOfTraining], methods: Sequence[Distillation | Family]) -> tuple[Phase, ...]:
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


def _frozen(teachings: Sequence[Teaching], loaded: Mapping[str, Loaded]) -> Params:
    found = {}
    for each in teachings:
        final = any(pair.target.final for pair in each.every)
        found[each.name] = frozen_weights(loaded[each.name], each.network, each.taps[-1], final=final, int8=each.int8)
    return found if len(teachings) > 1 else found[FIRST]


def _remark(teachings: Sequence[Teaching], loaded: Mapping[str, Loaded]) -> Callable[[Batch], str] | None:
    """See Task.remark: a line for each teacher of 8 bits."""
    rounded = [each for each in teachings if each.int8]

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
    for name, own in student_settings(config).items():
        key = "init" if name == FIRST_STUDENT else f"distill.students.{name}.init"
        with errors_of_student(name):
            found += [dataclasses.replace(each, key=key) for each in init_stand_in(own)]
    return found


def _for_evaluation(config: ConfigDict) -> ConfigDict:
    """See TaskType: the checkpoint is a run of all students."""
    for name in config.distill.students:
        config.distill.students[name].init = student_path(config.init, name)
    return config


TASK = TaskType(build=build, stand_ins=_stand_ins, for_evaluation=_for_evaluation)
