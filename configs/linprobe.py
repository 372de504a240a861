"""Linear probe on ImageNet-1K with MAE's published hyper-parameters: LARS, batch 16384. FILE:sgd is MoCo v3's recipe.

Name the encoder, a run or a converted file of any size, by init=runs/b. Images get new crops and flips in each epoch;
`tinymim probe` is the quick alternative without augmentation: it extracts features once and takes minutes.

Departures from MAE: batch norm uses statistics of the whole batch, or of each micro-batch with train.accumulate, not of
the 512 images on each GPU (train.accumulate=32 has micro-batches of that size); crops are torchvision's.
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
