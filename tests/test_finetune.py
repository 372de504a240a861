"""Fine-tuning: losses, a supervised teacher, layer decay with scan, other image sizes; against closed forms."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from runs import DIGITS, same_bits, small_config

from tinymim_jax import optim
from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.class_names import ClassMismatch
from tinymim_jax.evaluation.evaluate import evaluate_checkpoint
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.ops.keys import fold_in_name
from tinymim_jax.ops.losses import binary_cross_entropy, hard_distillation, soft_distillation
from tinymim_jax.ops.mixup import draw_mix, mix_images
from tinymim_jax.ops.posembed import resize_table
from tinymim_jax.state import trained_paths
from tinymim_jax.tasks import TASKS
from tinymim_jax.tasks.classify import task as classify
from tinymim_jax.tasks.classify.teacher import supervised_teacher
from tinymim_jax.tasks.pretrained import Loaded, fit_positions
from tinymim_jax.train import train

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 16, 16, 3), np.uint8)
BATCH = {"image": jnp.asarray(IMAGES), "label": jnp.array([3, 1, 4, 1])}
KEY = jax.random.key(5)
STAR = ("model.depth=1", "model.dist_token=True", "classify.hidden_dim=20")
# A teacher with other patches, another table and other pixels than the student's.
TEACHER = Classifier(
    ViT(embed_dim=24, depth=1, heads=4, patch_size=4, image_size=(16, 16), pos_embed="learned", final_norm=False),
    classes=10,
)
SEEN = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.25]}


def randomly(shapes):
    """Random parameters of these shapes, with norm scales near 1; avoids compiling the initializers."""
    rng = np.random.default_rng(1)
    values = {
        path: (float(path[-1] == "scale") + 0.2 * rng.normal(size=x.shape)).astype(np.float32)
        for path, x in sorted(flatten_dict(shapes).items())
    }
    return unflatten_dict(values)


def params_of(task):
    return randomly(jax.eval_shape(task.init, KEY))


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teachers") / "teacher"
    params = randomly(jax.eval_shape(TEACHER.init, KEY, jnp.zeros((1, 16, 16, 3)))["params"])
    record = {"encoder": TEACHER.encoder.record(), "classifier": TEACHER.record(), "preprocessing": SEEN}
    save_params(path, params, record)
    return path


def task_of(*words):
    config = small_config("finetune", *words)
    return TASKS[config.task].build(config, DIGITS)


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def one_hot(labels, classes):
    return np.eye(classes)[np.asarray(labels)]


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_bce_and_its_gradient_in_closed_form(threshold):
    logits, targets = RNG.normal(size=(3, 5)) * 4, softmax(RNG.normal(size=(3, 5)))
    wanted = targets if threshold is None else (targets > threshold).astype(float)
    p = 1 / (1 + np.exp(-logits))
    want = -(wanted * np.log(p) + (1 - wanted) * np.log(1 - p)).mean(axis=1)

    def loss(logits):
        return binary_cross_entropy(logits, jnp.asarray(targets, jnp.float32), threshold=threshold)

    given = jnp.asarray(logits, jnp.float32)
    np.testing.assert_allclose(loss(given), want, rtol=1e-5)
    np.testing.assert_allclose(jax.grad(lambda x: loss(x).sum())(given), (p - wanted) / 5, atol=1e-6)
    # Large logits do not overflow.
    assert np.isfinite(loss(jnp.full((3, 5), 1e4))).all()


def test_hard_distillation_and_its_gradient_in_closed_form():
    student, teacher = RNG.normal(size=(2, 3, 5)) * 3
    answers = one_hot(teacher.argmax(1), 5)
    given, wanted = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    want = -(answers * np.log(softmax(student))).sum(1)
    np.testing.assert_allclose(hard_distillation(given, wanted), want, rtol=1e-5)
    got = jax.grad(lambda x: hard_distillation(x, wanted).sum())(given)
    np.testing.assert_allclose(got, softmax(student) - answers, atol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 3.0])
def test_soft_distillation_and_its_gradient_in_closed_form(tau):
    student, teacher = RNG.normal(size=(2, 3, 5)) * 3
    p, q = softmax(teacher / tau), softmax(student / tau)
    given, wanted = jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)
    want = tau**2 * (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(soft_distillation(given, wanted, tau=tau), want, rtol=1e-4)
    got = jax.grad(lambda x: soft_distillation(x, wanted, tau=tau).sum())(given)
    np.testing.assert_allclose(got, tau * (q - p), atol=1e-5)
    np.testing.assert_allclose(soft_distillation(wanted, wanted, tau=tau), 0, atol=1e-6)


SHARED = {
    "two heads, soft": [*STAR, "classify.distillation=soft"],
    "one head, hard, bce": ["classify.distillation=hard", "classify.loss=bce", "classify.bce_threshold=None"],
}


@pytest.mark.parametrize("name", SHARED)
def test_a_teacher_and_the_labels_share_the_loss(teacher, name):
    words = ["model.depth=1", "classify.alpha=0.25", "classify.tau=2.0", f"classify.teacher.path={teacher}"]
    task = task_of(*SHARED[name], *words)
    params, of_teacher = params_of(task), load_params(teacher)[1]
    network = Classifier(ViT.from_record(task.model["encoder"]), **task.model["classifier"])
    mean, std = (np.array(SEEN[name]) for name in ("mean", "std"))
    shown, seen = (jnp.asarray(x, jnp.float32) for x in (IMAGES / 127.5 - 1, (IMAGES / 255 - mean) / std))

    @jax.jit
    def everything(params, frozen):
        first, second = network.apply({"params": params}, shown, method="logits")
        answers = TEACHER.apply({"params": of_teacher}, seen)
        return task.losses(params, frozen, BATCH, KEY, False), first, second, answers

    values, first, second, answers = everything(params, task.load_frozen())
    assert set(values) == set(task.names)
    assert (second is None) == name.startswith("one head")
    first, taught, answers = (np.asarray(x) for x in (first, first if second is None else second, answers))
    labels = one_hot(BATCH["label"], 10)
    if "bce" in name:
        p = 1 / (1 + np.exp(-first))
        label_loss = -(labels * np.log(p) + (1 - labels) * np.log(1 - p)).mean(1)
        teacher_loss = -(one_hot(answers.argmax(1), 10) * np.log(softmax(taught))).sum(1)
    else:
        label_loss = -(labels * np.log(softmax(first))).sum(1)
        p, q = softmax(answers / 2), softmax(taught / 2)
        teacher_loss = 4 * (p * np.log(p / q)).sum(1)
    np.testing.assert_allclose(values["label_loss"], label_loss, rtol=1e-4)
    np.testing.assert_allclose(values["teacher_loss"], teacher_loss, rtol=1e-4)
    np.testing.assert_allclose(values["loss"], 0.75 * label_loss + 0.25 * teacher_loss, rtol=1e-4)
    np.testing.assert_array_equal(values["top1"], (first + taught).argmax(1) == np.asarray(BATCH["label"]))
    np.testing.assert_array_equal(values["teacher_top1"], answers.argmax(1) == np.asarray(BATCH["label"]))


def test_gradients_reach_all_of_the_student_and_nothing_of_the_teacher(teacher):
    task = task_of(*STAR, "classify.distillation=soft", f"classify.teacher.path={teacher}")
    params, frozen = params_of(task), task.load_frozen()
    assert trained_paths(task, frozen, BATCH) == set(flatten_dict(params))
    # Only the second head learns the teacher's answers.
    second = optim.params_with_gradient(lambda p: task.losses(p, frozen, BATCH, KEY, True)["teacher_loss"], params)
    assert {("head_dist", "kernel"), ("encoder", "dist_token"), ("encoder", "cls_token")} <= second
    assert not {path for path in second if path[0] == "head"}

    def loss(params, frozen):
        return jnp.mean(task.losses(params, frozen, BATCH, KEY, False)["loss"])

    grads, of_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, frozen)
    for path, grad in flatten_dict(grads).items():
        assert np.any(grad), path
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(of_teacher))


def test_the_teacher_sees_the_students_augmented_images(monkeypatch):
    """The stand-in teacher returns the mean of its input, which must be that of the student's mixed images."""

    def answers(frozen, images):
        return jnp.broadcast_to(images.mean(axis=(1, 2, 3))[:, None], (len(images), 10))

    stand_in = types.SimpleNamespace(
        alpha=1.0, logits=answers, distance=lambda mine, wanted: wanted[:, 0], weights=dict, origin={}
    )
    monkeypatch.setattr(classify, "supervised_teacher", lambda config, class_names: stand_in)
    task = task_of("classify.mixup=0.8", "model.depth=1")
    images = jnp.asarray(IMAGES / 127.5 - 1, jnp.float32)

    @jax.jit
    def everything(params):
        mix = draw_mix(fold_in_name(KEY, "mixup"), (16, 16), mixup=0.8, cutmix=0.0, prob=1.0, switch_prob=0.5)
        mixed = mix_images(images, mix).mean(axis=(1, 2, 3))
        return task.losses(params, {}, BATCH, KEY, True)["loss"], mixed, mix.lam

    got, want, lam = everything(params_of(task))
    assert 0.01 < lam < 0.99
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_teacher_of_another_image_size(teacher):
    """Images of one colour do not change by resizing, so only size and normalisation matter."""
    words = ["classify.distillation=hard", f"classify.teacher.path={teacher}", "classify.teacher.image_size=(24,20)"]
    found = supervised_teacher(small_config("finetune", *words), DIGITS)
    colour = np.array([40, 200, 90])
    shown = jnp.broadcast_to(jnp.asarray(colour / 127.5 - 1, jnp.float32), (2, 16, 16, 3))
    params, (mean, std) = load_params(teacher)[1], (np.array(SEEN[name]) for name in ("mean", "std"))
    table = resize_table(params["encoder"]["pos_embed"], (4, 4), (6, 5))
    own = params | {"encoder": params["encoder"] | {"pos_embed": table}}
    larger = TEACHER.clone(encoder=TEACHER.encoder.clone(image_size=(24, 20)))
    seen = jnp.broadcast_to(jnp.asarray((colour / 255 - mean) / std, jnp.float32), (2, 24, 20, 3))
    weights = found.weights()
    got, want = jax.jit(lambda: (found.logits(weights, shown), larger.apply({"params": own}, seen)))()
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
def test_a_star_is_trained_evaluated_without_its_teacher_and_used(teacher, data_dir, tmp_path):
    words = [*STAR, "classify.distillation=hard", "train.ema=0.5"]
    here, gone = (f"classify.teacher.path={path}" for path in (teacher, tmp_path / "gone"))
    result = train(small_config("finetune", *words, here), tmp_path / "run", data_dir=data_dir)
    assert {"label_loss", "teacher_loss", "teacher_top1", "top1"} <= set(result)
    evaluated = evaluate_checkpoint(small_config("finetune", *words, gone), tmp_path / "run", data_dir=data_dir)
    assert evaluated["top1"] == pytest.approx(result["top1"])
    assert "teacher_loss" not in evaluated
    record, params = load_params(tmp_path / "run")
    assert record["classifier"] == {"classes": 10, "pool": "mean", "hidden_dim": 20}
    # It can start another run, both heads included.
    again = task_of(*STAR, f"init={tmp_path / 'run'}")
    assert same_bits(again.start(params_of(again)), params)


