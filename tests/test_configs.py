"""Every shipped config: it builds at full size, and the loop reads every key."""

import json
import pathlib

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from runs import probe_config, small_config

import tinymim_jax.experiment as experiment_module
import tinymim_jax.tasks.classify.teacher as supervised_teacher
import tinymim_jax.tasks.distill.task as distill_module
import tinymim_jax.tasks.probe.task as probe_module
from tinymim_jax import optim
from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.config import from_json, load_config
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.experiment import batch_shapes, build_experiment, build_optimizer
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.resume import differences
from tinymim_jax.state import trained_paths
from tinymim_jax.tasks.distill.teachers import TEACHERS
from tinymim_jax.tasks.pretrained import Loaded
from tinymim_jax.train import train

ROOT = pathlib.Path(__file__).parents[1]
SMALL = [
    f"configs/{file}.py:{name}"
    for file in ("digits", "cifar10")
    for name in ("mae_teacher", "mae_student", "distill", "finetune")
]
OTHERS = ("__init__", "base", "chain", "cifar10", "digits")
SPECS = [f"configs/{p.name}" for p in sorted((ROOT / "configs").glob("*.py")) if p.stem not in OTHERS]
SPECS += ["configs/linprobe.py:sgd", "configs/own_images.py:t,8000", "configs/own_images.py:b"]
NEEDS = {
    "distill": ["distill.teacher.path=fake"],
    "linprobe": ["init=fake"],
    "finetune_t_star": ["classify.teacher.path=fake"],
}


class FakeImageNet(Source):
    """The length and classes of ImageNet-1K, without its images."""

    name, split = "imagenet2012", "train"
    class_names = tuple(str(i) for i in range(1000))

    def __len__(self) -> int:
        return 1281167

    def __getitem__(self, index):
        raise IndexError(index)


def fake_teacher(config) -> Loaded:
    """The config's teacher with weights that take no memory."""
    row = TEACHERS[(config.distill.teacher.name if config.task == "distill" else "") or "mae_vit_base"]
    heads = row.embed_dim // 64
    vit = ViT(embed_dim=row.embed_dim, depth=row.depth, heads=heads, image_size=(224, 224), pos_embed="learned")
    shapes = jax.eval_shape(vit.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))["params"]
    params = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    return Loaded("fake", {"encoder": vit.record()}, {"encoder": params})


def fake_classifier(path) -> Loaded:
    """A small classifier for ImageNet."""
    network = Classifier(ViT(embed_dim=16, depth=1, heads=2, final_norm=False), classes=1000)
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))["params"]
    params = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    return Loaded(path, {"encoder": network.encoder.record(), "classifier": network.record()}, params)


@pytest.mark.parametrize("spec", SPECS)
def test_shipped_configs_build_at_full_size(spec, monkeypatch):
    config = load_config(str(ROOT / spec), next((words for name, words in NEEDS.items() if name in spec), []))
    monkeypatch.setattr(experiment_module, "open_source", lambda *_, **__: FakeImageNet())
    if config.task == "distill":
        monkeypatch.setattr(distill_module, "load", lambda path: fake_teacher(config))
    if config.task == "probe":
        monkeypatch.setattr(probe_module, "load", lambda path: fake_teacher(config))
    monkeypatch.setattr(supervised_teacher, "load", fake_classifier)
    experiment = build_experiment(config)
    assert experiment.total_steps == int(float(config.train.duration.split()[0]) * 1281167 / config.train.batch_size)
    frozen = experiment.task.load_frozen()
    paths = trained_paths(experiment.task, frozen, batch_shapes(experiment))
    params = jax.eval_shape(experiment.task.init, jax.random.key(0))
    optimizer = build_optimizer(experiment, paths)
    moments = jax.eval_shape(optimizer.init, optim.split(params, paths)[0])
    # adamw: mu and nu of each, two step counts. Others: momentum of each, a step count.
    assert len(jax.tree.leaves(moments)) == (2 if config.optim.name == "adamw" else 1) * (len(paths) + 1)
    untrained = len(jax.tree.leaves(params)) - len(paths)
    # TinyMIM: the last block's projection, norm and MLP and the final norm; of a probe the running mean and variance.
    assert untrained == {"distill": 10, "probe": 2}.get(config.task, 0)


class Recorded:
    """A ConfigDict that remembers which of its keys were read."""

    def __init__(self, config: ConfigDict, seen: set, prefix: str = ""):
        self._config, self._seen, self._prefix = config, seen, prefix

    def __getattr__(self, name):
        return self[name]

    def __getitem__(self, name):
        if name in ("to_dict", "copy_and_resolve_references"):
            return getattr(self._config, name)
        value = self._config[name]
        if isinstance(value, ConfigDict):
            return Recorded(value, self._seen, f"{self._prefix}{name}.")
        self._seen.add(f"{self._prefix}{name}")
        return value

    def keys(self):
        return self._config.keys()


