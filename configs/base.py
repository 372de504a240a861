"""Every key of an experiment, explained, with its default value.

The other files of this folder are experiments: each takes the config of one of the functions here, such as distill() or
segment(), and changes some keys. Keys describe the experiment only; where it runs (devices, workers, folders) is set by
options of `tinymim train`.

Durations are strings: "300 epochs" or "700 steps". Learning rates are given for a batch of 256 images; the rate that is
used is base_lr * batch_size / 256. Defaults are those of TinyMIM's pre-training unless a comment says otherwise.
A key that is None by default takes its value from somewhere else, which its comment names.
"""

import ml_collections
from ml_collections import config_dict


def common(task: str) -> ml_collections.ConfigDict:
    """The keys that all tasks share."""
    config = ml_collections.ConfigDict()
    config.task = task  # mae | distill | classify | probe | segment
    config.seed = 0  # of weights, order of the images, crops, masks and everything else that is random
    config.init = ""  # run or converted checkpoint with the initial weights; empty: random weights

    config.model = ml_collections.ConfigDict()
    config.model.variant = "S"  # size: pico | nano | Ti | S | B | L | H
    config.model.embed_dim = config_dict.placeholder(int)  # embed_dim, depth, heads: None means the variant's
    config.model.depth = config_dict.placeholder(int)
    config.model.heads = config_dict.placeholder(object)  # one for all blocks, or a tuple with one for each
    config.model.patch_size = 16
    config.model.stem = "linear"  # what makes tokens of patches: linear | conv: convolutions (arXiv 2106.14881)
    config.model.image_size = (224, 224)  # height, width in pixels
    config.model.mlp_ratio = 4.0  # hidden width of each block's MLP, relative to embed_dim
    config.model.dist_token = False  # a second learned token after CLS, for classify.distillation (DeiT, TinyMIM*-T)
    config.model.pos_embed = "sincos"  # sincos: fixed table | learned: a parameter, initialised as that table
    config.model.drop_path = 0.1  # probability of skipping a residual branch, per image (stochastic depth)
    config.model.drop_path_schedule = "constant"  # constant: all blocks but the last | linear: from 0 to drop_path
    config.model.dtype = "bfloat16"  # of activations and matrix products; parameters are float32
    config.model.scan = False  # compile one block and loop over it: shorter compilation, for L and H
    config.model.remat = "none"  # recomputed by the backward pass, to save memory: none | dots: all but products | full

    # dense: matrix products and a softmax, with maps of all pairs of tokens in memory | fused: a kernel without them
    # (Pallas on TPUs, cuDNN on GPUs) | auto: fused on TPUs
    config.model.attention = "auto"

    config.data = ml_collections.ConfigDict()
    config.data.source = "imagenet2012"  # TFDS name, "digits", or folder: | tar: | parquet: | array_record:LOCATION
    config.data.train_split = "train"
    config.data.eval_split = "validation"
    config.data.examples = 0  # train on a subset of this size with equally many of each class; 0: all images
    config.data.crop_scale = (0.2, 1.0)  # RandomResizedCrop: range of the crop's share of the image area
    config.data.crop_ratio = (3 / 4, 4 / 3)  # and of its width / height
    config.data.flip = True  # mirror an image with probability 1/2
    config.data.crops = 1  # crops of each decoded image, each an example of the batch (repeated augmentation)
    config.data.upright = False  # rotate images by their EXIF orientation; the published recipes do not
    config.data.rand_augment = ""  # applied after crop and flip, in timm's notation: "rand-m9-mstd0.5-inc1"; empty: off
    # Of the crops: kornia | cykooz, about twice as fast (pip install 'tinymim-jax[resize]'). Last bits of pixels differ
    config.data.resizer = "kornia"
    config.data.eval_resize = 256  # evaluation resizes the short side to this before the centre crop
    # Pixels in [0, 1] are normalised by (pixel - mean) / std, per channel. These are ImageNet's.
    config.data.mean = (0.485, 0.456, 0.406)
    config.data.std = (0.229, 0.224, 0.225)

    config.optim = ml_collections.ConfigDict()
    config.optim.name = "adamw"  # adamw | sgd | lars
    config.optim.base_lr = 1.5e-4  # peak learning rate for a batch of 256
    config.optim.warmup = "15 epochs"  # linear increase to the peak
    config.optim.schedule = "cosine"  # after it. cosine: half a cosine to final_lr | poly: (1 - step / all)^power to 0
    config.optim.power = 1.0  # poly; 1: a straight line
    config.optim.final_lr = 0.0  # cosine: at the end; not scaled by the batch
    config.optim.b1 = 0.9  # adamw: decay rates of the two moments
    config.optim.b2 = 0.95
    config.optim.eps = 1e-8  # adamw
    config.optim.momentum = 0.9  # sgd, lars
    config.optim.nesterov = False  # sgd
    config.optim.trust = 0.001  # lars: trust coefficient
    config.optim.weight_decay = 0.05  # adamw: decoupled from the gradient; sgd, lars: added to the gradient
    # Parameters without weight decay. pretrain: biases and norms | finetune: also the CLS token, the position table and
    # relative position biases | official: as the authors' segmentation code does it, which is as pretrain, and the
    # learning rate of the DIST token is not reduced by layer_decay
    config.optim.no_decay = "pretrain"
    config.optim.layer_decay = 1.0  # factor on the learning rate per block, counted down from the head; 1: off
    config.optim.clip_norm = 0.0  # largest norm of the gradient; 0: not clipped

    config.train = ml_collections.ConfigDict()
    config.train.batch_size = 4096
    config.train.duration = "300 epochs"
    # Split the batch into this many micro-batches, one after another, to save memory; 0: the smallest number that fits
    # into the devices' memory, found by compiling the step. Batch norm is over each micro-batch.
    config.train.accumulate = 1
    config.train.ema = 0.0  # decay of an exponential moving average of the weights, which is evaluated; 0: off
    config.train.log_every = 50  # steps between lines of the log
    config.train.eval_every = "20 epochs"  # time between evaluations; "0 epochs": one at the end
    # Time between probes of the features in training: effective rank, and k-NN accuracy where there are labels, without
    # augmentation, recorded as probe/effective_rank and probe/knn. "0 epochs": none
    config.train.probe_every = "0 epochs"
    config.train.probe_images = 1000  # training images among which neighbors are sought; half as many are classified
    config.train.probe_patience = 0  # end the training when so many probes in a row have not raised probe/knn; 0: never
    config.train.max_skipped = 10  # updates in a row that may be skipped as not finite; 0: stop at the first

    config.checkpoint = ml_collections.ConfigDict()
    config.checkpoint.every_minutes = 10.0  # time between checkpoints; 0: one after every step
    config.checkpoint.keep = 3  # number of newest checkpoints that are kept
    return config


