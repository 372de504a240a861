"""Which network of a checkpoint is converted: wrappers, averages, teachers, prefixes; what is left out is said."""

import re

import numpy as np
import pytest
from small_vit import vit_state
from torch_files import save_arrays

from tinymim_jax.convert import FAMILIES, ConvertError, convert_file, from_torch
from tinymim_jax.convert.readers.pickle_values import Opaque
from tinymim_jax.convert.state_dict import find_state_dict

ANCHOR = FAMILIES["vit"].anchor


@pytest.fixture(scope="module")
def one():
    return vit_state(seed=1)


@pytest.fixture(scope="module")
def two():
    return vit_state(seed=2)


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


def assert_is(found: dict, state: dict) -> None:
    assert found.keys() == state.keys()
    assert all(found[name] is state[name] for name in state)


@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.module.",
        "module.module.",
        "module._orig_mod.model.",
        "model.",
        "backbone.",
        "encoder.",
        "student.backbone.",
        "a.name.nobody.thought.of.",
    ],
)
@pytest.mark.parametrize("nest", ["", "model", "state_dict", "network"])
def test_any_prefix_under_any_key(one, prefix, nest):
    data = prefixed(prefix, one)
    found = find_state_dict({nest: data, "epoch": 3} if nest else data, ANCHOR)
    assert_is(found.state, one)
    assert f"names without '{prefix}'" in found.place
    assert found.left_out == (["entries that are no weights of a model: epoch"] if nest else [])


def dino(one, two) -> dict:
    """main_dino.py: the student in DDP, the teacher not, both with a projection head beside the backbone."""
    head = {
        "head.mlp.0.weight": np.ones((4, 3)),
        "head.mlp.2.weight": np.ones((2, 4)),
        "head.last_layer.weight_g": np.ones(2),
    }
    networks = {
        "student": prefixed("module.", prefixed("backbone.", one) | head),
        "teacher": prefixed("backbone.", two) | head,
    }
    return networks | {"optimizer": {"state": {}}, "epoch": 100, "args": Opaque("argparse.Namespace", ())}


def test_the_teacher_of_dino_is_taken_and_the_student_offered(one, two):
    found = find_state_dict(dino(one, two), ANCHOR)
    assert_is(found.state, two)
    assert found.place == "'teacher', names without 'backbone.'"
    assert found.left_out == [
        "'student', names without 'module.backbone.' (20 tensors; --use student)",
        "head (3 tensors)",
        "entries that are no weights of a model: optimizer, epoch, args",
    ]
    assert_is(find_state_dict(dino(one, two), ANCHOR, use="student").state, one)
    assert_is(find_state_dict(dino(one, two), ANCHOR, prefix="module.backbone").state, one)
    with pytest.raises(
        ConvertError, match=r"no network in it fits --use ema.*\n  'student'.*: --use student\n  'teacher'"
    ):
        find_state_dict(dino(one, two), ANCHOR, use="ema")


def test_the_base_encoder_of_moco_without_its_projection_head(one, two):
    body = {name: x for name, x in one.items() if not name.startswith("head")}
    head = {"head.0.weight": np.ones((4, 3)), "head.1.running_mean": np.ones(4), "head.3.weight": np.ones((2, 4))}
    names = prefixed("module.base_encoder.", body | head) | prefixed("module.momentum_encoder.", two)
    found = find_state_dict({"state_dict": names | {"module.predictor.0.weight": np.ones((2, 2))}}, ANCHOR)
    assert_is(found.state, body)
    assert found.left_out == [
        "'state_dict', names without 'module.momentum_encoder.' (20 tensors; --use momentum)",
        "predictor (1 tensors)",
        "the projection head of self-supervised training at head. (3 tensors)",
    ]
    assert_is(find_state_dict({"state_dict": names}, ANCHOR, use="momentum").state, two)


def test_a_classifier_in_a_sequence_is_no_projection_head(one):
    """Dropout, Linear: dropping head.1 would lose what was trained, so it stays and is an error."""
    state = {name.replace("head.", "head.1."): x for name, x in one.items()}
    with pytest.raises(ConvertError, match=r"unexpected: head\.1\.weight"):
        from_torch("vit", state, heads=3)


@pytest.mark.parametrize(
    ("raw", "average"), [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("net", "ema_model")]
)
def test_an_average_beside_the_weights_or_alone(one, two, raw, average):
    both = {raw: one, average: two, "epoch": 9}
    found = find_state_dict(both, ANCHOR)
    assert_is(found.state, one)
    assert found.place == f"'{raw}'"
    assert found.left_out[0] == f"'{average}' (20 tensors; --use ema)"
    assert_is(find_state_dict(both, ANCHOR, use="ema").state, two)
    assert_is(find_state_dict(both, ANCHOR, use=average).state, two)
    assert_is(find_state_dict(both, ANCHOR, use=raw).state, one)
    alone = find_state_dict({average: two}, ANCHOR)
    assert_is(alone.state, two)
    assert alone.place == f"'{average}'"


