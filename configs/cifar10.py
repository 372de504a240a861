"""Experiments of docs/replication.md: the models of configs/digits.py on CIFAR-10, 32 x 32 pixels, patches of 4.

There are four: FILE:mae_teacher, FILE:mae_student, FILE:distill and FILE:finetune.
"""

from configs import digits


def get_config(experiment: str = "distill"):
    config = digits.get_config(experiment)
    config.data.source = "cifar10"
    config.data.flip = True
    config.data.crop_scale = (0.2, 1.0)
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.train.batch_size = 128
    if experiment == "finetune":
        config.data.examples = 10_000
        config.data.train_split = "train[:90%]"
        config.data.eval_split = "train[90%:]"  # for choosing learning rates; the test split is for the final figure
        config.data.crop_scale = (0.5, 1.0)
        config.optim.base_lr = 4e-3
        config.train.duration = "500 steps"
    else:
        config.data.eval_split = "test[:1000]"  # the loss only; pre-trained models are compared after fine-tuning
        config.optim.base_lr = 8e-3 if experiment == "distill" else 3e-3
        config.train.duration = "1500 steps" if experiment == "mae_teacher" else "1000 steps"
    config.optim.warmup = "100 steps" if experiment != "finetune" else "50 steps"
    return config
