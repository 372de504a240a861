"""Linear probe on ImageNet-1K with the published numbers of MAE: LARS, batch 16384. FILE:sgd is the one of MoCo v3.

Start from a run or a converted file, of any size: init=runs/b. Images are cropped and flipped anew in each epoch;
`tinymim probe` does without that, on features that are extracted once, in minutes.

Departures: batch norm takes its statistics over the whole batch, or over each of train.accumulate parts of it, where
the authors' runs do over the 512 images of each GPU (train.accumulate=32 is near that); crops are torchvision's.
"""

from configs import base


def get_config(recipe: str = "lars"):
    config = base.probe()
    if recipe == "sgd":
        config.optim.name = "sgd"
        config.optim.warmup = "0 epochs"
        config.train.batch_size = 1024
    elif recipe != "lars":
        raise ValueError(f"configs/linprobe.py:{recipe} is unknown. Choices: lars, sgd")
    return config
