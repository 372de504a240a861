"""Measures of layers against closed forms in numpy, and `tinymim analyze` on small networks."""

import itertools
import json
import math
import pathlib
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import run
from pictures import encoded
from runs import DIGITS, small_config

from tinymim_jax.analysis.analyze import analyze
from tinymim_jax.analysis.images import batches_of, rows_of, some_of
from tinymim_jax.analysis.networks import find_networks
from tinymim_jax.analysis.relations import common_heads, relation_kl_of_blocks
from tinymim_jax.analysis.tap import suggest_tap
from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.convert import convert_file
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.data.sources.sources import open_source
from tinymim_jax.evaluation.similarity import (
    attention_distance,
    attention_entropy,
    attention_weights,
    cka,
    effective_rank,
    gram,
    hsic,
    knn_accuracy,
    linear_accuracy,
)
from tinymim_jax.models.cnn import ConvNet
from tinymim_jax.models.switches import Switches
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import normalize
from tinymim_jax.ops.rope import Rope
from tinymim_jax.ops.token_grid import resize_images
from tinymim_jax.tasks import TASKS

RNG = np.random.default_rng(0)
GOLDEN = pathlib.Path(__file__).parent / "golden" / "teachers"
TEACHER = ViT(embed_dim=32, depth=3, heads=4, patch_size=4, image_size=(16, 16))
STUDENT = ViT(embed_dim=16, depth=2, heads=(2, 4), patch_size=8, image_size=(16, 16), dist_token=True)
MEAN = STD = (0.5, 0.5, 0.5)
PICTURE = encoded(np.full((16, 16, 3), 90, np.uint8), "PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random networks: a teacher, and a student that records it, on another grid and with a DIST token."""
    path = tmp_path_factory.mktemp("networks")
    pixels = {"preprocessing": {"mean": list(MEAN), "std": list(STD)}}
    records = {
        "teacher": (TEACHER, {}),
        "student": (STUDENT, {"teacher": {"checkpoint": str(path / "teacher"), "blocks": [[2, 3]]}}),
        "orphan": (STUDENT, {"teacher": {"checkpoint": str(path / "gone")}}),
        "pupil": (
            STUDENT,
            {"teacher": {"checkpoint": str(path / "teacher")}, "teachers": {"b": {"checkpoint": "teachers/other"}}},
        ),
    }
    for name, (vit, more) in records.items():
        params = jax.jit(vit.init)(jax.random.key(len(name)), np.zeros((1, 16, 16, 3), np.float32))["params"]
        save_params(path / name, {"encoder": params}, {"encoder": vit.record()} | pixels | more)
    return path


def test_of_several_teachers_the_first_is_compared(folder, caplog):
    caplog.set_level("INFO")
    networks = find_networks(str(folder / "pupil"), image_size=(16, 16))
    assert [one.name for one in networks.members] == ["student", "teacher"]
    assert f"the first, {folder / 'teacher'}, is compared; for the others use --teacher: teachers/other" in caplog.text


def hsic_by_definition(a, b):
    """The U-statistic over all ordered tuples of distinct images (Song et al., theorem 2)."""
    n = len(a)
    total = sum(
        a[i, j] * b[i, j] + a[i, j] * b[q, r] - 2 * a[i, j] * b[i, q]
        for i, j, q, r in itertools.permutations(range(n), 4)
    )
    return total / math.perm(n, 4)


def test_hsic_is_its_definition():
    x, y = RNG.normal(size=(6, 5)), RNG.normal(size=(6, 3))
    a, b = x @ x.T, y @ y.T
    np.testing.assert_allclose(hsic(a, b), hsic_by_definition(a, b), rtol=1e-10)
    centred = np.asarray(gram(jnp.asarray(x + 100.0)))  # a shift of all features changes nothing
    np.testing.assert_allclose(hsic(centred, b), hsic(a, b), rtol=2e-3)
    with pytest.raises(ValueError, match="at least 4 images, got 3"):
        hsic(a[:3, :3], b[:3, :3])


def test_cka():
    """1 for a rotated and scaled copy; near the biased ||Y'X||^2 form for many images; batches are averaged."""
    x = RNG.normal(size=(400, 6))
    rotation, _ = np.linalg.qr(RNG.normal(size=(6, 6)))
    y = x[:, :3] @ RNG.normal(size=(3, 4)) + 0.5 * RNG.normal(size=(400, 4))
    grams = [np.asarray(gram(jnp.asarray(z, jnp.float32)))[None] for z in (x, 3 * x @ rotation, y)]
    found = cka(np.stack([grams[0]]), np.stack([np.concatenate(grams[1:])]))
    assert found.shape == (1, 2)
    np.testing.assert_allclose(found[0, 0], 1.0, atol=1e-5)
    cx, cy = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    biased = norm(cy.T @ cx) ** 2 / (norm(cx.T @ cx) * norm(cy.T @ cy))
    np.testing.assert_allclose(found[0, 1], biased, atol=0.01)  # the bias falls as 1 / images
    first, second = RNG.normal(size=(2, 2, 8, 8)), RNG.normal(size=(2, 3, 8, 8))
    first, second = (np.einsum("abij,abkj->abik", z, z) for z in (first, second))
    by_hand = [
        [
            sum(hsic(first[k, i], second[k, j]) for k in range(2))
            / math.sqrt(
                sum(hsic(first[k, i], first[k, i]) for k in range(2))
                * sum(hsic(second[k, j], second[k, j]) for k in range(2))
            )
            for j in range(3)
        ]
        for i in range(2)
    ]
    np.testing.assert_allclose(cka(first, second), by_hand, rtol=1e-10)


def test_attention_distance_and_entropy():
    grid, patch = (2, 3), 4
    places = [(r, c) for r in range(2) for c in range(3)]
    every = [[patch * math.dist(a, b) for b in places] for a in places]
    uniform = jnp.full((1, 1, 8, 8), 1 / 8)  # two tokens before the patches
    itself = jnp.eye(8)[None, None]
    np.testing.assert_allclose(attention_distance(uniform, grid, patch), np.mean(every), rtol=1e-6)
    np.testing.assert_allclose(attention_distance(itself, grid, patch), 0.0)
    q, k = (jnp.asarray(RNG.normal(size=(2, 8, 3, 5)), jnp.float32) for _ in range(2))
    weights = np.zeros((2, 3, 8, 8))
    for b, h in itertools.product(range(2), range(3)):
        logits = np.asarray(q)[b, :, h].astype(np.float64) @ np.asarray(k)[b, :, h].T / math.sqrt(5)
        weights[b, h] = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    got = jax.jit(attention_weights)(q, k)
    np.testing.assert_allclose(got, weights, rtol=1e-5)
    patches = weights[:, :, 2:, 2:] / weights[:, :, 2:, 2:].sum(-1, keepdims=True)
    np.testing.assert_allclose(
        attention_distance(got, grid, patch), (patches * np.array(every)).sum(-1).mean(-1), rtol=1e-5
    )
    np.testing.assert_allclose(attention_entropy(got), -(weights * np.log(weights)).sum(-1).mean(-1), rtol=1e-5)
    np.testing.assert_allclose(attention_entropy(itself), 0.0)
    np.testing.assert_allclose(attention_entropy(uniform), math.log(8), rtol=1e-6)


def test_effective_rank():
    assert effective_rank(np.eye(5)[[0, 1, 2, 3, 4, 0][:5]]) == pytest.approx(5)
    assert effective_rank(np.outer(RNG.normal(size=7), RNG.normal(size=4))) == pytest.approx(1)
    left, _ = np.linalg.qr(RNG.normal(size=(9, 2)))
    shares = np.array([0.75, 0.25])
    want = math.exp(-(shares * np.log(shares)).sum())
    assert effective_rank(left * shares @ np.eye(2, 4)) == pytest.approx(want)


def labelled_points():
    labels = np.repeat(np.arange(3), 20).astype(np.int32)
    centres = 3 * RNG.normal(size=(3, 8))
    return centres[labels] + RNG.normal(size=(60, 8)) * 2, labels


def test_knn_accuracy_is_that_of_a_loop():
    bank, labels = labelled_points()
    queries, wanted = bank[::3] + RNG.normal(size=(20, 8)), labels[::3]
    hits = 0
    for query, label in zip(queries, wanted):
        similarity = bank @ query / np.linalg.norm(bank, axis=1) / np.linalg.norm(query)
        votes = np.zeros(3)
        for i in np.argsort(-similarity)[:20]:
            votes[labels[i]] += math.exp(similarity[i] / 0.07)
        hits += votes.argmax() == label
    got = knn_accuracy(bank.astype(np.float32), labels, queries.astype(np.float32), wanted, 3)
    assert got == pytest.approx(hits / 20)
    assert 0.4 < got <= 1


def test_linear_accuracy_is_that_of_augmented_least_squares():
    """Ridge regression is least squares with rows sqrt(strength) * identity added; the strength is one of four."""
    bank, labels = labelled_points()
    queries, wanted = bank[::3] + RNG.normal(size=(20, 8)), labels[::3]
    got = linear_accuracy(bank, labels, queries, wanted, 3)
    x, z = ((part - bank.mean(0)) / bank.std(0) for part in (bank, queries))
    found = []
    for strength in (1e-3, 1e-2, 1e-1, 1.0):
        rows = np.concatenate([np.c_[x, np.ones(60)], np.c_[np.eye(8) * math.sqrt(strength * 60), np.zeros(8)]])
        targets = np.concatenate([np.eye(3)[labels], np.zeros((8, 3))])
        weights = np.linalg.lstsq(rows, targets, rcond=None)[0]
        found.append(float(((np.c_[z, np.ones(20)] @ weights).argmax(1) == wanted).mean()))
    assert got in found
    assert got > 0.6


def numpy_kl(student, teacher):
    """KL(teacher || student) [batch, heads] of the softmaxes of logits, in float64."""
    student, teacher = (np.asarray(x, np.float64) for x in (student, teacher))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher, student))
    return (p * np.log(p / q)).sum(-1).mean(-1)


