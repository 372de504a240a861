"""Two teachers in one step: relations of the first beside the similarities of the second's output tokens, by weight.

Name both teachers for all points; the first as in the other studies:

  tinymim sweep configs/study/several_teachers.py --workdir runs/study/several --run local \\
    distill.teacher.path=teachers/mae_vit_large distill.teachers.second.path=teachers/dinov2_b

Teachers of other patches than the student's need its grid only for rotated q and k; outputs are brought to it.
"""

from configs.study.pipeline import two_stages

TARGET = "oo(loss=mse, normalize=true, patches=true)"  # Gram anchoring (DINOv3, arXiv 2508.10104)
# (of the first, of the second); the losses differ in scale, so their weights do too.
WEIGHTS = ((1.0, 0.0), (1.0, 0.3), (1.0, 1.0), (1.0, 3.0), (0.0, 1.0))


def get_chain(scale: str = ""):
    return two_stages(scale)


def sweep(scale: str):
    for first, second in WEIGHTS:
        yield {
            "student.distill.teacher.weight": first,
            "student.distill.teachers.second.weight": second,
            "student.distill.teachers.second.target": TARGET,
        }
