"""configs/study/at_once.py: the arms of the study's tables as students of one training."""

import json

import pytest
from runs import SMALL

from configs.study import at_once, losses, relation_family, targets
from tinymim_jax.config import load_config
from tinymim_jax.sweeps.points import make_runs, read_stages
from tinymim_jax.sweeps.sweep import read_points
from tinymim_jax.train import train

FILE = "configs/study/at_once.py"


def students(argument: str) -> dict:
    return load_config(f"{FILE}:{argument}").distill.students.to_dict()


def test_the_arms_are_those_of_the_sweeps(tmp_path):
    assert set(at_once.TABLES["targets"]) == set(targets.PAPER)
    relations = {f"{target}(loss={loss})" for target, loss in losses.PAPER}
    features = {f"output(loss={loss})" for loss in ("smooth_l1", "mse", "cosine")}
    assert {arm["target"] for arm in at_once.TABLES["losses"].values()} == relations | features

    def values(table: str, key: str) -> list:
        return [point.overrides[key] for point in read_points(f"study/{table}:small", "sweep", tmp_path, {})]

    blocks = values("tapped_block", "student.distill.teacher.tap")
    assert [arm["taps"][0][1] for arm in at_once.TABLES["tapped_block"].values()] == blocks
    drop_path = sorted(set(values("drop_path", "student.model.drop_path")))
    assert [arm["model"]["drop_path"] for arm in at_once.TABLES["drop_path"].values()] == drop_path
    assert at_once.TABLES["recipes"]["both"]["target"] == relation_family.ARMS["output_qk_vv"]


def test_rates_and_arms_are_chosen_by_the_argument():
    assert len(students("targets")) == 27
    assert list(students("drop_path,128")) == ["drop_0_128", "drop_1_128", "drop_2_128", "drop_3_128"]
    chosen = students("recipes,qk_vv_16,split_96")
    assert {name: arm["lr_scale"] for name, arm in chosen.items()} == {"qk_vv_16": 0.5, "split_96": 3.0}
    with pytest.raises(ValueError, match=r"Tables: targets, losses"):
        load_config(f"{FILE}:target")
    for wrong in ("qk_16", "qk_vv", "16,output_32"):
        with pytest.raises(ValueError, match=r"is no arm and rate of recipes: .*qk_vv_32\. Arms: qk_vv, output"):
            load_config(f"{FILE}:recipes,{wrong}")


def test_each_arm_is_a_student_with_its_own_rate(tmp_path, mae_run, data_dir):
    words = [*SMALL, "data.source=digits", "distill.teacher.tap=None", f"distill.teacher.path={mae_run}"]
    config = load_config(f"{FILE}:recipes,qk_vv_16,both_64", [*words, "train.duration=2 steps"])
    train(config, tmp_path / "run", data_dir=data_dir)
    found = {}
    for student in (tmp_path / "run" / "students").iterdir():
        own = json.loads((student / "config.json").read_text())
        found[student.name] = (own["distill"]["target"], own["optim"]["base_lr"], own["distill"]["mask_ratio"])
    assert found == {"qk_vv_16": ("qk_vv", 0.016, 0.75), "both_64": ("output + qk_vv", 0.064, 0.75)}


def test_as_a_chain_each_student_is_fine_tuned(tmp_path):
    words = {"distill.teacher.path": "teacher", "seed": 1}
    students, *classifiers = make_runs(read_stages(f"{FILE}:recipes,qk_vv_16,both_64"), tmp_path, words)
    assert set(load_config(students.config, students.overrides).distill.students) == {"qk_vv_16", "both_64"}
    for name, run in zip(("qk_vv_16", "both_64"), classifiers, strict=True):
        config = load_config(run.config, run.overrides)
        assert (run.name, config.init) == (name, str(tmp_path / "students" / "students" / name))
        assert (config.task, config.seed, config.train.duration) == ("classify", 1, "250 steps")
