"""The Pallas kernels in the interpreter against the dense forms, values and gradients."""

import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import relative_error

from tinymim_jax.convert import convert_file
from tinymim_jax.flops import matmul_flops
from tinymim_jax.models.blocks import Tap
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.attention import choose_form, cudnn_attention, joint_attention
from tinymim_jax.ops.kernels import tiles
from tinymim_jax.ops.kernels.attention import fused_attention
from tinymim_jax.ops.kernels.relations import fused_relation_kl, relations_of
from tinymim_jax.ops.placement import splitting_batches
from tinymim_jax.ops.platform import compiling_for
from tinymim_jax.plan.devices import assume_cudnn
from tinymim_jax.sharding import batch_sharding, make_mesh
from tinymim_jax.tasks.distill.targets import find_target


def split_heads(qkv, heads):
    batch, tokens, width = qkv.shape
    parts = qkv.reshape(batch, tokens, 3, heads, width // 3 // heads)
    return parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]


def dense_attention(qkv, heads, bias=0.0):
    """In the plain form of ops.attention."""
    q, k, v = split_heads(qkv, heads)
    logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5 + bias
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*qkv.shape[:2], -1)


def dense_relations(student, teacher, heads, names, real=jnp.float32):
    """KL(teacher || student) [batch, relations], term by term."""
    found = []
    student, teacher = split_heads(student.astype(real), heads), split_heads(teacher.astype(real), heads)
    for name in names:
        left, right = ("qkv".index(letter) for letter in name)
        logs = []
        for side in (student, teacher):
            logits = jnp.einsum("bqhd,bkhd->bhqk", side[left], side[right]) * side[0].shape[-1] ** -0.5
            logs.append(jax.nn.log_softmax(logits, axis=-1))
        found.append(jnp.mean(jnp.sum(jnp.exp(logs[1]) * (logs[1] - logs[0]), axis=-1), axis=(1, 2)))
    return jnp.stack(found, axis=1)


def drawn(seed, *shape, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), shape)


# tokens, dim, heads: one head or several in a tile, a tile that is not full, heads that divide no tile.
SHAPES = [(50, 64, 4), (37, 192, 3), (197, 128, 2), (26, 96, 2), (21, 160, 2), (24, 256, 2)]


@pytest.mark.parametrize(("tokens", "dim", "heads"), SHAPES)
def test_attention_in_float32(tokens, dim, heads):
    qkv, cotangent = drawn(0, 2, tokens, 3 * dim, scale=2.0), drawn(1, 2, tokens, dim)
    value, back = jax.vjp(lambda x: fused_attention(x, None, heads, True), qkv)
    wanted, wanted_back = jax.vjp(lambda x: dense_attention(x, heads), qkv)
    assert relative_error(value, wanted) <= 1e-5
    assert relative_error(back(cotangent)[0], wanted_back(cotangent)[0]) <= 1e-5


@pytest.mark.parametrize(("tokens", "dim", "heads"), [(45, 128, 4), (53, 96, 2), (40, 256, 2)])
def test_attention_by_rows(tokens, dim, heads, monkeypatch):
    """The form for many tokens, in blocks of 16 rows: of 45 tokens the last block is not full."""
    small_blocks(monkeypatch)
    test_attention_in_float32(tokens, dim, heads)


def small_blocks(monkeypatch):
    for module, other in (("attention", "attention_rows"), ("relations", "relation_rows")):
        monkeypatch.setattr(f"tinymim_jax.ops.kernels.{module}.SHORT", 8)
        monkeypatch.setattr(f"tinymim_jax.ops.kernels.{other}.ROWS", 16)
    assert tiles.SHORT > 197  # a ViT's tokens at 224 px are one block


def test_attention_at_512_pixels():
    qkv, cotangent = drawn(0, 1, 1025, 3 * 128), drawn(1, 1, 1025, 128)
    value, back = jax.vjp(lambda x: fused_attention(x, None, 2, True), qkv)
    wanted, wanted_back = jax.vjp(lambda x: dense_attention(x, 2), qkv)
    assert relative_error(value, wanted) <= 1e-5
    assert relative_error(back(cotangent)[0], wanted_back(cotangent)[0]) <= 1e-5


