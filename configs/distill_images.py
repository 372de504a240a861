"""Distillation on images of your own; `tinymim distill` uses it and chooses the rest.

  tinymim train --config configs/distill_images.py:s,5k --workdir runs/pets data.source=folder:/data/pets \\
    distill.teacher.path=teachers/mae_vit_base

FILE:SIZE,PRESET: sizes are pico, nano, hybrid (nano with a convolutional stem), t, s (the default) and b; presets are
5k, 50k (the default) and 1M, the nearest number of training images. From 50k to 1M, epochs, batch and learning rate
approach the published ones (1M: those of the paper). Values for fewer images are our choice: as small sets give few
updates per epoch, batches are smaller, epochs more, and the peak learning rate follows the square root of the batch.
Labels are not used.
"""

from configs import base

SIZES = {"pico": "pico", "nano": "nano", "hybrid": "nano", "t": "Ti", "s": "S", "b": "B"}

# Images, epochs, batch, base_lr (for 256 images), epochs of warm-up.
PRESETS = {
    "5k": (5_000, 800, 256, 1e-3, 40),
    "50k": (50_000, 400, 1024, 5e-4, 20),
    "1M": (1_000_000, 300, 4096, 1.5e-4, 15),
}


def get_config(argument: str = "s,50k"):
    size, _, preset = argument.partition(",")
    preset = preset or "50k"
    if size not in SIZES or preset not in PRESETS:
        raise ValueError(
            f"configs/distill_images.py:{argument} is unknown. Sizes: {', '.join(SIZES)}; presets: "
            f"{', '.join(PRESETS)}; write them as s,50k"
        )
    _, epochs, batch, rate, warmup = PRESETS[preset]
    config = base.distill()
    config.model.variant = SIZES[size]
    if size == "hybrid":
        config.model.stem = "conv"
        config.model.depth = 11  # as in arXiv 2106.14881, the stem takes the place of a block
    config.model.drop_path = 0.1 if size in ("s", "b") else 0.0  # small students underfit
    config.data.source = "folder:YOUR_IMAGES"
    config.data.train_split = "all[:90%]"
    config.data.eval_split = "all[90%:]"
    config.data.upright = True  # cameras store the orientation in EXIF
    config.train.batch_size = batch
    config.train.duration = f"{epochs} epochs"
    config.train.eval_every = f"{epochs // 10} epochs"
    config.optim.base_lr = rate * (2 if size in ("pico", "nano", "hybrid") else 1)  # narrow networks take larger steps
    config.optim.warmup = f"{warmup} epochs"
    config.optim.clip_norm = 1.0
    return config
