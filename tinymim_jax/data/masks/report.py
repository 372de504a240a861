"""A report on a sample of the masks of a source: values, shares and modes. Implausible masks are refused."""

import collections
import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from tinymim_jax.data.masks.classes import IGNORED
from tinymim_jax.data.masks.rules import MaskRules, read_mask
from tinymim_jax.data.sources import files
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.sources.labels import LabelError
from tinymim_jax.data.views.decoding import Picture

log = logging.getLogger(__name__)

SAMPLED = 32  # masks that are read, at equal distances
_SHOWN = 24  # classes in the report
_MOSTLY_IGNORED = 0.5


@dataclasses.dataclass
class _Sample:
    """What some masks hold: pixels of each stored value, modes, and the first records that are wrong."""

    counts: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    modes: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    first: dict[int, int] = dataclasses.field(default_factory=dict)  # by stored value: a record that has it
    read: int = 0
    errors: list[str] = dataclasses.field(default_factory=list)
    damaged: list[str] = dataclasses.field(default_factory=list)


def describe_masks(source: Source, rules: MaskRules, names: Sequence[str]) -> str:
    """A report on some of the masks, for the log.

    Raises LabelError, with the name of a file and a remedy, if they do not fit `rules`: a missing mask, one of
    another size than its image, values that are no class, masks of 0 and 255, and only one class.
    """
    if rules.classes == 1:
        raise LabelError(
            f"the masks of {source.name!r} have one class, {names[0]!r}, and the loss compares classes: name the "
            "background as a class as well (two lines in the file of data.masks.classes, or data.masks.classes=2)"
        )
    sample = _read(source, rules)
    if sample.errors:
        raise LabelError(sample.errors[0])
    if not sample.read:
        raise LabelError(
            f"none of {len(sample.damaged)} images of {source.name!r} could be read with its mask: {sample.damaged[0]}"
        )
    _check_values(source, rules, sample)
    total = sum(sample.counts.values())
    shares: collections.Counter[int] = collections.Counter()
    for value, count in sample.counts.items():
        meaning = rules.meaning(value)
        shares[IGNORED if meaning is None else meaning] += count
    as_stored = set(range(rules.classes)) <= set(sample.counts) and rules.classes not in sample.counts
    if rules.reduce_zero_label and as_stored:
        log.warning(
            "%s: data.masks.reduce_zero_label is on, which ignores 0 and makes %d the last class; but the masks hold 0 "
            "to %d, as if these were the %d classes. Then set data.masks.reduce_zero_label=False",
            source.name,
            rules.classes,
            rules.classes - 1,
            rules.classes,
        )
    if shares[IGNORED] / total > _MOSTLY_IGNORED:
        log.warning("%s: %.0f %% of the pixels are ignored", source.name, 100 * shares[IGNORED] / total)
    found = sorted((number for number in shares if number != IGNORED), key=lambda number: -shares[number])
    text = ", ".join(f"{number} {names[number]} {shares[number] / total:.1%}" for number in found[:_SHOWN])
    more = f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    absent = rules.classes - len(found)
    values = sorted(sample.counts)
    return (
        f"{source.name}, {source.split}: {sample.read} of {len(source):,} masks read, mode "
        f"{', '.join(sample.modes)}, stored values {values[0]} to {values[-1]}; {text}{more}; ignored "
        f"{shares[IGNORED] / total:.1%}" + (f"; not seen: {absent} of {rules.classes} classes" if absent else "")
    )


def _read(source: Source, rules: MaskRules) -> _Sample:
    sample = _Sample()
    chosen = np.unique(np.linspace(0, len(source) - 1, min(SAMPLED, len(source))).astype(int)).tolist()
    for index, found in zip(chosen, files.in_threads(lambda index: _read_one(source, rules, index), chosen)):
        if isinstance(found, Exception):
            (sample.errors if isinstance(found, LabelError) else sample.damaged).append(str(found))
        else:
            mode, values, counts = found
            sample.read += 1
            sample.modes[mode] += 1
            for value, count in zip(values.tolist(), counts.tolist()):
                sample.counts[value] += count
                sample.first.setdefault(value, index)
    return sample


