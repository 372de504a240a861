"""Fine-tuning of TinyMIM-Tiny on ImageNet-1K.

The authors published no numbers for this size; learning rate, layer decay and drop path are ours.
Start from a run or a converted file: init=runs/tinymim_t.
Mixup, cutmix, RandAugment and random erasing are not in it yet.
"""

from configs import base


def get_config():
    config = base.classify()
    config.model.variant = "Ti"
    config.model.drop_path = 0.0
    config.optim.base_lr = 1e-3
    config.optim.layer_decay = 0.85
    return config
