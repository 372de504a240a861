"""A linear probe of segmentation on ADE20K: batch norm and a 1 x 1 convolution on the patches of a frozen encoder.

  tinymim train --config configs/segment_linear.py --workdir runs/ade_linear init=teachers/mae_b model.variant=B

This is how DINOv2 and DINOv3 compare encoders (mIoU without decoder). Rate 1e-3, weight decay 1e-3, 40,000 steps,
batch 16 and dropout 0.1 are DINOv3's; the schedule is ours. The head reads the last block behind the final norm. Of an
encoder that was distilled by relations the last block is not trained (docs/segmentation_networks.md): probe block 11 by
segment.taps=(11,), or fine-tune it first. model.variant must be the size of the encoder.
"""

from configs import segment_s


def get_config():
    config = segment_s.get_config()
    config.model.drop_path = 0.0
    config.optim.base_lr = 1.6e-2  # 1e-3 for a batch of 16
    config.optim.weight_decay = 1e-3
    config.optim.layer_decay = 1.0
    config.train.duration = "40000 steps"
    config.train.eval_every = "8000 steps"
    config.segment.head = "linear"
    config.segment.frozen_encoder = True
    config.segment.relative_bias = False
    config.segment.layer_scale = False
    return config
