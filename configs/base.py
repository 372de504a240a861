"""Every key of an experiment, with what it means. Nothing here depends on where the experiment runs.

Experiments are the other files of this folder: each starts from distill(), mae(), probe() or classify().

Durations are written "300 epochs" or "700 steps". Learning rates are given for 256 images and scaled by the batch.
Values are those of TinyMIM's pre-training unless a comment says otherwise.
"""

import ml_collections
from ml_collections import config_dict


def common(task: str) -> ml_collections.ConfigDict:
    """What all tasks have."""
    config = ml_collections.ConfigDict()
    config.task = task  # mae | distill | classify | probe
    config.seed = 0  # everything random follows from it
    config.init = ""  # checkpoint that the weights start from; empty: from scratch

    config.model = ml_collections.ConfigDict()
    config.model.variant = "S"  # pico | nano | Ti | S | B | L | H
    config.model.embed_dim = config_dict.placeholder(int)  # None: as the variant has it
    config.model.depth = config_dict.placeholder(int)
    config.model.heads = config_dict.placeholder(object)  # one number, or one for each block
    config.model.patch_size = 16
    config.model.image_size = (224, 224)  # height, width
    config.model.mlp_ratio = 4.0
    config.model.dist_token = False  # a second learned token behind CLS, of classify.distillation; see TinyMIM*-T
    config.model.pos_embed = "sincos"  # sincos: fixed | learned: starts as sincos
    config.model.drop_path = 0.1
    config.model.drop_path_schedule = "constant"  # constant: all but the last block | linear
    config.model.dtype = "bfloat16"  # of the computation; parameters are float32
    config.model.scan = False  # compile one block instead of all: for L and H
    config.model.remat = "none"  # none | dots | full: what the backward pass computes again to save memory

    config.data = ml_collections.ConfigDict()
    config.data.source = "imagenet2012"  # a TFDS set, "digits", or folder: | tar: | parquet: | array_record:LOCATION
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.examples = 0  # train on this many, evenly over the classes; 0: all
    config.data.crop_scale = (0.2, 1.0)  # RandomResizedCrop
    config.data.crop_ratio = (3 / 4, 4 / 3)
    config.data.flip = True
    config.data.crops = 1  # views of each decoded image in a batch; each counts as an example
    config.data.upright = False  # turn pictures as their EXIF says; the published recipes do not
    config.data.rand_augment = ""  # after crop and flip, such as "rand-m9-mstd0.5-inc1" (timm's strings); empty: off
    config.data.eval_resize = 256  # short side before the centre crop
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)

    config.optim = ml_collections.ConfigDict()
    config.optim.name = "adamw"  # adamw | sgd | lars
    config.optim.base_lr = 1.5e-4
    config.optim.warmup = "15 epochs"
    config.optim.final_lr = 0.0
    config.optim.b1 = 0.9  # b1, b2, eps: of adamw
    config.optim.b2 = 0.95
    config.optim.eps = 1e-8
    config.optim.momentum = 0.9  # of sgd and lars
    config.optim.nesterov = False  # of sgd
    config.optim.trust = 0.001  # of lars: norm of an update over that of its parameter, before the learning rate
    config.optim.weight_decay = 0.05  # adamw: a part of the update; sgd and lars: added to the gradient
    config.optim.no_decay = "pretrain"  # pretrain: 1-D parameters | finetune: and CLS token, position table
    config.optim.layer_decay = 1.0
    config.optim.clip_norm = 0.0  # 0: off

    config.train = ml_collections.ConfigDict()
    config.train.batch_size = 4096
    config.train.duration = "300 epochs"
    config.train.accumulate = 1  # work the batch off in this many parts
    config.train.ema = 0.0  # decay of a moving average of the weights; 0: off
    config.train.log_every = 50  # steps
    config.train.eval_every = "20 epochs"  # "0 epochs": only at the end
    config.train.max_skipped = 10  # updates in a row that may be skipped as not finite; 0: stop at the first

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_minutes = 10.0
    config.checkpoint.keep = 3
    return config


def distill() -> ml_collections.ConfigDict:
    """TinyMIM pre-training."""
    config = common("distill")
    config.distill = ml_collections.ConfigDict()
    config.distill.target = "qk_vv"  # relations qk, qq, kk, vv joined by _ | a row of FEATURES (targets.py)
    config.distill.relation_loss = "kl"  # of relations: kl (of their softmax) | smooth_l1 | mse (of scaled products)
    config.distill.feature_loss = "smooth_l1"  # of features: smooth_l1 | mse | cosine
    config.distill.beta = 2.0  # where smooth_l1 turns linear
    config.distill.student_tap = config_dict.placeholder(int)  # block counted from 1; None: the last
    # In place of student_tap and teacher.tap: ((student block, teacher block, weight), ...)
    config.distill.taps = config_dict.placeholder(object)
    # adaptive: the student's tapped blocks have the teacher's heads (published) | own: as model.heads says, which must
    # be the teacher's for relations | resplit: as model.heads says, and relations of q, k, v cut anew into equal heads
    config.distill.heads = "adaptive"
    config.distill.relation_heads = config_dict.placeholder(int)  # of resplit; None: as many as the teacher's
    config.distill.mask_ratio = 0.0  # share of patches hidden from the student; only visible ones are compared
    config.distill.mim_weight = 0.0  # of MAE's loss on the hidden patches, added to the distillation's; 0: off
    config.distill.mim = ml_collections.ConfigDict()  # its decoder, as in mae()
    config.distill.mim.decoder_dim = 512
    config.distill.mim.decoder_depth = 8
    config.distill.mim.decoder_heads = 16
    config.distill.mim.normalize_pixels = True
    config.distill.jitter = ml_collections.ConfigDict()  # of the student's view
    config.distill.jitter.brightness = 0.4
    config.distill.jitter.contrast = 0.4
    config.distill.jitter.saturation = 0.4
    config.distill.teacher = ml_collections.ConfigDict()
    config.distill.teacher.name = ""  # a row of TEACHERS: its tapped block, its address; empty: any checkpoint
    config.distill.teacher.path = ""  # what `tinymim convert` wrote, or a run of ours
    config.distill.teacher.tap = config_dict.placeholder(int)  # None: the row's, or the last block
    config.distill.teacher.image_size = config_dict.placeholder(object)  # (height, width); None: as the student's
    # Of the teacher's pixels, as data.mean and std are of the student's; None: from its model.json, or else ImageNet's
    config.distill.teacher.mean = config_dict.placeholder(object)
    config.distill.teacher.std = config_dict.placeholder(object)
    config.distill.teacher.masked = False  # hide the student's hidden patches from the teacher too
    config.distill.teacher.drop_path = 0.0  # by model.drop_path_schedule
    config.distill.teacher.jitter = ml_collections.ConfigDict()  # of its view, drawn apart from the student's; 0: clean
    config.distill.teacher.jitter.brightness = 0.0
    config.distill.teacher.jitter.contrast = 0.0
    config.distill.teacher.jitter.saturation = 0.0
    return config


