"""UPerNet with TinyMIM-Base on ADE20K: the published recipe (52.2 mIoU in the paper, at 144,000 of 160,000 steps).

  tinymim train --config configs/segment_b.py --workdir runs/ade_b init=runs/b_finetuned \\
    data.source=pairs:/data/ADEChallengeData2016

Published (the release's config and log for B): UPerNet of 768 channels, FCN head of 256 with weight 0.4, taps 4, 6, 8
and 12, crops of 512, batch 16, AdamW 1e-4 with weight decay 0.05, layer decay 0.75, drop path 0.1, 1,500 steps of
warm-up. The release starts from the pre-trained encoder with 12 heads in every block: segment.heads=official does so;
here the heads are kept as they were pre-trained. Weight decay leaves out the CLS token, positions and relative biases,
as was meant there; optim.no_decay=official decays them as the released code does.
"""

from configs import base


def get_config():
    config = base.segment()
    config.model.variant = "B"
    config.data.source = "pairs:ADEChallengeData2016"
    config.data.train_split = "training"
    config.data.masks.classes = "ade20k"
    return config
