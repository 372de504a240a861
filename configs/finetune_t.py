"""Fine-tuning of TinyMIM-Tiny on ImageNet-1K (75.8 in the paper).

The authors published no numbers for this size, only that rate and batch are larger than those of Base (issue 5 of their
repository). Ours: base_lr, layer_decay and drop_path; a smaller network overfits less and has more to learn anew, hence
more of the first two and less of the third. As published for Base: epochs, batch, warm-up and augmentation.
Start from a run or a converted file: init=runs/tinymim_t.
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
