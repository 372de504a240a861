"""The data of segmentation: masks read as the config says, the views of training, and the windows of evaluation."""

from ml_collections import ConfigDict

from tinymim_jax.data.masks.source import open_masks
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.views.segmentation import SegmentationAugment, SegmentationView
from tinymim_jax.tasks.segmenter import Windows
from tinymim_jax.tasks.views import Views


def with_masks(config: ConfigDict, source: Source) -> Source:
    """`source` with the class of every pixel, as `config.data.masks` says; some masks are read now and checked."""
    masks = config.data.masks
    ignore = masks.ignore
    return open_masks(
        source,
        classes="" if masks.classes is None else masks.classes,
        ignore=ignore if ignore is None or isinstance(ignore, int) else tuple(ignore),
        label_map=None if masks.label_map is None else tuple(tuple(pair) for pair in masks.label_map),
        reduce_zero_label=masks.reduce_zero_label,
    )


def segmentation_views(config: ConfigDict, classes: int) -> Views:
    """The views of training, and the whole image for evaluation, for masks with this many classes."""
    size, data, fill = tuple(config.model.image_size), config.data, mean_colour(config)
    train = SegmentationAugment(
        size=size,
        classes=classes,
        scale=None if data.scale is None else tuple(data.scale),
        scale_range=tuple(data.scale_range),
        max_class_share=data.max_class_share,
        flip=data.flip,
        photometric=data.photometric,
        fill=fill,
    )
    return Views(train=train, eval=SegmentationView(size=size, classes=classes, fill=fill))


def evaluation_windows(config: ConfigDict) -> Windows:
    """How evaluation and prediction show images to the network. Raises ValueError for invalid settings."""
    settings, scale = config.segment.evaluation, config.data.scale
    return Windows(
        mode=settings.mode,
        stride=tuple(settings.stride),
        resize=None if scale is None else tuple(scale),
        flip=settings.flip,
        scales=tuple(settings.scales),
    )


def mean_colour(config: ConfigDict) -> tuple[int, int, int]:
    """RGB of the pixels that are closest to 0 after normalizing: the colour of padding."""
    red, green, blue = (round(255 * value) for value in config.data.mean)
    return red, green, blue
