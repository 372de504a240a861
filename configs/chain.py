"""Sequential distillation (paper, section 4.4): each student is the next one's teacher; `tinymim chain` runs it.

FILE is MAE-L -> B -> S -> T; FILE:b,t and FILE:s,t are other lists. The last student is fine-tuned. The first one's
teacher must be given: distill.teacher.path=teachers/mae_vit_large (b.distill.teacher.name=mae_vit_base for another).
Last blocks have 16 heads, as MAE-L; with distill.heads=resplit every student keeps its own number of heads throughout.
FILE:digits is a chain on handwritten digits, its teacher included, in minutes on two cores.
"""

SIZES = ("b", "s", "t")

# Of a student of ours the last block is tapped, the one that was trained on relations.
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
    """A teacher of 128 x 6 blocks, students of 96 x 4 and 48 x 4, and a classifier from 100 labels."""
    return [
        ("teacher", "digits.py:mae_teacher", {}),
        ("large", "digits.py:distill", {"distill.teacher.path": "{teacher}", "model.embed_dim": 96}),
        ("small", "digits.py:distill", _STUDENT_AS_TEACHER | {"distill.teacher.path": "{large}"}),
        ("classifier", "digits.py:finetune", {"init": "{small}"}),
    ]
