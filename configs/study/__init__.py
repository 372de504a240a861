"""The paper's tables as sweeps. Each point distils a student and fine-tunes it; the note is the paper's top-1.

FILE is full size, ImageNet-1K: TinyMIM-B from MAE-L, 100 epochs; FILE:small is CIFAR-10 at 32 px (configs/cifar10.py).
The teacher is made first, and given to all points:

  tinymim sweep configs/study/targets.py --workdir runs/study/targets --run local \\
    distill.teacher.path=teachers/mae_vit_large
  tinymim train --config configs/cifar10.py:mae_teacher --workdir runs/study/teacher
  tinymim sweep configs/study/targets.py:small --workdir runs/study/targets_small --run local --seeds 3 \\
    distill.teacher.path=runs/study/teacher
"""
