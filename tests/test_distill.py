"""Options of distillation: their losses, what they train, and that other commands accept their runs."""

import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from runs import DIGITS, run_steps, same_bits, small_config

from tinymim_jax import optim
from tinymim_jax.checkpoints.manager import Checkpoints
from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.convert import to_torch
from tinymim_jax.flops import step_flops
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.mae_decoder import MaskedAutoencoder
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.color import color_jitter, normalize
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.ops.losses import masked_pixel_loss
from tinymim_jax.ops.masking import random_masking
from tinymim_jax.ops.patches import patchify
from tinymim_jax.runtime.exits import Interrupted
from tinymim_jax.sharding import make_mesh
from tinymim_jax.tasks import TASKS
from tinymim_jax.tasks.decoder import build_decoder
from tinymim_jax.tasks.distill.targets import TARGETS
from tinymim_jax.train import train as train_run

TEACHER = ViT(embed_dim=32, depth=3, heads=4, patch_size=4, image_size=(16, 16))
PATCH_8 = TEACHER.clone(patch_size=8)
MEAN = STD = (0.5, 0.5, 0.5)  # of configs/digits.py
CLEAN = tuple(f"distill.jitter.{name}=0.0" for name in ("brightness", "contrast", "saturation"))
MIM = tuple(f"distill.mim.{key}" for key in ("decoder_dim=8", "decoder_depth=1", "decoder_heads=2"))
IMAGES = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
BATCH = {"image": jnp.asarray(IMAGES), "label": jnp.zeros(4, jnp.int32)}
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Random teachers with 4 x 4 and with 2 x 2 patches."""
    path = tmp_path_factory.mktemp("teachers")
    for name, vit in (("teacher", TEACHER), ("patch_8", PATCH_8)):
        params = jax.jit(vit.init)(jax.random.key(1), np.zeros((1, 16, 16, 3), np.float32))["params"]
        record = {"encoder": vit.record(), "preprocessing": {"mean": list(MEAN), "std": list(STD)}}
        save_params(path / name, {"encoder": params}, record)
    return path


def distill(folder, *words, teacher="teacher"):
    """A student of 16 x 2 blocks with 4 x 4 patches."""
    return small_config("distill", "model.patch_size=4", f"distill.teacher.path={folder / teacher}", *words)


def task_of(config):
    return TASKS[config.task].build(config, DIGITS)


def losses_of(folder, *words, teacher="teacher", key=KEY, train=True, params=None):
    """The task's losses at its initial parameters (or `params`) for four fixed images."""
    task = task_of(distill(folder, *words, teacher=teacher))
    params = task.init(jax.random.key(2)) if params is None else params
    return jax.jit(task.losses, static_argnums=4)(params, task.load_frozen(), BATCH, key, train)


OPTIONS = {
    "qq_kk_vv by smooth-L1": ["distill.target=qq_kk_vv", "distill.relation_loss=smooth_l1"],
    "cls, cosine": ["distill.target=cls", "distill.feature_loss=cosine"],
    "qkv, small beta, other adaptive heads": ["distill.target=qkv", "distill.beta=0.5", "model.heads=1"],
    "three pairs": ["distill.taps=((1,1,1.0),(2,3,0.5),(2,2,2.0))", "model.scan=True"],
    "resplit, 2 heads": ["distill.heads=resplit", "distill.relation_heads=2", "model.heads=1"],
    "masked, both": ["distill.mask_ratio=0.5", "distill.teacher.masked=True", "model.dtype=bfloat16"],
    "masked, another grid": ["distill.mask_ratio=0.5", "distill.teacher.image_size=(24,16)"],
    "teacher's noise": ["distill.teacher.drop_path=0.5", "distill.teacher.jitter.contrast=0.4", "train.accumulate=2"],
    "a sum": [
        "distill.target=qk_vv + oo(normalize=true, temperature=0.07, patches=true):0.5 + ffn(norm=fixed, student=1)",
        "distill.adapter=mlp",
    ],
    "attention maps of 4 heads by 2": ["distill.target=attention_map", "distill.heads=own"],
    "the teacher's patches are dropped": ["distill.teacher.drop_patches=0.25", "distill.target=output + cls"],
    "mim and features": [
        *("distill.mask_ratio=0.5", "distill.mim_weight=0.5", "distill.target=ffn", "distill.feature_loss=mse"),
        *("distill.mim.normalize_pixels=False", *MIM),
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options_train(folder, data_dir, name):
    config = distill(folder, *OPTIONS[name])
    state, losses, before, after = run_steps(config, data_dir, make_mesh(devices=jax.devices()[:1]), 2)
    assert np.isfinite(losses).all()
    assert int(state.skipped) == 0
    start = task_of(config).init(jax.random.key(config.seed))
    # The first learning rate is 0, the second is not: each part has changed.
    for part, params in state.params.items():
        moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), params, start[part])
        assert any(jax.tree.leaves(moved)), part
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_the_published_path_costs_what_it_did(folder):
    """Options that are off cost nothing: FLOPs and losses are those of the method written out."""
    config = distill(folder, "distill.teacher.tap=2")
    task = task_of(config)
    student = ViT.from_record(task.model["encoder"])
    target, jitter = TARGETS["qk_vv"], dict(config.distill.jitter)

    def by_hand(params, frozen, image, key):
        seen = TEACHER.apply({"params": frozen}, normalize(image, MEAN, STD), tap=2, method="encode")
        view = normalize(color_jitter(fold_in_name(key, "jitter"), image, **jitter), MEAN, STD)
        own = student.apply({"params": params["encoder"]}, view, tap=2, method="encode")
        return jnp.mean(sum(target.loss(target.extract(own), target.extract(seen)).values()))

    def ours(params, frozen, image, key):
        return jnp.mean(task.losses(params, frozen, {"image": image}, key, True)["loss"])

    args = (task.init(jax.random.key(2)), task.load_frozen(), BATCH["image"], KEY)
    compiled = [jax.jit(jax.value_and_grad(function)).lower(*args).compile() for function in (by_hand, ours)]
    costs = [c.cost_analysis() for c in compiled]
    flops = [(cost[0] if isinstance(cost, list) else cost)["flops"] for cost in costs]
    assert flops[1] <= flops[0]
    want, got = (c(*args) for c in compiled)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), got, want)


