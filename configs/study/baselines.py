"""Distillation compared with MAE pre-training of the student itself and with no pre-training (paper, first table).

FILE:tinymim, FILE:mae and FILE:scratch are sweeps over the sizes T, S and B, all fine-tuned with the recipe of Base.
The teachers are expected at teachers/mae_vit_base (for T and S) and teachers/mae_vit_large (for B). At the small scale
there are FILE:small_tinymim (with distill.teacher.path=runs/study/teacher), FILE:small_mae and FILE:small_scratch.
"""

# Top-1 of T, S and B: (TinyMIM, MAE directly).
PAPER = {"Ti": (75.8, 71.6), "S": (83.0, 80.6), "B": (85.0, 83.6)}
HEADS = {"Ti": 6, "S": 6, "B": 12}  # of TinyMIM's students, as published

_SMALL = {"tinymim": "../cifar10.py:distill", "mae": "../cifar10.py:mae_student"}
_FULL = {"tinymim": "../distill_b.py", "mae": "../mae_b.py"}


def get_chain(way: str = "tinymim"):
    files, finetune, way = (
        (_SMALL, "../cifar10.py:finetune", way.removeprefix("small_"))
        if way.startswith("small_")
        else (_FULL, "../finetune_b.py", way)
    )
    if way == "scratch":
        return [("classifier", finetune, {})]
    if way not in files:
        raise ValueError(f"configs/study/baselines.py:{way} is unknown. Choices: tinymim, mae, scratch, small_WAY")
    return [("student", files[way], {}), ("classifier", finetune, {"init": "{student}"})]


def sweep(way: str):
    """One point per size. The small scale has one size; its points are learning rates of fine-tuning."""
    if way.startswith("small_"):
        for rate in (4e-3, 8e-3):
            yield {"classifier.optim.base_lr": rate}
        return
    for size, (tinymim, mae) in PAPER.items():
        point = {"model.variant": size}
        if way in ("", "tinymim"):
            large = size == "B"
            point |= {
                "student.model.heads": HEADS[size],
                "student.distill.teacher.name": "mae_vit_large" if large else "mae_vit_base",
                "student.distill.teacher.path": "teachers/mae_vit_large" if large else "teachers/mae_vit_base",
            }
        yield point | {"note.paper": {"mae": mae, "scratch": None}.get(way, tinymim)}
