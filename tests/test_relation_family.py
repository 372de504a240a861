"""Relations of block outputs, sums of targets, attention maps, statistics and adapters, against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_targets import BATCH, STUDENT, TEACHER, TOKENS, WIDTH, softmax

from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.platform import compiling_for
from tinymim_jax.tasks.distill import relations as relations_module
from tinymim_jax.tasks.distill.adapters import adapt, init_adapter
from tinymim_jax.tasks.distill.compare import compare, init_comparison
from tinymim_jax.tasks.distill.pairs import Blocks, Pair
from tinymim_jax.tasks.distill.parts import Part, read_parts
from tinymim_jax.tasks.distill.statistics import no_statistics, standardize, update_statistics
from tinymim_jax.tasks.distill.targets import find_target
from tinymim_jax.tasks.task import RUNNING

GRAM = {"relation_loss": "mse", "relation_normalize": True}
CKA = {"relation_loss": "cka"}
LOCAL = {"relation_loss": "kl", "relation_normalize": True, "relation_temperature": 0.07}


def by_hand(kind: str, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """(loss of one image, its gradient by the student's tokens `x` [tokens, width]), in closed form and float64."""
    if kind == "cka":  # through the features, as Kornblith et al. write it; the gradient by products of centred tokens
        x, y = x - x.mean(0), y - y.mean(0)
        own, other = np.linalg.norm(x.T @ x), np.linalg.norm(y.T @ y)
        cka = np.linalg.norm(y.T @ x) ** 2 / (own * other)
        gradient = -2 * (y @ y.T / (own * other) - cka * (x @ x.T) / own**2) @ x
        return 1 - cka, gradient - gradient.mean(0)
    lengths = np.linalg.norm(x, axis=1, keepdims=True)
    u, w = x / lengths, y / np.linalg.norm(y, axis=1, keepdims=True)
    if kind == "gram":
        difference = u @ u.T - w @ w.T
        value, by_cosine = (difference**2).mean(), 2 * difference / difference.size
    else:
        p, q = softmax(w @ w.T / 0.07), softmax(u @ u.T / 0.07)
        value, by_cosine = (p * np.log(p / q)).sum(1).mean(), (q - p) / len(x) / 0.07
    by_unit = (by_cosine + by_cosine.T) @ u
    return value, (by_unit - (by_unit * u).sum(1, keepdims=True) * u) / lengths


@pytest.mark.parametrize(
    ("kind", "options"),
    [("gram", GRAM), ("local", LOCAL), ("cka", {"relation_loss": "cka"})],
    ids=["gram", "kl", "cka"],
)
@pytest.mark.parametrize("patches_only", [False, True])
def test_gram_anchoring_the_local_loss_and_cka(kind, options, patches_only):
    pairs = [Pair(Blocks(1, 1), find_target("oo", **options), ("oo",), patches_only=patches_only)]

    def loss(output):
        values = compare(pairs, {}, [STUDENT.replace(output=output)], [TEACHER], prefix=1)
        return values["loss"].sum(), values

    (_, values), gradient = jax.value_and_grad(loss, has_aux=True)(STUDENT.output)
    assert set(values) == {"loss", "oo"}
    start = int(patches_only)
    for i in range(BATCH):
        x, y = (np.asarray(tap.output[i, start:], np.float64) for tap in (STUDENT, TEACHER))
        value, wanted = by_hand(kind, x, y)
        # float32; a KL is a sum of differences of logarithms of order 10, and the gradient of a cosine a difference of
        # larger terms.
        np.testing.assert_allclose(values["oo"][i], value, rtol=2e-5, atol=2e-7)
        np.testing.assert_allclose(gradient[i, start:], wanted, rtol=1e-4, atol=1e-6)
    assert not np.any(gradient[:, :start])


@pytest.mark.parametrize("options", [GRAM, LOCAL, {"relation_loss": "cka"}, {"relation_loss": "kl"}])
def test_equal_outputs_cost_nothing_and_cka_ignores_scale_and_shift(options):
    target = find_target("oo", **options)

    def loss(output):
        return target.loss(target.extract(STUDENT.replace(output=output)), target.extract(STUDENT))["oo"].sum()

    value, gradient = jax.value_and_grad(loss)(STUDENT.output)
    np.testing.assert_allclose(value, 0, atol=2e-6)
    np.testing.assert_allclose(gradient, 0, atol=2e-6)
    if options["relation_loss"] == "cka":
        np.testing.assert_allclose(loss(3 * STUDENT.output + 1), 0, atol=2e-6)


def test_a_zero_token_has_a_finite_gradient_and_cosine_0():
    target = find_target("oo", **GRAM)
    found = jax.grad(
        lambda x: target.loss(target.extract(STUDENT.replace(output=x)), target.extract(TEACHER))["oo"].sum()
    )(jnp.zeros((BATCH, TOKENS, WIDTH)))
    assert np.isfinite(found).all()
    assert not np.any(target.extract(STUDENT.replace(output=jnp.zeros((BATCH, TOKENS, WIDTH))))["oo"])


def test_temperature_normalization_and_heads_of_every_letter():
    tap = STUDENT
    got = find_target("vv_oo", relation_normalize=True, relation_temperature=0.5, output_heads=2).extract(tap)
    v = np.asarray(tap.v, np.float64)
    v /= np.linalg.norm(v, axis=-1, keepdims=True)
    o = np.asarray(tap.output, np.float64).reshape(BATCH, TOKENS, 2, -1)
    o /= np.linalg.norm(o, axis=-1, keepdims=True)
    np.testing.assert_allclose(got["vv"], np.einsum("bqhd,bkhd->bhqk", v, v) / 0.5, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["oo"], np.einsum("bqhd,bkhd->bhqk", o, o) / 0.5, rtol=1e-4, atol=1e-5)
    plain = find_target("qk", relation_temperature=2.0).extract(tap)["qk"]
    wanted = np.einsum("bqhd,bkhd->bhqk", np.asarray(tap.q, np.float64), np.asarray(tap.k, np.float64)) / 2
    np.testing.assert_allclose(plain, wanted, rtol=1e-4, atol=1e-5)


def test_cosines_of_bfloat16_are_those_of_the_rounded_values():
    """Products of bfloat16 are exact in float32, and lengths are float32."""
    low = STUDENT.replace(output=STUDENT.output.astype(jnp.bfloat16))
    high = STUDENT.replace(output=low.output.astype(jnp.float32))
    target = find_target("oo", **LOCAL)
    np.testing.assert_allclose(target.extract(low)["oo"], target.extract(high)["oo"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relation_temperature": 0.0}, r"relation_temperature=0\.0 must be positive"),
        ({"relation_temperature": 0.1, "relation_loss": "cka"}, r"no effect on relation_loss='cka'"),
        ({"relation_form": "fused"}, r"is for products of q, k and v at the published scale.*'auto' or 'dense'"),
        ({"feature_norm": "batch"}, r"distill\.feature_norm='batch' is unknown.*'layer', 'fixed'"),
        ({"adapter": "mpl"}, r"did you mean 'mlp'"),
    ],
)
def test_mistaken_options(options, message):
    with pytest.raises(ValueError, match=message):
        find_target("oo", **options)


def test_what_the_kernel_does_not_compute_is_dense_and_logged(caplog):
    relations_module._log_dense.cache_clear()
    with compiling_for("tpu"), caplog.at_level("INFO"):
        assert set(find_target("qk_vv").extract(STUDENT)) == {"qkv", "q"}
        assert "dense" not in caplog.text
        assert set(find_target("qk_oo").extract(STUDENT)) == {"qk", "oo"}
        assert "distill.relation_form: dense, as the fused form is for products of q, k and v" in caplog.text
        assert set(find_target("qk", relation_normalize=True).extract(STUDENT)) == {"qk"}
    with pytest.raises(ValueError, match="is for products of q, k and v"):
        find_target("qk", relation_normalize=True, relation_form="fused")


# The text of distill.target.


def test_sums_are_read():
    assert read_parts("qk_vv") == (Part("qk_vv"),)
    assert read_parts("qk_vv:1 + output:0.5+cls : 1e-1") == (Part("qk_vv"), Part("output", 0.5), Part("cls", 0.1))
    got = read_parts("oo(loss=mse, normalize=True,patches=false, heads=4):2 + ffn(loss=cosine, norm=fixed, student=3)")
    relation = {"relation_loss": "mse", "relation_normalize": True, "relation_heads": 4, "output_heads": 4}
    feature = {"feature_loss": "cosine", "feature_norm": "fixed"}
    assert got == (Part("oo", 2.0, relation, patches_only=False), Part("ffn", 1.0, feature, student=3))
    assert read_parts("attention_map(teacher=12)") == (Part("attention_map", teacher=12),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("qk_vv + fnn", r"distill\.target='fnn' is unknown; did you mean 'ffn'"),
        ("qk_vv +", r"distill\.target='' is unknown"),
        ("qk_vv:one", r"'qk_vv:one' cannot be read.*NAME\(OPTION=VALUE.*Names: qk, .*options of relations: loss, norm"),
        ("qk_vv:1:2", r"'qk_vv:1:2' cannot be read"),
        ("oo(loss=mse", r"cannot be read"),
        ("qk_vv:0", r"the weight of qk_vv is 0; it must be positive"),
        ("qk_vv:-1", r"must be positive"),
        ("oo(lss=mse)", r"option of oo='lss' is unknown; did you mean 'loss'"),
        ("output(normalize=true)", r"option of output='normalize' is unknown.*'adapter'"),
        ("attention_map(loss=kl)", r"option of attention_map='loss' is unknown.*'patches'"),
        ("oo(normalize=1)", r"normalize='1' of oo must be true or false"),
        ("oo(temperature=warm)", r"temperature='warm' of oo must be a number"),
        ("oo(student=1.5)", r"student='1\.5' of oo must be a whole number"),
        ("oo(loss)", r"loss of oo has no value: write loss=VALUE"),
    ],
)
def test_mistaken_sums_name_the_choices(text, message):
    with pytest.raises(ValueError, match=message):
        read_parts(text)