def test_attention_in_bfloat16_is_as_exact_as_the_dense_form():
    exact = drawn(0, 2, 197, 3 * 128, scale=2.0).astype(jnp.bfloat16).astype(jnp.float32)
    cotangent = drawn(1, 2, 197, 128).astype(jnp.bfloat16).astype(jnp.float32)
    truth, truth_back = jax.vjp(lambda x: dense_attention(x, 2), exact)
    for form, limit in ((lambda x: fused_attention(x, None, 2, True), 2.0), (lambda x: dense_attention(x, 2), 1.0)):
        value, back = jax.vjp(form, exact.astype(jnp.bfloat16))
        errors = (
            relative_error(value, truth),
            relative_error(back(cotangent.astype(jnp.bfloat16))[0], truth_back(cotangent)[0]),
        )
        if limit == 2.0:
            fused = errors
        else:
            assert fused[0] <= 2 * errors[0]
            assert fused[1] <= 2 * errors[1]
    assert max(fused) <= 6e-3


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(("tokens", "dim", "heads"), [(50, 64, 4), (37, 192, 3), (45, 128, 2), (21, 160, 2)])
def test_attention_with_a_bias(tokens, dim, heads, rows, monkeypatch):
    """A bias on each logit (BEiT) and its gradient, a sum over images, in both forms of the kernel."""
    if rows:
        small_blocks(monkeypatch)
    qkv, cotangent = drawn(0, 3, tokens, 3 * dim, scale=2.0), drawn(1, 3, tokens, dim)
    bias = drawn(2, heads, tokens, tokens)
    value, back = jax.vjp(lambda x, bias: fused_attention(x, bias, heads, True), qkv, bias)
    wanted, wanted_back = jax.vjp(lambda x, bias: dense_attention(x, heads, bias), qkv, bias)
    assert relative_error(value, wanted) <= 1e-5
    for found, right in zip(back(cotangent), wanted_back(cotangent), strict=True):
        assert relative_error(found, right) <= 1e-5


def test_a_bias_too_large_for_fast_memory_is_read_in_rows():
    from tinymim_jax.ops.kernels import attention

    assert attention._is_short(jnp.zeros((12, 197, 197)), 197)
    assert not attention._is_short(jnp.zeros((16, 325, 325)), 325)
    assert attention._is_short(None, 325)


def test_a_bias_over_eight_devices():
    """Each device has its own images and all of the bias; its gradients are summed."""
    qkv, bias = drawn(0, 8, 12, 3 * 32), drawn(1, 4, 12, 12)
    weights = drawn(2, 8, 12, 32)
    mesh = make_mesh(2)

    def split(qkv, bias):
        with splitting_batches(mesh):
            return jnp.vdot(joint_attention(qkv, 4, "fused", bias), weights)

    placed = jax.device_put(qkv, batch_sharding(mesh))
    found = jax.jit(jax.grad(split, (0, 1)))(placed, bias)
    right = jax.grad(lambda *a: jnp.vdot(joint_attention(a[0], 4, "dense", a[1]), weights), (0, 1))(qkv, bias)
    for a, b in zip(found, right, strict=True):
        assert relative_error(a, b) <= 1e-5


RELATION_SHAPES = [
    (50, 64, 128, 4, "qk_vv"),
    (37, 96, 192, 3, "qk_vv"),
    (29, 48, 80, 2, "qq_kk_vv"),
    (30, 256, 128, 2, "kk"),
]


@pytest.mark.parametrize(("tokens", "dim", "teacher_dim", "heads", "target"), RELATION_SHAPES)
def test_relations_in_float32(tokens, dim, teacher_dim, heads, target):
    names = target.split("_")
    student, teacher = drawn(2, 2, tokens, 3 * dim), drawn(3, 2, tokens, 3 * teacher_dim)
    cotangent = jax.random.uniform(jax.random.key(4), (2, len(names)))
    relations = relations_of(names)
    value, back = jax.vjp(lambda x: fused_relation_kl(x, teacher, heads, relations, True), student)
    with jax.enable_x64(True):
        double = student.astype(jnp.float64)
        wanted, wanted_back = jax.vjp(lambda x: dense_relations(x, teacher, heads, names, jnp.float64), double)
    assert relative_error(value, wanted) <= 1e-5
    with jax.enable_x64(True):
        wanted_gradient = wanted_back(cotangent.astype(jnp.float64))[0]
    assert relative_error(back(cotangent)[0], wanted_gradient) <= 1e-5
    np.testing.assert_array_equal(fused_relation_kl(student, teacher, heads, relations, True), value)