def test_relation_kl_of_blocks(folder):
    """By head, of tokens that both have: without the DIST token, the teacher's patches resized."""
    networks = find_networks(str(folder / "student"), image_size=(16, 16))
    student, teacher = networks.student, networks.teacher
    assert teacher is not None
    assert networks.compared == ((2, 3),)
    heads = common_heads(student, teacher, networks.compared)
    assert heads == 4  # the student's second block has the teacher's
    assert common_heads(student, teacher, ()) == 4
    images = jnp.asarray(RNG.integers(0, 256, (3, 16, 16, 3), np.uint8))
    found = jax.jit(relation_kl_of_blocks(student, teacher, heads))(student.params, teacher.params, images)
    assert found["qk"].shape == (3, 2, 3, 4)
    # The task's own loss, which averages over heads.
    words = ["model.patch_size=8", "model.dist_token=True", "model.heads=(2,4)", "distill.student_tap=2"]
    words += ["distill.teacher.tap=3", f"distill.teacher.path={folder / 'teacher'}", "model.depth=2"]
    task = TASKS["distill"].build(small_config("distill", *words), DIGITS)
    params = {"encoder": student.params}
    losses = jax.jit(task.losses, static_argnums=4)(
        params, task.load_frozen(), {"image": images}, jax.random.key(0), False
    )
    for relation in ("qk", "vv"):
        np.testing.assert_allclose(found[relation][:, 1, 2].mean(-1), losses[relation], rtol=2e-4)
    assert task.origin["teacher"]["blocks"] == [[2, 3]]
    assert task.origin["teacher"]["image_size"] == [16, 16]
    # Other blocks, in numpy: the student's first against the teacher's second, patches of 4 averaged to those of 8.
    own, theirs = (jax.jit(one.taps)(one.params, images) for one in (student, teacher))
    mine, wanted = np.asarray(own[0].v), np.asarray(theirs[1].v)
    mine = np.delete(mine, 1, axis=1).reshape(3, 5, 4, 4)
    grid = wanted[:, 1:].reshape(3, 2, 2, 2, 2, 4, 8).mean((2, 4)).reshape(3, 4, 4, 8)
    wanted = np.concatenate([wanted[:, :1], grid], axis=1)
    logits = [np.einsum("bqhd,bkhd->bhqk", x, x) / math.sqrt(x.shape[-1]) for x in (mine, wanted)]
    np.testing.assert_allclose(found["vv"][:, 0, 1], numpy_kl(*logits), rtol=1e-3)


