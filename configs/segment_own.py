"""Segmentation with masks of your own, on one GPU. FILE:t, FILE:s (the default) and FILE:b are the sizes.

  tinymim convert --from tinymim --input TinyMIM-PT-S.pth --output teachers/tinymim_s
  tinymim train --config configs/segment_own.py --workdir runs/leaves data.source=pairs:/data/leaves \\
    init=teachers/tinymim_s
  tinymim predict runs/leaves photo.jpg --output labels

/data/leaves has train/images, train/masks, val/images, val/masks, and classes.txt with a class a line (docs/data.md
has other layouts). The values are ours, for some hundred to some thousand images: the light decoder, which costs a
fortieth of UPerNet, batch 8, 20,000 steps, layer decay 0.75. Images are scaled to a short side of 512 pixels;
data.scale=None keeps their size, which small objects in large images need. If memory runs out, lower train.batch_size.
"""

from configs import base

SIZES = {"t": "Ti", "s": "S", "b": "B"}


def get_config(size: str = "s"):
    if size not in SIZES:
        raise ValueError(f"configs/segment_own.py:{size} is unknown. Choices: {', '.join(SIZES)}")
    config = base.segment()
    config.model.variant = SIZES[size]
    config.data.source = "pairs:YOUR_DATA"
    config.data.eval_split = "val"
    config.data.upright = True  # cameras store the orientation in EXIF
    config.optim.base_lr = 3.2e-3  # 1e-4 for a batch of 8
    config.optim.warmup = "500 steps"
    config.optim.clip_norm = 1.0  # gradients of a new head vary much between batches
    config.train.batch_size = 8
    config.train.duration = "20000 steps"
    config.train.eval_every = "2000 steps"
    config.segment.head = "light"
    config.segment.channels = 256
    return config
