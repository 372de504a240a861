"""FLOPs counted in the trace, against the ViT's closed form and the compiler's own count."""

import jax
import jax.numpy as jnp
import pytest

from tinymim_jax.models.flops import matmul_flops
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT


def traced(encoder: ViT, classes: int = 7):
    """(function, shapes of its arguments) of a classifier on one image."""
    network = Classifier(encoder, classes)
    image = jax.ShapeDtypeStruct((1, *encoder.image_size, 3), jnp.float32)
    params = jax.eval_shape(network.init, jax.random.key(0), image)
    return network.apply, params, image


def closed_form(encoder: ViT, classes: int = 7) -> int:
    patches, dim = encoder.grid[0] * encoder.grid[1], encoder.embed_dim
    tokens, hidden = patches + 1, int(encoder.mlp_ratio * dim)
    linear = tokens * dim * 3 * dim + tokens * dim * dim + 2 * tokens * dim * hidden
    attention = 2 * tokens * tokens * dim
    return 2 * (patches * 3 * encoder.patch_size**2 * dim + encoder.depth * (linear + attention) + dim * classes)


SMALL = ViT(24, 3, 2, patch_size=8, image_size=(32, 48), final_norm=False)


@pytest.mark.parametrize("options", [{}, {"scan": True}, {"scan": True, "remat": "full"}, {"mlp_ratio": 2.0}])
def test_a_classifier_takes_what_its_sizes_say(options):
    encoder = SMALL.clone(**options)
    assert matmul_flops(*traced(encoder)) == closed_form(encoder)


def test_published_sizes():
    # 17.6 G multiply-adds are the usual figure of ViT-B/16 at 224 pixels.
    base = ViT(768, 12, 12, final_norm=False)
    assert matmul_flops(*traced(base, 1000)) / 2 == pytest.approx(17.56e9, rel=0.005)


def test_the_compiler_counts_a_little_more():
    function, *arguments = traced(ViT(192, 2, 3, final_norm=False), 1000)
    analysed = jax.jit(function).lower(*arguments).cost_analysis()["flops"]
    counted = matmul_flops(function, *arguments)
    assert counted < analysed < 1.05 * counted  # it has the softmax, norms and GELU as well


def test_a_gradient_takes_twice_the_forward_pass():
    def product(a, b):
        return jnp.sum(a @ b)

    a, b = jax.ShapeDtypeStruct((5, 6), jnp.float32), jax.ShapeDtypeStruct((6, 7), jnp.float32)
    forward = 2 * 5 * 6 * 7
    assert matmul_flops(product, a, b) == forward
    assert matmul_flops(jax.value_and_grad(product, (0, 1)), a, b) == 3 * forward


def test_what_cannot_be_counted_is_refused():
    def loop(x):
        return jax.lax.while_loop(lambda y: jnp.sum(y) < 9, lambda y: y @ y, x)

    with pytest.raises(NotImplementedError, match="while"):
        matmul_flops(loop, jnp.ones((3, 3)))
