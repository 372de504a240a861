"""Experiments on CIFAR-10 at 32 px, patch 4: the small scale of configs/study/. All values are ours.

FILE:mae_teacher, FILE:mae_student, FILE:distill and FILE:finetune name the four. The pictures come from TFDS
(`tinymim prepare cifar10`) or from folders train/ and test/: data.source=folder:/data/cifar10.
"""

from configs import base

IMAGE_SIZE = (32, 32)


def get_config(experiment: str = "distill"):
    make = {"mae_teacher": mae_teacher, "mae_student": mae_student, "distill": distill, "finetune": finetune}
    if experiment not in make:
        raise ValueError(f"configs/cifar10.py:{experiment} is unknown. Choices: {', '.join(make)}")
    return make[experiment]()


def mae_teacher():
    """A teacher of 192 x 12 blocks, 5.4 M parameters."""
    config = _decoder(_small(base.mae()))
    config.model.variant = "Ti"
    config.train.duration = "400 epochs"
    config.optim.warmup = "20 epochs"
    return config


def mae_student():
    """MAE directly on the student: what distillation has to beat."""
    config = _decoder(_student(_small(base.mae())))
    config.train.duration = "200 epochs"
    config.optim.warmup = "10 epochs"
    return config


def distill():
    """TinyMIM. Needs distill.teacher.path."""
    config = _student(_small(base.distill()))
    config.model.drop_path = 0.1
    config.distill.teacher.tap = 9  # of 12, as 18 of 24
    config.distill.mim.decoder_dim = 96
    config.distill.mim.decoder_depth = 2
    config.distill.mim.decoder_heads = 4
    config.train.duration = "200 epochs"
    config.optim.warmup = "10 epochs"
    return config


def finetune():
    """A classifier; init names a pre-trained student; empty: from scratch."""
    config = _student(_small(base.classify()))
    config.model.drop_path = 0.1
    config.data.crop_scale = (0.5, 1.0)
    config.optim.layer_decay = 0.85
    config.classify.mixup = 0.2
    config.train.duration = "100 epochs"
    config.optim.warmup = "5 epochs"
    return config


def _small(config):
    config.model.image_size = IMAGE_SIZE
    config.model.patch_size = 4
    config.data.source = "cifar10"
    config.data.eval_split = "test"
    config.data.eval_resize = IMAGE_SIZE[0]
    config.optim.base_lr = 1e-3
    config.train.batch_size = 512
    config.train.eval_every = "20 epochs"
    return config


def _student(config):
    """96 x 12 blocks, 1.3 M parameters: a quarter of the teacher."""
    config.model.variant = "pico"
    return config


def _decoder(config):
    config.mae.decoder_dim = 96
    config.mae.decoder_depth = 2
    config.mae.decoder_heads = 4
    return config