def blocks_with(key, values):
    return [{"block": i + 1, key: value} for i, value in enumerate(values)]


def test_suggested_taps():
    tap = suggest_tap(blocks_with("linear", [0.3, 0.6, 0.58, 0.5]), "teacher", 400)
    assert (tap["block"], tap["by"], tap["equal"]) == (3, "linear", [2, 3])  # one standard error is 0.0245
    assert "block 3 of 4 of the teacher" in tap["text"]
    certain = suggest_tap(blocks_with("linear", [0.3, 0.6, 0.58, 0.5]), "teacher", 40_000)
    assert (certain["block"], certain["equal"]) == (2, [2])
    rank = suggest_tap(blocks_with("effective_rank", [3.0, 9.0, 2.0]), "encoder", 0)
    assert (rank["block"], rank["by"], rank["equal"]) == (2, "effective_rank", [2])


def test_analyze_the_command(folder, data_dir, capsys, tmp_path):
    config = small_config("distill", f"distill.teacher.path={folder / 'teacher'}")
    words = ["data.eval_split=test[:40]", "model.image_size=(16,16)", "data.eval_resize=16"]
    options = ["--config", "configs/digits.py:distill", "--images", "36", "--labelled", "60", "--compile_cache", ""]
    code, out, err = run(
        capsys, "analyze", folder / "student", "--data_dir", data_dir, "--output", tmp_path / "a", *options, *words
    )
    assert code == 0, err
    found = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert (found["images"], found["relation_images"]) == (32, 4)
    assert found["labelled"] == {"bank": 60, "queries": 30}
    student, teacher = found["networks"]["student"]["blocks"], found["networks"]["teacher"]["blocks"]
    assert [len(block["attention_distance"]) for block in student] == [2, 4]
    assert len(teacher) == 3
    assert np.shape(found["cka"]["student|teacher"]) == (2, 3)
    np.testing.assert_allclose(np.diag(found["cka"]["teacher|teacher"]), 1.0, atol=1e-4)
    assert np.shape(found["relation_kl"]["vv"]) == (2, 3, 4)
    assert all(0 <= block["knn"] <= 1 and 0 <= block["linear"] <= 1 for block in student + teacher)
    # A random network's features are pixels mixed at random, which tell digits apart better than chance.
    assert max(block["linear"] for block in teacher) > 0.3
    assert found["tap"]["network"] == "teacher"
    assert f"block {found['tap']['block']} of 3 of the teacher" in out
    assert out.count("| student |") == 2
    pictures = sorted(path.name for path in (tmp_path / "a").glob("*.svg"))
    assert {"cka_student_teacher.svg", "knn.svg", "kl_qk_heads.svg", "attention_distance.svg"} <= set(pictures)
    for path in (tmp_path / "a").glob("*.svg"):
        ET.parse(path)
    # Without a teacher and without labels: of the network alone; the tap by effective rank.
    alone = analyze(str(folder / "orphan"), config, images=8, labelled=0, data_dir=data_dir)
    assert list(alone["networks"]) == ["encoder"]
    assert "relation_kl" not in alone
    assert alone["tap"]["by"] == "effective_rank"
    assert "linear" not in alone["networks"]["encoder"]["blocks"][0]


