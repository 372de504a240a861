"""Semantic segmentation of CamVid (11 classes, 367 training pictures), small enough for a CPU: docs/segmentation.md.

`configs/camvid.py:mae` pre-trains the encoder on the pictures alone, `:linear` and `:upernet` learn their masks.
"""

from configs import base

EXPERIMENTS = ("mae", "linear", "upernet")


def get_config(experiment: str = "linear"):
    """One of EXPERIMENTS."""
    if experiment not in EXPERIMENTS:
        raise ValueError(f"{experiment!r} is no experiment of configs/camvid.py; choices: {', '.join(EXPERIMENTS)}")
    config = _mae() if experiment == "mae" else _segment(experiment)
    config.data.source = "pairs:camvid"  # the folder with train, trainannot, val and valannot
    config.data.eval_split = "val"
    config.model.embed_dim, config.model.depth, config.model.heads = 128, 6, 4
    config.model.image_size = (128, 128)
    config.model.drop_path = 0.0
    config.model.dtype = "float32"
    config.checkpoint.every_minutes = 5.0
    return config


def _mae():
    config = base.mae()
    config.data.eval_resize = 146
    config.mae.decoder_dim, config.mae.decoder_depth, config.mae.decoder_heads = 64, 2, 4
    config.optim.base_lr = 4e-3  # 1e-3 for a batch of 64
    config.optim.warmup = "100 steps"
    config.train.batch_size = 64
    config.train.duration = "2000 steps"
    config.train.eval_every = "0 steps"
    return config


def _segment(head: str):
    config = base.segment()
    config.data.masks.classes = "camvid"
    config.data.scale = (240, 180)
    config.segment.head = head
    config.segment.channels = config.segment.auxiliary_channels = 64
    config.segment.evaluation.stride = (85, 85)
    config.optim.base_lr = 0.032  # 1e-3 for a batch of 8
    config.optim.warmup = "100 steps"
    config.optim.layer_decay = 1.0
    config.train.batch_size = 8
    config.train.duration = "1000 steps"
    config.train.eval_every = "0 steps"
    return config