@pytest.mark.parametrize(
    ("tokens", "dim", "teacher_dim", "heads", "target"), [(45, 64, 128, 4, "qk_vv"), (32, 96, 192, 3, "qq_kk_vv")]
)
def test_relations_by_rows(tokens, dim, teacher_dim, heads, target, monkeypatch):
    small_blocks(monkeypatch)
    test_relations_in_float32(tokens, dim, teacher_dim, heads, target)


def test_relations_of_equal_tokens_are_zero():
    student = drawn(5, 2, 33, 3 * 64)
    value, back = jax.vjp(lambda x: fused_relation_kl(x, student, 4, relations_of(["qk", "vv"]), True), student)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    np.testing.assert_allclose(back(jnp.ones((2, 2)))[0], 0, atol=1e-7)


def test_relations_in_bfloat16_are_as_exact_as_the_dense_form():
    from tinymim_jax.ops.products import scaled_products
    from tinymim_jax.ops.relations import relation_kl

    def dense(student, teacher):
        student, teacher = split_heads(student, 4), split_heads(teacher, 4)
        pairs = ((0, 1), (2, 2))
        return jnp.stack(
            [
                relation_kl(scaled_products(student[a], student[b]), scaled_products(teacher[a], teacher[b]))
                for a, b in pairs
            ],
            1,
        )

    exact = [drawn(seed, 2, 197, 3 * dim).astype(jnp.bfloat16).astype(jnp.float32) for seed, dim in ((6, 64), (7, 128))]
    low = [array.astype(jnp.bfloat16) for array in exact]
    cotangent = jnp.ones((2, 2))
    truth, truth_back = jax.vjp(lambda x: dense(x, exact[1]), exact[0])
    errors = {}
    forms = {"dense": dense, "fused": lambda x, y: fused_relation_kl(x, y, 4, relations_of(["qk", "vv"]), True)}
    for name, form in forms.items():
        value, back = jax.vjp(lambda x, form=form: form(x, low[1]), low[0])
        errors[name] = relative_error(value, truth), relative_error(back(cotangent)[0], truth_back(cotangent)[0])
    assert errors["fused"][0] <= max(2 * errors["dense"][0], 1e-5)
    assert errors["fused"][1] <= 2 * errors["dense"][1]


def test_a_letter_in_two_relations_is_refused():
    with pytest.raises(ValueError, match="'qk_qq' has one twice"):
        relations_of(["qk", "qq"])


@pytest.mark.parametrize("biased", [False, True])
def test_padding_for_cudnn_changes_nothing(biased):
    """cuDNN takes even numbers of tokens only; the same arguments in XLA's own implementation."""
    q, k, v = (drawn(seed, 2, 7, 2, 16) for seed in (0, 1, 2))
    bias = drawn(3, 2, 7, 7) if biased else None
    wanted = dense_attention(
        jnp.concatenate([x.reshape(2, 7, 32) for x in (q, k, v)], axis=-1), 2, bias if biased else 0
    )
    np.testing.assert_allclose(cudnn_attention(q, k, v, bias, "xla").reshape(2, 7, 32), wanted, atol=1e-5)


@pytest.mark.parametrize("biased", [False, True])
def test_cudnn_takes_our_shapes(biased, monkeypatch):
    """Lowered for CUDA, forward and backward, at 197 tokens; jax checks shapes, and here there is no cuDNN to ask."""
    private = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    for name in ("check_cudnn_version", "cuda_versions"):  # put back after the test
        monkeypatch.setattr(private, name, getattr(private, name, None))
    assume_cudnn()
    bias = jnp.zeros((2, 197, 197)) if biased else None

    def loss(qkv):
        with compiling_for("gpu"):
            return jnp.sum(joint_attention(qkv, 2, "fused", bias).astype(jnp.float32))

    qkv = jax.ShapeDtypeStruct((2, 197, 3 * 128), jnp.bfloat16)
    text = jax.jit(jax.grad(loss)).trace(qkv).lower(lowering_platforms=("cuda",)).as_text()
    kernel = "ScaleBiasSoftmax" if biased else "Softmax"
    assert f'__cudnn$fmha{kernel}"' in text or f"__cudnn$fmha{kernel}(" in text
    assert f"__cudnn$fmha{kernel}Backward" in text
    assert "198x198" not in re.sub(r"backend_config.*", "", text) or biased