def distill() -> ml_collections.ConfigDict:
    """TinyMIM pre-training."""
    config = common("distill")
    config.distill = ml_collections.ConfigDict()
    # qk, qq, kk, vv, oo (of the block's output) joined by _: token relations | a feature: output, ffn, cls, ... |
    # attention_map. Several with weights and options of their own: "qk_vv:1 + output(loss=mse):0.5" (docs/recipes.md)
    config.distill.target = "qk_vv"
    config.distill.relation_loss = "kl"  # for relations: kl of the softmax | smooth_l1 | mse | cka, without softmax
    config.distill.relation_normalize = False  # relations are cosines of tokens instead of their products
    # Products or cosines are divided by this; None: the square root of the width of a head, and 1 for cosines
    config.distill.relation_temperature = config_dict.placeholder(float)
    config.distill.patches_only = False  # the CLS token is not compared
    config.distill.relation_form = "auto"  # dense | fused | auto, as model.attention; only kl has a fused form
    config.distill.feature_loss = "smooth_l1"  # for features: smooth_l1 | mse | cosine
    # Of the teacher's features. layer: LayerNorm of each token | fixed: by mean and standard deviation of each channel
    # | none: as they are
    config.distill.feature_norm = "layer"
    config.distill.statistics_images = 50_000  # fixed: they are those of the first so many images of the training
    # From the student's features to the teacher's width: linear | mlp: 2 layers | norm_linear: LayerNorm and Linear |
    # none: the features themselves, of equal width
    config.distill.adapter = "linear"
    config.distill.beta = 2.0  # smooth_l1: the difference at which it changes from quadratic to linear
    # Which block, counted from 1; None: the last. Or ((when, block), ...), each from then on, as for teacher.tap
    config.distill.student_tap = config_dict.placeholder(object)
    # Several pairs of blocks instead of student_tap and teacher.tap: ((student block, teacher block, weight), ...)
    config.distill.taps = config_dict.placeholder(object)
    # Relations need equal numbers of heads. adaptive: the student's tapped blocks get the teacher's number (published)
    # | own: all blocks have model.heads, which must be the teacher's number | resplit: all blocks have model.heads, and
    # for the loss, q, k and v of both models are split into distill.relation_heads heads
    config.distill.heads = "adaptive"
    config.distill.relation_heads = config_dict.placeholder(int)  # for resplit; None: the teacher's number
    # The student's last block is as wide as the teacher, behind a Linear, and stays so (WideLast, arXiv 2511.15572)
    config.distill.wide_last = False
    config.distill.mask_ratio = 0.0  # share of patches hidden from the student; the loss covers visible patches
    config.distill.mim_weight = 0.0  # weight of an additional MAE loss on the hidden patches; 0: off
    config.distill.mim = ml_collections.ConfigDict()  # decoder of that loss; keys as in mae()
    config.distill.mim.decoder_dim = 512
    config.distill.mim.decoder_depth = 8
    config.distill.mim.decoder_heads = 16
    config.distill.mim.normalize_pixels = True
    config.distill.jitter = ml_collections.ConfigDict()  # colour jitter of the student's view
    config.distill.jitter.brightness = 0.4  # factor drawn from [1 - 0.4, 1 + 0.4]; the others likewise
    config.distill.jitter.contrast = 0.4
    config.distill.jitter.saturation = 0.4
    config.distill.teacher = _teacher()
    # Further teachers in the same step, each named by you: distill.teachers.NAME.path=..., see further_teacher()
    config.distill.teachers = ml_collections.ConfigDict()
    # Further students of the same teacher pass, each named by you: distill.students.NAME.model.variant=..., see
    # further_student(). The first one is that of config.model and config.init
    config.distill.students = ml_collections.ConfigDict()
    return config


