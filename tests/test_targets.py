"""Targets: values and gradients against numpy, and the resizing of tokens to another grid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tinymim_jax.models.blocks import Tap
from tinymim_jax.ops import token_grid
from tinymim_jax.ops.products import scaled_products
from tinymim_jax.ops.relations import resplit
from tinymim_jax.tasks.distill.targets import FEATURES, TARGETS, find_target, is_relation

BATCH, TOKENS, HEADS, HEAD_DIM = 2, 5, 3, 4
WIDTH = HEADS * HEAD_DIM
PLACES = ("attention", "middle", "ffn", "output")


def random_tap(seed: int) -> Tap:
    rng = np.random.default_rng(seed)
    heads = {name: rng.normal(size=(BATCH, TOKENS, HEADS, HEAD_DIM)) for name in "qkv"}
    tokens = {name: rng.normal(size=(BATCH, TOKENS, WIDTH)) for name in PLACES}
    joined = {"qkv": np.concatenate([heads[name].reshape(BATCH, TOKENS, -1) for name in "qkv"], axis=-1)}
    return Tap(**{name: jnp.asarray(x, jnp.float32) for name, x in (heads | joined | tokens).items()})


STUDENT, TEACHER = random_tap(0), random_tap(1)


def numpy_relation(tap: Tap, name: str, heads: int = HEADS) -> np.ndarray:
    if name == "oo":  # the output has no heads
        heads = 1
    parts = (tap.output if letter == "o" else getattr(tap, letter) for letter in name)
    left, right = (np.asarray(part, np.float64).reshape(BATCH, TOKENS, heads, -1) for part in parts)
    return np.einsum("bqhd,bkhd->bhqk", left, right) / np.sqrt(WIDTH / heads)


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def value_and_gradient(kind: str, s: np.ndarray, t: np.ndarray, beta: float) -> tuple[np.ndarray, np.ndarray]:
    """(loss of each image, gradient of their sum by `s`), in closed form and float64."""
    inner = tuple(range(1, s.ndim))
    count = s[0].size
    if kind == "kl":
        p, q = softmax(t), softmax(s)
        return (p * np.log(p / q)).sum(-1).mean((1, 2)), (q - p) / s[0, ..., 0].size
    if kind == "mse":
        return ((s - t) ** 2).mean(inner), 2 * (s - t) / count
    if kind == "cka":
        rows, columns = (-1,), (-2,)
        s, t = (x - x.mean(rows, keepdims=True) for x in (s, t))
        s, t = (x - x.mean(columns, keepdims=True) for x in (s, t))
        length = np.linalg.norm(s, axis=(-2, -1), keepdims=True)
        unit, other = s / length, t / np.linalg.norm(t, axis=(-2, -1), keepdims=True)
        cosine = (unit * other).sum((-2, -1), keepdims=True)
        return (1 - cosine).mean(inner), -(other - cosine * unit) / length / s.shape[1]
    if kind == "smooth_l1":
        d = np.abs(s - t)
        return np.where(d < beta, d**2 / (2 * beta), d - beta / 2).mean(inner), np.clip((s - t) / beta, -1, 1) / count
    lengths = np.linalg.norm(s, axis=-1, keepdims=True)
    unit, other = s / lengths, t / np.linalg.norm(t, axis=-1, keepdims=True)
    cosine = (unit * other).sum(-1, keepdims=True)
    return (1 - cosine).mean(inner), -(other - cosine * unit) / lengths / s[0, ..., 0].size


def check(target, kind: str, beta: float, student: dict, teacher: dict) -> None:
    """The target's losses and gradients at these float64 arrays, `teacher` as it enters the distance."""
    given = {name: jnp.asarray(x, jnp.float32) for name, x in student.items()}

    def total(given):
        losses = target.loss(given, target.extract(TEACHER))
        return sum(jnp.sum(x) for x in losses.values()), losses

    (_, losses), grads = jax.value_and_grad(total, has_aux=True)(given)
    assert target.names == tuple(student)
    assert set(losses) == set(student)
    for name, x in student.items():
        value, gradient = value_and_gradient(kind, x, teacher[name], beta)
        assert losses[name].dtype == jnp.float32
        # float32 sums of a few hundred terms of order one.
        np.testing.assert_allclose(losses[name], value, rtol=1e-5, err_msg=f"{kind} {name}")
        np.testing.assert_allclose(grads[name], gradient, rtol=1e-4, atol=1e-7, err_msg=f"{kind} {name}")


