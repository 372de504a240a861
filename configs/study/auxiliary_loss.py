"""MAE's loss in addition to distillation (paper, table on the auxiliary loss)."""

from configs.study.pipeline import two_stages


def get_chain(scale: str = ""):
    return two_stages(scale)


SMALL_DECODER = {
    "student.distill.mim.decoder_dim": 64,
    "student.distill.mim.decoder_depth": 2,
    "student.distill.mim.decoder_heads": 4,
}


def sweep(scale: str):
    decoder = SMALL_DECODER if scale == "small" else {}
    yield {"student.distill.mask_ratio": 0.0, "student.distill.mim_weight": 0.0, "note.paper": 84.6}
    yield {"student.distill.mask_ratio": 0.75, "student.distill.mim_weight": 0.0, "note.paper": 83.9}
    yield {"student.distill.mask_ratio": 0.75, "student.distill.mim_weight": 1.0, "note.paper": 84.0} | decoder
