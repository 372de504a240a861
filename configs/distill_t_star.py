"""TinyMIM*-T, first stage: TinyMIM of a Tiny with 12 heads in every block. The second is finetune_t_star.py.

Published: 300 epochs from TinyMIM-Small (paper, table 3); 12 heads in every block (the release's segmentation code).
The authors released no pre-training of it. Their distillation token belongs to fine-tuning (issue 6 of their
repository), and no pre-training class of theirs has one, so it is new in the second stage. model.dist_token=True has it
from the start; relations are of CLS and patches all the same. Everything else is ours, as for the other sizes.
"""

from configs import base


def get_config():
    config = base.distill()
    config.model.variant = "Ti"
    config.model.heads = 12
    config.distill.teacher.name = "tinymim_vit_small"
    return config
