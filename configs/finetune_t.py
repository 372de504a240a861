"""Fine-tuning of TinyMIM-Tiny on ImageNet-1K (75.8 in the paper).

The authors published no hyper-parameters for this size, only that learning rate and batch are larger than those of Base
(issue 5 of their repository). base_lr, layer_decay and drop_path are our choice: a smaller model overfits less, so the
first two are larger and the third is smaller. Epochs, batch, warm-up and augmentation are those published for Base.
Name the pre-trained student, a run or a converted file, by init=runs/tinymim_t.
"""

from configs import base


def get_config():
    config = base.classify()
    config.model.variant = "Ti"
    config.model.drop_path = 0.0
    config.optim.base_lr = 1e-3
    config.optim.layer_decay = 0.85
    config.data.rand_augment = "rand-m9-mstd0.5-inc1"
    config.classify.mixup = 0.8
    config.classify.cutmix = 1.0
    config.classify.erase = 0.25
    return config
