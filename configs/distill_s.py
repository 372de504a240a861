"""TinyMIM-Small from MAE ViT-B (paper, section 4; models_tinymim.py: 6 heads, the last block has the teacher's)."""

from configs import base


def get_config():
    config = base.distill()
    config.model.variant = "S"
    config.model.heads = 6
    config.distill.teacher.name = "mae_vit_base"
    config.train.probe_every = "5 epochs"  # below 0.03 % of the FLOPs (docs/distill.md)
    return config