class Damaged(Source):
    """Pictures of which one cannot be decoded."""

    name, split, class_names = "damaged", "test", ()

    def __len__(self):
        return 6

    def __getitem__(self, index):
        return {"image": b"no picture" if index == 2 else PICTURE, "label": -1}


def test_a_damaged_image_is_not_measured_as_another_one():
    with (
        pytest.raises(RuntimeError, match=r"1 of 6 records cannot be decoded, more than the 0\.1 %"),
        batches_of(Damaged(), small_config("finetune"), 2) as batches,
    ):
        list(batches)


KINDS = {
    "registers": Switches(registers=2),
    "rotary": Switches(registers=1, positions="none", rope=Rope(centred=True, layout="halves", theta=100.0)),
    "biases": Switches(positions="none", relative_bias=True, qkv_bias="qv"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_attention_of_encoders_of_other_authors(kind, tmp_path, data_dir):
    """The weights, applied to the values, give what the block itself adds: with rotations and biases."""
    vit = TEACHER.clone(depth=2, switches=KINDS[kind])
    shapes = jax.eval_shape(vit.init, jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    params = jax.tree.map(lambda leaf: RNG.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)
    save_params(tmp_path / kind, {"encoder": params}, {"encoder": vit.record()})
    network = find_networks(str(tmp_path / kind), image_size=(16, 16)).student
    images = jnp.asarray(RNG.integers(0, 256, (2, 16, 16, 3), np.uint8))
    taps = network.taps(network.params, images)
    for i, (tap, weights) in enumerate(zip(taps, network.attention(network.params, taps), strict=True)):
        np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-5)
        attended = np.einsum("bhqk,bkhd->bqhd", weights, tap.v).reshape(2, -1, 32)
        proj = params[f"blocks_{i}"]["attn"]["proj"]
        np.testing.assert_allclose(attended @ proj["kernel"] + proj["bias"], tap.attention, atol=1e-4)
    # A plain student beside it, which sees another grid: rotated q and k are not compared.
    student = STUDENT.clone(dist_token=False)
    init = jax.jit(student.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    save_params(tmp_path / "student", {"encoder": init}, {"encoder": student.record()})
    config = small_config("distill", "distill.teacher.path=unused")
    found = analyze(
        str(tmp_path / "student"), config, images=8, labelled=0, teacher=str(tmp_path / kind), data_dir=data_dir
    )
    assert set(found["relation_kl"]) == ({"vv"} if kind == "rotary" else {"qk", "vv"})
    assert np.isfinite(found["relation_kl"]["vv"]).all()
    assert len(found["networks"]["teacher"]["blocks"][1]["attention_entropy"]) == 4


@pytest.mark.parametrize("kind", ["convnext", "resnet"])
def test_a_convolutional_teacher(kind, folder, data_dir, tmp_path, capsys):
    """Its stages are compared by CKA and accuracies; there is no attention, and the last stage is the tap."""
    model, params = convert_file("auto", GOLDEN / f"timm_{kind}.safetensors")
    save_params(tmp_path / kind, params, model)
    words = ["data.eval_split=test[:40]", "model.image_size=(16,16)", "data.eval_resize=16"]
    code, out, err = run(
        capsys, "analyze", folder / "orphan", "--teacher", tmp_path / kind, "--data_dir", data_dir, "--config",
        "configs/digits.py:distill", "--images", "8", "--labelled", "40", "--compile_cache", "", "--output",
        tmp_path / "a", *words,
    )  # fmt: skip
    assert code == 0, err
    found = json.loads((tmp_path / "a" / "analysis.json").read_text())
    depth = len(model["backbone"]["widths"])
    assert np.shape(found["cka"]["student|teacher"]) == (2, depth)
    np.testing.assert_allclose(np.diag(found["cka"]["teacher|teacher"]), 1.0, atol=1e-4)
    blocks = found["networks"]["teacher"]["blocks"]
    assert all("attention_distance" not in block and 0 <= block["linear"] <= 1 for block in blocks)
    assert "relation_kl" not in found
    assert (found["tap"]["block"], found["tap"]["equal"]) == (depth, [depth])
    assert "the teacher is convolutional: its blocks are stages" in out
    assert f"| teacher | {depth} | - | - | - |" in out
    assert {"attention_distance.svg", "linear.svg"} <= {path.name for path in (tmp_path / "a").glob("*.svg")}
    # Ranks are those of the means of the stages' own maps.
    network = find_networks(str(tmp_path / kind), image_size=(16, 16)).student
    assert isinstance(network.vit, ConvNet)
    assert network.vit.image_size == (32, 32)  # the next multiple of 32
    images = jnp.asarray(RNG.integers(0, 256, (3, 16, 16, 3), np.uint8))
    shown = normalize(resize_images(images.astype(jnp.float32), (32, 32)), network.mean, network.std)
    maps = network.vit.stages(network.params, shown)[-depth:]
    for tap, each in zip(network.taps(network.params, images), maps, strict=True):
        np.testing.assert_allclose(tap.output.mean(1), each.mean((1, 2)), rtol=1e-5, atol=1e-6)


def test_what_cannot_be_analyzed(folder, data_dir, capsys):
    config = small_config("distill", f"distill.teacher.path={folder / 'teacher'}")
    with pytest.raises(ValueError, match=r"images=3.*at least 4"):
        analyze(str(folder / "student"), config, images=3, data_dir=data_dir)
    code, _, err = run(capsys, "analyze", folder / "student", "--compile_cache", "")
    assert (code, "name the experiment with --config" in err) == (1, True)
    code, _, err = run(capsys, "analyze", "a", "b", "--output", "c")
    assert (code, "one folder, but there are 2" in err) == (1, True)
    code, _, err = run(
        capsys, "analyze", folder / "student", "--teacher", folder / "gone", "--config", "configs/digits.py:distill",
        "--data_dir", data_dir, "--compile_cache", "",
    )  # fmt: skip
    assert (code, "gone does not exist" in err) == (1, True)


def test_some_images_are_the_same_each_time_and_padding_is_left_out(data_dir):
    source = open_source("digits", split="test", data_dir=data_dir)
    some = some_of(source, 10)
    assert [some[i]["image"] for i in range(10)] == [some_of(source, 10)[i]["image"] for i in range(10)]
    assert len(some_of(source, 10_000)) == len(source)
    config = small_config("mae_teacher")
    rows = rows_of(lambda batch: (batch["image"], batch["label"]), batches_of(some, config, 4))
    assert rows[0].shape == (10, 16, 16, 3)
    assert rows[1].tolist() == [some[i]["label"] for i in range(10)]
