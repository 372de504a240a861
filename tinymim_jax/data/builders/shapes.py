"""Generated pictures of discs, squares and triangles with their masks: a segmentation set without a download."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

CLASSES = {"background": (40, 40, 40), "disc": (230, 60, 60), "square": (60, 200, 60), "triangle": (70, 90, 240)}
SPLITS = {"train": 200, "val": 40}
IGNORED = 255  # pixels at the border of a shape, as in PASCAL VOC
_SIDES = (72, 97)  # of the pictures, in pixels


def scene(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture `number`: RGB, uint8 `[height, width, 3]`, and its mask, `[height, width]`: 0 to 3, IGNORED at borders.

    A shape's colour is half that of its class and half random, so form and colour tell the classes apart together.
    """
    rng = np.random.default_rng([number, 20])
    height, width = (int(side) for side in rng.integers(*_SIDES, 2))
    picture = Image.fromarray(_texture(rng, height, width))
    mask = Image.new("L", (width, height), 0)
    for _ in range(int(rng.integers(2, 5))):
        kind = int(rng.integers(1, 4))
        radius = int(rng.integers(11, 21))
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        turn = float(rng.uniform(0, 2 * np.pi))
        own = tuple(CLASSES.values())[kind]
        colour = tuple(int(value + noise) // 2 for value, noise in zip(own, rng.integers(0, 256, 3)))
        for image, fill, grow in ((mask, IGNORED, 1), (mask, kind, -1), (picture, colour, 0)):
            _draw(ImageDraw.Draw(image), kind, x, y, radius + grow, turn, fill)
    pixels = np.asarray(picture, np.int16) + rng.integers(-12, 13, (height, width, 3), dtype=np.int16)
    return pixels.clip(0, 255).astype(np.uint8), np.asarray(mask)


def write_shapes(folder: Path) -> Path:
    """Writes the set to `folder`, as a location of `pairs:`, unless it is there; returns `folder`."""
    if (folder / "classes.txt").is_file():  # written last
        return folder
    number = 0
    for split, count in SPLITS.items():
        for kind in ("images", "masks"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            picture, mask = scene(number)
            Image.fromarray(picture).save(folder / split / "images" / f"{number:04}.png")
            Image.fromarray(mask).save(folder / split / "masks" / f"{number:04}.png")
            number += 1
    lines = (" ".join([name, *map(str, colour)]) for name, colour in CLASSES.items())
    (folder / "classes.txt").write_text("\n".join(lines) + "\n")
    return folder


def _texture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Two random colours that merge in waves."""
    wave = np.sin(np.arange(height)[:, None] * rng.uniform(0.02, 0.2) + np.arange(width) * rng.uniform(0.02, 0.2))
    share = (wave[..., None] + 1) / 2
    first, second = rng.integers(0, 160, (2, 3))
    return (share * first + (1 - share) * second).astype(np.uint8)


def _draw(draw: ImageDraw.ImageDraw, kind: int, x: int, y: int, radius: int, turn: float, fill) -> None:
    if kind == 1:
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
        return
    corners = 4 if kind == 2 else 3
    angles = turn + 2 * np.pi * np.arange(corners) / corners
    draw.polygon([(float(x + radius * np.cos(a)), float(y + radius * np.sin(a))) for a in angles], fill=fill)