def test_an_encoder_without_the_token_gets_a_new_one(teacher):
    words = ["model.depth=1", "model.dist_token=True", "model.embed_dim=24", "model.heads=4", "model.patch_size=4"]
    task = task_of(*words, f"init={teacher}")
    before = params_of(task)
    after, loaded = task.start(before), load_params(teacher)[1]
    np.testing.assert_array_equal(after["encoder"]["dist_token"], before["encoder"]["dist_token"])
    table = after["encoder"]["pos_embed"]
    np.testing.assert_array_equal(np.delete(table, 1, axis=1), loaded["encoder"]["pos_embed"])
    assert not table[:, 1].any()
    # The head of a network with one head does not fit a network with two.
    np.testing.assert_array_equal(after["head"]["kernel"], before["head"]["kernel"])


def test_a_token_is_not_lost_silently(tmp_path):
    encoder = ViT(embed_dim=16, depth=2, heads=2, patch_size=8, image_size=(16, 16), dist_token=True)
    params = randomly(jax.eval_shape(encoder.init, KEY, jnp.zeros((1, 16, 16, 3)))["params"])
    save_params(tmp_path / "token", {"encoder": params}, {"encoder": encoder.record()})
    task = task_of(f"init={tmp_path / 'token'}")
    with pytest.raises(ValueError, match=r"has a distillation token: set model\.dist_token=True"):
        task.start(params_of(task))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["classify.loss=bec"], r"did you mean 'bce'"),
        (
            ["classify.loss=bce", "classify.bce_threshold=0.001"],
            r"bce_threshold=0\.001 would turn the targets of all classes into 1",
        ),
        (["classify.distillation=hrad"], r"did you mean 'hard'"),
        (["classify.distillation=hard"], r"teacher\.path is empty: name a classifier"),
        (["classify.distillation=none", "classify.teacher.path=TEACHER"], r"distillation='none' asks no teacher"),
        (["classify.distillation=hard", "classify.teacher.path=TEACHER", "classify.alpha=1.5"], r"a share from 0 to 1"),
        (["classify.distillation=soft", "classify.teacher.path=TEACHER", "classify.tau=0.0"], r"a tau above 0"),
        (
            ["classify.distillation=hard", "classify.teacher.path=TEACHER", "classify.teacher.image_size=(18,16)"],
            r"images of 18x16 cannot be cut into the teacher's patches of 4",
        ),
    ],
)
def test_mistakes_name_the_remedy(teacher, words, message):
    with pytest.raises(ValueError, match=message):
        task_of(*(word.replace("TEACHER", str(teacher)) for word in words))