COMPILED = """
import re, sys
import jax, jax.numpy as jnp
from tinymim_jax.ops.kernels.attention import fused_attention
from tinymim_jax.ops.kernels.relations import fused_relation_kl, relations_of
from tinymim_jax.plan.devices import devices_of
from tinymim_jax.plan.hlo import work_of
from tinymim_jax.plan.topology import parse_topology
from tinymim_jax.sharding import make_mesh, replicated

whole = replicated(make_mesh(1, devices_of(parse_topology(sys.argv[1]))[:1]))

def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=whole)

def biased(qkv, bias):
    return fused_attention(qkv, bias, 6).astype(jnp.float32).sum()

def step(student, teacher):
    student = student.at[..., :384].add(fused_attention(student, None, 6))
    return fused_relation_kl(student, teacher, 6, relations_of(["qk", "vv"])).sum()

for tokens in (197, 1025):
    program = jax.jit(jax.grad(step)).lower(shape(2, tokens, 1152), shape(2, tokens, 2304)).compile()
    text = program.as_text()
    assert f"{tokens},{tokens}" not in text, "a map of all pairs of tokens in memory"
    # Attention forward and backward, and two relations of student (with gradients) and teacher: multiply-adds of pairs.
    pairs = 2 * tokens**2
    wanted = 2 * pairs * (2 * 384 + 5 * 384 + 2 * (3 * 384 + 768))
    assert sum(work.times * work.flops for work in work_of(text)) == wanted
    bias = jax.ShapeDtypeStruct((6, tokens, tokens), jnp.float32, sharding=whole)
    text = jax.jit(jax.grad(biased, (0, 1))).lower(shape(2, tokens, 1152), bias).compile().as_text()
    assert f"2,6,{tokens},{tokens}" not in text, "a map for each image in memory"
print("compiled")
"""


@pytest.mark.parametrize("topology", ["v5e-1", "v6e-1"])
def test_the_compiler_for_tpus_takes_the_kernels(topology):
    pytest.importorskip("libtpu")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    command = [sys.executable, "-c", COMPILED, topology]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("compiled\n"), done.stderr


@pytest.mark.parametrize(("platform", "form", "wanted"), [
    ("tpu", "auto", "fused"), ("tpu", "dense", "dense"), ("gpu", "auto", "dense"), ("cpu", "auto", "dense"),
    ("cpu", "fused", "fused"),
])  # fmt: skip
def test_which_form_is_chosen(platform, form, wanted):
    with compiling_for(platform):
        assert choose_form("model.attention", form, tokens=197) == wanted


def test_many_tokens_are_left_to_the_compiler_and_logged(caplog):
    with compiling_for("tpu"), caplog.at_level("INFO", logger="tinymim_jax"):
        assert choose_form("model.attention", "auto", tokens=5000) == "dense"
    assert "dense, as 5000 tokens are more" in caplog.text
    with pytest.raises(ValueError, match=r"model.attention='fast' is unknown.*auto"):
        choose_form("model.attention", "fast", tokens=197)


def test_an_encoder_over_eight_devices_under_scan_and_remat():
    """Values and gradients of the kernel, each device on its own images, against the dense form on one device."""
    images = jnp.asarray(np.random.default_rng(0).normal(size=(8, 16, 24, 3)), jnp.float32)
    dense = ViT(embed_dim=32, depth=2, heads=4, patch_size=8, image_size=(16, 24), attention="dense")
    fused = dense.clone(attention="fused", scan=True, remat="dots")
    params = jax.jit(dense.init)(jax.random.key(0), images)["params"]
    directions = drawn(1, 1, 7, 32)

    def loss(encoder, params, images):
        return jnp.mean(encoder.apply({"params": params}, images) * directions)

    wanted, wanted_gradients = jax.value_and_grad(lambda p: loss(dense, p, images))(params)
    mesh = make_mesh(2)

    @jax.jit
    def split(params, images):
        with splitting_batches(mesh):
            return jax.value_and_grad(lambda p: loss(fused, p, images))(params)

    got, gradients = split(params, jax.device_put(images, batch_sharding(mesh)))
    assert relative_error(got, wanted) <= 1e-5
    for path, leaf in jax.tree.leaves_with_path(wanted_gradients):
        found = dict(jax.tree.leaves_with_path(gradients))[path]
        np.testing.assert_allclose(found, leaf, rtol=1e-4, atol=1e-5 * float(jnp.max(jnp.abs(leaf))), err_msg=str(path))