def flat_keys(config: ConfigDict, prefix: str = "") -> set[str]:
    keys = set()
    for name, value in config.items():
        keys |= flat_keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {f"{prefix}{name}"}
    return keys


def test_every_key_is_read_by_something(tmp_path, data_dir):
    vit = ViT(embed_dim=16, depth=2, heads=2, patch_size=8, image_size=(16, 16))
    params = jax.jit(vit.init)(jax.random.key(0), np.zeros((1, 16, 16, 3), np.float32))["params"]
    save_params(tmp_path / "teacher", {"encoder": params}, {"encoder": vit.record()})
    runs = {
        "mae_teacher": [],
        "distill": [f"distill.teacher.path={tmp_path / 'teacher'}"],
        "finetune": [f"init={tmp_path / 'teacher'}"],
        "probe": [f"init={tmp_path / 'teacher'}"],
    }
    for name, overrides in runs.items():
        overrides += ["train.duration=2 steps", "train.eval_every=1 steps"]
        config, seen = probe_config(*overrides) if name == "probe" else small_config(name, *overrides), set()
        train(Recorded(config, seen), tmp_path / name, data_dir=data_dir)
        assert flat_keys(config) - seen == set(), name


def test_fewer_images_of_ones_own_are_seen_more_often():
    epochs = [load_config(str(ROOT / f"configs/own_images.py:s,{n}")).train.duration for n in (5000, 50_000, 200_000)]
    assert epochs == ["300 epochs", "100 epochs", "50 epochs"]
    for wrong in ("x", "s,", "s,many", "s,0"):
        with pytest.raises(ValueError, match="Choices: t, s, b"):
            load_config(str(ROOT / f"configs/own_images.py:{wrong}"))


def test_configs_of_a_task_have_the_same_keys():
    files = {"mae": "mae_b", "distill": "distill_b", "classify": "finetune_b", "probe": "linprobe"}
    base = {name: load_config(str(ROOT / f"configs/{file}.py")) for name, file in files.items()}
    for spec in [*SPECS, *SMALL]:
        config = load_config(str(ROOT / spec))
        assert flat_keys(config) == flat_keys(base[config.task]), spec


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["optim.base_rl=1"], ValueError, r"did you mean 'optim\.base_lr'"),
        (["optim.base_lr"], ValueError, r"write key=value"),
        (["optim.base_lr=fast"], TypeError, r"wrong type: it is 0\.00015 now"),
        (["train.batch_size=1.5"], TypeError, r"wrong type"),
        (["data.flip=2"], TypeError, r"wrong type"),
        (["data.source=5"], TypeError, r"is the string 'imagenet2012'"),
        (["model.depth=deep"], TypeError, r"wrong type"),
    ],
)
def test_mistaken_overrides(words, error, message):
    with pytest.raises(error, match=message):
        load_config(str(ROOT / "configs/distill_s.py"), words)


def test_overrides_are_read_as_python_and_the_config_is_locked():
    words = ["optim.base_lr=1", "model.heads=(2,4)", "data.flip=false", "data.crop_scale=(0.5, 1)", "model.depth=3"]
    config = load_config(str(ROOT / "configs/distill_s.py"), words)
    assert (config.optim.base_lr, config.model.heads, config.data.flip) == (1.0, (2, 4), False)
    assert (config.data.crop_scale, config.model.depth) == ((0.5, 1), 3)
    with pytest.raises((KeyError, AttributeError)):
        config.optim.not_a_key = 0.9


def test_missing_files_and_functions(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_config(str(tmp_path / "nothing.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(AttributeError, match=r"no function get_config\(\)"):
        load_config(str(tmp_path / "empty.py"))
    with pytest.raises(ValueError, match="Choices: mae_teacher"):
        load_config(str(ROOT / "configs/digits.py") + ":teacher")


def test_a_run_of_an_older_version_lacks_keys(tmp_path):
    """What it lacks has its default; a value that was written stays, and one that differs is told."""
    config = load_config("configs/digits.py:finetune")
    old = json.loads(json.dumps(config.to_dict()))
    del old["data"]["crops"], old["classify"]["mixup"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert differences(tmp_path, config) == []
    now = load_config("configs/digits.py:finetune", ["data.crops=2", "seed=1"])
    assert differences(tmp_path, now) == ["  data.crops: 1 there, 2 here", "  seed: 0 there, 1 here"]
    read = from_json(old)
    assert (read.data.crops, read.classify.mixup, read.data.source) == (1, 0.0, "digits")
    with pytest.raises(AttributeError, match="locked"):
        read.new = 1