def test_a_teacher_must_answer_the_same_question(teacher, tmp_path):
    config = small_config("finetune", "classify.distillation=hard", f"classify.teacher.path={teacher}")
    with pytest.raises(ValueError, match=r"has 10 classes, but 'digits' has 7 classes"):
        TASKS["classify"].build(config, DIGITS[:7])
    params = load_params(teacher)[1]
    save_params(tmp_path / "encoder", {"encoder": params["encoder"]}, {"encoder": TEACHER.encoder.record()})
    with pytest.raises(ValueError, match=r"has no classifier, but 'digits' has 10 classes"):
        task_of("classify.distillation=hard", f"classify.teacher.path={tmp_path / 'encoder'}")
    with pytest.raises(CheckpointError, match=r"classify\.teacher\.path: .*nothing does not exist"):
        task_of("classify.distillation=hard", f"classify.teacher.path={tmp_path / 'nothing'}")


def test_a_teachers_classes_are_matched_by_name(teacher, tmp_path, caplog):
    model, params = load_params(teacher)
    order = np.array([3, 1, 4, 0, 5, 9, 2, 6, 8, 7])  # output i of the saved teacher is the digit order[i]
    names = [f"{digit:02d}" for digit in order]
    head = jax.tree.map(lambda leaf: leaf[..., order], params["head"])
    record = model | {"preprocessing": SEEN | {"class_names": names}}
    save_params(tmp_path / "permuted", params | {"head": head}, record)
    words = ("model.depth=1", "classify.distillation=soft")

    def answers(path):
        task = task_of(*words, f"classify.teacher.path={path}")
        return jax.jit(task.losses, static_argnums=4)(params_of(task), task.load_frozen(), BATCH, KEY, False)

    with caplog.at_level("INFO"):
        got, want = answers(tmp_path / "permuted"), answers(teacher)
    assert "the classes of " in caplog.text
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
    others = ["ant", *names[1:]]
    save_params(tmp_path / "others", params, record | {"preprocessing": SEEN | {"class_names": others}})
    with pytest.raises(ClassMismatch, match=r"others does not know 1 of the 10 classes of 'digits': '3'"):
        answers(tmp_path / "others")