@pytest.mark.parametrize("heads", [None, 8])
def test_the_distillation_target_in_fused_form(heads):
    def tap(seed, dim):
        qkv = drawn(seed, 2, 9, 3 * dim)
        q, k, v = split_heads(qkv, 4)
        rest = dict.fromkeys(("attention", "middle", "ffn", "output"), qkv)
        return Tap(q=q, k=k, v=v, qkv=qkv, **rest)

    student, teacher, losses = tap(0, 32), tap(1, 64), {}
    for form in ("dense", "fused"):
        found = find_target("qk_vv", relation_heads=heads, relation_form=form)
        losses[form] = found.loss(found.extract(student), found.extract(teacher))
    assert set(losses["fused"]) == {"qk", "vv"}
    for name, value in losses["dense"].items():
        assert relative_error(losses["fused"][name], value) <= 1e-5


@pytest.mark.parametrize(("target", "loss"), [("qk_qq", "kl"), ("qk_vv", "mse")])
def test_targets_without_a_fused_form(target, loss):
    with pytest.raises(ValueError, match=r"distill.relation_form='fused' needs relation_loss='kl'"):
        find_target(target, relation_loss=loss, relation_form="fused")
    find_target(target, relation_loss=loss, relation_form="auto")


def test_golden_gradients_with_the_kernels(golden):
    """The authors' gradients of the first step, with attention and relation losses as kernels."""
    arrays, sizes = golden.arrays("tinymim.npz"), golden.meta["student"]
    heads = [sizes["heads"]] * (sizes["depth"] - 1) + [sizes["last_heads"]]
    loaded = convert_file("mae", golden.path("teacher.pth"), heads=golden.meta["teacher"]["heads"])
    teacher, frozen = ViT.from_record(loaded[0]["encoder"], attention="fused"), loaded[1]["encoder"]
    model, params = convert_file("tinymim", golden.path("student.pth"), heads=heads)
    student = ViT.from_record(model["encoder"], pos_embed="sincos", attention="fused")
    params["encoder"].pop("pos_embed")
    target = find_target("qk_vv", relation_form="fused")

    @jax.jit
    def gradients(params, teacher_images, student_images):
        wanted = teacher.apply({"params": frozen}, teacher_images, tap=golden.meta["teacher"]["tap"], method="encode")

        def loss(params):
            seen = student.apply({"params": params}, student_images, tap=student.depth, method="encode")
            return sum(value.mean() for value in target.loss(target.extract(seen), target.extract(wanted)).values())

        return jax.grad(loss)(params)

    found = gradients(params["encoder"], arrays["teacher_images"][0], arrays["student_images"][0])
    block = found["blocks_3"]
    width = sizes["embed_dim"]
    for name, ours in {
        "blocks.3.attn.qkv.weight": block["attn"]["qkv"]["kernel"].T,
        "blocks.3.attn.qkv.bias": block["attn"]["qkv"]["bias"],
        "blocks.3.mlp.fc1.weight": block["mlp"]["fc1"]["kernel"].T,
        "blocks.3.norm1.weight": block["norm1"]["scale"],
    }.items():
        assert relative_error(ours, arrays[f"grad0/{name}"]) <= 1e-4, name
    last = found[f"blocks_{sizes['depth'] - 1}"]["attn"]["qkv"]["kernel"].T
    assert relative_error(last, arrays[f"grad0/blocks.{sizes['depth'] - 1}.attn.qkv.weight"]) <= 1e-4
    assert last.shape == (3 * width, width)


def test_flops_are_those_of_the_dense_form_whatever_the_config_says():
    """Also where cuDNN is missing, and without what kernels compute twice."""
    qkv = jax.ShapeDtypeStruct((1, 197, 3 * 128), jnp.bfloat16)

    def gradient(form):
        return lambda x: jax.grad(lambda x: jnp.sum(joint_attention(x, 2, form).astype(jnp.float32)))(x)

    wanted = 2 * 197**2 * 128 * 5  # of the two forward the gradient needs one only, and four backward
    assert matmul_flops(gradient("fused"), qkv) == matmul_flops(gradient("dense"), qkv) == wanted