@pytest.mark.parametrize("kind", ["kl", "smooth_l1", "mse", "cka"])
@pytest.mark.parametrize("name", [name for name in TARGETS if is_relation(name)])
def test_relations_in_closed_form(name, kind):
    beta = 0.7  # so that both branches occur
    target = find_target(name, relation_loss=kind, beta=beta)
    student, teacher = ({p: numpy_relation(tap, p) for p in name.split("_")} for tap in (STUDENT, TEACHER))
    for part, logits in target.extract(STUDENT).items():
        np.testing.assert_allclose(logits, student[part], rtol=1e-4, atol=1e-5)
    check(target, kind, beta, student, teacher)


# The features again, written out by hand.
PLACE_OF = {"output": "output", "ffn": "ffn", "ffn_residual": "output", "attention": "attention"}
PLACE_OF |= {"attention_residual": "middle"}


def numpy_features(tap: Tap, name: str) -> dict[str, np.ndarray]:
    if name == "cls":
        return {"cls": np.asarray(tap.output, np.float64)[:, :1]}
    if name in PLACE_OF:
        return {name: np.asarray(getattr(tap, PLACE_OF[name]), np.float64)}
    return {part: np.asarray(getattr(tap, part), np.float64).reshape(BATCH, TOKENS, WIDTH) for part in name}


def normalized(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize("kind", ["smooth_l1", "mse", "cosine"])
@pytest.mark.parametrize("name", FEATURES)
def test_features_in_closed_form(name, kind):
    target = find_target(name, feature_loss=kind, beta=0.7)
    student = numpy_features(STUDENT, name)
    for part, feature in target.extract(STUDENT).items():
        np.testing.assert_array_equal(feature, student[part].astype(np.float32))
    teacher = {part: normalized(x) for part, x in numpy_features(TEACHER, name).items()}
    check(target, kind, 0.7, student, teacher)
    assert target.adapted


def test_defaults_are_the_published_losses():
    for name, target in TARGETS.items():
        extracted = target.extract(STUDENT), target.extract(TEACHER)
        published = {"feature_loss": "smooth_l1", "beta": 2.0, "relation_loss": "kl"}
        want = find_target(name, **published).loss(*extracted)
        for part, value in target.loss(*extracted).items():
            np.testing.assert_array_equal(value, want[part])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("kind", ["kl", "smooth_l1", "mse", "cka"])
def test_equal_relations_cost_nothing(kind, normalize):
    target = find_target("qk_qq_kk_vv_oo", relation_loss=kind, relation_normalize=normalize)
    for value in target.loss(target.extract(STUDENT), target.extract(STUDENT)).values():
        np.testing.assert_allclose(value, 0, atol=1e-6)


@pytest.mark.parametrize("kind", ["smooth_l1", "mse", "cosine"])
def test_a_student_that_has_the_normalised_feature_costs_nothing(kind):
    for name in FEATURES:
        target = find_target(name, feature_loss=kind)
        student = {part: jnp.asarray(normalized(x), jnp.float32) for part, x in numpy_features(TEACHER, name).items()}
        for value in target.loss(student, target.extract(TEACHER)).values():
            np.testing.assert_allclose(value, 0, atol=1e-6)


def test_a_zero_vector_has_a_finite_cosine_gradient():
    target = find_target("ffn", feature_loss="cosine")
    zeros = {"ffn": jnp.zeros((BATCH, TOKENS, WIDTH))}
    grads = jax.grad(lambda s: target.loss(s, target.extract(TEACHER))["ffn"].sum())(zeros)
    assert np.isfinite(grads["ffn"]).all()


def test_bfloat16_taps_are_compared_in_float32():
    """The result is that of float32 for the same rounded values."""
    low = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), tap) for tap in (STUDENT, TEACHER)]
    high = [jax.tree.map(lambda x: x.astype(jnp.float32), tap) for tap in low]
    for name in ("qk_vv", "ffn", "qkv"):
        target = find_target(name)
        got, want = (target.loss(*(target.extract(tap) for tap in taps)) for taps in (low, high))
        for part in target.names:
            assert got[part].dtype == jnp.float32
            np.testing.assert_allclose(got[part], want[part], rtol=1e-5)


