"""TinyMIM-Base, Small and Tiny in one training: each image passes MAE ViT-L once. Heads as in distill_b, _s and _t.

The paper distils Small and Tiny from MAE ViT-B, or from larger students one after another (configs/chain.py); one
teacher for all is our choice. The first student is Base; the others are at RUN/students/s and RUN/students/t.
"""

from configs import base, distill_b


def get_config():
    config = distill_b.get_config()
    config.distill.students.s = base.further_student(model={"variant": "S", "heads": 6})
    config.distill.students.t = base.further_student(model={"variant": "Ti", "heads": 6})
    return config