def test_a_teacher_sees_its_own_pixels(folder):
    """Its mean and std come from the config, its model.json or ImageNet; the student's are those of data."""
    vit, mean, std = load_params(folder / "teacher"), (0.2, 0.3, 0.4), (0.3, 0.2, 0.1)
    save_params(folder / "own_pixels", vit[1], vit[0] | {"preprocessing": {"mean": list(mean), "std": list(std)}})
    save_params(folder / "no_record", vit[1], {"encoder": vit[0]["encoder"]})
    words = (*CLEAN, "distill.teacher.tap=2", "model.drop_path=0.0")
    task = task_of(distill(folder, *words))
    params, frozen = task.init(jax.random.key(2)), task.load_frozen()
    student, target = ViT.from_record(task.model["encoder"]), TARGETS["qk_vv"]

    @jax.jit
    def by_hand(mean, std):
        shown, pixels = (IMAGES / 255 - np.array(MEAN)) / np.array(STD), (IMAGES / 255 - mean) / std
        seen, own = (
            network.apply({"params": weights}, jnp.asarray(view, jnp.float32), tap=2, method="encode")
            for network, weights, view in ((TEACHER, frozen, pixels), (student, params["encoder"], shown))
        )
        return sum(target.loss(target.extract(own), target.extract(seen)).values())

    def ours(*more, teacher):
        task = task_of(distill(folder, *words, *more, teacher=teacher))
        record = task.origin["teacher"]
        values = jax.jit(task.losses, static_argnums=4)(params, task.load_frozen(), BATCH, KEY, True)
        return values["loss"], (tuple(record["mean"]), tuple(record["std"]))

    given = [f"distill.teacher.mean={mean}".replace(" ", ""), f"distill.teacher.std={std}".replace(" ", "")]
    cases = {
        "model.json": (ours(teacher="own_pixels"), (mean, std)),
        "config": (ours(*given, teacher="no_record"), (mean, std)),
        "ImageNet": (ours(teacher="no_record"), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))),
        "the data's": (ours(teacher="teacher"), (MEAN, STD)),
        "one of each": (ours(given[0], teacher="teacher"), (mean, STD)),
    }
    for name, ((loss, recorded), pixels) in cases.items():
        assert recorded == pixels, name
        # float32, and the pixels by another formula
        np.testing.assert_allclose(loss, by_hand(*map(np.array, pixels)), rtol=2e-5, err_msg=name)
    assert len({float(loss[0]) for (loss, _), _ in cases.values()}) == 4
    for words_, message in (
        (
            ["distill.teacher.std=(0.1,0.0,0.1)"],
            r"distill\.teacher\.std=\(0\.1, 0\.0, 0\.1\) \(the config\): needs three",
        ),
        (["distill.teacher.mean=0.5"], r"distill\.teacher\.mean=0\.5 \(the config\): needs three numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            task_of(distill(folder, *words_))


# Parts of the student's last block that only some targets train.
BEHIND = {"attn/proj": ("attention", "attention_residual"), "norm2": (), "mlp/fc1": (), "mlp/fc2": ()}
WHOLE_BLOCK = ("cls", "output", "ffn", "ffn_residual")


@pytest.mark.parametrize("target", ["qk_vv", "kk", "attention", "attention_residual", *WHOLE_BLOCK, "v", "qkv"])
def test_gradients_reach_what_they_should_and_nothing_else(folder, target):
    task = task_of(distill(folder, f"distill.target={target}", "model.drop_path=0.0"))
    params, frozen = task.init(jax.random.key(2)), task.load_frozen()

    def loss(params, frozen):
        return jnp.mean(task.losses(params, frozen, BATCH, KEY, True)["loss"])

    paths = optim.params_with_gradient(loss, params, frozen)
    trained = {"/".join(path) for path in paths}
    behind = {name for name, targets in BEHIND.items() if target in (*targets, *WHOLE_BLOCK)}
    never = {"encoder/norm"} | {f"encoder/blocks_1/{name}" for name in BEHIND if name not in behind}
    every = {"/".join(path) for path in flatten_dict(params)}
    want = {name for name in every if not any(name.startswith(f"{prefix}/") for prefix in never)}
    assert trained == want
    grads, of_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, frozen)
    for path, value in flatten_dict(grads).items():
        assert np.any(value) == (path in paths), path
    assert not any(np.any(x) for x in jax.tree.leaves(of_teacher))


def test_several_taps_are_the_weighted_sum_of_single_ones(folder):
    own = ["distill.heads=resplit", "model.drop_path=0.3"]
    both = losses_of(folder, *own, "distill.taps=((2,3,1.0),(1,2,0.5))")
    last = losses_of(folder, *own, "distill.student_tap=2", "distill.teacher.tap=3")
    first = losses_of(folder, *own, "distill.student_tap=1", "distill.teacher.tap=2")
    np.testing.assert_allclose(both["loss"], last["loss"] + 0.5 * first["loss"], rtol=1e-5)
    np.testing.assert_allclose(both["qk_1_2"], first["qk"], rtol=1e-5)
    np.testing.assert_allclose(both["vv_2_3"], last["vv"], rtol=1e-5)
    assert set(both) == {"loss", "qk_1_2", "vv_1_2", "qk_2_3", "vv_2_3"}


def test_a_sum_is_the_weighted_sum_of_its_parts_each_in_its_blocks(folder):
    own = ["distill.heads=resplit", "model.drop_path=0.3"]
    words = "qk_vv:0.5 + oo(loss=mse, normalize=true, student=1, teacher=2):3 + oo(loss=cka, patches=true)"
    both = losses_of(folder, *own, f"distill.target={words}")
    relations = losses_of(folder, *own, "distill.target=qk_vv")
    gram = ["distill.target=oo", "distill.relation_loss=mse", "distill.relation_normalize=True"]
    gram = losses_of(folder, *own, *gram, "distill.student_tap=1", "distill.teacher.tap=2")
    cka = losses_of(folder, *own, "distill.target=oo", "distill.relation_loss=cka", "distill.patches_only=True")
    np.testing.assert_allclose(both["loss"], 0.5 * relations["loss"] + 3 * gram["loss"] + cka["loss"], rtol=1e-5)
    assert set(both) == {"loss", "qk_2_3", "vv_2_3", "oo_1_2", "oo_2_3"}
    np.testing.assert_allclose(both["oo_1_2"], gram["oo"], rtol=1e-5)
    np.testing.assert_allclose(both["oo_2_3"], cka["oo"], rtol=1e-5)
    np.testing.assert_allclose(both["qk_2_3"], relations["qk"], rtol=1e-5)


def test_parts_of_one_name_are_logged_by_their_losses_and_one_without_a_block_takes_the_configs(folder):
    task = task_of(distill(folder, "distill.target=oo + oo(loss=mse)"))
    assert task.names == ("loss", "oo", "oo_mse")
    # The blocks of the config are for the parts that name none.
    task = task_of(distill(folder, "distill.target=vv + output(teacher=1)", "distill.student_tap=1"))
    assert task.names == ("loss", "vv_1_3", "output_1_1")
    assert task.origin["teacher"]["blocks"] == [[1, 3], [1, 1]]
    assert task.model["adapter"]["blocks"] == [[1, 3], [1, 1]]
    assert set(task.init(jax.random.key(0))["adapter"]) == {"taps_1"}


def test_a_learned_combination_of_the_students_maps_is_compared(folder):
    words = ["distill.target=attention_map", "distill.heads=own", "distill.mask_ratio=0.5"]
    task = task_of(distill(folder, *words))
    params = task.init(jax.random.key(2))
    assert params["adapter"]["taps_0"]["attention_map"]["kernel"].shape == (2, 4)
    assert task.model["encoder"]["heads"] == [2, 2]
    assert np.isfinite(losses_of(folder, *words)["loss"]).all()
    assert "adapter" not in task_of(distill(folder, "distill.target=attention_map")).init(jax.random.key(2))
    params = twin_params(folder)
    np.testing.assert_allclose(losses_of(folder, *TWINS, words[0], params=params)["loss"], 0, atol=1e-9)


@pytest.mark.slow
def test_statistics_are_saved_stop_at_their_limit_and_resume_to_the_same_bits(folder, data_dir, tmp_path, monkeypatch):
    words = ["distill.target=output", "distill.feature_norm=fixed", "distill.statistics_images=20"]
    config, whole, resumed = distill(folder, *words, "train.batch_size=8"), tmp_path / "whole", tmp_path / "resumed"
    train_run(config, whole, data_dir=data_dir)
    save, asked = Checkpoints.save, []

    def interrupted(self, step, *args, **kwargs):
        saved = save(self, step, *args, **kwargs)
        if not asked:
            asked.append(step)
            signal.raise_signal(signal.SIGINT)
        return saved

    monkeypatch.setattr(Checkpoints, "save", interrupted)
    with pytest.raises(Interrupted, match="stopped after step 2, all saved"):
        train_run(config, resumed, data_dir=data_dir)
    train_run(config, resumed, data_dir=data_dir)
    (model, params), (_, again) = load_params(whole), load_params(resumed)
    assert same_bits(params, again)
    # The four batches have 32 images: counting stopped at the first number that is not below 20.
    assert params["statistics"]["taps_0"]["output"]["images"] == 24
    assert model["statistics"] == {"target": "output", "blocks": [[2, 3]], "embed_dim": 32}
    # As the start of the same experiment they are taken over.
    start = task_of(distill(folder, *words, f"init={whole}"))
    filled = start.start(jax.device_get(start.init(jax.random.key(9))))
    assert same_bits(filled["statistics"], params["statistics"])


def test_adaptive_heads_are_those_of_every_tapped_teacher_block(folder):
    task = task_of(distill(folder, "distill.taps=((2,3,1.0),)"))
    assert task.model["encoder"]["heads"] == [2, 4]
    task = task_of(distill(folder, "distill.taps=((1,2,1.0),(2,3,1.0))"))
    assert task.model["encoder"]["heads"] == [4, 4]
    for choice in ("own", "resplit"):
        assert task_of(distill(folder, f"distill.heads={choice}")).model["encoder"]["heads"] == [2, 2]


def test_resplit_is_adaptive_where_head_counts_agree(folder):
    adaptive, own, resplit = (losses_of(folder, "model.heads=4", f"distill.heads={h}")["loss"]
                              for h in ("adaptive", "own", "resplit"))  # fmt: skip
    np.testing.assert_array_equal(adaptive, own)
    np.testing.assert_array_equal(adaptive, resplit)


TWINS = ("model.embed_dim=32", "model.depth=3", "model.heads=4", "distill.heads=own", *CLEAN)


def twin_params(folder):
    return {"encoder": load_params(folder / "teacher")[1]["encoder"]}


def test_the_same_patches_are_hidden_from_both(folder):
    """A student equal to the teacher has loss 0 only if both see the same patches in the same order."""
    masked = [*TWINS, "distill.mask_ratio=0.5", "distill.teacher.masked=True"]
    params = twin_params(folder)
    for train in (True, False):
        got = losses_of(folder, *masked, params=params, train=train)
        np.testing.assert_allclose(got["loss"], 0, atol=1e-6)
    # An unmasked teacher has other outputs, but in block 1 the same q, k and v at the visible patches.
    whole = [*TWINS, "distill.mask_ratio=0.5"]
    first = losses_of(folder, *whole, "distill.student_tap=1", "distill.teacher.tap=1", params=params)
    np.testing.assert_allclose(first["loss"], 0, atol=1e-6)
    assert (np.asarray(losses_of(folder, *whole, params=params)["loss"]) > 1e-4).all()


def test_the_teacher_sees_the_patches_that_the_student_attends_to(folder):
    """Compared by hand: the student's attention of CLS, the best half of the patches, and relations of those."""
    words = ["distill.teacher.drop_patches=0.5", "distill.teacher.tap=2", "model.drop_path=0.0", *CLEAN]
    task = task_of(distill(folder, *words))
    params, frozen = task.init(jax.random.key(2)), task.load_frozen()
    student, target = ViT.from_record(task.model["encoder"]), TARGETS["qk_vv"]
    view = normalize(BATCH["image"], MEAN, STD)
    own = student.apply({"params": params["encoder"]}, view, tap=2, method="encode")
    q, k = np.asarray(own.q, np.float64), np.asarray(own.k, np.float64)
    logits = np.einsum("bqhd,bkhd->bhqk", q, k)[:, :, 0] / np.sqrt(q.shape[-1])
    attention = (np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)).mean(1)[:, 1:]
    keep = np.sort(np.argsort(-attention, axis=1)[:, :8], axis=1)
    shown = TEACHER.apply({"params": frozen}, view, tap=2, keep=jnp.asarray(keep), method="encode")
    at = np.concatenate([np.zeros((4, 1), int), keep + 1], axis=1)
    own = jax.tree.map(lambda x: jnp.stack([x[i, at[i]] for i in range(4)]), own)
    wanted = sum(target.loss(target.extract(own), target.extract(shown)).values())
    got = jax.jit(task.losses, static_argnums=4)(params, frozen, BATCH, KEY, True)
    np.testing.assert_allclose(got["loss"], wanted, rtol=2e-5)

    def flops(*words):
        task = task_of(distill(folder, *words))
        return step_flops(task, task.load_frozen(), BATCH)

    assert flops(*words) < 0.8 * flops(*words[1:])  # most of the step is the teacher


