"""Drop path of the student and of the teacher (paper, table on drop path)."""

from configs.study.pipeline import two_stages

# (student, teacher): top-1 of TinyMIM-B after 100 epochs.
PAPER = {(0.0, 0.0): 84.3, (0.1, 0.0): 84.6, (0.2, 0.0): 84.3, (0.3, 0.0): 84.1, (0.1, 0.1): 83.9}


def get_chain(scale: str = ""):
    return two_stages(scale)


def sweep():
    for (student, teacher), paper in PAPER.items():
        yield {
            "student.model.drop_path": student,
            "student.distill.teacher.drop_path": teacher,
            "note.paper": paper,
        }
