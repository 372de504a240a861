"""MAE pre-training of ViT-L on ImageNet-1K (MAE release, PRETRAIN.md): the teacher of TinyMIM-Base."""

from configs import base


def get_config():
    config = base.mae()
    config.model.variant = "L"
    config.train.probe_every = "5 epochs"  # below 0.03 % of the FLOPs (docs/distill.md)
    config.model.scan = True
    config.model.remat = "dots"
    return config
