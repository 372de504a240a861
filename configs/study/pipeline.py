"""The two stages of all studies: distil a student, then fine-tune it."""


def two_stages(scale: str, *, full: str = "b"):
    """The stages `student` and `classifier`: at full size (scale "", TinyMIM of size `full`) or at scale "small"."""
    if scale == "small":
        return [
            ("student", "../cifar10.py:distill", {}),
            ("classifier", "../cifar10.py:finetune", {"init": "{student}"}),
        ]
    if scale:
        raise ValueError(f"FILE:{scale} is unknown. Choices: FILE, at full size, and FILE:small")
    return [
        ("student", f"../distill_{full}.py", {"train.duration": "100 epochs"}),
        ("classifier", f"../finetune_{full}.py", {"init": "{student}"}),
    ]
