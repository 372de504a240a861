"""Pipelines from JPEG files to training crops; input_pipeline.py runs each in a separate process on one core.

    python benchmarks/input_peers.py NAME DIR SIZE [DATA_DIR]

Prints "ready", then for each line with a number of images on standard input the seconds of processor time that so many
took, and how many they really were.
"""

import io
import math
import os
import random
import sys
import time
from pathlib import Path

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)
BATCH = 25


def files_of(folder: str) -> list[bytes]:
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpeg", ".jpg"))
    return [path.read_bytes() for path in found]


def bare_decode(folder: str, size: int, data_dir: str):
    """A full decode and nothing else."""
    import simplejpeg

    def run(count: int) -> int:
        for i in range(count):
            simplejpeg.decode_jpeg(files[i % len(files)], "RGB")
        return count

    files = files_of(folder)
    return run


def published(folder: str, size: int, data_dir: str, views: int = 2):
    """The published pipeline, written with Pillow: RandomResizedCrop and flip, then a clean and a jittered tensor."""
    import numpy as np
    from PIL import Image, ImageEnhance

    def cropped(data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box = draw_box(image.width, image.height)
        image = image.crop(box).resize((size, size), Image.Resampling.BICUBIC)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else image

    def jittered(image: Image.Image) -> Image.Image:
        for change in random.sample((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), 3):
            image = change(image).enhance(random.uniform(0.6, 1.4))
        return image

    def tensor(image: Image.Image) -> np.ndarray:
        pixels = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)).astype(np.float32)
        pixels /= 255
        pixels -= mean
        pixels /= std
        return pixels

    def draw_box(width: int, height: int) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = width * height * random.uniform(*SCALE)
            aspect = math.exp(random.uniform(math.log(RATIO[0]), math.log(RATIO[1])))
            across, down = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < across <= width and 0 < down <= height:
                left, top = random.randint(0, width - across), random.randint(0, height - down)
                return left, top, left + across, top + down
        return 0, 0, width, height

    def run(count: int) -> int:
        for start in range(0, count, BATCH):
            images = [cropped(files[i % len(files)]) for i in range(start, start + BATCH)]
            np.stack([tensor(image) for image in images])
            if views == 2:
                np.stack([tensor(jittered(image)) for image in images])
        return count

    mean, std = (np.array(values, np.float32)[:, None, None] for values in (MEAN, STD))
    files = files_of(folder)
    return run


def published_one_view(folder: str, size: int, data_dir: str):
    """The same without the second, jittered view."""
    return published(folder, size, data_dir, views=1)


def torchvision(folder: str, size: int, data_dir: str):
    """The published pipeline with torchvision's transforms."""
    import torch
    from PIL import Image
    from torchvision import transforms

    torch.set_num_threads(1)
    bicubic = transforms.InterpolationMode.BICUBIC
    shared = transforms.Compose(
        [transforms.RandomResizedCrop(size, SCALE, RATIO, bicubic), transforms.RandomHorizontalFlip()]
    )
    clean = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    jittered = transforms.Compose([transforms.ColorJitter(0.4, 0.4, 0.4), clean])

    def run(count: int) -> int:
        for start in range(0, count, BATCH):
            opened = (Image.open(io.BytesIO(files[i % len(files)])) for i in range(start, start + BATCH))
            images = [shared(image.convert("RGB")) for image in opened]
            torch.stack([clean(image) for image in images])
            torch.stack([jittered(image) for image in images])
        return count

    files = files_of(folder)
    return run


def tf_antialiased(folder: str, size: int, data_dir: str, antialias: bool = True):
    """tf.data: only the crop is decoded; bicubic, antialiased; uint8."""
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf

    def view(data):
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(data),
            tf.zeros((1, 0, 4)),
            area_range=SCALE,
            aspect_ratio_range=RATIO,
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], extent[:2]], 0)
        image = tf.io.decode_and_crop_jpeg(data, window, channels=3)
        method = "bicubic" if antialias else "bilinear"
        image = tf.image.resize(image, (size, size), method=method, antialias=antialias)
        return tf.image.random_flip_left_right(tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8))

    def run(count: int) -> int:
        for _ in range(count // BATCH):
            next(batches)
        return count

    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    data = tf.data.Dataset.from_tensor_slices(files_of(folder)).repeat()
    batches = iter(data.map(view, num_parallel_calls=1).batch(BATCH).with_options(options))
    return run


def tf_aliased(folder: str, size: int, data_dir: str):
    """The same with bilinear resizing without antialiasing, which is big_vision's default."""
    return tf_antialiased(folder, size, data_dir, antialias=False)


def bare_decode_prepared(folder: str, size: int, data_dir: str):
    """A full decode of what `tinymim prepare --short_side 256` wrote, and nothing else."""
    import simplejpeg

    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tinymim_jax.data.sources.sources import open_source

    source = open_source("prepared_256", split="train", data_dir=data_dir)
    files = [source[i]["image"] for i in range(len(source))]

    def run(count: int) -> int:
        for i in range(count):
            simplejpeg.decode_jpeg(files[i % len(files)], "RGB")
        return count

    return run


def ours(folder: str, size: int, data_dir: str, name: str = "", resizer: str = "kornia"):
    """Our complete pipeline with Grain: reading, shuffling, decoding, crop, resize, flip, batching."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tinymim_jax.data.pipeline import train_batches
    from tinymim_jax.data.sources.sources import open_source
    from tinymim_jax.data.views.transforms import Augment

    source = open_source(name or f"folder:{folder}", split="all" if not name else "train", data_dir=data_dir or None)
    read = type(source).__getitem__
    reads = [0]

    def counted(self, index):
        reads[0] += 1
        return read(self, index)

    type(source).__getitem__ = counted  # images that are read ahead for the next round count for this one

    def run(count: int) -> int:
        reads[0] = 0
        augment = Augment(size, SCALE, RATIO, resizer=resizer)
        options = {"augment": augment, "batch_size": BATCH, "seed": 0, "threads": 1, "prefetch": 1}
        with train_batches(source, **options) as batches:
            for _ in range(count // BATCH):
                next(batches)
            return reads[0]

    return run


def ours_prepared(folder: str, size: int, data_dir: str):
    """The same after `tinymim prepare --short_side 256`."""
    return ours(folder, size, data_dir, name="prepared_256")


def ours_cykooz(folder: str, size: int, data_dir: str):
    """Ours with data.resizer=cykooz."""
    return ours(folder, size, data_dir, resizer="cykooz")


def ours_prepared_cykooz(folder: str, size: int, data_dir: str):
    """Both."""
    return ours(folder, size, data_dir, name="prepared_256", resizer="cykooz")


PEERS = {
    peer.__name__: peer
    for peer in (
        bare_decode,
        bare_decode_prepared,
        published,
        published_one_view,
        torchvision,
        tf_antialiased,
        tf_aliased,
        ours,
        ours_prepared,
        ours_cykooz,
        ours_prepared_cykooz,
    )
}


def main() -> None:
    name, folder, size, data_dir = (*sys.argv[1:], "")[:4]
    # All use the same core; one runs at a time.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    run = PEERS[name](folder, int(size), data_dir)
    run(4 * BATCH)
    print("ready", flush=True)
    for line in sys.stdin:
        began = time.process_time()
        done = run(int(line))
        print(time.process_time() - began, done, flush=True)


if __name__ == "__main__":
    main()
