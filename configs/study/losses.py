"""Loss functions: of relations, with softmax and KL or without softmax; of features, three distances."""

from configs.study.pipeline import two_stages

# Top-1 of TinyMIM-B after 100 epochs; the paper has one result "without softmax" and does not name its distance.
PAPER = {
    ("qk_vv", "kl"): 84.6,
    ("qk_vv", "smooth_l1"): 84.4,
    ("qk_vv", "mse"): 84.4,
    ("qq_kk_vv", "kl"): 84.5,
    ("qq_kk_vv", "smooth_l1"): 84.4,
    ("qq_kk_vv", "mse"): 84.4,
}


def get_chain(scale: str = ""):
    return two_stages(scale)


def sweep():
    for (target, loss), paper in PAPER.items():
        yield {"student.distill.target": target, "student.distill.relation_loss": loss, "note.paper": paper}


def sweep_features():
    for loss, paper in {"smooth_l1": 83.7, "mse": None, "cosine": None}.items():
        yield {"student.distill.target": "output", "student.distill.feature_loss": loss, "note.paper": paper}