def test_masks_come_from_the_step_key_and_differ_between_images(folder):
    words = [*TWINS, "distill.mask_ratio=0.5", "distill.target=ffn"]
    task = task_of(distill(folder, *words))
    params = task.init(jax.random.key(2))
    same = {"image": jnp.asarray(np.repeat(IMAGES[:1], 4, axis=0))}
    run = jax.jit(task.losses, static_argnums=4)
    loss = np.asarray(run(params, task.load_frozen(), same, KEY, True)["loss"])
    again = np.asarray(run(params, task.load_frozen(), same, KEY, True)["loss"])
    other = np.asarray(run(params, task.load_frozen(), same, jax.random.key(6), True)["loss"])
    np.testing.assert_array_equal(loss, again)
    assert len(set(loss)) == 4
    assert not set(loss) & set(other)


@pytest.mark.slow
def test_a_teacher_of_another_grid(folder):
    """With a constant image and no position table all patch tokens are equal, so the teacher's grid does not matter."""
    vit, params = TEACHER.clone(pos_embed="learned"), load_params(folder / "teacher")[1]["encoder"]
    nowhere = params | {"pos_embed": np.zeros((1, 17, 32), np.float32)}
    save_params(folder / "nowhere", {"encoder": nowhere}, {"encoder": vit.record()})
    plain = {"image": jnp.full((2, 16, 16, 3), 90, jnp.uint8)}
    losses = []
    for size in ("None", "(24,32)", "(8,12)"):
        words = ["distill.teacher.tap=1", "distill.target=v", f"distill.teacher.image_size={size}"]
        task = task_of(distill(folder, *words, teacher="nowhere"))
        params = task.init(jax.random.key(2))
        losses.append(jax.jit(task.losses, static_argnums=4)(params, task.load_frozen(), plain, KEY, False)["loss"])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    np.testing.assert_allclose(losses[2], losses[0], rtol=1e-5)
    assert np.isfinite(losses_of(folder, teacher="patch_8")["loss"]).all()


