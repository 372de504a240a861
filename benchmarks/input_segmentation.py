"""Images per second of CPU time of the segmentation input pipeline, on real pictures with masks.

    python benchmarks/input_segmentation.py --data pairs:camvid --split train

For each size of crops: decoding alone, the training view without and with photometric distortion. All of it runs in
this thread. Figures are medians over rounds of images divided by CPU seconds, so that other programs hardly matter. One
JSON line goes to standard output, messages to standard error.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from tinymim_jax.data.masks.source import open_masks
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.data.views.decoding import Picture
from tinymim_jax.data.views.segmentation import SegmentationAugment

# Side of the crops, and (long, short) sides into which images are scaled: CamVid's recipe here and ADE20K's.
SIZES = {"128 of 240 x 180": (128, (240, 180)), "512 of 2048 x 512": (512, (2048, 512))}


def main() -> None:
    options = _parse()
    source = open_masks(open_source(options.data, split=options.split), classes=options.classes)

    def decode(index: int) -> None:
        example = source[index]
        Picture(example["image"]).pixels()

    ways: dict[str, Callable[[int], None]] = {"decoding alone": decode}
    for name, (side, scale) in SIZES.items():
        for photometric in (False, True):
            view = SegmentationAugment((side, side), source.classes, scale=scale, photometric=photometric)
            ways[f"{name}{', photometric' * photometric}"] = _viewed(source, view)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for round_number in range(options.repeat):
        for name, way in ways.items():
            first = round_number * options.images
            began = time.thread_time()
            for index in range(first, first + options.images):
                way(index % len(source))
            rates[name].append(options.images / (time.thread_time() - began))
        print(" | ".join(f"{name} {values[-1]:.0f}" for name, values in rates.items()), file=sys.stderr, flush=True)
    print(json.dumps({"images_per_cpu_second": {name: round(statistics.median(v), 1) for name, v in rates.items()}}))


def _viewed(source, view: SegmentationAugment) -> Callable[[int], None]:
    def make(index: int) -> None:
        example = source[index]
        view.make(Picture(example["image"]), example, np.random.default_rng(index))

    return make


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a source with masks, such as pairs:DIR")
    parser.add_argument("--split", default="train", help="default train")
    parser.add_argument("--classes", default="camvid", help="see data.masks.classes (default camvid)")
    parser.add_argument("--images", type=int, default=200, help="in each round (default 200)")
    parser.add_argument("--repeat", type=int, default=5, help="rounds (default 5)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
