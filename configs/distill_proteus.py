"""Proteus: DINOv2 B/14 into S/14 by CLS, features and hidden patches (arXiv 2407.10366). Not run at ImageNet scale.

From the authors' code (github.com/BeSpontaneous/Proteus-pytorch, pretrain/models_proteus_dinov2.py, run_pretrain.sh):
tokens after the final norm of both, a LayerNorm and a Linear on the student's, mean squared errors, all of weight 1:
  token    of the CLS token
  feature  of all tokens; its CLS passes the head of the first term, so that it is that term once more, with the weight
           of one token among all
  patch    of half of the patches, which the student sees as a learned token, with a head of its own
RandAugment and crops of 8 to 100 % of the image, the same for both; AdamW at 5e-4 for 512 images, 5 epochs of warm-up.

Departures: every image has hidden patches (theirs: half of each batch); no random erasing, no repeated augmentation and
no LayerScale, which starts at 1 there; the learning rate starts from 0 and not 1e-6.
"""

from configs import base

SIZE, PATCH = 224, 14


def get_config():
    config = base.distill()
    config.model.variant = "S"
    config.model.patch_size = PATCH
    config.model.image_size = (SIZE, SIZE)
    config.model.pos_embed = "learned"
    config.model.drop_path = 0.0
    config.distill.teacher.name = "dinov2_vit_base"
    config.distill.target = target((SIZE // PATCH) ** 2)
    config.distill.heads = "own"
    for view in (config.distill.jitter, config.distill.teacher.jitter):
        view.brightness = view.contrast = view.saturation = 0.0
    config.data.crop_scale = (0.08, 1.0)
    config.data.rand_augment = "rand-m9-mstd0.5-inc1"
    config.optim.base_lr = 2.5e-4
    config.optim.b2 = 0.999
    config.optim.warmup = "5 epochs"
    config.optim.final_lr = 1e-5
    config.train.batch_size = 512
    return config


def target(patches: int) -> str:
    """The three terms as a sum of targets, for so many patches."""
    head = "final=true, loss=mse, norm=none, adapter=norm_linear"
    tokens = patches + 1
    return (
        f"cls({head}):{1 + 1 / tokens} + output({head}, patches=true):{patches / tokens} + output({head}, hidden=0.5):1"
    )
