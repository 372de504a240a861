"""Fine-tuning of TinyMIM-Base on ImageNet-1K with the published hyper-parameters (85.0 in the paper).

Name the pre-trained student, a run or a converted file, by init=runs/tinymim_b.
"""

from configs import base


def get_config():
    config = base.classify()
    config.model.variant = "B"
    config.model.drop_path = 0.2
    config.optim.layer_decay = 0.65
    config.data.rand_augment = "rand-m9-mstd0.5-inc1"
    config.classify.mixup = 0.8
    config.classify.cutmix = 1.0
    config.classify.erase = 0.25
    return config