def test_a_teachers_pixels_may_be_given(teacher):
    words = ("model.depth=1", "classify.distillation=soft", f"classify.teacher.path={teacher}")
    found = supervised_teacher(small_config("finetune", *words, "classify.teacher.mean=(0.1,0.2,0.3)"), DIGITS)
    assert found.own == ((0.1, 0.2, 0.3), tuple(SEEN["std"]))
    task = task_of(*words, "classify.teacher.mean=(0.1,0.2,0.3)")
    assert task.origin == {"teacher": {"checkpoint": str(teacher), "mean": [0.1, 0.2, 0.3], "std": SEEN["std"]}}
    with pytest.raises(
        ValueError, match=r"classify\.teacher\.std=\(1, 0, 1\) \(the config\): needs three numbers above 0"
    ):
        task_of(*words, "classify.teacher.std=(1,0,1)")


@pytest.mark.parametrize("task", ["mae_teacher", "distill"])
def test_a_pixel_decoder_has_no_place_for_the_token(teacher, task):
    words = [f"distill.teacher.path={teacher}", "distill.mask_ratio=0.5", "distill.mim_weight=1.0"]
    config = small_config(task, "model.dist_token=True", *(words if task == "distill" else []), "model.patch_size=4")
    with pytest.raises(ValueError, match=r"model\.dist_token=True: a decoder of pixels"):
        TASKS[config.task].build(config, DIGITS)


