"""Tasks: what they load, what they refuse, and that all accept converted files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import run_steps, small_config

from tinymim_jax.checkpoints.format import CheckpointError
from tinymim_jax.checkpoints.params import load_params, save_params
from tinymim_jax.convert import convert_file
from tinymim_jax.evaluation.evaluate import evaluate_checkpoint
from tinymim_jax.experiment import build_experiment
from tinymim_jax.ops.posembed import resize_table
from tinymim_jax.ops.top_k import in_top
from tinymim_jax.sharding import make_mesh
from tinymim_jax.tasks.distill.teachers import TEACHERS, how_to_get


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    """The golden PyTorch files, converted."""
    folder, meta = tmp_path_factory.mktemp("converted"), golden.meta
    heads = [meta["student"]["heads"]] * (meta["student"]["depth"] - 1) + [meta["student"]["last_heads"]]
    decoder = {"decoder_heads": meta["mae"]["decoder_heads"]}
    files = {
        "mae": ("mae", meta["mae"]["heads"], decoder),
        "teacher": ("mae", meta["teacher"]["heads"], {}),
        "student": ("tinymim", heads, {}),
        "vit_gap": ("vit", meta["vit"]["heads"], {}),
        "vit_cls": ("vit", meta["vit"]["heads"], {}),
    }
    for name, (family, heads, options) in files.items():
        model, params = convert_file(family, golden.path(f"{name}.pth"), heads=heads, **options)
        save_params(folder / name, params, model)
    return folder


def sizes_of(golden, name: str) -> list[str]:
    """Overrides that give the config the golden network's sizes."""
    size, image = golden.meta[name], golden.meta["image_size"]
    return [
        f"model.embed_dim={size['embed_dim']}",
        f"model.depth={size['depth']}",
        f"model.heads={size['heads']}",
        f"model.patch_size={golden.meta['patch_size']}",
        f"model.image_size=({image},{image})",
        f"data.eval_resize={image}",
    ]


@pytest.mark.slow
def test_a_converted_teacher_and_a_converted_student(golden, converted, data_dir):
    config = small_config(
        "distill",
        *sizes_of(golden, "student"),
        f"init={converted / 'student'}",
        f"distill.teacher.path={converted / 'teacher'}",
        f"distill.teacher.tap={golden.meta['teacher']['tap']}",
        "model.scan=True",
    )
    experiment = build_experiment(config, data_dir=data_dir)
    assert experiment.task.model["encoder"]["heads"][-1] == golden.meta["teacher"]["heads"]
    # Blocks after the tapped one are not among the frozen weights.
    frozen = experiment.task.load_frozen()
    blocks = {name for name in frozen if name.startswith("blocks_")}
    assert blocks == {f"blocks_{i}" for i in range(golden.meta["teacher"]["tap"])}
    assert "norm" not in frozen
    state, losses, *_ = run_steps(config, data_dir, make_mesh(devices=jax.devices()[:1]), 1)
    assert np.isfinite(losses).all()
    start = load_params(converted / "student")[1]["encoder"]["blocks_0"]["mlp"]["fc1"]["kernel"]
    # The first learning rate of the warm-up is exactly 0.
    np.testing.assert_array_equal(state.params["encoder"]["blocks_0"]["mlp"]["fc1"]["kernel"], start)


@pytest.mark.parametrize(("name", "pool"), [("vit_gap", "mean"), ("vit_cls", "cls")])
def test_a_converted_classifier_is_evaluated_as_it_is(golden, converted, data_dir, name, pool):
    overrides = [*sizes_of(golden, "vit"), f"classify.pool={pool}", "data.eval_split=test[:13]"]
    result = evaluate_checkpoint(small_config("finetune", *overrides), converted / name, data_dir=data_dir)
    assert result["examples"] == 13  # with batches of 8
    # Independent: the network on all 13 images in one batch.
    from tinymim_jax.data.sources.sources import open_source
    from tinymim_jax.data.views.decoding import decode
    from tinymim_jax.data.views.transforms import EvalView
    from tinymim_jax.models.heads import Classifier
    from tinymim_jax.models.vit import ViT

    model, params = load_params(converted / name)
    source = open_source("digits", split="test[:13]", data_dir=data_dir)
    image_size = golden.meta["image_size"]
    view = EvalView(image_size, image_size)
    images = np.stack([view(decode(source[i]["image"])) for i in range(13)]) / 127.5 - 1
    labels = np.array([source[i]["label"] for i in range(13)])
    network = Classifier(ViT.from_record(model["encoder"]), **model["classifier"])
    logits = np.asarray(network.apply({"params": params}, jnp.asarray(images, jnp.float32)))
    assert result["top1"] == pytest.approx((logits.argmax(1) == labels).mean())
    top5 = [label in np.argsort(-row)[:5] for row, label in zip(logits, labels)]
    assert result["top5"] == pytest.approx(np.mean(top5))
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    assert result["loss"] == pytest.approx(-log_p[np.arange(13), labels].mean(), rel=1e-4)