def _read_one(source: Source, rules: MaskRules, index: int) -> tuple[str, np.ndarray, np.ndarray] | Exception:
    """(mode, values, pixels of each); a LabelError; or another error of a damaged record, left to the pipeline."""
    try:
        example = source[index]
        if not (mask := example.get("mask")):
            return LabelError(
                f"{source.describe(index)} has {'no mask, or an empty one' if mask == b'' else 'no mask'}. "
                "Segmentation needs images with masks: pairs:LOCATION, a Parquet file with a column `mask`, tar files "
                "with KEY.jpg and KEY.mask.png, or a TFDS set with `segmentation_mask`"
            )
        stored, (_, mode) = rules.stored(mask), read_mask(mask)
        height, width = Picture(example["image"]).size
    except LabelError as error:
        return LabelError(f"{source.describe(index)}: {error}")
    except Exception as error:  # the pipeline names damaged records
        return ValueError(f"{source.describe(index)}: {error}")
    if stored.shape != (height, width):
        return LabelError(f"{source.describe(index)}: {wrong_size(stored.shape, (height, width))}")
    return mode, *np.unique(stored, return_counts=True)


def wrong_size(mask: tuple[int, ...], image: tuple[int, int]) -> str:
    """What to say of a mask of another (height, width) than its image."""
    turned = mask == image[::-1]
    return (
        f"its mask has {mask[1]} x {mask[0]} pixels, but the image {image[1]} x {image[0]}"
        + (". The image may be rotated by its EXIF orientation: see data.upright" if turned else "")
        + ". Save both at the same size (masks without interpolation)"
    )


def _check_values(source: Source, rules: MaskRules, sample: _Sample) -> None:
    values = sorted(sample.counts)
    total = sum(sample.counts.values())
    meanings = {value: rules.meaning(value) for value in values}
    wrong = [value for value in values if meanings[value] is None]
    suggestion = ", ".join(f"({value}, {number})" for number, value in enumerate(values))
    if values == [0, 255] and not rules.label_map:
        raise LabelError(
            f"{source.describe(sample.first[255])}: the masks of {source.name!r} hold only 0 and 255, so 255 is "
            f"probably a class, and it is {'ignored' if meanings[255] == IGNORED else 'no class'}: set "
            "data.masks.label_map='((0, 0), (255, 1))'"
        )
    if wrong:
        share = sum(sample.counts[value] for value in wrong) / total
        remedy = "If they are to be ignored, name them in data.masks.ignore"
        if len(values) <= rules.classes + len(rules.ignore):
            more = f" and data.masks.classes={len(values)}" if len(values) > rules.classes else ""
            remedy = f"To number the values in their order: data.masks.label_map='({suggestion})'{more}. {remedy}"
        elif len(values) > 2 * rules.classes + 2:
            remedy = f"So many values come from resizing masks with interpolation, or from JPEG. {remedy}"
        if values == list(range(1, rules.classes + 1)):
            remedy = f"They begin at 1: data.masks.reduce_zero_label=True. {remedy}"
        elif wrong == [rules.classes] and 0 in values and not rules.label_map:
            remedy = f"If 0 means unlabelled: data.masks.reduce_zero_label=True. {remedy}"
        shown = ", ".join(map(str, wrong[:12])) + ", ..." * (len(wrong) > 12)
        raise LabelError(
            f"{source.describe(sample.first[wrong[0]])}: {share:.1%} of the pixels of the masks of {source.name!r} "
            f"that were read have values that are none of the {rules.classes} classes: {shown}. {remedy}"
        )
    classes = {meaning for meaning in meanings.values() if meaning != IGNORED}
    if len(classes) < 2 and sample.read > 1:
        what = f"only class {classes.pop()}" if classes else "no class at all"
        hint = "data.masks.reduce_zero_label is on, which ignores 0" if rules.reduce_zero_label else "check the masks"
        if {"LA", "PA", "RGBA"} & set(sample.modes):
            hint += " (their alpha channel is not read)"
        raise LabelError(
            f"the {sample.read} masks of {source.name!r} that were read hold {what} (stored values "
            f"{', '.join(map(str, values[:12]))}), so there is nothing to learn: {hint}, data.masks.ignore="
            f"{rules.ignore} and .label_map"
        )