@pytest.mark.parametrize("word", ["distill.teacher.drop_path=0.5", "distill.teacher.jitter.brightness=0.9"])
def test_noise_of_the_teacher_is_of_training_only(folder, word):
    words = [*TWINS, "model.drop_path_schedule=constant"]
    params = twin_params(folder)
    np.testing.assert_allclose(losses_of(folder, *words, params=params)["loss"], 0, atol=1e-6)
    noisy = losses_of(folder, *words, word, params=params)
    assert np.max(noisy["loss"]) > 1e-4
    np.testing.assert_allclose(losses_of(folder, *words, word, params=params, train=False)["loss"], 0, atol=1e-6)


def test_the_mim_loss_is_maes(folder):
    words = ["distill.mask_ratio=0.5", "model.drop_path=0.0", *CLEAN]
    config = distill(folder, *words, "distill.mim_weight=0.3", *MIM)
    task = task_of(config)
    params, frozen = task.init(jax.random.key(2)), task.load_frozen()
    got = jax.jit(task.losses, static_argnums=4)(params, frozen, BATCH, KEY, True)
    alone = losses_of(folder, *words, params={"encoder": params["encoder"]})
    np.testing.assert_allclose(got["loss"], alone["loss"] + 0.3 * got["mae"], rtol=1e-5)
    encoder = ViT.from_record(task.model["encoder"])
    network = MaskedAutoencoder(encoder, build_decoder(config.distill.mim, encoder))
    images, masking = normalize(BATCH["image"], MEAN, STD), random_masking(fold_in_name(KEY, "masking"), 4, 16, 0.5)
    prediction = network.apply({"params": params}, images, masking)
    want = masked_pixel_loss(prediction, patchify(images, 4), masking.hidden, normalize=True)
    np.testing.assert_allclose(got["mae"], want, rtol=1e-5)
    # Its gradient reaches the whole encoder: all parameters are trained.
    paths = optim.params_with_gradient(lambda p: task.losses(p, frozen, BATCH, KEY, True)["loss"].mean(), params)
    assert paths == set(flatten_dict(params))


