"""timm's VisionTransformer as a classifier, which is also models_vit.py of MAE's and TinyMIM's releases.

With 'mean' pooling the mean of the tokens is normalised (fc_norm) instead of each token (norm). DeiT's distilled models
have a second token and a second head.
"""

from tinymim_jax.convert.families.table import Family
from tinymim_jax.convert.families.vit_rows import BODY, CLS, DIST, NORM, POSITIONS, VIT_HEADS, linear, norm, part

FAMILY = Family(
    (
        CLS,
        *part("dist", DIST),
        POSITIONS,
        *BODY,
        *part("cls", *NORM),
        *part("mean", *norm("fc_norm", "fc_norm", "d")),
        *part("head", *linear("head", "head", "k", "d")),
        *part("head_dist", *linear("head_dist", "head_dist", "k", "d")),
    ),
    heads=VIT_HEADS,
)