def test_letters_in_any_order():
    want = TARGETS["qk_vv"].extract(STUDENT)
    got = find_target("vv_qk").extract(STUDENT)
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_array_equal(got[name], want[name])


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qkvv", {}, r"distill\.target='qkvv' is unknown; did you mean 'qk_vv'"),
        ("qq_kk_vvv", {}, r"did you mean 'qq_kk_vv'"),
        ("qk_qk", {}, r"is unknown"),
        ("", {}, r"is unknown"),
        ("atention", {}, r"did you mean 'attention'"),
        ("ffn_residuals", {}, r"did you mean 'ffn_residual'"),
        (
            "qk",
            {"relation_loss": "cosine"},
            r"distill\.relation_loss='cosine' is unknown.*'kl', 'smooth_l1', 'mse', 'cka'",
        ),
        ("qk", {"feature_loss": "kl"}, r"distill\.feature_loss='kl' is unknown"),
        ("ffn", {"relation_loss": "ms"}, r"did you mean 'mse'"),
        ("ffn", {"beta": 0.0}, r"distill\.beta=0\.0 must be positive"),
    ],
)
def test_mistakes_name_the_remedy(name, options, message):
    with pytest.raises(ValueError, match=message):
        find_target(name, **options)


def test_another_width_is_no_broadcast():
    target = find_target("ffn")
    with pytest.raises(ValueError, match="by a Linear"):
        target.loss({"ffn": jnp.zeros((BATCH, TOKENS, 1))}, target.extract(TEACHER))


def test_resplit_with_the_heads_of_attention_is_the_published_relation():
    for name in ("qk", "vv"):
        got = find_target(name, relation_heads=HEADS).extract(STUDENT)[name]
        np.testing.assert_array_equal(got, TARGETS[name].extract(STUDENT)[name])


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_resplit_cuts_the_joined_channels_anew(heads):
    got = find_target("qk", relation_heads=heads).extract(STUDENT)["qk"]
    want = numpy_relation(STUDENT, "qk", heads)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert got.shape == (BATCH, heads, TOKENS, TOKENS)
    # Neighboring channels stay neighbors.
    whole = resplit(STUDENT.q, 1)[:, :, 0]
    np.testing.assert_array_equal(whole, STUDENT.q.reshape(BATCH, TOKENS, WIDTH))


def test_relations_of_all_heads_add_up():
    """With the scale taken out, the products of all heads sum to the product of the whole vectors."""
    one = scaled_products(resplit(STUDENT.q, 1), resplit(STUDENT.k, 1)) * np.sqrt(WIDTH)
    six = scaled_products(resplit(STUDENT.q, 6), resplit(STUDENT.k, 6)) * np.sqrt(WIDTH / 6)
    np.testing.assert_allclose(six.sum(1), one[:, 0], rtol=1e-4, atol=1e-4)


def interpolated(grid: np.ndarray, new: tuple[int, int]) -> np.ndarray:
    """[rows, columns] by numpy's piecewise linear interpolation between pixel centres, one axis after the other."""
    for axis in (0, 1):
        old = grid.shape[axis]
        at = (np.arange(new[axis]) + 0.5) / new[axis]
        grid = np.apply_along_axis(lambda line: np.interp(at, (np.arange(old) + 0.5) / old, line), axis, grid)  # noqa: B023
    return grid


