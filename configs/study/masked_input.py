"""Plain or masked images (paper, table on the input)."""

from configs.study.pipeline import two_stages

MASKED = {"student.distill.mask_ratio": 0.75}


def get_chain(scale: str = ""):
    return two_stages(scale)


def sweep():
    """The paper has 83.9 for masked input and does not say whether the teacher's input is masked: both are here."""
    yield {"student.distill.mask_ratio": 0.0, "note.paper": 84.6}
    yield MASKED | {"student.distill.teacher.masked": False, "note.paper": 83.9}
    yield MASKED | {"student.distill.teacher.masked": True, "note.paper": 83.9}