@pytest.fixture(scope="module")
def featured(folder):
    """The workdir of a student with adapters and a decoder."""
    words = ["distill.target=ffn", "distill.mask_ratio=0.5", "distill.mim_weight=1.0", *MIM]
    task = task_of(distill(folder, *words))
    params = jax.device_get(task.init(jax.random.key(3)))
    save_params(folder / "featured", params, task.model)
    return folder / "featured", words, params


def test_adapters_and_decoder_are_no_part_of_the_encoder(folder, featured, caplog):
    path, words, params = featured
    assert set(params) == {"encoder", "adapter", "decoder"}
    assert params["adapter"]["taps_0"]["ffn"]["kernel"].shape == (16, 32)
    # As a teacher, as the start of a classifier, and as a PyTorch file.
    frozen = task_of(small_config("distill", "model.patch_size=4", f"distill.teacher.path={path}")).load_frozen()
    np.testing.assert_array_equal(frozen["cls_token"], params["encoder"]["cls_token"])
    finetune = small_config("finetune", "model.patch_size=4", f"init={path}")
    task = task_of(finetune)
    start = task.start(jax.device_get(task.init(jax.random.key(0))))
    np.testing.assert_array_equal(start["encoder"]["cls_token"], params["encoder"]["cls_token"])
    assert set(start) == {"encoder", "fc_norm", "head"}
    model, loaded = load_params(path)
    assert "decoder_pos_embed" in to_torch("mae", model, loaded)
    # As the start of the same experiment everything fits, and nothing is logged.
    caplog.clear()
    task = task_of(distill(folder, *words, f"init={path}"))
    jax.tree.map(np.testing.assert_array_equal, task.start(jax.device_get(task.init(jax.random.key(9)))), params)
    assert "init:" not in caplog.text


