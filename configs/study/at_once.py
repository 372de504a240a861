"""The study on CIFAR-10 with all arms of a table as students of one training, so that the teacher runs once for all.

FILE:TABLE trains every arm at three learning rates; TABLES has the tables. Each student is what it would be if it were
trained alone (docs/recipes.md, several students), at students/ARM_RATE of the workdir, with the rate in thousandths;
the workdir itself has the published recipe at a rate of 0.032. Students see a quarter of the patches, which makes their
steps cheaper; the teacher sees the whole image, of which it gives the tokens at these patches.

  tinymim train --config configs/cifar10.py:mae_teacher --workdir runs/study/teacher
  tinymim train --config configs/study/at_once.py:targets --workdir runs/study/targets \\
    distill.teacher.path=runs/study/teacher
  tinymim knn runs/study/targets/students/output_32

FILE:TABLE,128,256 trains all arms at these rates; FILE:TABLE,qk_vv_64,output_64 these arms at these rates. As a chain,
each student is fine-tuned after that, and table.md has the accuracies:

  tinymim chain configs/study/at_once.py:recipes,qk_vv_64,output_64 --workdir runs/study/recipes_1 seed=1 \\
    distill.teacher.path=runs/study/teacher
"""

from configs import base, cifar10

RATES = ("16", "32", "64")  # thousandths
LAST = 4  # the student's last block

TARGETS = ("qk_vv", "qq_kk_vv", "qkv", "output", "ffn", "attention", "ffn_residual", "attention_residual", "cls")
# What an arm changes of the published recipe, by table and arm.
TABLES = {
    "targets": {target: {"target": target} for target in TARGETS},
    "losses": {
        f"{target}_{loss}": {"target": f"{target}(loss={loss})"}
        for target, losses in {
            "qk_vv": ("kl", "smooth_l1", "mse"),
            "qq_kk_vv": ("kl", "smooth_l1", "mse"),
            "output": ("smooth_l1", "mse", "cosine"),
        }.items()
        for loss in losses
    },
    "tapped_block": {f"block_{block}": {"taps": ((LAST, block, 1.0),)} for block in (2, 3, 4, 5, 6)},  # of 6
    "drop_path": {f"drop_{tenths}": {"model": {"drop_path": tenths / 10}} for tenths in (0, 1, 2, 3)},
    # Against the published recipe at equal cost. split: relations leave the last block to the feature.
    "recipes": {
        "qk_vv": {"target": "qk_vv"},
        "output": {"target": "output"},
        "both": {"target": "output + qk_vv"},
        "split": {"target": f"output + qk_vv(student={LAST - 1})"},
    },
}


def get_config(argument: str = "targets"):
    config = cifar10.get_config("distill")
    config.distill.mask_ratio = 0.75
    config.optim.base_lr = 0.032
    config.optim.warmup = "50 steps"
    config.train.duration = "500 steps"
    for name, changes, rate in _students(argument):
        config.distill.students[name] = base.further_student(**changes, lr_scale=rate / config.optim.base_lr)
    return config


def get_chain(argument: str = "targets"):
    """Distils the students, then fine-tunes each, half as long as in configs/cifar10.py."""
    finetune = {"train.duration": "250 steps", "optim.warmup": "25 steps"}
    return [
        ("students", f"at_once.py:{argument}", {}),
        *(
            (name, "../cifar10.py:finetune", finetune | {"init": f"{{students}}/students/{name}"})
            for name, _, _ in _students(argument)
        ),
    ]


def _students(argument: str) -> list[tuple[str, dict, float]]:
    """Of each student that the argument chooses its name, what it changes, and its learning rate."""
    table, *chosen = argument.split(",")
    if table not in TABLES:
        raise ValueError(f"configs/study/at_once.py:{argument} is unknown. Tables: {', '.join(TABLES)}")
    return [(f"{arm}_{rate}", TABLES[table][arm], float(rate) * 1e-3) for arm, rate in _arms(table, chosen)]


def _arms(table: str, chosen: list[str]) -> list[tuple[str, str]]:
    """Pairs of arm and rate: those that were chosen, or all arms at the rates that were chosen."""
    if all(word.isdecimal() for word in chosen):
        return [(arm, rate) for arm in TABLES[table] for rate in chosen or RATES]
    pairs = [tuple(word.rsplit("_", 1)) for word in chosen]
    for word, pair in zip(chosen, pairs):
        if len(pair) != 2 or pair[0] not in TABLES[table] or not pair[1].isdecimal():
            raise ValueError(
                f"{word!r} is no arm and rate of {table}: write ARM_RATE, such as {next(iter(TABLES[table]))}_32. "
                f"Arms: {', '.join(TABLES[table])}"
            )
    return pairs
