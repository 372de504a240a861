"""The state dict of a small timm ViT, with noise in it."""

import numpy as np


def vit_state(dim: int = 24, patch: int = 4, image: int = 16, classes: int = 5, seed: int = 0) -> dict[str, np.ndarray]:
    """One block; timm's names and shapes written out."""
    rng = np.random.default_rng(seed)
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, (image // patch) ** 2 + 1, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
        "blocks.0.norm1.weight": (dim,),
        "blocks.0.norm1.bias": (dim,),
        "blocks.0.attn.qkv.weight": (3 * dim, dim),
        "blocks.0.attn.qkv.bias": (3 * dim,),
        "blocks.0.attn.proj.weight": (dim, dim),
        "blocks.0.attn.proj.bias": (dim,),
        "blocks.0.norm2.weight": (dim,),
        "blocks.0.norm2.bias": (dim,),
        "blocks.0.mlp.fc1.weight": (4 * dim, dim),
        "blocks.0.mlp.fc1.bias": (4 * dim,),
        "blocks.0.mlp.fc2.weight": (dim, 4 * dim),
        "blocks.0.mlp.fc2.bias": (dim,),
        "norm.weight": (dim,),
        "norm.bias": (dim,),
        "head.weight": (classes, dim),
        "head.bias": (classes,),
    }
    return {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
