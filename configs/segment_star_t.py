"""UPerNet with TinyMIM*-T, fine-tuned, on ADE20K (45.0 mIoU in the paper).

  tinymim train --config configs/segment_star_t.py --workdir runs/ade_star init=runs/t_star_finetuned

Published: tokens CLS, DIST and patches, 12 heads, the layer of width 1280 behind the last block, which is taken from
the fine-tuned checkpoint, a pyramid of four times the encoder's width, layer decay 0.8. The released config cannot run
as written: its UPerNet expects maps of the encoder's width, 192, and the pyramid makes 768. Here the head takes what
the pyramid makes, and has 768 channels as the others: 87.3 M parameters with 150 classes.
"""

from configs import segment_t


def get_config():
    config = segment_t.get_config()
    config.model.heads = 12
    config.model.dist_token = True
    config.optim.layer_decay = 0.8
    config.segment.pyramid = "star"
    config.segment.widen = 1280
    return config
