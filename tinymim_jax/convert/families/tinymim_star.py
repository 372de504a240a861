"""TinyMIM*-T, the fine-tuned file: two tokens, widened behind the encoder, and two heads.

Segmentation/TinyMIMstar-T/backbone/mae.py of the release has its encoder; log/TinyMIMstar-T.log there names the other
tensors (fc_norm, head, head_dist). The class that has them all was not released.
"""

from tinymim_jax.convert.families.table import Family
from tinymim_jax.convert.families.vit_rows import BODY, CLS, DIST, POSITIONS, linear, norm, part

FAMILY = Family(
    (
        CLS,
        DIST,
        POSITIONS,
        *BODY,
        *norm("conv1x1.0", "widen/norm", "d"),
        *linear("conv1x1.1", "widen/linear", "w", "d"),
        *part("mean", *norm("fc_norm", "fc_norm", "f")),
        *part("head", *linear("head", "head", "k", "w"), *linear("head_dist", "head_dist", "k", "w")),
    ),
    heads={192: (12, 12)},
)