@pytest.mark.parametrize(
    ("words", "fresh", "messages"),
    [
        (
            ["distill.target=attention"],
            {"adapter"},
            [
                r"WARNING .*the adapter of \S+ is {'target': 'ffn'.*config asks for {'target': 'attention'",
                "not use decoder",
            ],
        ),
        (["distill.target=qk_vv"], set(), ["not use adapter, decoder"]),
        (
            [
                "distill.target=ffn",
                "distill.mask_ratio=0.5",
                "distill.mim_weight=1.0",
                *MIM,
                "distill.mim.decoder_dim=4",
            ],
            {"decoder"},
            [r"WARNING .*the decoder of \S+ is {'embed_dim': 8.*config asks for {'embed_dim': 4"],
        ),
    ],
)
def test_parts_of_a_checkpoint_that_do_not_fit_start_afresh_and_are_named(
    folder, featured, caplog, words, fresh, messages
):
    task = task_of(distill(folder, *words, f"init={featured[0]}"))
    before = jax.device_get(task.init(jax.random.key(9)))
    with caplog.at_level("INFO"):
        start = task.start(before)
    for part, params in start.items():
        want = before[part] if part in fresh else featured[2][part]
        jax.tree.map(np.testing.assert_array_equal, params, want)
    for message in messages:
        assert re.search(message, caplog.text), caplog.text


def test_an_encoder_alone_starts_mae_and_what_it_lacks_is_logged(folder, caplog):
    words = ("model.patch_size=4", "model.embed_dim=32", "model.depth=3", "model.heads=4")
    task = task_of(small_config("mae_teacher", *words, f"init={folder / 'teacher'}"))
    with caplog.at_level("INFO"):
        task.start(jax.device_get(task.init(jax.random.key(0))))
    assert re.search(r"INFO .*init: \S+/teacher has no decoder; it starts from its initialization", caplog.text)


