"""Numbers of attention heads in pre-training and fine-tuning. The paper has no results on these.

`official` is what the authors' code does: it fine-tunes with 3, 6 or 12 heads in every block, whatever the number
was in pre-training.
"""

from configs.study.pipeline import two_stages


def get_chain(scale: str = ""):
    return two_stages(scale)


def sweep(scale: str):
    student = {"student.model.heads": 2 if scale == "small" else 12}
    yield student | {"student.distill.heads": "adaptive", "classifier.classify.heads": "keep"}
    yield student | {"student.distill.heads": "adaptive", "classifier.classify.heads": "uniform"}
    if scale != "small":  # official is defined for the published widths
        yield student | {"student.distill.heads": "adaptive", "classifier.classify.heads": "official"}
    yield student | {"student.distill.heads": "resplit", "classifier.classify.heads": "keep"}
    # The teacher's number of heads in all blocks.
    yield {"student.model.heads": 4 if scale == "small" else 16, "student.distill.heads": "own"}


def sweep_last_block():
    """Treatment of the last block, of which distillation trains only q, k and v."""
    for choice in ("keep", "zero_init", "copy_previous", "drop"):
        yield {"classifier.classify.last_block": choice}