def test_a_full_mae_file_starts_both_encoder_and_decoder(golden, converted, data_dir):
    size = golden.meta["mae"]
    decoder = [f"mae.decoder_{k}={size[f'decoder_{k}']}" for k in ("dim", "depth", "heads")]
    config = small_config("mae_teacher", *sizes_of(golden, "mae"), *decoder, f"init={converted / 'mae'}")
    task = build_experiment(config, data_dir=data_dir).task
    params = task.start(jax.device_get(task.init(jax.random.key(0))))
    loaded = load_params(converted / "mae")[1]
    np.testing.assert_array_equal(params["decoder"]["pred"]["kernel"], loaded["decoder"]["pred"]["kernel"])
    np.testing.assert_array_equal(params["encoder"]["cls_token"], loaded["encoder"]["cls_token"])
    assert "pos_embed" not in params["decoder"]


def test_a_pretrained_student_becomes_a_classifier(golden, converted, data_dir):
    words = [*sizes_of(golden, "student"), f"init={converted / 'student'}", "model.image_size=(48,48)"]
    config = small_config("finetune", *words, "data.eval_resize=48")
    task = build_experiment(config, data_dir=data_dir).task
    heads = golden.meta["student"]
    # keep: the adaptive block keeps its heads, although model.heads has another number.
    assert task.model["encoder"]["heads"] == [heads["heads"]] * (heads["depth"] - 1) + [heads["last_heads"]]
    fresh = jax.device_get(task.init(jax.random.key(0)))
    params = task.start(fresh)
    loaded = load_params(converted / "student")[1]["encoder"]
    np.testing.assert_array_equal(params["head"]["kernel"], fresh["head"]["kernel"])
    # The position table is resized to the larger image, and is now a trained parameter.
    grid = golden.meta["image_size"] // golden.meta["patch_size"]
    want = resize_table(loaded["pos_embed"], (grid, grid), (6, 6))
    np.testing.assert_array_equal(params["encoder"]["pos_embed"], want)
    assert "norm" not in params["encoder"]


def test_another_architecture_lists_what_differs(golden, converted, data_dir):
    words = [*sizes_of(golden, "student"), f"init={converted / 'student'}"]
    config = small_config("finetune", *words, "model.embed_dim=32")
    task = build_experiment(config, data_dir=data_dir).task
    with pytest.raises(CheckpointError, match=r"(?s)blocks_0/attn/qkv/kernel.*24.*32"):
        task.start(jax.device_get(task.init(jax.random.key(0))))


def test_other_heads_are_not_taken_silently(golden, converted, data_dir):
    words = [*sizes_of(golden, "mae"), f"init={converted / 'mae'}", "model.heads=2"]
    task = build_experiment(small_config("mae_teacher", *words), data_dir=data_dir).task
    with pytest.raises(ValueError, match=r"q, k and v would be cut differently.*model\.heads"):
        task.start(jax.device_get(task.init(jax.random.key(0))))


def test_a_table_that_is_not_sincos_is_not_dropped_silently(golden, converted, data_dir, tmp_path):
    model, params = load_params(converted / "teacher")
    params["encoder"]["pos_embed"] = params["encoder"]["pos_embed"] + 0.1
    save_params(tmp_path / "learned", params, model)
    words = [*sizes_of(golden, "teacher"), f"init={tmp_path / 'learned'}"]
    task = build_experiment(small_config("mae_teacher", *words), data_dir=data_dir).task
    with pytest.raises(ValueError, match=r"model\.pos_embed='learned'"):
        task.start(jax.device_get(task.init(jax.random.key(0))))


def test_evaluating_a_checkpoint_without_a_head_is_refused(golden, converted, data_dir):
    config = small_config("finetune", *sizes_of(golden, "teacher"))
    with pytest.raises(ValueError, match="has classifier None"):
        evaluate_checkpoint(config, converted / "teacher", data_dir=data_dir)


