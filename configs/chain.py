"""Sequential distillation (paper, section 4.4), run by `tinymim chain`: each student is the teacher of the next one.

FILE distils MAE-L into Base, Base into Small and Small into Tiny, and fine-tunes the last student. FILE:b,t and
FILE:s,t are shorter lists. Name the first teacher by distill.teacher.path=teachers/mae_vit_large; for a MAE-B, add
b.distill.teacher.name=mae_vit_base. All students have 16 heads in their last block, as MAE-L has; with
distill.heads=resplit every student has its own number of heads in all blocks.
FILE:digits is a small chain on handwritten digits that trains its teacher too, in minutes on two cores.
"""

SIZES = ("b", "s", "t")

# Of a distilled student the last block is the target, since it was trained on relations.
_STUDENT_AS_TEACHER = {"distill.teacher.name": "", "distill.teacher.tap": None}


def get_chain(sizes: str = "b,s,t"):
    if sizes == "digits":
        return digits()
    names = sizes.split(",")
    if not set(names) <= set(SIZES) or len(set(names)) < len(names):
        raise ValueError(f"configs/chain.py:{sizes} is unknown. Choose digits, or some of {', '.join(SIZES)}: b,s,t")
    stages = [(names[0], f"distill_{names[0]}.py", {"distill.teacher.name": "mae_vit_large"})]
    for i, name in enumerate(names[1:]):
        stages.append((name, f"distill_{name}.py", _STUDENT_AS_TEACHER | {"distill.teacher.path": f"{{{names[i]}}}"}))
    return [*stages, ("classifier", f"finetune_{names[-1]}.py", {"init": f"{{{names[-1]}}}"})]


def digits():
    """A teacher of width 128 and 6 blocks, students of widths 96 and 48 and 4 blocks, a classifier of 100 labels."""
    return [
        ("teacher", "digits.py:mae_teacher", {}),
        ("large", "digits.py:distill", {"distill.teacher.path": "{teacher}", "model.embed_dim": 96}),
        ("small", "digits.py:distill", _STUDENT_AS_TEACHER | {"distill.teacher.path": "{large}"}),
        ("classifier", "digits.py:finetune", {"init": "{small}"}),
    ]
