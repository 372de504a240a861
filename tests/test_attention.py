"""The CPU variants of operations against the plain ones, and against numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from tinymim_jax.ops import platform
from tinymim_jax.ops.attention import attention, attention_for_cpu
from tinymim_jax.ops.gelu import gelu
from tinymim_jax.ops.layer_norm import layer_norm, layer_norm_for_cpu
from tinymim_jax.ops.products import add_bias, linear_product, linear_product_for_cpu, scaled_products

pytestmark = pytest.mark.usefixtures("optimized")

RNG = np.random.default_rng(0)


@pytest.fixture
def plain(monkeypatch):
    """Makes the ops use the plain variants, as on accelerators."""
    for module in ("attention", "layer_norm"):
        monkeypatch.setattr(f"tinymim_jax.ops.{module}.on_cpu", lambda: False)


def heads(scale: float = 1.0, dtype=jnp.float32):
    shape = (2, 7, 3, 8)
    return tuple(jnp.asarray(scale * RNG.normal(size=shape), dtype) for _ in range(3))


def equations(jaxpr):
    """The equations of a jaxpr and of all jaxprs inside it."""
    for equation in jaxpr.eqns:
        inner = [getattr(value, "jaxpr", value) for value in equation.params.values()]
        for each in inner:
            if hasattr(each, "eqns"):
                yield from equations(each)
        yield equation


def test_attention_in_numpy():
    q, k, v = heads()
    logits = np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    want = np.einsum("bhqk,bkhd->bqhd", weights, v)
    np.testing.assert_allclose(attention_for_cpu(q, k, v), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-6), (jnp.bfloat16, 2e-2)])
def test_attention_and_its_gradient_do_not_depend_on_the_form(plain, dtype, tolerance):
    """bfloat16 has 8 bits, and the two variants round in different places."""
    arguments, cotangent = heads(dtype=dtype), heads()[0].astype(dtype)
    want, want_vjp = jax.vjp(attention, *arguments)
    got, got_vjp = jax.vjp(attention_for_cpu, *arguments)
    for a, b in zip((got, *got_vjp(cotangent)), (want, *want_vjp(cotangent)), strict=True):
        assert a.dtype == b.dtype == dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def test_gradient_of_products_in_numpy():
    left, right, _ = (np.asarray(x) for x in heads())
    cotangent = RNG.normal(size=(2, 3, 7, 7)).astype(np.float32)
    _, vjp = jax.vjp(scaled_products, jnp.asarray(left), jnp.asarray(right))
    want = (
        np.einsum("bhqk,bkhd->bqhd", cotangent, right) / np.sqrt(8),
        np.einsum("bhqk,bqhd->bkhd", cotangent, left) / np.sqrt(8),
    )
    for a, b in zip(vjp(jnp.asarray(cotangent)), want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_with_bfloat16_no_product_is_of_float32(plain):
    """In both passes. A float32 product over all pairs of tokens is many times slower on a GPU."""

    def loss(q, k, v):
        return jnp.sum(attention(q, k, v).astype(jnp.float32) ** 2) + jnp.sum(scaled_products(v, v) ** 2)

    traced = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*heads(dtype=jnp.bfloat16))
    products = [each for each in equations(traced.jaxpr) if each.primitive.name == "dot_general"]
    dtypes = [operand.aval.dtype for product in products for operand in product.invars]
    assert len(products) == 3 * 3  # q k, weights v and v v, each with two gradients
    assert set(dtypes) == {jnp.dtype(jnp.bfloat16)}


def test_attention_survives_large_logits():
    q, k, v = heads(scale=100.0)
    value, grads = jax.value_and_grad(lambda *a: jnp.sum(attention_for_cpu(*a) ** 2), argnums=(0, 1, 2))(q, k, v)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_layer_norm_and_its_gradient(plain, dtype):
    x = jnp.asarray(3 + 2 * RNG.normal(size=(4, 5, 16)), dtype)
    scale, bias = (jnp.asarray(RNG.normal(size=16), jnp.float32) for _ in range(2))
    x64 = np.asarray(x, np.float64)
    want = (x64 - x64.mean(-1, keepdims=True)) / np.sqrt(x64.var(-1, keepdims=True) + 1e-6) * scale + bias

    def own(x, scale, bias):
        return layer_norm_for_cpu(x.astype(jnp.float32), scale, bias)

    np.testing.assert_allclose(own(x, scale, bias), want, atol=1e-5)
    cotangent = jnp.asarray(RNG.normal(size=x.shape), jnp.float32)
    _, plain_vjp = jax.vjp(layer_norm, x, scale, bias)
    _, own_vjp = jax.vjp(own, x, scale, bias)
    for a, b in zip(own_vjp(cotangent), plain_vjp(cotangent), strict=True):
        assert a.dtype == b.dtype
        # Rounding of x's gradient to its own dtype aside, equal to float32 accuracy.
        tolerance = 1e-2 if a.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(np.float32(a), np.float32(b), atol=tolerance * np.abs(np.float32(b)).max())


@pytest.mark.parametrize("mean", [0.0, 3.0, -40.0])
def test_layer_norm_in_one_pass(plain, mean):
    """For bfloat16 the variance is E[x^2] - E[x]^2, which loses digits where the mean is large: still below 1e-4."""
    x = jnp.asarray(mean + RNG.normal(size=(3, 384)), jnp.bfloat16)
    exact = np.asarray(x, np.float64)
    want = (exact - exact.mean(-1, keepdims=True)) / np.sqrt(exact.var(-1, keepdims=True) + 1e-6)
    got = layer_norm(x, np.ones(384, np.float32), np.zeros(384, np.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5 if abs(mean) < 10 else 1e-3)


def test_layer_norm_of_equal_values_is_its_bias(plain):
    """Rounding must not make the variance negative."""
    x = jnp.full((4, 384), 77.5, jnp.bfloat16) * jnp.asarray([[1.0], [-3.0], [1e3], [1e-3]], jnp.bfloat16)
    got = layer_norm(x, np.ones(384, np.float32), np.full(384, 0.25, np.float32))
    np.testing.assert_allclose(got, 0.25, atol=1e-3)


def test_the_gradient_of_layer_norm_keeps_no_float32_copy(plain):
    x, vector = jnp.ones((64, 384), jnp.bfloat16), jnp.ones(384)
    _, kept = jax.vjp(lambda x: layer_norm(x, vector, vector).astype(jnp.bfloat16), x)
    sizes = [leaf.size for leaf in jax.tree.leaves(kept) if getattr(leaf, "dtype", None) == jnp.float32]
    assert sizes
    assert max(sizes) < x.size


def test_gelu_is_exact():
    x = np.linspace(-6, 6, 101)
    want = x * 0.5 * (1 + erf(x / np.sqrt(2)))
    np.testing.assert_allclose(gelu(jnp.asarray(x, jnp.float32)), want, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gelu_and_its_gradient_round_once(dtype):
    """Against math.erf: the float32 error of `1 + erf`, and one rounding to the dtype of the input."""
    x = jnp.linspace(-6, 6, 1201).astype(dtype)
    exact = np.asarray(x, np.float64)
    phi = np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in exact])
    slope = phi + exact * np.exp(-0.5 * exact**2) / math.sqrt(2 * math.pi)
    gradient = jax.grad(lambda x: jnp.sum(gelu(x).astype(jnp.float32)))
    for got, want in ((jax.jit(gelu)(x), exact * phi), (jax.jit(gradient)(x), slope)):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=jnp.finfo(dtype).eps, atol=1e-6)


def test_the_form_follows_the_backend():
    assert platform.on_cpu() == (jax.default_backend() == "cpu")


def test_the_gradient_of_a_bias_before_a_kernel_is_summed_in_float32():
    """On TPUs as a product of ones; in bfloat16, 4096 equal cotangents would add up to much less."""
    x, bias = jnp.zeros((64, 64, 8), jnp.bfloat16), jnp.ones(8)
    with platform.compiling_for("tpu"):
        value, back = jax.vjp(add_bias, x, bias)
        d_x, d_bias = back(jnp.full_like(x, 1 / 64))
    np.testing.assert_array_equal(value, jnp.ones_like(x))
    np.testing.assert_array_equal(d_x, jnp.full_like(x, 1 / 64))
    assert d_bias.dtype == jnp.float32
    np.testing.assert_allclose(d_bias, 64.0, rtol=1e-6)


def test_linear_products_of_bfloat16_are_sums_in_float32_rounded_once():
    rows, kernel, cotangent = (
        jnp.asarray(RNG.normal(size=shape), jnp.bfloat16) for shape in ((2, 9, 40), (40, 24), (2, 9, 24))
    )
    product, gradient = jax.vjp(linear_product_for_cpu, rows, kernel)
    by_rows, by_kernel = gradient(cotangent)
    x, w, g = (np.asarray(each, np.float64) for each in (rows, kernel, cotangent))
    wanted = {"product": x @ w, "by rows": g @ w.T, "by kernel": x.reshape(-1, 40).T @ g.reshape(-1, 24)}
    for (name, want), got in zip(wanted.items(), (product, by_rows, by_kernel)):
        assert got.dtype == jnp.bfloat16, name
        # Half a unit in the last of 8 places, and rounding of the float32 sum.
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8, atol=1e-5, err_msg=name)


def test_on_cpus_no_operand_of_a_linear_product_is_converted_to_float32():
    """XLA has a product of bfloat16 with a float32 result; any other is one of float32 after a conversion."""
    rows, kernel = jnp.ones((6, 8), jnp.bfloat16), jnp.ones((8, 4), jnp.bfloat16)
    made = jax.make_jaxpr(jax.grad(lambda x, w: jnp.sum(linear_product(x, w).astype(jnp.float32)), (0, 1)))(
        rows, kernel
    )
    products = [each for each in equations(made.jaxpr) if each.primitive.name == "dot_general"]
    assert len(products) >= 2
    for product in products:
        assert {value.aval.dtype for value in product.invars} == {jnp.dtype(jnp.bfloat16)}
        assert product.outvars[0].aval.dtype == jnp.float32
