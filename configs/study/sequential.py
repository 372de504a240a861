"""Teachers compared: MAE-B, MAE-L, or a distilled model of intermediate size (paper, table on sequential distillation).

Make the teachers first, at teachers/mae_vit_base, teachers/mae_vit_large and by this command:
  tinymim chain configs/chain.py:b,s --workdir runs/study/chain distill.teacher.path=teachers/mae_vit_large
FILE is TinyMIM-S; FILE:t with --sweep t is TinyMIM-T. FILE:small has an intermediate student of width 96, 4 blocks:
  tinymim train --config configs/cifar10.py:mae_teacher --workdir runs/study/teacher
  tinymim train --config configs/cifar10.py:distill --workdir runs/study/between model.embed_dim=96 \\
    distill.teacher.path=runs/study/teacher
"""

from configs.study.pipeline import two_stages

BASE, LARGE, CHAIN = "teachers/mae_vit_base", "teachers/mae_vit_large", "runs/study/chain"


def get_chain(scale: str = ""):
    return two_stages("", full=scale) if scale == "t" else two_stages(scale, full="s")


def sweep(scale: str):
    if scale == "small":
        yield _from("runs/study/teacher", tap=4)
        yield _from("runs/study/between")
        return
    yield _from(BASE, name="mae_vit_base", paper=82.3)
    yield _from(LARGE, name="mae_vit_large", paper=82.1)
    yield _from(f"{CHAIN}/b", paper=82.6)


def sweep_t():
    yield _from(BASE, name="mae_vit_base", paper=74.1)
    yield _from(LARGE, name="mae_vit_large", paper=74.4)
    yield _from(f"{CHAIN}/s", paper=75.0)


def _from(path: str, *, name: str = "", tap=None, paper=None):
    return {
        "student.distill.teacher.path": path,
        "student.distill.teacher.name": name,
        "student.distill.teacher.tap": tap,
        "note.paper": paper,
    }
