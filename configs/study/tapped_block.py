"""Which block of the teacher is the target (paper, table on the target block)."""

from configs.study.pipeline import two_stages

# Block of MAE-L's 24: top-1 of TinyMIM-B after 100 epochs, mIoU on ADE20K.
PAPER = {12: (83.6, 48.7), 15: (84.1, 49.8), 18: (84.6, 52.2), 21: (84.8, 50.6), 24: (84.4, 50.0)}


def get_chain(scale: str = ""):
    return two_stages(scale)


def sweep(scale: str):
    if scale == "small":
        for block in (2, 3, 4, 5, 6):  # of 6
            yield {"student.distill.teacher.tap": block}
        return
    for block, (top1, miou) in PAPER.items():
        yield {"student.distill.teacher.tap": block, "note.paper": top1, "note.paper_miou": miou}
