"""Distillation of MAE ViT-B into a Tiny with 12 heads in every block, as MAE-lite's. Not run by us on ImageNet-1K.

The teacher has 12 heads as well, so no block needs adaptive heads. configs/finetune_t_lite.py fine-tunes the student.
FILE:attention is MAE-lite's own target in place of relations (arXiv 2205.14443; projects/mae_lite/
mae_lite_distill_exp.py): MSE of the attention maps of block 12, of both on the same visible quarter, beside MAE's loss,
at equal weights, for 400 epochs, with MAE's views. MAE-lite maps the student's heads by a learned 1x1 convolution here
too, where both have 12; ours compares them as they are.
"""

from configs import base


def get_config(target: str = "relations"):
    config = base.distill()
    config.model.variant = "Ti"
    config.model.heads = 12
    config.distill.teacher.name = "mae_vit_base"
    config.train.probe_every = "5 epochs"  # below 0.03 % of the FLOPs (docs/distill.md)
    if target == "attention":
        config.distill.target = "attention_map"
        config.distill.mask_ratio = 0.75
        config.distill.teacher.masked = True
        config.distill.mim_weight = 1.0
        config.distill.mim.decoder_dim = 96
        config.distill.mim.decoder_depth = 1
        config.distill.mim.decoder_heads = 3
        config.distill.jitter.brightness = 0.0
        config.distill.jitter.contrast = 0.0
        config.distill.jitter.saturation = 0.0
        config.model.drop_path = 0.0
        config.data.crop_scale = (0.08, 1.0)
        config.optim.warmup = "40 epochs"
        config.train.duration = "400 epochs"
    elif target != "relations":
        raise ValueError(f"configs/distill_t_lite.py:{target} is unknown. Choices: relations, attention")
    return config
