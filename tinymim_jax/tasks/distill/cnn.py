"""A ConvNeXt or a ResNet as the teacher: the map of its last stage, brought to the student's grid, is compared."""

import jax
import numpy as np
from ml_collections import ConfigDict

from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.tasks.pretrained import Loaded, compute_dtype
from tinymim_jax.tasks.task import Params


def cnn_teacher(loaded: Loaded, config: ConfigDict) -> ConvNet:
    """The frozen network at the config's image size. Raises ValueError for options that it cannot have."""
    settings = config.distill.teacher
    size = tuple(settings.image_size or config.model.image_size)
    network = ConvNet.from_record(loaded.model["backbone"], image_size=size, dtype=compute_dtype(config.model))
    what = f"{loaded.path} is a {network.kind}"
    if settings.name:
        raise ValueError(f"{what}, but distill.teacher.name={settings.name!r} names a ViT: set it to ''")
    if any(side % network.patch_size or not side for side in size):
        raise ValueError(
            f"distill.teacher.image_size: {what}, whose last stage has one position for {network.patch_size} pixels "
            f"along each side, and images of {size[0]}x{size[1]} do not divide by that: choose multiples of it; its "
            "map is brought to the student's grid"
        )
    taps = {settings.tap} if config.distill.taps is None else {triple[1] for triple in config.distill.taps}
    if taps - {None, network.depth}:
        raise ValueError(
            f"distill.teacher.tap: {what}, of which the last stage, {network.depth}, is compared: leave the tap out, "
            f"or name {network.depth} in distill.taps"
        )
    for key, value in (("masked", settings.masked), ("drop_path", settings.drop_path)):
        if value:
            raise ValueError(
                f"distill.teacher.{key}={value}: {what}, which sees whole images as they are: leave it out"
            )
    return network


def cnn_weights(loaded: Loaded, network: ConvNet) -> Params:
    """Its parameters; kernels in the dtype of the computation, norms in float32."""
    params = loaded.params["backbone"]
    return jax.tree.map(lambda leaf: np.asarray(leaf, network.dtype if np.ndim(leaf) > 1 else np.float32), params)
