"""The release of TinyMIM (models_tinymim.py): encoders whose last block has as many heads as the teacher."""

from tinymim_jax.convert.families.table import Family
from tinymim_jax.convert.families.vit_rows import BODY, CLS, NORM, POSITIONS

FAMILY = Family((CLS, POSITIONS, *BODY, *NORM), heads={192: (6, 12), 384: (6, 12), 768: (12, 16)})
