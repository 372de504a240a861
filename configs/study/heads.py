"""Attention heads of student and teacher, in pre-training and in fine-tuning. The paper has no figures of these.

The authors fine-tune with 3, 6 or 12 heads in every block whatever pre-training had (`official`).
"""

from configs.study.pipeline import two_stages


def get_chain(scale: str = ""):
    return two_stages(scale)


def sweep(scale: str):
    student = {"student.model.heads": 2 if scale == "small" else 12}
    yield student | {"student.distill.heads": "adaptive", "classifier.classify.heads": "keep"}
    yield student | {"student.distill.heads": "adaptive", "classifier.classify.heads": "uniform"}
    if scale != "small":  # its width is not a published one
        yield student | {"student.distill.heads": "adaptive", "classifier.classify.heads": "official"}
    yield student | {"student.distill.heads": "resplit", "classifier.classify.heads": "keep"}
    # As many as the teacher has.
    yield {"student.model.heads": 4 if scale == "small" else 16, "student.distill.heads": "own"}


def sweep_last_block():
    """What becomes of the last block, of which distillation trains q, k and v alone."""
    for choice in ("keep", "zero_init", "copy_previous", "drop"):
        yield {"classifier.classify.last_block": choice}