@pytest.mark.slow
def test_a_chain_of_students_with_resplit(folder, data_dir):
    """L -> S -> T with the heads of each size: relations are split anew, no stage changes a number of heads."""
    mesh = make_mesh(devices=jax.devices()[:1])
    small = distill(folder, "distill.heads=resplit", "model.embed_dim=24", "model.heads=6", "model.depth=3")
    with pytest.raises(ValueError, match=r"Choices: 1, 2, 4, 8"):
        task_of(
            distill(folder, "distill.heads=resplit", "model.embed_dim=24", "model.heads=6", "distill.relation_heads=3")
        )
    state, losses, *_ = run_steps(small, data_dir, mesh, 1)
    assert np.isfinite(losses).all()
    save_params(folder / "small", jax.device_get(state.params), task_of(small).model)
    words = ["distill.heads=resplit", "model.embed_dim=12", "model.heads=3"]
    tiny = distill(folder, *words, teacher="small")
    assert task_of(tiny).model["encoder"]["heads"] == [3, 3]
    _, losses, *_ = run_steps(tiny, data_dir, mesh, 1)
    assert np.isfinite(losses).all()
    assert losses[0] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distill.taps=((3,1,1.0),)"], r"distill\.taps: the student has no block 3; it has blocks 1 to 2"),
        (["distill.taps=((1,4,1.0),)"], r"the teacher has no block 4; it has blocks 1 to 3"),
        (["distill.taps=((1,1),)"], r"\(student block, teacher block, positive weight\)"),
        (["distill.taps=((1,1,0.0),)"], r"positive weight"),
        (["distill.taps=()"], r"positive weight"),
        (["distill.taps=12:18"], r"positive weight"),
        (["distill.taps=((1,1,1.0),(1,1,2.0))"], r"has a pair twice"),
        (["distill.taps=((1,1,1.0),)", "distill.student_tap=1"], r"set both to None"),
        (["distill.student_tap=5"], r"distill\.student_tap: the student has no block 5"),
        (["distill.heads=resplt"], r"did you mean 'resplit'"),
        (["distill.relation_heads=2"], r"needs distill\.heads='resplit', but that is 'adaptive'"),
        (["distill.heads=resplit", "distill.relation_heads=3"], r"Choices: 1, 2, 4, 8, 16"),
        (["model.embed_dim=18"], r"do not divide the student's width 18: set distill\.heads='resplit'"),
        (["distill.teacher.masked=True"], r"distill\.mask_ratio=0\.0: set it"),
        (["distill.mask_ratio=1.0"], r"mask_ratio=1\.0 must lie in \[0, 1\)"),
        (["distill.mask_ratio=0.99"], r"hides all of 16 patches"),
        (["distill.mim_weight=0.5"], r"distill\.mask_ratio=0\.0 hides none"),
        (["distill.mim_weight=-1.0"], r"must not be negative"),
        (["distill.teacher.image_size=(18,16)"], r"cannot be cut into the teacher's patches of 4"),
        (
            ["distill.teacher.image_size=(8,8)", "distill.teacher.masked=True", "distill.mask_ratio=0.5"],
            r"the student's is \(4, 4\) and the teacher's \(2, 2\)",
        ),
        (["distill.target=fnn"], r"did you mean 'ffn'"),
        (["distill.teacher.drop_patches=0.5", "distill.mask_ratio=0.5"], r"a student that sees all patches"),
        (
            ["distill.teacher.drop_patches=0.5", "distill.teacher.image_size=(8,8)"],
            r"the grids are \(4, 4\) and \(2, 2\)",
        ),
        (["distill.teacher.drop_patches=1.0"], r"must lie in \[0, 1\)"),
        (["distill.target=qk_vv + qk"], r"compares qk twice in the same blocks"),
        (["distill.target=output(student=3)"], r"distill\.target: the student has no block 3; it has blocks 1 to 2"),
        (["distill.target=cls", "distill.patches_only=True"], r"write cls\(patches=false\)"),
        (["distill.target=oo(heads=3)"], r"3 relation heads do not divide.*Choices: 1, 2, 4, 8, 16"),
        (
            ["distill.target=vv(student=1)", "distill.taps=((1,1,1.0),(2,2,1.0))"],
            r"vv names one block and distill\.taps=.*give it both student= and teacher=",
        ),
        (["distill.feature_norm=fixed", "distill.statistics_images=0"], r"statistics_images=0 must be positive"),
        (["distill.relation_loss=l1"], r"Choices: 'kl', 'smooth_l1', 'mse', 'cka'"),
    ],
)
def test_mistakes_name_the_remedy(folder, words, message):
    with pytest.raises(ValueError, match=message):
        task_of(distill(folder, *words))


# Fine-tuning: the last block.


@pytest.fixture(scope="module")
def pretrained(folder):
    return load_params(folder / "teacher")[1]["encoder"]


