"""TinyMIM-Base from MAE ViT-L (paper, section 4; models_tinymim.py: 12 heads, the last block has the teacher's)."""

from configs import base


def get_config():
    config = base.distill()
    config.model.variant = "B"
    config.model.heads = 12
    config.distill.teacher.name = "mae_vit_large"
    config.train.probe_every = "5 epochs"  # below 0.03 % of the FLOPs (docs/distill.md)
    return config