def further_teacher(**values) -> ml_collections.ConfigDict:
    """An entry of distill.teachers, with these values: `config.distill.teachers.dino = further_teacher(path=...)`.

    It has the keys of distill.teacher, and these.
    """
    teacher = _teacher()
    teacher.target = ""  # as distill.target, for this teacher; empty: distill.target
    # As distill.taps, for this teacher; None: its tap with the block of distill.student_tap
    teacher.taps = config_dict.placeholder(object)
    teacher.update(values)
    return teacher


def further_student(**values) -> ml_collections.ConfigDict:
    """An entry of distill.students: `config.distill.students.ti = further_student(model={"variant": "Ti"})`.

    What is None or empty is as for the first student, except where a comment says otherwise.
    """
    student = ml_collections.ConfigDict()
    student.init = ""  # run or converted checkpoint with its initial weights; empty: random weights
    student.target = ""  # as distill.target, for this student
    student.student_tap = config_dict.placeholder(object)  # as distill.student_tap
    student.taps = config_dict.placeholder(object)  # as distill.taps, in place of student_tap and distill.teacher.tap
    student.lr_scale = 1.0  # its learning rate is that of config.optim times this
    student.model = ml_collections.ConfigDict()  # as in config.model
    student.model.variant = config_dict.placeholder(str)
    # None: those of the variant where that is given here, else as for the first student
    student.model.embed_dim = config_dict.placeholder(int)
    student.model.depth = config_dict.placeholder(int)
    student.model.heads = config_dict.placeholder(object)
    student.model.patch_size = config_dict.placeholder(int)
    student.model.stem = config_dict.placeholder(str)
    student.model.mlp_ratio = config_dict.placeholder(float)
    student.model.dist_token = config_dict.placeholder(bool)
    student.model.pos_embed = config_dict.placeholder(str)
    student.model.drop_path = config_dict.placeholder(float)
    student.update(values)
    return student


# Sections whose entries get names from the user, and what makes an entry.
OPEN_SECTIONS = {"distill.teachers": further_teacher, "distill.students": further_student}


def _teacher() -> ml_collections.ConfigDict:
    teacher = ml_collections.ConfigDict()
    teacher.name = ""  # a published teacher (tasks/distill/teachers.py), which sets tap; empty: any
    teacher.path = ""  # its weights: output of `tinymim convert`, or the workdir of a run
    teacher.weight = 1.0  # of the comparison with it in the loss
    # Block, counted from 1; None: as published, or the last. (("0 epochs", 9), ("150 epochs", 12)): 9, and 12 after 150
    teacher.tap = config_dict.placeholder(object)
    teacher.image_size = config_dict.placeholder(object)  # (height, width); None: the student's
    # Normalisation of the teacher's input, as data.mean and data.std; None: those of its model.json, else ImageNet's
    teacher.mean = config_dict.placeholder(object)
    teacher.std = config_dict.placeholder(object)
    teacher.masked = False  # True: the teacher does not see the hidden patches either
    # Share of the patches that the teacher is not shown, to save its compute: those to which the student's CLS token
    # attends least (MaskedKD, arXiv 2302.10494). The loss covers the others
    teacher.drop_patches = 0.0
    # True: linear layers of its blocks are products of 8-bit integers, for chips that are faster at these. The log says
    # at the start how far its relations are from those of the float32 teacher
    teacher.int8 = False
    teacher.drop_path = 0.0  # as model.drop_path, with the same schedule
    # Of the teacher's view, independent of the student's; teachers of equal strengths see the same
    teacher.jitter = ml_collections.ConfigDict()
    teacher.jitter.brightness = 0.0
    teacher.jitter.contrast = 0.0
    teacher.jitter.saturation = 0.0
    return teacher


