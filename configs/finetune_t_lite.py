"""Fine-tuning of a Tiny with MAE-lite's recipe: weak augmentation and a long schedule. Not run by us on ImageNet-1K.

MAE-lite (arXiv 2205.14443) reports 75.8 for this recipe from random weights, 78.0 after MAE and 78.4 after MAE with
distilled attention maps, all with 12 heads. Its code (projects/eval_tools/finetuning_exp.py of wangsr126/MAE-Lite on
GitHub) has base_lr 1e-3 per 256, layer decay 0.85, 300 epochs, 5 of them warm-up, RandAugment of magnitude 10, mixup
0.2, and neither cutmix, label smoothing, random erasing nor drop path.

FILE:s and FILE:b revisit the other sizes. s is G2SD's (arXiv 2302.14771; G2SD/SD.sh in github.com/pengzhiliang/G2SD):
base_lr 1e-3, layer decay 0.75, 200 epochs, no drop path, mixup 0.8, cutmix 1.0, erasing 0.25; without its supervised
teacher. b is DMAE's (arXiv 2208.12256; finetune.sh in github.com/UCSC-VLAA/DMAE): 100 epochs, base_lr 5e-4, drop path
0.1; its layer decay is the default of its main_finetune.py, 0.7.

Name the pre-trained student by init=runs/t; heads are those of its pre-training (configs/distill_t_lite.py has 12).
"""

from configs import finetune_b, finetune_s, finetune_t


def get_config(size: str = "t"):
    make = {"t": tiny, "s": small, "b": base}
    if size not in make:
        raise ValueError(f"configs/finetune_t_lite.py:{size} is unknown. Choices: {', '.join(make)}")
    return make[size]()


def tiny():
    config = finetune_t.get_config()
    config.train.duration = "300 epochs"
    config.data.rand_augment = "rand-m10-mstd0.5-inc1"
    config.classify.mixup = 0.2
    config.classify.cutmix = 0.0
    config.classify.label_smoothing = 0.0
    config.classify.erase = 0.0
    return config


def small():
    config = finetune_s.get_config()
    config.model.drop_path = 0.0
    config.train.duration = "200 epochs"
    return config


def base():
    config = finetune_b.get_config()
    config.model.drop_path = 0.1
    config.optim.layer_decay = 0.7
    return config
