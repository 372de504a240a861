"""The paper's tables as sweeps. Each point distils a student and fine-tunes it; its note is the paper's top-1.

FILE is the full size on ImageNet-1K: MAE-L into TinyMIM-B, 100 epochs. FILE:small is CIFAR-10 (configs/cifar10.py).
Train or convert the teacher first and name it for all points:

  tinymim sweep configs/study/targets.py --workdir runs/study/targets --run local \\
    distill.teacher.path=teachers/mae_vit_large
  tinymim train --config configs/cifar10.py:mae_teacher --workdir runs/study/teacher
  tinymim sweep configs/study/targets.py:small --workdir runs/study/targets_small --run local --seeds 3 \\
    distill.teacher.path=runs/study/teacher
"""
