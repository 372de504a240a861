"""Small experiments on 1,797 handwritten digits, which take minutes on two cores. `make demo` runs all of them.

There are four: FILE:mae_teacher, FILE:mae_student, FILE:distill and FILE:finetune.
"""

from configs import base

# Scans of 8 x 8 pixels are enlarged to this. Crops preserve a digit; mirroring does not, so flip is off.
IMAGE_SIZE = (32, 32)


def get_config(experiment: str = "distill"):
    make = {"mae_teacher": mae_teacher, "mae_student": mae_student, "distill": distill, "finetune": finetune}
    if experiment not in make:
        raise ValueError(f"configs/digits.py:{experiment} is unknown. Choices: {', '.join(make)}")
    return make[experiment]()


def sweep():
    """Two learning rates of fine-tuning, for `tinymim sweep configs/digits.py:finetune`."""
    for rate in (1.6e-2, 3.2e-2):
        yield {"optim.base_lr": rate}


def study(trial):
    """The search space of `tinymim sweep configs/digits.py:finetune --study study`."""
    return {"optim.base_lr": trial.suggest_float("base_lr", 4e-3, 6.4e-2, log=True)}


def mae_teacher():
    """MAE pre-training of the teacher: width 128, 6 blocks, 1.2 M parameters."""
    config = _small(base.mae())
    config.model.variant = "nano"
    config.model.depth = 6
    config.optim.base_lr = 4e-3
    config.train.duration = "700 steps"
    config.optim.warmup = "70 steps"
    return _decoder(config)


def mae_student():
    """MAE pre-training of the student itself, the baseline of distillation."""
    config = _decoder(_student(_small(base.mae())))
    config.optim.base_lr = 4e-3
    config.train.duration = "500 steps"
    config.optim.warmup = "50 steps"
    return config


def distill():
    """TinyMIM: the student learns the teacher's token relations. Name the teacher by distill.teacher.path."""
    config = _student(_small(base.distill()))
    config.model.drop_path = 0.0
    config.distill.teacher.tap = 4  # of 6; the last blocks are specialised for MAE's decoder
    config.optim.base_lr = 1.6e-2
    config.train.duration = "500 steps"
    config.optim.warmup = "50 steps"
    return config


def finetune():
    """Fine-tuning on 100 labels, ten of each digit. init names a pre-trained student; empty: from scratch."""
    config = _student(_small(base.classify()))
    config.model.drop_path = 0.0
    config.data.examples = 100
    config.data.train_split = "train[:80%]"
    config.data.eval_split = "train[80%:]"  # for choosing learning rates; the test split is for the final figure
    config.data.crop_scale = (0.6, 1.0)
    config.train.batch_size = 32
    config.optim.base_lr = 1.6e-2
    config.optim.warmup = "15 steps"
    config.train.duration = "150 steps"
    return config


def _small(config):
    config.model.image_size = IMAGE_SIZE
    config.model.patch_size = 4
    config.model.dtype = "float32"
    config.data.source = "digits"
    config.data.eval_split = "test"
    config.data.eval_resize = IMAGE_SIZE[0]
    config.data.flip = False
    config.data.crop_scale = (0.5, 1.0)
    config.data.mean = (0.5, 0.5, 0.5)
    config.data.std = (0.5, 0.5, 0.5)
    config.train.batch_size = 64
    config.train.eval_every = "0 epochs"
    return config


def _student(config):
    """Width 48, 4 blocks: 0.12 M parameters, a tenth of the teacher."""
    config.model.variant = "pico"
    config.model.embed_dim = 48
    config.model.depth = 4
    return config


def _decoder(config):
    config.mae.decoder_dim = 64
    config.mae.decoder_depth = 2
    config.mae.decoder_heads = 4
    return config
