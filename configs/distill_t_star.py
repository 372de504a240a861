"""TinyMIM*-T, first stage: distillation of TinyMIM-Small into a Tiny with 12 heads. finetune_t_star.py is the second.

Published: 300 epochs from TinyMIM-Small (paper, table 3); 12 heads in every block (the authors' segmentation code).
Not published: the code of this pre-training. The authors use the distillation token in fine-tuning (issue 6 of their
repository) and none of their pre-training classes has one, so here it is added in the second stage. With
model.dist_token=True it exists from the start; relations are those of CLS and patch tokens in both cases.
Everything else is as for the other sizes.
"""

from configs import base


def get_config():
    config = base.distill()
    config.model.variant = "Ti"
    config.model.heads = 12
    config.distill.teacher.name = "tinymim_vit_small"
    config.train.probe_every = "5 epochs"  # below 0.03 % of the FLOPs (docs/distill.md)
    return config