@pytest.mark.parametrize(
    ("experiment", "override", "message"),
    [
        ("distill", "distill.target=qkvv", r"did you mean 'qk_vv'"),
        ("distill", "model.variant=nan", r"did you mean 'nano'"),
        ("distill", "distill.heads=both", r"Choices: 'adaptive', 'own', 'resplit'"),
        ("distill", "distill.teacher.name=mae_vit_larg", r"did you mean 'mae_vit_large'"),
        ("distill", "distill.teacher.name=mae_vit_base", r"has width 768 and 12 blocks"),
        ("distill", "distill.teacher.tap=9", r"has blocks 1 to 5"),
        ("distill", "model.dtype=float16", r"Choices: 'float32', 'bfloat16'"),
        ("finetune", "task=clasify", r"did you mean 'classify'"),
        ("finetune", "classify.heads=offical", r"did you mean 'official'"),
        ("finetune", "classify.heads=official", r"published for widths \(192, 384, 768\)"),
        ("finetune", "train.duration=3 eons", r"'300 epochs' or '700 steps'"),
        ("finetune", "train.accumulate=3", r"choose a divisor"),
        ("mae_teacher", "data.crops=3", r"data.crops=3 does not divide train.batch_size=8"),
        ("finetune", "data.eval_split=tset", r"test"),
    ],
)
def test_mistakes_in_a_config_name_the_remedy(converted, data_dir, experiment, override, message):
    overrides = [f"distill.teacher.path={converted / 'teacher'}"] if experiment == "distill" else []
    with pytest.raises(ValueError, match=message):
        build_experiment(small_config(experiment, *overrides, override), data_dir=data_dir)


def test_official_heads_and_others_are_refused(data_dir):
    words = ("classify.heads=official", "model.embed_dim=192")
    with pytest.raises(ValueError, match=r"model\.heads=2, but .*'official' has 3 heads in every block"):
        build_experiment(small_config("finetune", *words), data_dir=data_dir)
    for heads in (3, None):
        task = build_experiment(small_config("finetune", *words, f"model.heads={heads}"), data_dir=data_dir).task
        assert task.model["encoder"]["heads"] == [3, 3]


def test_a_missing_teacher_says_how_to_get_it(data_dir, tmp_path):
    words = ["distill.teacher.name=mae_vit_large", f"distill.teacher.path={tmp_path / 'nothing'}"]
    with pytest.raises(CheckpointError, match=r"(?s)nothing.*mae_pretrain_vit_large\.pth.*tinymim convert --from mae"):
        build_experiment(small_config("distill", *words), data_dir=data_dir)
    with pytest.raises(ValueError, match=r"distill\.teacher\.path is empty(?s:.*)tinymim convert"):
        build_experiment(small_config("distill"), data_dir=data_dir)


def test_relations_need_equal_heads_and_tokens(converted, data_dir, golden):
    words = [f"distill.teacher.path={converted / 'teacher'}", "distill.heads=own"]
    with pytest.raises(ValueError, match=r"has 2 heads and the teacher's 4.*heads='adaptive'.*'resplit'"):
        run_steps(small_config("distill", *words), data_dir, make_mesh(devices=jax.devices()[:1]), 1)


def test_top_k_counts_ties_for_the_first_class_and_nan_for_none():
    logits = jnp.array([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 3.0, 2.0], [np.nan, np.nan, np.nan]])
    labels = jnp.array([0, 1, 2, 0])
    np.testing.assert_array_equal(in_top(logits, labels, 1), [1, 0, 0, 0])
    np.testing.assert_array_equal(in_top(logits, labels, 2), [1, 1, 1, 0])


def test_teachers_of_the_hub_say_how_to_get_them():
    assert how_to_get("dinov3_vit_base", "teachers/d").splitlines() == [
        "hf download facebook/dinov3-vitb16-pretrain-lvd1689m",
        "  tinymim convert --from auto --input facebook/dinov3-vitb16-pretrain-lvd1689m --output teachers/d",
    ]
    assert "--input vit-b-300ep.pth.tar" in how_to_get("mocov3_vit_base", "x")


# Millions of parameters of the encoder as published (model cards, papers), with the position table of 224 pixels.
PUBLISHED_SIZES = {
    "dinov3_vit_small": 21.6,
    "clip_vit_base": 85.8,
    "eva02_vit_base": 85.8,
    "beit_vit_base": 85.8,
    "aimv2_vit_large": 309.2,
}


def test_stand_ins_have_the_published_sizes():
    """To 0.5 %: releases count heads, tables of their own resolution and masks differently."""
    for name, millions in PUBLISHED_SIZES.items():
        encoder = TEACHERS[name].encoder
        shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, *encoder.image_size, 3)))
        assert sum(x.size for x in jax.tree.leaves(shapes)) / 1e6 == pytest.approx(millions, rel=5e-3), name


def test_teachers_name_real_architectures():
    for name, teacher in TEACHERS.items():
        assert 1 <= teacher.tap <= teacher.depth, name
        assert dataclasses.asdict(teacher)["url"].startswith("https://")
        assert teacher.licence or name.startswith("tinymim"), name
        assert teacher.tap_is_ours or name.startswith(("mae_vit_base", "mae_vit_large", "tinymim")), name
    assert (TEACHERS["mae_vit_large"].tap, TEACHERS["mae_vit_base"].tap) == (18, 12)


def test_model_records_are_plain_json(converted):
    model, _ = load_params(converted / "student")
    assert json.loads(json.dumps(model)) == model