def test_two_of_a_kind_are_not_guessed(one, two):
    both = {"generator": one, "critic": two}
    with pytest.raises(
        ConvertError, match=r"several networks in it fit; choose.*\n  'generator': --use generator\n  'critic'"
    ):
        find_state_dict(both, ANCHOR)
    assert_is(find_state_dict(both, ANCHOR, use="critic").state, two)


def test_one_network_inside_another(one, two):
    """The names of the inner one are not unexpected names of the outer one."""
    found = find_state_dict(one | prefixed("teacher.", two), ANCHOR)
    assert_is(found.state, one)
    assert found.left_out == ["names without 'teacher.' (20 tensors; --use teacher)"]


def test_options_without_anything_to_choose_from(one):
    with pytest.raises(ConvertError, match="nothing to choose from"):
        find_state_dict({"x": np.ones(2)}, ANCHOR, use="ema")
    with pytest.raises(ConvertError, match="no network in it fits --prefix x"):
        find_state_dict(one, ANCHOR, prefix="x")


def test_more_networks_than_any_checkpoint_has():
    data = {f"n{i}": {ANCHOR: np.ones(1)} for i in range(100)}
    with pytest.raises(ConvertError, match="100 networks"):
        find_state_dict(data, ANCHOR, use="n0")


def test_what_was_taken_is_recorded(tmp_path, one, two):
    save_arrays(tmp_path / "w.pth", one, lambda tensors: {"student": prefixed("module.", tensors), "epoch": 1})
    model, params = convert_file("vit", tmp_path / "w.pth", heads=3)
    assert model["source"]["taken"] == "'student', names without 'module.'"
    assert model["source"]["left_out"] == ["entries that are no weights of a model: epoch"]
    assert "assumed" not in model["source"]
    assert params["encoder"]["cls_token"].tobytes() == one["cls_token"].tobytes()
    with pytest.raises(ConvertError, match=r"w\.pth \('student', names without 'module\.'\): .*'mae'"):
        convert_file("mae", tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"blocks.0.ls1.gamma": (24,)}, r"do not have LayerScale \(DINOv2"),
        ({"register_tokens": (1, 4, 24)}, "do not have register tokens"),
        ({"blocks.0.0.norm1.weight": (24,)}, "blocks in chunks"),
        ({"blocks.0.attn.q_norm.weight": (8,)}, "normalised queries"),
    ],
)
def test_models_that_cannot_be_converted_are_told_why(one, extra, message):
    with pytest.raises(ConvertError, match=message):
        from_torch("vit", one | {name: np.zeros(shape, np.float32) for name, shape in extra.items()}, heads=3)


def test_blocks_in_chunks_are_read_by_their_numbers(one):
    """DINOv2's training checkpoints: each chunk holds its blocks at their places in the whole network."""
    number = re.compile(r"^blocks\.(\d+)\.")
    blocks = {name: x for name, x in one.items() if number.match(name)}
    four = one | {number.sub(f"blocks.{i}.", name): x for i in range(1, 4) for name, x in blocks.items()}
    in_chunks = {number.sub(lambda m: f"blocks.{int(m[1]) // 2}.{m[1]}.", name): x for name, x in four.items()}
    assert any(name.startswith("blocks.1.3.") for name in in_chunks)
    found = find_state_dict({"teacher": prefixed("backbone.", in_chunks)}, ANCHOR)
    assert_is(found.state, four)
    assert found.place == "'teacher', names without 'backbone.', blocks by their numbers, without those of chunks"
    # Blocks that are counted anew in each chunk cannot be told apart from others.
    anew = {number.sub(lambda m: f"blocks.{m[1]}.0.", name): x for name, x in four.items()}
    assert_is(find_state_dict(anew, ANCHOR).state, anew)


def test_numpy_arrays_in_a_pickle_get_a_remedy(one):
    arrays = {name: Opaque("numpy._core.multiarray._reconstruct", ()) for name in one}
    with pytest.raises(ConvertError, match=r"numpy arrays, not tensors: save \{name: torch\.from_numpy"):
        from_torch("vit", arrays)


def test_position_tables_that_are_not_square(one):
    with pytest.raises(ConvertError, match=r"8 patches, which is no square.*--image_size 8 16"):
        from_torch("vit", one | {"pos_embed": np.zeros((1, 9, 24), np.float32)}, heads=3)
    with pytest.raises(ConvertError, match=r"16 rows are a square, it has none for the CLS token.*zeros_like"):
        from_torch("vit", one | {"pos_embed": one["pos_embed"][:, 1:]}, heads=3)