# Attention maps.


def test_attention_maps_and_their_adapter():
    target = find_target("attention_map")
    maps = {}
    for name, tap in (("student", STUDENT), ("teacher", TEACHER)):
        q, k = np.asarray(tap.q, np.float64), np.asarray(tap.k, np.float64)
        maps[name] = softmax(np.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1]))
    own, other = target.extract(STUDENT), target.extract(TEACHER)
    np.testing.assert_allclose(own["attention_map"], maps["student"], rtol=1e-5, atol=1e-7)
    wanted = ((maps["student"] - maps["teacher"]) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(target.loss(own, other)["attention_map"], wanted, rtol=1e-5)
    np.testing.assert_array_equal(target.loss(own, own)["attention_map"], 0)
    assert init_adapter("heads", jax.random.key(0), 3, 3) is None
    # From 3 heads to 2: each of the two is a combination of the three.
    params = init_adapter("heads", jax.random.key(0), 3, 2)
    kernel = np.random.default_rng(0).normal(size=(3, 2)).astype(np.float32)
    assert params["kernel"].shape == kernel.shape
    rows = adapt("heads", params, own["attention_map"]).sum(-1)
    np.testing.assert_allclose(rows, 1, rtol=1e-5)  # still distributions at the start
    got = adapt("heads", {"kernel": jnp.asarray(kernel)}, own["attention_map"])
    np.testing.assert_allclose(got, np.einsum("bsqk,st->btqk", maps["student"], kernel), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="the student's attention maps are"):
        target.loss({"attention_map": got}, other)


# Statistics and adapters of features.


def test_statistics_are_those_of_the_first_images():
    rng = np.random.default_rng(0)
    batches = [rng.normal(3, 2, (size, TOKENS, WIDTH)).astype(np.float32) for size in (4, 2, 6, 5)]
    statistics = no_statistics(WIDTH)
    np.testing.assert_allclose(standardize(jnp.asarray(batches[0]), statistics), batches[0], rtol=1e-5)
    for count, batch in enumerate(batches, 1):
        statistics = update_statistics(statistics, jnp.asarray(batch), 10)
        seen = np.concatenate(batches[: min(count, 3)]).reshape(-1, WIDTH).astype(np.float64)
        assert statistics["images"] == (4, 6, 12, 12)[count - 1]
        np.testing.assert_allclose(statistics["mean"], seen.mean(0), rtol=1e-5)
        np.testing.assert_allclose(statistics["variance"], seen.var(0), rtol=1e-5)
    got = standardize(jnp.asarray(batches[3], jnp.bfloat16), statistics)
    low = np.asarray(jnp.asarray(batches[3], jnp.bfloat16), np.float64)
    np.testing.assert_allclose(got, (low - seen.mean(0)) / seen.std(0), rtol=1e-4, atol=1e-5)


def test_a_standardized_feature_is_compared_with_running_statistics():
    vit = ViT(WIDTH, 1, 3, 4, (8, 8))
    pairs = [Pair(Blocks(1, 1), find_target("qkv", feature_loss="mse", feature_norm="fixed"), ("q", "k", "v"))]
    params = init_comparison(jax.random.key(0), pairs, vit, vit)
    assert set(params) == {"adapter", "statistics"}
    assert set(params["statistics"]["taps_0"]) == {"q", "k", "v"}
    values = compare(pairs, params, [STUDENT], [TEACHER], prefix=1, images=5)
    running = values.pop(RUNNING)["statistics"]
    assert jax.tree.structure(running) == jax.tree.structure(params["statistics"])
    for name in "qkv":
        own, other = (
            np.asarray(getattr(tap, name), np.float64).reshape(BATCH, TOKENS, -1) for tap in (STUDENT, TEACHER)
        )
        other = (other - other.mean((0, 1))) / np.sqrt(other.var((0, 1)) + 1e-6)
        own = own @ np.asarray(params["adapter"]["taps_0"][name]["kernel"], np.float64)
        np.testing.assert_allclose(values[name], ((own - other) ** 2).mean((1, 2)), rtol=1e-4)
    # Evaluation uses what training has found and changes nothing.
    again = compare(pairs, params | {"statistics": running}, [STUDENT], [TEACHER], prefix=1)
    assert RUNNING not in again
    np.testing.assert_allclose(again["loss"], values["loss"], rtol=1e-6)


def test_the_mlp_adapter_has_two_layers_of_the_teachers_width():
    params = init_adapter("mlp", jax.random.key(0), 4, 6)
    assert {name: layer["kernel"].shape for name, layer in params.items()} == {"fc1": (4, 6), "fc2": (6, 6)}
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    hidden = jax.nn.gelu(x @ params["fc1"]["kernel"] + params["fc1"]["bias"], approximate=False)
    wanted = hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    np.testing.assert_allclose(adapt("mlp", params, jnp.asarray(x)), wanted, rtol=1e-4, atol=1e-5)
