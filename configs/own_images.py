"""Fine-tuning on images of your own: 5,000 to 200,000 of them, on one GPU.

  tinymim convert --from tinymim --input TinyMIM-PT-S.pth --output teachers/tinymim_s
  tinymim train --config configs/own_images.py --workdir runs/pets data.source=folder:/data/pets init=teachers/tinymim_s
  tinymim predict runs/pets cat.jpg

FILE:t, FILE:s (the default) and FILE:b are the sizes; init is a student of that size, yours or the authors'. With
FILE:s,8000 you say how many images there are: fewer are seen more often (100 epochs at 50,000, and as the inverse root
of the number: 250 at 8,000). A tenth of the images is held out, unless folders say what is: data.train_split=train
data.eval_split=val. If memory runs out: train.accumulate=4. Numbers that differ from configs/finetune_*.py are ours.
"""

import math

from configs import finetune_b, finetune_s, finetune_t

SIZES = {"t": finetune_t, "s": finetune_s, "b": finetune_b}


def get_config(argument: str = "s"):
    size, comma, images = argument.partition(",")
    if size not in SIZES or (comma and not (images.isdigit() and int(images))):
        raise ValueError(f"configs/own_images.py:{argument} is unknown. Choices: t, s, b, or with images: s,8000")
    config = SIZES[size].get_config()
    config.data.source = "folder:YOUR_IMAGES"
    config.data.train_split = "all[:90%]"
    config.data.eval_split = "all[90%:]"
    config.data.upright = True  # photographs out of a camera lie as their EXIF says
    config.model.drop_path = max(0.1, config.model.drop_path)  # a small set is learned by heart sooner
    # The rate is that of batch 256; a larger batch would leave small sets too few updates.
    config.train.batch_size = 256
    config.train.duration = f"{_epochs(int(images or 50_000))} epochs"
    config.train.ema = 0.999  # of some thousand updates; the average is what is evaluated
    config.optim.clip_norm = 1.0  # a fresh head on few classes: single batches are far off
    return config


def _epochs(images: int) -> int:
    """Between 40 and 300, in tens."""
    return min(300, max(40, round(10 * math.sqrt(50_000 / images)) * 10))