def finetuned(folder, *words, init="teacher"):
    """(task, its parameters at the start) of a classifier that starts from the 32 x 3 teacher."""
    sizes = ["model.patch_size=4", "model.embed_dim=32", "model.depth=3", "model.heads=4"]
    task = task_of(small_config("finetune", *sizes, f"init={folder / init}", *words))
    return task, task.start(jax.device_get(task.init(jax.random.key(0))))


def features(task, params):
    network = Classifier(ViT.from_record(task.model["encoder"]), **task.model["classifier"])
    images = normalize(BATCH["image"], MEAN, STD)
    return np.asarray(jax.jit(lambda p: network.apply({"params": p}, images, method="features"))(params))


def test_keep_leaves_the_last_block(folder, pretrained):
    _, params = finetuned(folder)
    jax.tree.map(np.testing.assert_array_equal, params["encoder"]["blocks_2"], pretrained["blocks_2"])


def test_zero_init_is_the_encoder_without_its_last_block(folder, pretrained):
    zero, zero_params = finetuned(folder, "classify.last_block=zero_init")
    short, short_params = finetuned(folder, "classify.last_block=drop")
    assert short.model["encoder"]["depth"] == 2
    assert short.model["encoder"]["heads"] == [4, 4]
    assert set(zero_params["encoder"]) - set(short_params["encoder"]) == {"blocks_2"}
    np.testing.assert_array_equal(features(zero, zero_params), features(short, short_params))
    kept = features(*finetuned(folder))
    assert np.abs(kept - features(zero, zero_params)).max() > 0.1
    # The parts that distillation trained are kept, and fc1 is not zeros, so the block can learn.
    last = zero_params["encoder"]["blocks_2"]
    np.testing.assert_array_equal(last["attn"]["qkv"]["kernel"], pretrained["blocks_2"]["attn"]["qkv"]["kernel"])
    np.testing.assert_array_equal(last["mlp"]["fc1"]["kernel"], pretrained["blocks_2"]["mlp"]["fc1"]["kernel"])


def test_copy_previous_takes_what_lies_behind_q_k_v(folder, pretrained):
    _, params = finetuned(folder, "classify.last_block=copy_previous")
    last, before = params["encoder"]["blocks_2"], pretrained["blocks_1"]
    for name in ("norm2", "mlp"):
        jax.tree.map(np.testing.assert_array_equal, last[name], before[name])
    jax.tree.map(np.testing.assert_array_equal, last["attn"]["proj"], before["attn"]["proj"])
    jax.tree.map(np.testing.assert_array_equal, last["attn"]["qkv"], pretrained["blocks_2"]["attn"]["qkv"])
    jax.tree.map(np.testing.assert_array_equal, last["norm1"], pretrained["blocks_2"]["norm1"])


@pytest.mark.parametrize("choice", ["zero_init", "drop"])
def test_a_fine_tuned_last_block_is_left_alone(folder, choice):
    """Evaluating a classifier builds the same task from it: its last block must not be changed again."""
    task, params = finetuned(folder, f"classify.last_block={choice}")
    moved = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.01), params)
    save_params(folder / f"finetuned_{choice}", moved, task.model)
    _, again = finetuned(folder, f"classify.last_block={choice}", init=f"finetuned_{choice}")
    jax.tree.map(np.testing.assert_array_equal, again, moved)


def test_mistaken_last_blocks(folder):
    with pytest.raises(ValueError, match=r"did you mean 'zero_init'"):
        finetuned(folder, "classify.last_block=zero_int")
    with pytest.raises(ValueError, match=r"init is empty"):
        task_of(small_config("finetune", "classify.last_block=drop"))


def test_uniform_heads(folder):
    task = task_of(distill(folder, "model.embed_dim=32", "model.depth=3"))
    save_params(folder / "adaptive", jax.device_get(task.init(jax.random.key(0))), task.model)
    assert task.model["encoder"]["heads"] == [2, 2, 4]
    assert finetuned(folder, init="adaptive")[0].model["encoder"]["heads"] == [2, 2, 4]
    uniform, _ = finetuned(folder, "classify.heads=uniform", init="adaptive")
    assert uniform.model["encoder"]["heads"] == [2, 2, 2]


@pytest.mark.parametrize("choice", ["keep", "uniform"])
def test_other_heads_than_the_checkpoints_are_refused(folder, choice):
    for asked in ("8", "(4,4,2)"):
        with pytest.raises(ValueError, match=r"(?s)model\.heads=.*was trained with \[4, 4, 4\].*set model\.heads=None"):
            finetuned(folder, f"classify.heads={choice}", f"model.heads={asked}")
    for asked in ("None", "4", "(4,4,4)"):
        task, _ = finetuned(folder, f"classify.heads={choice}", f"model.heads={asked}")
        assert task.model["encoder"]["heads"] == [4, 4, 4]
