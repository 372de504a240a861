"""Semantic segmentation of generated shapes, for `tinymim demo --segment`: about a minute on two cores."""

from configs import base


def get_config():
    """A small encoder with the linear head, from random weights."""
    config = base.segment()
    config.data.source = "pairs:shapes"
    config.data.eval_split = "val"
    config.data.scale = None
    config.data.scale_range = (0.8, 1.25)
    config.data.max_class_share = 0.9
    config.model.embed_dim, config.model.depth, config.model.heads = 96, 4, 4
    config.model.patch_size = 8
    config.model.image_size = (64, 64)
    config.model.drop_path = 0.0
    config.model.dtype = "float32"
    config.segment.head = "linear"
    config.segment.dropout = 0.0
    config.segment.evaluation.stride = (32, 32)
    config.optim.base_lr = 0.032  # 2e-3 for a batch of 16
    config.optim.warmup = "50 steps"
    config.optim.layer_decay = 1.0
    config.train.batch_size = 16
    config.train.duration = "400 steps"
    config.train.log_every = 100
    config.train.eval_every = "0 steps"
    return config