@pytest.mark.parametrize(("old", "new"), [((2, 3), (4, 5)), ((4, 4), (2, 2)), ((7, 5), (3, 6)), ((1, 2), (3, 4))])
@pytest.mark.parametrize(("rest", "prefix"), [((3,), 1), ((2, 2), 1), ((3,), 0), ((2,), 3)])
def test_resized_tokens_are_interpolated(old, new, rest, prefix):
    tokens = np.random.default_rng(0).normal(size=(2, prefix + old[0] * old[1], *rest)).astype(np.float32)
    got = np.asarray(token_grid.resize_tokens(jnp.asarray(tokens), old, new, prefix))
    assert got.shape == (2, prefix + new[0] * new[1], *rest)
    np.testing.assert_array_equal(got[:, :prefix], tokens[:, :prefix])
    for index in np.ndindex(2, *rest):
        channel = (index[0], slice(prefix, None), *index[1:])
        want = interpolated(tokens[channel].reshape(old), new)
        np.testing.assert_allclose(got[channel].reshape(new), want, rtol=1e-5, atol=1e-6)


def test_halving_a_grid_averages_two_by_two_and_bfloat16_stays():
    grid = np.arange(32, dtype=np.float32).reshape(1, 4, 4, 2)
    tokens = np.concatenate([np.full((1, 1, 2), 99.0), grid.reshape(1, 16, 2)], axis=1)
    got = token_grid.resize_tokens(jnp.asarray(tokens, jnp.bfloat16), (4, 4), (2, 2))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got[:, 1:], grid.reshape(1, 2, 2, 2, 2, 2).mean((2, 4)).reshape(1, 4, 2))
    assert token_grid.resize_tokens(got, (2, 2), (2, 2)) is got
    with pytest.raises(ValueError, match="5 tokens are not a CLS token and a grid of 3x3"):
        token_grid.resize_tokens(got, (3, 3), (2, 2))
    with pytest.raises(ValueError, match="5 tokens are not 3 tokens and a grid of 2x2"):
        token_grid.resize_tokens(got, (2, 2), (3, 3), 3)


@pytest.mark.parametrize(("rest", "prefix"), [((3,), 1), ((2, 2), 1), ((2,), 0), ((3,), 4)])
def test_visible_tokens(rest, prefix):
    tokens = np.random.default_rng(0).normal(size=(2, prefix + 5, *rest)).astype(np.float32)
    keep = np.array([[4, 0, 2], [1, 3, 0]])
    got = token_grid.visible_tokens(jnp.asarray(tokens), jnp.asarray(keep), prefix)
    want = np.stack([tokens[i][[*range(prefix), *(keep[i] + prefix)]] for i in range(2)])
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("prefix", "kept"), [(0, 0), (1, 1), (1, 0), (2, 1), (5, 1), (4, 0)])
def test_tokens_that_are_not_compared(prefix, kept):
    tokens = np.random.default_rng(0).normal(size=(2, prefix + 6, 3)).astype(np.float32)
    got = token_grid.without_extra_tokens(jnp.asarray(tokens), prefix, kept)
    np.testing.assert_array_equal(got, np.delete(tokens, range(kept, prefix), axis=1))
    with pytest.raises(ValueError, match=rf"{prefix + 1} of {prefix} tokens .* cannot be kept"):
        token_grid.without_extra_tokens(got, prefix, prefix + 1)


def test_resized_images_keep_their_range_and_their_mean():
    images = np.random.default_rng(0).integers(0, 2, (2, 8, 8, 3)).astype(np.float32) * 255
    larger = np.asarray(token_grid.resize_images(jnp.asarray(images), (16, 12)))
    assert larger.shape == (2, 16, 12, 3)
    assert (larger.min(), larger.max()) == (0.0, 255.0)
    flat = token_grid.resize_images(jnp.full((1, 8, 8, 3), 77.0), (12, 4))
    np.testing.assert_allclose(flat, 77.0, rtol=1e-5)
