"""The authors' PyTorch distillation step, timed for benchmarks/step.py, which starts this program.

Needs torch, timm and a checkout of github.com/OliverRensu/TinyMIM. Prints one line when ready; then, for each line "N"
on standard input, runs N steps and prints the seconds that they took.
"""

import argparse
import sys
import time
import types


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repository", required=True)
    parser.add_argument("--teacher", required=True, help="a function of models_teacher.py")
    parser.add_argument("--student", required=True, help="a function of models_tinymim.py")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()

    import numpy as np
    import torch

    # Names that newer versions of numpy and timm have removed.
    setattr(np, "float", float)  # noqa: B010
    _old_timm()
    sys.path.insert(0, options.repository)
    import models_teacher
    import models_tinymim

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    teacher = getattr(models_teacher, options.teacher)().eval().to(device)
    student = getattr(models_tinymim, options.student)().train().to(device)
    decayed = [p for p in student.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in student.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))
    images = torch.randn(2, options.batch, 3, 224, 224, device=device)

    def losses():
        # As in engine_pretrain.py, with bfloat16 instead of float16 with loss scaling.
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.dtype == "bfloat16"):
            with torch.no_grad():
                wanted = teacher(images[0])
            qk, vv = student(images[1], wanted)
        return qk + vv

    if options.compile:
        losses = torch.compile(losses)

    def step() -> float:
        optimizer.zero_grad()
        loss = losses()
        loss.backward()
        optimizer.step()
        return loss.item()  # the authors do this in every step

    for _ in range(3 if device.type == "cuda" else 1):
        step()
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"ready torch {torch.__version__} {name}", flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        for _ in range(int(line)):
            step()
        print(time.perf_counter() - began, flush=True)


def _old_timm() -> None:
    """Provides timm's module names of 2021, which the authors import."""
    import importlib

    for old, new in {"helpers": "_builder", "layers": None, "registry": "_registry"}.items():
        try:
            importlib.import_module(f"timm.models.{old}")
        except ImportError:
            module = importlib.import_module(f"timm.models.{new}" if new else "timm.layers")
            stand_in = types.ModuleType(f"timm.models.{old}")
            stand_in.__dict__.update(vars(module))
            stand_in.__dict__.setdefault("load_pretrained", None)
            sys.modules[f"timm.models.{old}"] = stand_in


if __name__ == "__main__":
    main()
