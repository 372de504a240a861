"""MAE pre-training of ViT-B on ImageNet-1K (MAE release, PRETRAIN.md): the teacher of TinyMIM-Small and -Tiny."""

from configs import base


def get_config():
    config = base.mae()
    config.model.variant = "B"
    config.train.probe_every = "5 epochs"  # below 0.03 % of the FLOPs (docs/distill.md)
    return config
