"""How examples become the rows of a batch, in training and in evaluation."""

import dataclasses

from ml_collections import ConfigDict

from tinymim_jax.data.views.transforms import Augment, EvalView, View


@dataclasses.dataclass(frozen=True)
class Views:
    """The two views of a task; `train.arrays` is what a training batch has beside `label` and `valid`."""

    train: View
    eval: View


def image_views(config: ConfigDict) -> Views:
    """Images alone: augmented as `config.data` says in training, resized and cropped at the center in evaluation."""
    size, data = tuple(config.model.image_size), config.data
    augment = Augment(
        image_size=size,
        crop_scale=tuple(data.crop_scale),
        crop_ratio=tuple(data.crop_ratio),
        flip=data.flip,
        rand_augment=data.rand_augment,
        mean=tuple(data.mean),
        resizer=data.resizer,
    )
    return Views(train=augment, eval=EvalView(image_size=size, resize=data.eval_resize))
