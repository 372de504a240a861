"""The release of MAE (models_mae.py): the published files hold the encoder alone, or the encoder and the decoder."""

from tinymim_jax.convert.families.table import Family, Row
from tinymim_jax.convert.families.vit_rows import BODY, CLS, NORM, POSITIONS, VIT_HEADS, blocks, linear, norm, part

_DECODER_TOKENS = (
    Row("mask_token", "decoder/mask_token", "1 1 e"),
    Row("decoder_pos_embed", "decoder/pos_embed", "1 n e"),
)
_DECODER = (
    *linear("decoder_embed", "decoder/embed", "e", "d"),
    *blocks("decoder_blocks", "decoder", "e", "4e"),
    *norm("decoder_norm", "decoder/norm", "e"),
    *linear("decoder_pred", "decoder/pred", "3pp", "e"),
)

FAMILY = Family(
    (CLS, POSITIONS, *part("decoder", *_DECODER_TOKENS), *BODY, *NORM, *part("decoder", *_DECODER)),
    heads=VIT_HEADS,
    decoder_heads={512: 16},
)
