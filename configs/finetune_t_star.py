"""TinyMIM*-T, second stage: fine-tuning on ImageNet-1K with a supervised teacher (79.6 in the paper).

  tinymim train --config configs/distill_t_star.py --workdir runs/t_star distill.teacher.path=teachers/tinymim_s
  tinymim train --config configs/finetune_t_star.py --workdir runs/t_star_finetuned \\
    init=runs/t_star classify.teacher.path=runs/b_finetuned

Published: 1000 epochs, distillation as in DeiT (paper, table 3); tokens CLS, DIST and patches, 12 heads in every block,
LayerNorm, Linear to 1280 and GELU after the last block (the authors' segmentation code); two heads, and fc_norm, which
is the norm of mean pooling (their training log).
Not published, taken from DeiT (arXiv 2012.12877): hard labels of the teacher with half the weight of the loss, and the
mean of both heads in evaluation.
Not published, our choice: the teacher (any classifier; DeiT's was a RegNetY-16GF), the order of Linear, pooling and
norm, that the second head reads DIST, learning rate, layer decay, drop path and batch size. Augmentation: that of Base.
"""

from configs import finetune_t


def get_config():
    config = finetune_t.get_config()
    config.model.heads = 12
    config.model.dist_token = True
    config.classify.hidden_dim = 1280
    config.classify.distillation = "hard"
    config.classify.alpha = 0.5
    config.train.duration = "1000 epochs"
    config.train.eval_every = "20 epochs"
    return config
