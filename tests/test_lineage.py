"""The licences of the weights that a model was made from, through distillation and fine-tuning."""

import json
import logging

from runs import SMALL
from teacher_files import converted

from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.config import load_config
from tinymim_jax.evaluation.model_card import licence_of
from tinymim_jax.train import train

STUDENT = ("model.patch_size=4", "model.image_size=(12,16)", "model.heads=2", "train.duration=2 steps")


def test_teacher_and_licence_go_with_every_further_training(tmp_path, data_dir, caplog):
    caplog.set_level(logging.INFO)
    model, params = converted("timm_dinov2", licence="dinov3-license")
    save_params(tmp_path / "dino_tiny", params, model)
    words = [*SMALL, *STUDENT, f"distill.teacher.path={tmp_path}/dino_tiny", "distill.teacher.tap=2"]
    train(load_config("configs/digits.py:distill", words), tmp_path / "student", data_dir=data_dir)
    want = [{"name": "dino_tiny", "role": "teacher", "family": "dinov2", "licence": "dinov3-license"}]
    assert json.loads((tmp_path / "student" / "model.json").read_text())["lineage"] == want
    assert "made from dino_tiny (teacher), licence dinov3-license" in caplog.text
    words = [*SMALL, *STUDENT, f"init={tmp_path}/student"]
    train(load_config("configs/digits.py:finetune", words), tmp_path / "tuned", data_dir=data_dir)
    assert json.loads((tmp_path / "tuned" / "model.json").read_text())["lineage"] == want
    for folder in ("student", "dino_tiny"):  # the record holds where the ancestors are gone
        (tmp_path / folder).rename(tmp_path / f"{folder}_gone")
    assert licence_of(str(tmp_path / "tuned")) == "dinov3-license"


def test_a_run_without_published_weights_has_none(tmp_path, data_dir):
    config = load_config("configs/digits.py:finetune", [*SMALL, "train.duration=2 steps"])
    train(config, tmp_path / "run", data_dir=data_dir)
    assert "lineage" not in json.loads((tmp_path / "run" / "model.json").read_text())
