"""What a segmentation task needs: masks that travel with the images, and a metric that is no mean over examples.

A toy task with a confusion matrix is trained and evaluated by the real loop over 8 devices, against numpy.
"""

import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import small_config

from tinymim_jax import experiment as experiment_module
from tinymim_jax.checkpoints.params import load_params
from tinymim_jax.data.pipeline import eval_batches, train_batches
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.views.decoding import Undecodable
from tinymim_jax.data.views.transforms import EvalView
from tinymim_jax.experiment import batch_shapes, build_experiment
from tinymim_jax.metrics import Metric
from tinymim_jax.tasks import TASKS
from tinymim_jax.tasks.task import Task, TaskType
from tinymim_jax.tasks.views import Views
from tinymim_jax.train import train

SIZE, CLASSES, VOID = 8, 3, 255


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def scene(index: int) -> tuple[np.ndarray, np.ndarray]:
    """An image [8, 8, 3] and its mask [8, 8]: noise whose brightest channel is the class, and some void pixels."""
    rng = np.random.default_rng(index)
    mask = rng.integers(0, CLASSES, (SIZE, SIZE)).astype(np.uint8)
    image = rng.integers(0, 100, (SIZE, SIZE, 3), dtype=np.uint8)
    image[np.arange(SIZE)[:, None], np.arange(SIZE), mask] += 80
    mask[rng.random((SIZE, SIZE)) < 0.1] = VOID
    return image, mask


class Scenes(Source):
    """Images and masks without labels; of the `damaged` ones the mask cannot be decoded."""

    name, split, class_names = "scenes", "train", ()

    def __init__(self, length: int, damaged=()):
        self._length, self._damaged = length, frozenset(damaged)

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        image, mask = scene(index)
        return {"image": png(image), "label": -1, "mask": b"damaged" if index in self._damaged else png(mask)}


class MaskedView:
    """Image and mask, both flipped or neither."""

    def __init__(self, flip: bool):
        self._flip = flip
        self.arrays = {"image": ((SIZE, SIZE, 3), np.uint8), "mask": ((SIZE, SIZE), np.uint8)}

    def make(self, picture, example, rng):
        try:
            mask = np.asarray(Image.open(io.BytesIO(example["mask"])))
        except OSError as error:
            raise Undecodable(f"mask: {error}") from error
        step = -1 if self._flip and rng.random() < 0.5 else 1
        return {"image": picture.pixels()[:, ::step], "mask": mask[:, ::step]}


def build(config, class_names) -> Task:
    def init(key):
        return {"encoder": {"kernel": 0.1 * jax.random.normal(key, (3, CLASSES))}}

    def logits(params, batch):
        return batch["image"].astype(jnp.float32) / 255 @ params["encoder"]["kernel"]

    def pixel_loss(params, batch):
        log_p, known = jax.nn.log_softmax(logits(params, batch)), batch["mask"] < CLASSES
        picked = (log_p * jax.nn.one_hot(batch["mask"], CLASSES)).sum(-1)
        return -(picked * known).sum((1, 2)) / known.sum((1, 2)).clip(1)

    def values(params, frozen, batch, key):
        truth = jax.nn.one_hot(batch["mask"], CLASSES, dtype=jnp.int32)  # zeros where the pixel is void
        guess = jax.nn.one_hot(jnp.argmax(logits(params, batch), -1), CLASSES, dtype=jnp.int32)
        return {"loss": pixel_loss(params, batch), "confusion": jnp.einsum("bhwt,bhwg->btg", truth, guess)}

    def result(sums, examples):
        confusion = sums["confusion"]
        hits, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
        iou = {f"iou/{i}": float(hits[i] / union[i]) for i in range(CLASSES)}
        figures = {"loss": sums["loss"] / examples, "mIoU": np.mean(list(iou.values())), "pixels": confusion.sum()}
        return {name: float(value) for name, value in figures.items()} | iou

    return Task(
        model={"encoder": {"depth": 1}},
        init=init,
        losses=lambda params, frozen, batch, key, train: {"loss": pixel_loss(params, batch)},
        names=("loss",),
        metric=Metric(values, result),
    )


TOY = TaskType(build=build, views=lambda config: Views(MaskedView(flip=True), MaskedView(flip=False)))