def mae() -> ml_collections.ConfigDict:
    """MAE pre-training (arXiv 2111.06377)."""
    config = common("mae")
    config.model.drop_path = 0.0
    config.optim.warmup = "40 epochs"
    config.train.duration = "800 epochs"
    config.mae = ml_collections.ConfigDict()
    config.mae.mask_ratio = 0.75  # share of patches hidden from the encoder
    config.mae.normalize_pixels = True  # the target is each patch normalised by its own mean and standard deviation
    config.mae.decoder_dim = 512
    config.mae.decoder_depth = 8
    config.mae.decoder_heads = 16
    return config


def probe() -> ml_collections.ConfigDict:
    """A linear classifier on a frozen encoder, named by init: MAE's protocol (main_linprobe.py)."""
    config = common("probe")
    for name in set(config.model) - {"image_size", "dtype", "scan", "attention"}:
        del config.model[name]  # the architecture is that of the checkpoint
    config.data.crop_scale = (0.08, 1.0)
    config.optim.name = "lars"
    config.optim.base_lr = 0.1
    config.optim.warmup = "10 epochs"
    config.optim.weight_decay = 0.0
    config.train.batch_size = 16384
    config.train.duration = "90 epochs"
    config.train.eval_every = "10 epochs"
    config.probe = ml_collections.ConfigDict()
    config.probe.pool = "cls"  # cls: CLS token after the final norm | mean: mean of the patch tokens, then a norm
    config.probe.head_std = 0.01  # standard deviation of the head's initial weights
    return config


def classify() -> ml_collections.ConfigDict:
    """Fine-tuning of an encoder with a classification head."""
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
    # What the head reads. mean: mean of the patch tokens | cls: the CLS token | cls_mean: both, as DINOv2's classifiers
    config.classify.pool = "mean"
    config.classify.hidden_dim = 0  # width of a Linear and GELU on all tokens before pooling (TinyMIM*-T); 0: none
    config.classify.norm_first = False  # with mean pooling: LayerNorm before that Linear instead of after pooling
    # softmax: cross-entropy | bce: binary cross-entropy for each class, mean over the classes
    config.classify.loss = "softmax"
    # bce: mixed targets above this are 1, others 0 (ResNet strikes back: 0.2, DeiT III: 0.0); None: targets stay mixed
    config.classify.bce_threshold = 0.2
    config.classify.label_smoothing = 0.1
    config.classify.mixup = 0.0  # alpha of the Beta(alpha, alpha) distribution; 0: off. One draw per micro-batch
    config.classify.cutmix = 0.0  # the same for cutmix
    config.classify.mixup_prob = 1.0  # probability that a batch is mixed by either
    config.classify.switch_prob = 0.5  # probability of cutmix instead of mixup, if both are on
    config.classify.erase = 0.0  # probability of random erasing, per image
    config.classify.head_std = 2e-5  # standard deviation of the head's initial weights
    # Attention heads of a pre-trained init. keep: as pre-trained | official: 3 (Ti), 6 (S) or 12 (B) in every block, as
    # in the authors' fine-tuning | uniform: the number of the first block in every block
    config.classify.heads = "keep"
    # The last block of a pre-trained init, whose projection, norm2 and MLP are not trained by relations. keep: as it is
    # (published) | zero_init: the block starts as the identity | copy_previous: they are copied from the block before
    # | drop: the block is removed
    config.classify.last_block = "keep"
    # Distillation from a supervised classifier (DeiT). none | hard: its predicted class | soft: its probabilities at
    # temperature tau. A head on the DIST token learns them if model.dist_token is on, else the only head
    config.classify.distillation = "none"
    config.classify.alpha = 0.5  # weight of the teacher's part of the loss; the labels' is 1 - alpha
    config.classify.tau = 3.0  # temperature of soft
    config.classify.teacher = ml_collections.ConfigDict()
    config.classify.teacher.path = ""  # a classifier of the same classes: workdir of a run, or output of convert
    config.classify.teacher.image_size = config_dict.placeholder(object)  # (height, width); None: the student's
    # Normalisation of the teacher's input, as data.mean and data.std; None: those of its model.json, else ImageNet's
    config.classify.teacher.mean = config_dict.placeholder(object)
    config.classify.teacher.std = config_dict.placeholder(object)
    return config


