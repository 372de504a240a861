"""FLOPs of the step: computed by hand, by the compiler, and for every task."""

import jax
import jax.numpy as jnp
import pytest
from runs import small_config

from tinymim_jax.config import load_config
from tinymim_jax.experiment import batch_shapes
from tinymim_jax.flops import matmul_flops, step_flops
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.plan.build import plan_experiment


def flops_of(config, data_dir: str | None = None) -> float:
    planned = plan_experiment(config, data_dir=data_dir)
    return step_flops(planned.experiment.task, planned.frozen, batch_shapes(planned.experiment))


@pytest.fixture(scope="module")
def tiny() -> float:
    """configs/distill_t.py with one image."""
    return flops_of(load_config("configs/distill_t.py", ["train.batch_size=1"]))


def test_vit_b_to_tiny_by_hand(tiny):
    """Eleven blocks and one qkv of each network; three times that for the student, without the pixels' gradient."""
    tokens, patches = 197, 196

    def embedding(d):
        return 2 * patches * 768 * d

    def blocks(d):
        return 11 * (24 * tokens * d * d + 4 * tokens**2 * d) + 2 * tokens * d * 3 * d

    def relations(d):
        return 2 * 2 * tokens**2 * d

    teacher = embedding(768) + blocks(768) + relations(768)
    student = 2 * embedding(192) + 3 * (blocks(192) + relations(192))
    assert tiny == teacher + student


def test_a_second_pair_of_blocks_costs_its_relations_alone(tiny):
    two = load_config("configs/distill_t.py", ["train.batch_size=1", "distill.taps=((12, 12, 1.0), (6, 6, 0.5))"])
    relations = 2 * 2 * 197**2
    assert flops_of(two) - tiny == relations * 768 + 3 * relations * 192


def test_convolutions_forward_and_backward_by_hand():
    x, kernel = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 5))
    dimensions = ("NHWC", "HWIO", "NHWC")

    def loss(x, kernel, stride):
        padding = ((1, 1), (1, 1))
        return jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, padding, dimension_numbers=dimensions).sum()

    once = 2 * 2 * 64 * 3 * 3 * 3 * 5
    assert matmul_flops(lambda *a: loss(*a, 1), x, kernel) == once
    assert matmul_flops(jax.grad(lambda *a: loss(*a, 1) ** 2, argnums=(0, 1)), x, kernel) == 3 * once
    assert matmul_flops(jax.grad(lambda *a: loss(*a, 2) ** 2, argnums=(0, 1)), x, kernel) == 3 * once // 4


def test_they_are_the_compilers():
    encoder = ViT(embed_dim=64, depth=4, heads=2, patch_size=8, image_size=(64, 64))
    images = jnp.zeros((4, 64, 64, 3))
    params = jax.jit(encoder.init)(jax.random.key(0), images)["params"]

    def qkv(params, images):
        tap = encoder.apply({"params": params}, images, tap=3, method="encode")
        return tap.q, tap.k, tap.v

    analysis = jax.jit(qkv).lower(params, images).compile().cost_analysis()
    counted = (analysis[0] if isinstance(analysis, list) else analysis)["flops"]
    # The compiler also counts norms, softmax and GELU, which are a noticeable part at this width.
    assert matmul_flops(qkv, params, images) == pytest.approx(counted, rel=0.12)
    assert matmul_flops(qkv, params, images) < counted


@pytest.mark.parametrize("name", ["mae_teacher", "finetune"])
def test_scan_changes_nothing_and_remat_adds(name, data_dir):
    def flops(*words):
        return flops_of(small_config(name, "model.depth=3", *words), data_dir)

    plain = flops()
    assert flops("model.scan=True", "train.batch_size=16") == 2 * plain
    assert plain < flops("model.remat=full") < 4 / 3 * plain


def test_a_branch_counts_once_and_a_loop_as_often_as_it_runs():
    x = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    product = 2 * 8**3

    def looped(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: y @ x, x)

    def branched(x):
        return jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x)

    def unused(x):
        return (x @ x, x @ x @ x)[0]

    assert matmul_flops(looped, x) == 5 * product
    assert matmul_flops(branched, x) == 2 * product
    assert matmul_flops(unused, x) == product


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
