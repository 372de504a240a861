"""Families of PyTorch checkpoints, one file each: a new one is a file with `FAMILY`, and a row here and in the cli."""

from tinymim_jax.convert.families import mae, segmentation, tinymim, tinymim_star, vit
from tinymim_jax.convert.families.table import Family

FAMILIES: dict[str, Family] = {
    "mae": mae.FAMILY,
    "tinymim": tinymim.FAMILY,
    "vit": vit.FAMILY,
    "tinymim_star": tinymim_star.FAMILY,
    "tinymim_segmentation": segmentation.FAMILY,
    "tinymim_star_segmentation": segmentation.STAR,
}