@pytest.mark.slow
def test_layer_decay_of_scanned_blocks(golden):
    """AdamW's first step has the size learning rate times the golden factor of the block, whatever the gradient."""
    factors = json.loads(golden.path("recipe.json").read_text())["layer_decay_0.65_depth12"]
    depth, lr = 12, 1e-2
    encoder = ViT(embed_dim=8, depth=depth, heads=2, patch_size=8, image_size=(16, 16), pos_embed="learned")
    network = Classifier(encoder.clone(final_norm=False, scan=True), classes=4)
    images = jnp.asarray(RNG.normal(size=(2, 16, 16, 3)), jnp.float32)
    params = randomly(jax.eval_shape(network.init, KEY, images)["params"])
    grads = jax.jit(jax.grad(lambda p: jnp.sum(network.apply({"params": p}, images)[:, 0] ** 2)))(params)
    optimizer = optim.make_optimizer(
        "adamw", lambda step: lr, params, b1=0.9, b2=0.999, eps=1e-30, weight_decay=0.0, layer_decay=0.65, depth=depth
    )
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    moved = flatten_dict(jax.tree.map(lambda update: np.abs(update).max() / lr, updates))
    for i in range(depth):
        block = [value for path, value in moved.items() if path[1:2] == (f"blocks_{i}",)]
        np.testing.assert_allclose(block, factors[f"blocks.{i}.mlp.fc1.weight"][0], rtol=1e-5, err_msg=f"block {i}")
    for ours, theirs in (("cls_token", "cls_token"), ("pos_embed", "pos_embed")):
        np.testing.assert_allclose(moved["encoder", ours], factors[theirs][0], rtol=1e-5)
    np.testing.assert_allclose(moved["head", "kernel"], factors["head.weight"][0], rtol=1e-5)


def test_a_distillation_token_is_an_embedding():
    encoder = ViT(embed_dim=8, depth=2, heads=2, patch_size=8, image_size=(16, 16), dist_token=True, final_norm=False)
    network = Classifier(encoder, classes=4, hidden_dim=12)
    params = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 16, 16, 3)))["params"]
    scales = optim.layer_scales(params, 0.5, 2)
    assert scales["encoder"]["dist_token"] == scales["encoder"]["cls_token"] == 0.5**3
    assert set(jax.tree.leaves({name: scales[name] for name in ("widen", "fc_norm", "head", "head_dist")})) == {1.0}
    assert not optim.decay_mask(params, "finetune")["encoder"]["dist_token"]


def test_heads_start_all_but_zero():
    encoder = ViT(embed_dim=8, depth=1, heads=2, patch_size=8, image_size=(16, 16), dist_token=True, final_norm=False)
    params = jax.jit(Classifier(encoder, classes=500).init)(KEY, jnp.zeros((1, 16, 16, 3)))["params"]
    for head in ("head", "head_dist"):
        kernel = np.asarray(params[head]["kernel"])
        # A standard normal that is truncated at 2 has standard deviation 0.8796.
        assert kernel.std() == pytest.approx(0.8796 * 2e-5, rel=0.05)
        assert np.abs(kernel).max() <= 4e-5
        assert not np.any(params[head]["bias"])


@pytest.mark.parametrize("size", [7, 16, 24, 32])
@pytest.mark.parametrize("dist_token", [False, True])
def test_a_larger_image_resizes_the_table(golden, close, size, dist_token):
    """A network for 14 x 14 patches fine-tuned at `size` x `size`: positions are resized as by torch's bicubic."""
    arrays = golden.arrays("pos_embed.npz")
    source, want = arrays["pos_14"], arrays[f"pos_{size}"]
    encoder = ViT(embed_dim=source.shape[-1], depth=1, heads=1, patch_size=2, image_size=(28, 28), pos_embed="learned")
    loaded = Loaded("here", {"encoder": encoder.record()}, {"encoder": {"pos_embed": source}})
    wanted = encoder.clone(image_size=(2 * size, 2 * size), dist_token=dist_token)
    got = fit_positions(loaded, wanted)["pos_embed"]
    assert got.shape[1] == wanted.prefix + size * size
    close(got[:, :1], want[:, :1], 1e-6, "CLS")
    close(got[:, wanted.prefix :], want[:, 1:], 1e-5, "patches")