def segment() -> ml_collections.ConfigDict:
    """Semantic segmentation: the recipe of TinyMIM on ADE20K."""
    config = common("segment")
    config.model.image_size = (512, 512)  # of the crops, and of the windows in evaluation
    config.model.pos_embed = "learned"
    config.model.drop_path_schedule = "linear"
    for name in ("crop_scale", "crop_ratio", "rand_augment", "eval_resize", "resizer"):
        del config.data[name]  # segmentation has views of its own
    # An image is scaled, with its proportions, to fit into (long, short) sides; None: it keeps its size
    config.data.scale = (2048, 512)
    config.data.scale_range = (0.5, 2.0)  # in training, that size times a random factor from this range
    config.data.max_class_share = 0.75  # a crop with more of one class is drawn again, up to ten times; 1: never
    config.data.photometric = True  # random brightness, contrast, saturation and hue in training
    config.data.masks = ml_collections.ConfigDict()
    # ade20k | cityscapes | cityscapes_train_ids | voc | camvid | a file with a class a line, NAME or NAME R G B | their
    # number; None: classes.txt beside the data
    config.data.masks.classes = config_dict.placeholder(object)
    # Stored value, or values, of pixels to ignore; None: as the named set says, or 255 (65535 in 16-bit masks)
    config.data.masks.ignore = config_dict.placeholder(object)
    # ((stored value, class), ...), class -1: ignored; None: as the named set says, or stored values are classes
    config.data.masks.label_map = config_dict.placeholder(object)
    # Stored 0 is ignored and k is class k - 1; None: as the named set says (ade20k: True)
    config.data.masks.reduce_zero_label = config_dict.placeholder(bool)
    config.optim.base_lr = 1.6e-3  # 1e-4 for a batch of 16
    config.optim.warmup = "1500 steps"
    config.optim.schedule = "poly"
    config.optim.b2 = 0.999
    config.optim.no_decay = "finetune"
    config.optim.layer_decay = 0.75
    config.train.batch_size = 16
    config.train.duration = "160000 steps"
    config.train.eval_every = "16000 steps"
    config.segment = ml_collections.ConfigDict()
    # upernet: pyramid and UPerNet (published) | linear: batch norm and a 1x1 convolution on the patches | light: a
    # small decoder of ours, without a pyramid | mask: a transformer of patches and a token for each class (Segmenter)
    config.segment.head = "upernet"
    config.segment.num_classes = config_dict.placeholder(int)  # None: as many as the data has
    # Blocks, counted from 1, that the head sees; None: the last for linear and mask, else 4, 6, 8, 12 of 12 and in
    # proportion
    config.segment.taps = config_dict.placeholder(object)
    config.segment.channels = 768  # of the head; linear has none, mask usually as many as the encoder is wide
    config.segment.auxiliary_channels = 256  # of the FCN head on the third map that is trained beside upernet
    config.segment.auxiliary_weight = 0.4  # of its loss; 0: no such head
    config.segment.dropout = 0.1  # of channels, before the last layer
    config.segment.pyramid = "plain"  # of upernet. plain: published for T, S and B | star: that of TinyMIM*-T
    config.segment.widen = 0  # star: width of the layer between the last block and the pyramid (1280); plain: 0
    config.segment.frozen_encoder = False  # the encoder of init keeps its values
    config.segment.relative_bias = True  # each block gets relative position biases, which start at 0
    config.segment.layer_scale = True  # each branch gets a learned factor for each channel, which starts at 1
    # Attention heads. keep: as pre-trained | official: 3 (Ti), 6 (S) or 12 (B) in every block, as the published ones
    config.segment.heads = "keep"
    config.segment.evaluation = ml_collections.ConfigDict()  # and of `tinymim predict`
    # slide: windows of model.image_size, whose logits are averaged | whole: the image scaled into one window
    config.segment.evaluation.mode = "slide"
    config.segment.evaluation.stride = (341, 341)  # (down, across) between windows
    config.segment.evaluation.flip = False  # probabilities averaged with those of the mirrored image
    config.segment.evaluation.scales = (1.0,)  # sizes relative to data.scale whose probabilities are averaged
    return config
