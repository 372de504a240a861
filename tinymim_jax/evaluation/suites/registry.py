"""What a classifier can be judged on: ImageNet's test sets by short names, and any labelled set of one's own."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

# AlexNet's top-1 errors, means over the five severities: what corruption errors are relative to (Hendrycks and
# Dietterich, arXiv 1903.12261; the spreadsheet
# that github.com/hendrycks/robustness links to, whose figures imagenet.py of google-research/augmix has as well).
ALEXNET_ERRORS = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
SEVERITIES = (1, 2, 3, 4, 5)

# The paper's figures in per cent, by the encoder's width: top-1, of c the mCE.
PAPER: dict[int, tuple[str, dict[str, float]]] = {
    192: ("TinyMIM-T", {"imagenet": 75.8, "a": 11.0, "r": 39.8, "c": 50.1}),
    384: ("TinyMIM-S", {"imagenet": 83.0, "a": 27.5, "r": 48.8, "c": 35.8}),
    768: ("TinyMIM-B", {"imagenet": 85.0, "a": 43.0, "r": 54.6, "c": 32.7}),
}


@dataclasses.dataclass(frozen=True)
class Suite:
    """Sets whose figures belong together.

    about: a line for --help.
    sets: by their names within the suite (the only one of most is ""), what they may be called on disk: the first that
        is there counts.
    split: a split that is taken where there is one; otherwise the only one is. None: see `choose_split`.
    remedy: what to do where a set is missing.
    imagenet: its labels are ImageNet's 1,000 classes.
    subset: answers are restricted to the classes that have images, of which there must be so many; 0: they are not.
    whole: its pictures have the size that models see: they are not resized to a larger short side and cropped.
    """

    about: str
    sets: Mapping[str, tuple[str, ...]]
    split: str | None
    remedy: str
    imagenet: bool = True
    subset: int = 0
    whole: bool = False


_TENSORFLOW = "once, with tensorflow-cpu installed"
_UNPACKED = (
    "or, without TensorFlow, of the unpacked archive: tinymim prepare folder:/data/{} --output DATA_DIR --name {}"
)

SUITES = {
    "imagenet": Suite(
        "ImageNet-1K's validation set",
        {"": ("imagenet2012",)},
        "validation",
        f"tinymim prepare imagenet2012 ({_TENSORFLOW}; its archives are downloaded by hand, TFDS says where to)",
    ),
    "real": Suite(
        "the same images with the labels of ImageNet ReaL (any of several is right)",
        {"": ("imagenet2012_real",)},
        "validation",
        f"tinymim prepare imagenet2012_real ({_TENSORFLOW}; ILSVRC2012_img_val.tar is downloaded by hand)",
    ),
    "v2": Suite(
        "ImageNet-V2, matched frequency",
        {"": ("imagenet_v2/matched-frequency", "imagenet_v2")},
        "test",
        f"tinymim prepare imagenet_v2/matched-frequency ({_TENSORFLOW})",
    ),
    "a": Suite(
        "ImageNet-A, answers among its 200 classes",
        {"": ("imagenet_a",)},
        "test",
        f"tinymim prepare imagenet_a ({_TENSORFLOW}); {_UNPACKED.format('imagenet-a', 'imagenet_a')}",
        subset=200,
    ),
    "r": Suite(
        "ImageNet-R, answers among its 200 classes",
        {"": ("imagenet_r",)},
        "test",
        f"tinymim prepare imagenet_r ({_TENSORFLOW}); {_UNPACKED.format('imagenet-r', 'imagenet_r')}",
        subset=200,
    ),
    "sketch": Suite(
        "ImageNet-Sketch",
        {"": ("imagenet_sketch",)},
        "test",
        f"tinymim prepare imagenet_sketch; {_UNPACKED.format('sketch', 'imagenet_sketch')}",
    ),
    "c": Suite(
        "ImageNet-C: 15 corruptions of 5 severities, mCE against AlexNet",
        {f"{name}/{s}": (f"imagenet2012_corrupted/{name}_{s}",) for name in ALEXNET_ERRORS for s in SEVERITIES},
        "validation",
        "of the published pictures, each of the 75: tinymim prepare folder:/data/imagenet-c/fog/1 "
        "--output DATA_DIR/imagenet2012_corrupted --name fog_1; or made anew by TFDS, in its own way: tinymim prepare "
        "imagenet2012_corrupted/fog_1 (with tensorflow-cpu, opencv-python, scipy and scikit-image installed)",
        whole=True,
    ),
}


def parse_suites(words: Sequence[str]) -> dict[str, Suite]:
    """The suites that `words` name: rows of SUITES, `all` of them, and sets of one's own.

    One's own are written NAME@SPLIT or, where files lie (`folder:/data/pets`), with or without @SPLIT: see
    `data.sources.open_source`. Nothing is opened. Raises ValueError for anything else.
    """
    found: dict[str, Suite] = {}
    for word in words:
        if word == "all":
            found |= SUITES
        elif word in SUITES:
            found[word] = SUITES[word]
        elif "@" in word or ":" in word:
            name, split = _own(word)
            found[word] = Suite("a set of one's own", {"": (name,)}, split, "", imagenet=False)
        else:
            raise ValueError(
                f"--suite {word!r} is unknown. Choices: {', '.join(SUITES)}, all; or a labelled set of your own as "
                "NAME@SPLIT, such as cifar10@test, or folder:/data/pets@test"
            )
    return found


def _own(word: str) -> tuple[str, str | None]:
    name, at, split = word.rpartition("@")
    # A place may have an @ of its own; a split has no slash.
    return (name, split) if at and split and "/" not in split else (word, None)


def corruption_errors(errors: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """By corruption, the sum of top-1 errors over the severities divided by AlexNet's; their mean is the mCE.

    `errors` are fractions, one for each severity; AlexNet's are of all five. Raises ValueError for another number.
    """
    for name, each in errors.items():
        if len(each) != len(SEVERITIES):
            raise ValueError(f"{name} has errors of {len(each)} severities, but AlexNet's are of {len(SEVERITIES)}")
    return {name: float(np.sum(each) / (len(SEVERITIES) * ALEXNET_ERRORS[name])) for name, each in errors.items()}
