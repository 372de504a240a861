"""The family of relation targets: which tokens' similarities, how they are compared, and relations beside features.

Every target runs at three learning rates, because losses of different scale need different ones; compare each at its
best. The paper has results on the first only (84.6 for QK and VV, 83.7 for the output, at one rate).
"""

from configs.study.pipeline import two_stages

ARMS = {
    "qk_vv": "qk_vv",  # TinyMIM
    "oo_cosine_kl": "oo(loss=kl, normalize=true, temperature=0.07, patches=true)",  # LightlyTrain's loss on patches
    "gram_mse": "oo(loss=mse, normalize=true, patches=true)",  # Gram anchoring (DINOv3, arXiv 2508.10104)
    "cka": "oo(loss=cka, patches=true)",  # linear CKA of the patch tokens
    "output": "output",
    "output_qk_vv": "output + qk_vv",
}
RATES = {"": (7.5e-5, 1.5e-4, 3e-4), "small": (1.6e-2, 3.2e-2, 6.4e-2)}


def get_chain(scale: str = ""):
    return two_stages(scale)


def sweep(scale: str):
    for arm, target in ARMS.items():
        for rate in RATES[scale]:
            yield {"student.distill.target": target, "student.optim.base_lr": rate, "note.arm": arm}
