"""Fine-tuning on images of your own: 5,000 to 200,000 of them, on one GPU.

  tinymim convert --from tinymim --input TinyMIM-PT-S.pth --output teachers/tinymim_s
  tinymim train --config configs/own_images.py --workdir runs/pets data.source=folder:/data/pets init=teachers/tinymim_s
  tinymim predict runs/pets cat.jpg

FILE:t, FILE:s (the default) and FILE:b are the sizes; FILE:pico, FILE:nano and FILE:hybrid (nano with a convolutional
stem) are smaller. init names a student of that size, yours or the authors'.
FILE:s,8000 gives the number of images, which sets the number of epochs: 100 for 50,000 images, proportional to the
inverse square root of their number (250 for 8,000). A tenth of the images is held out for evaluation; if folders define
the splits, set data.train_split=train data.eval_split=val. If memory runs out, set train.accumulate=4. Values that
differ from configs/finetune_*.py are our choice.
"""

import math

from configs import finetune_b, finetune_s, finetune_t

SMALLER = {"pico": "pico", "nano": "nano", "hybrid": "nano"}  # with the recipe of Tiny
SIZES = {"t": finetune_t, "s": finetune_s, "b": finetune_b} | dict.fromkeys(SMALLER, finetune_t)


def get_config(argument: str = "s"):
    size, comma, images = argument.partition(",")
    if size not in SIZES or (comma and not (images.isdigit() and int(images))):
        raise ValueError(
            f"configs/own_images.py:{argument} is unknown. Choices: {', '.join(SIZES)}, or with images: s,8000"
        )
    config = SIZES[size].get_config()
    if size in SMALLER:
        config.model.variant = SMALLER[size]
    if size == "hybrid":
        config.model.stem, config.model.depth = "conv", 11
    config.data.source = "folder:YOUR_IMAGES"
    config.data.train_split = "all[:90%]"
    config.data.eval_split = "all[90%:]"
    config.data.upright = True  # cameras store the orientation in EXIF
    if size not in SMALLER:
        config.model.drop_path = max(0.1, config.model.drop_path)  # small sets overfit sooner
    # With a larger batch, small sets would get too few updates.
    config.train.batch_size = 256
    config.train.duration = f"{_epochs(int(images or 50_000))} epochs"
    config.train.ema = 0.999  # averages over about a thousand updates
    config.optim.clip_norm = 1.0  # gradients of a new head on few classes vary much between batches
    return config


def _epochs(images: int) -> int:
    """Epochs for this many images: between 40 and 300, a multiple of 10."""
    return min(300, max(40, round(10 * math.sqrt(50_000 / images)) * 10))