@pytest.fixture
def config(monkeypatch):
    monkeypatch.setitem(TASKS, "toy", TOY)
    monkeypatch.setattr(
        experiment_module, "open_source", lambda *_, split, **__: Scenes(40 if split == "train" else 13)
    )
    words = ["train.duration=3 steps", "optim.base_lr=1.0", "optim.warmup=0 steps", "train.accumulate=2"]
    config = small_config("mae_teacher", *words, "train.batch_size=16", "data.train_split=train").unlock()
    config.task = "toy"
    return config.lock()


def confusion_by_numpy(kernel: np.ndarray, count: int) -> np.ndarray:
    confusion = np.zeros((CLASSES, CLASSES), np.int64)
    for index in range(count):
        image, mask = scene(index)
        guess = (image.astype(np.float32) / 255 @ kernel).argmax(-1)
        np.add.at(confusion, (mask[mask < CLASSES], guess[mask < CLASSES]), 1)
    return confusion


def test_a_task_with_masks_and_a_confusion_matrix_runs_through_the_loop(config, tmp_path):
    got = train(config, tmp_path)  # 13 images, evaluated 8 at a time on 8 devices: 3 rows of padding
    confusion = confusion_by_numpy(load_params(tmp_path)[1]["encoder"]["kernel"], 13)
    hits, union = np.diag(confusion), confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    assert (got["examples"], got["pixels"]) == (13, confusion.sum())
    for i in range(CLASSES):
        assert got[f"iou/{i}"] == pytest.approx(hits[i] / union[i], abs=1e-12)
    assert got["mIoU"] == pytest.approx(np.mean(hits / union), abs=1e-12)
    # It is not what the mean over images would be.
    each = [confusion_by_numpy(load_params(tmp_path)[1]["encoder"]["kernel"], n) for n in range(14)]
    per_image = [b - a for a, b in itertools.pairwise(each)]
    mean_of_images = np.mean([np.diag(c) / (c.sum(0) + c.sum(1) - np.diag(c)) for c in per_image])
    assert abs(got["mIoU"] - mean_of_images) > 1e-4
    assert json.loads((tmp_path / "result.json").read_text()) == got
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["eval/mIoU"] == got["mIoU"] and lines[-1]["eval/iou/2"] == got["iou/2"]  # noqa: PT018


def test_shapes_of_a_batch_come_from_the_view(config):
    shapes = {name: (x.shape, x.dtype) for name, x in batch_shapes(build_experiment(config)).items()}
    assert shapes == {
        "image": ((16, SIZE, SIZE, 3), np.uint8),
        "mask": ((16, SIZE, SIZE), np.uint8),
        "label": ((16,), np.int32),
        "valid": ((16,), np.bool_),
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_masks_travel_with_their_images(workers):
    options = {"augment": MaskedView(flip=True), "batch_size": 4, "seed": 1, "crops": 2, "workers": workers}
    with train_batches(Scenes(6), **options) as batches:
        batch = next(batches)
    originals, flips = [scene(i) for i in range(6)], set()
    for image, mask in zip(batch["image"], batch["mask"]):
        index = next(i for i, (a, _) in enumerate(originals) if (a == image).all() or (a[:, ::-1] == image).all())
        flipped = not (originals[index][0] == image).all()
        np.testing.assert_array_equal(mask, originals[index][1][:, :: -1 if flipped else 1])
        flips.add(flipped)
    assert flips == {False, True}


def test_a_damaged_mask_is_as_bad_as_a_damaged_image(caplog):
    with eval_batches(Scenes(3, damaged={1}), view=MaskedView(flip=False), batch_size=4) as batches:
        batch = next(batches)
    assert "record 1 of scenes/train: mask: cannot identify image file" in caplog.text
    np.testing.assert_array_equal(batch["mask"], [scene(0)[1], scene(2)[1], scene(2)[1], np.zeros((SIZE, SIZE))])
    np.testing.assert_array_equal(batch["image"][1], scene(2)[0])


def test_a_view_makes_what_it_declares():
    class Wrong(EvalView):
        def make(self, picture, example, rng):
            return super().make(picture, example, rng) | {"mask": np.zeros((2, 2))}

    with pytest.raises(RuntimeError, match=r"(?s)a view made .* shapes .*'mask': \(2, 2\).*its `arrays` declares"):
        next(eval_batches(Scenes(3), view=Wrong(SIZE, SIZE), batch_size=3))
    view = MaskedView(flip=False)
    view.arrays["valid"] = ((), np.bool_)
    with pytest.raises(RuntimeError, match=r"MaskedView\.arrays has \['valid'\], reserved for the pipeline"):
        next(eval_batches(Scenes(3), view=view, batch_size=3))