def mae() -> ml_collections.ConfigDict:
    """MAE pre-training (arXiv 2111.06377)."""
    config = common("mae")
    config.model.drop_path = 0.0
    config.optim.warmup = "40 epochs"
    config.train.duration = "800 epochs"
    config.mae = ml_collections.ConfigDict()
    config.mae.mask_ratio = 0.75
    config.mae.normalize_pixels = True  # compare with each patch's own mean and deviation
    config.mae.decoder_dim = 512
    config.mae.decoder_depth = 8
    config.mae.decoder_heads = 16
    return config


def probe() -> ml_collections.ConfigDict:
    """A linear head on a frozen encoder, as MAE's authors judge theirs (main_linprobe.py). init names the encoder."""
    config = common("probe")
    for name in set(config.model) - {"image_size", "dtype", "scan"}:
        del config.model[name]  # as the checkpoint has it
    config.data.crop_scale = (0.08, 1.0)
    config.optim.name = "lars"
    config.optim.base_lr = 0.1
    config.optim.warmup = "10 epochs"
    config.optim.weight_decay = 0.0
    config.train.batch_size = 16384
    config.train.duration = "90 epochs"
    config.train.eval_every = "10 epochs"
    config.probe = ml_collections.ConfigDict()
    config.probe.pool = "cls"  # cls: the CLS token after the final norm | mean: of the patch tokens, then a norm
    config.probe.head_std = 0.01
    return config


def classify() -> ml_collections.ConfigDict:
    """Fine-tuning of an encoder with a new head."""
    config = common("classify")
    config.model.pos_embed = "learned"
    config.model.drop_path_schedule = "linear"
    config.data.crop_scale = (0.08, 1.0)
    config.optim.base_lr = 5e-4
    config.optim.warmup = "5 epochs"
    config.optim.final_lr = 1e-6
    config.optim.b2 = 0.999
    config.optim.no_decay = "finetune"
    config.train.batch_size = 1024
    config.train.duration = "100 epochs"
    config.train.eval_every = "5 epochs"
    config.classify = ml_collections.ConfigDict()
    config.classify.pool = "mean"  # mean | cls
    config.classify.hidden_dim = 0  # width of a Linear and GELU on the tokens before pooling (TinyMIM*-T); 0: none
    config.classify.norm_first = False  # of mean pooling: what is pooled is normalised before, not after, that Linear
    # softmax: cross-entropy with soft targets | bce: a yes-or-no question for each class, mean over the classes
    config.classify.loss = "softmax"
    # Of bce: targets above it count as 1, others as 0 (ResNet strikes back: 0.2, DeiT III: 0.0); None: soft as they are
    config.classify.bce_threshold = 0.2
    config.classify.label_smoothing = 0.1
    config.classify.mixup = 0.0  # a of the Beta(a, a) law of lambda; 0: off. One draw for the batch, or for each part
    config.classify.cutmix = 0.0  # likewise
    config.classify.mixup_prob = 1.0  # of mixing a batch at all, where one of the two is on
    config.classify.switch_prob = 0.5  # of cutmix, where both are on
    config.classify.erase = 0.0  # probability of random erasing, for each image
    config.classify.head_std = 2e-5
    # keep: as pre-trained | official: 3, 6, 12 in every block | uniform: those of the first block in every block
    config.classify.heads = "keep"
    # Of a pre-trained init; relations train nothing of the last block behind q, k and v. keep: as it is (published)
    # | zero_init: it starts as the identity | copy_previous: what lies behind q, k, v is the block's before
    # | drop: the encoder is one block shorter
    config.classify.last_block = "keep"
    # What is learned from a supervised teacher (DeiT): none | hard: the class that it ranks first | soft: its
    # probabilities at temperature tau. By the DIST token's head where model.dist_token is on, or else by the only one
    config.classify.distillation = "none"
    config.classify.alpha = 0.5  # share of the teacher in the loss
    config.classify.tau = 3.0  # of soft
    config.classify.teacher = ml_collections.ConfigDict()
    config.classify.teacher.path = ""  # a classifier for the same classes: a run of ours, or what convert wrote
    config.classify.teacher.image_size = config_dict.placeholder(object)  # (height, width); None: as the student's
    # Of the teacher's pixels, as data.mean and std are of the student's; None: from its model.json, or else ImageNet's
    config.classify.teacher.mean = config_dict.placeholder(object)
    config.classify.teacher.std = config_dict.placeholder(object)
    return config
