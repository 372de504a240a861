"""Fine-tuning of TinyMIM-Base on ImageNet-1K with the published numbers.

Start from a run or a converted file: init=runs/tinymim_b.
Mixup, cutmix, RandAugment and random erasing are not in it yet.
"""

from configs import base


def get_config():
    config = base.classify()
    config.model.variant = "B"
    config.model.drop_path = 0.2
    config.optim.layer_decay = 0.65
    return config
