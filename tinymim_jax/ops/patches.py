"""Converts images to patches and back (MAE release, models_mae.py: patchify, unpatchify)."""

from jaxtyping import Array, Shaped


def patchify(
    images: Shaped[Array, "batch height width channels"], patch_size: int
) -> Shaped[Array, "batch patches pixels"]:
    """Cuts images into patches, row by row.

    Each patch is flattened as (patch row, patch column, channel). Raises ValueError if a side is not a multiple of
    `patch_size`.
    """
    batch, height, width, channels = images.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"an image of {height}x{width} cannot be cut into patches of {patch_size}: "
            "choose an image size that is a multiple of the patch size"
        )
    rows, columns = height // patch_size, width // patch_size
    grid = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return grid.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, patch_size * patch_size * channels)


def unpatchify(
    patches: Shaped[Array, "batch patches pixels"], patch_size: int, grid: tuple[int, int]
) -> Shaped[Array, "batch height width channels"]:
    """The inverse of `patchify` for a grid of (rows, columns)."""
    batch, count, pixels = patches.shape
    rows, columns = grid
    if rows * columns != count:
        raise ValueError(f"{count} patches do not fill a grid of {rows}x{columns}")
    channels = pixels // patch_size**2
    blocks = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * patch_size, columns * patch_size, channels)
