"""Every shipped config builds at full size, every key is read, and names of experiments are found."""

import functools
import json
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from runs import probe_config, small_config

import tinymim_jax.experiment as experiment_module
import tinymim_jax.tasks.classify.teacher as supervised_teacher
import tinymim_jax.tasks.distill.teacher_networks as distill_module
import tinymim_jax.tasks.probe.task as probe_module
import tinymim_jax.tasks.segment.task as segment_module
from configs.base import further_student
from tinymim_jax import optim
from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.config import experiments, find_file, from_json, load_config
from tinymim_jax.data.sources.examples import Source
from tinymim_jax.experiment import batch_shapes, build_experiment, build_optimizer
from tinymim_jax.models.heads import Classifier
from tinymim_jax.models.vit import ViT
from tinymim_jax.resume import check_same
from tinymim_jax.state import trained_paths
from tinymim_jax.sweeps.points import read_stages
from tinymim_jax.tasks.distill.teachers import TEACHERS
from tinymim_jax.tasks.pretrained import Loaded, build_encoder
from tinymim_jax.tasks.stand_in import encoder_zeros
from tinymim_jax.train import train

ROOT = pathlib.Path(__file__).parents[1]
SMALL = [
    f"configs/{file}.py:{name}"
    for file in ("digits", "cifar10")
    for name in ("mae_teacher", "mae_student", "distill", "finetune")
]
OTHERS = ("__init__", "base", "camvid", "chain", "cifar10", "digits", "shapes")
SPECS = [f"configs/{p.name}" for p in sorted((ROOT / "configs").glob("*.py")) if p.stem not in OTHERS]
SPECS += ["configs/distill_t_lite.py:attention", "configs/finetune_t_lite.py:s", "configs/finetune_t_lite.py:b"]
SPECS += ["configs/linprobe.py:sgd", "configs/own_images.py:t,8000", "configs/own_images.py:b"]
SPECS += ["configs/segment_own.py:t"]
NEEDS = {
    "distill": ["distill.teacher.path=fake"],
    "linprobe": ["init=fake"],
    "finetune_t_star": ["classify.teacher.path=fake"],
    "segment_linear": ["init=fake"],
}


class FakeImageNet(Source):
    """The length and classes of ImageNet-1K, without its images."""

    name, split = "imagenet2012", "train"
    class_names = tuple(str(i) for i in range(1000))

    def __len__(self) -> int:
        return 1281167

    def __getitem__(self, index):
        raise IndexError(index)


class FakeAde20k(FakeImageNet):
    """The length and number of classes of ADE20K."""

    class_names = tuple(str(i) for i in range(150))

    def __len__(self) -> int:
        return 20210


def fake_teacher(config) -> Loaded:
    """The config's teacher, with zeros that take no memory as weights."""
    row = TEACHERS[(config.distill.teacher.name if config.task == "distill" else "") or "mae_vit_base"]
    vit, params = zeros_of_vit(row.embed_dim, row.depth)
    return Loaded("fake", {"encoder": vit.record()}, {"encoder": params})


@functools.cache  # to trace 24 blocks takes a second
def zeros_of_vit(embed_dim: int, depth: int):
    heads = embed_dim // 64
    vit = ViT(embed_dim=embed_dim, depth=depth, heads=heads, image_size=(224, 224), pos_embed="learned")
    shapes = jax.eval_shape(vit.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))["params"]
    return vit, jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)


def fake_classifier(path) -> Loaded:
    """A small classifier for ImageNet."""
    network = Classifier(ViT(embed_dim=16, depth=1, heads=2, final_norm=False), classes=1000)
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 224, 224, 3), np.float32))["params"]
    params = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), shapes)
    return Loaded(path, {"encoder": network.encoder.record(), "classifier": network.record()}, params)


@pytest.mark.slow
@pytest.mark.parametrize("spec", SPECS)
def test_shipped_configs_build_at_full_size(spec, monkeypatch):
    config = load_config(str(ROOT / spec), next((words for name, words in NEEDS.items() if name in spec), []))
    source = FakeAde20k() if config.task == "segment" else FakeImageNet()
    monkeypatch.setattr(experiment_module, "_open_sources", lambda *_: (source, source))
    if config.task == "distill":
        monkeypatch.setattr(distill_module, "load", lambda path, **_: fake_teacher(config))
    if config.task == "probe":
        monkeypatch.setattr(probe_module, "load", lambda path: fake_teacher(config))
    if config.task == "segment":
        monkeypatch.setattr(segment_module, "load", lambda path: encoder_zeros(path, build_encoder(config.model)))
    monkeypatch.setattr(supervised_teacher, "load", fake_classifier)
    experiment = build_experiment(config)
    number, unit = config.train.duration.split()
    assert experiment.total_steps == int(float(number) * (1281167 / config.train.batch_size if unit == "epochs" else 1))
    frozen = experiment.task.load_frozen()
    paths = trained_paths(experiment.task, frozen, batch_shapes(experiment))
    params = jax.eval_shape(experiment.task.init, jax.random.key(0))
    optimizer = build_optimizer(experiment, paths)
    moments = jax.eval_shape(optimizer.init, optim.split(params, paths)[0])
    # adamw: mu and nu of each, two step counts for each student. Others: momentum of each, a step count.
    students = 1 + len(config.distill.students) if config.task == "distill" else 1
    assert len(jax.tree.leaves(moments)) == (2 if config.optim.name == "adamw" else 1) * (len(paths) + students)
    untrained = len(jax.tree.leaves(params)) - len(paths)
    if config.task == "segment":
        frozen = [params["batch_stats"], params["encoder"] if config.segment.frozen_encoder else {}]
        assert untrained == len(jax.tree.leaves(frozen))
        return
    # TinyMIM, each student: the last block's projection, norm and MLP and the final norm; of a probe the running mean
    # and variance.
    # MAE's loss beside distillation trains all, and so does a target after the final norm.
    whole = config.task == "distill" and (config.distill.mim_weight or "final=true" in config.distill.target)
    assert untrained == (0 if whole else {"distill": 10 * students, "probe": 2}.get(config.task, 0))


class Recorded:
    """A ConfigDict that records which of its keys were read."""

    def __init__(self, config: ConfigDict, seen: set, prefix: str = ""):
        self._config, self._seen, self._prefix = config, seen, prefix

    def __getattr__(self, name):
        return self[name]

    def __getitem__(self, name):
        if name in ("to_dict", "copy_and_resolve_references", "get"):
            return getattr(self._config, name)
        value = self._config[name]
        if isinstance(value, ConfigDict):
            return Recorded(value, self._seen, f"{self._prefix}{name}.")
        self._seen.add(f"{self._prefix}{name}")
        return value

    def __contains__(self, name):
        return name in self._config

    def keys(self):
        return self._config.keys()

    def __iter__(self):
        return iter(self._config)


def flat_keys(config: ConfigDict, prefix: str = "") -> set[str]:
    keys = set()
    for name, value in config.items():
        keys |= flat_keys(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {f"{prefix}{name}"}
    return keys


@pytest.mark.slow
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
        overrides += ["train.probe_every=2 steps"] if name != "probe" else []
        config, seen = probe_config(*overrides) if name == "probe" else small_config(name, *overrides), set()
        train(Recorded(config, seen), tmp_path / name, data_dir=data_dir)
        # A linear probe trains no encoder, so there is nothing to be probed while it runs.
        unread = {"train.probe_images", "train.probe_patience"} if name == "probe" else set()
        assert flat_keys(config) - seen <= unread, name


@pytest.mark.slow
def test_every_key_of_segmentation_is_read_by_something(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
        for i in range(8):
            pixels, labels = rng.integers(0, 256, (40, 40, 3)), rng.integers(0, 2, (40, 40))
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / split / "images" / f"{i}.png")
            Image.fromarray(labels.astype(np.uint8)).save(tmp_path / split / "masks" / f"{i}.png")
    words = ["model.embed_dim=16", "model.depth=1", "model.heads=2", "model.image_size=(32,32)", "train.batch_size=8"]
    words += ["segment.head=upernet", "segment.auxiliary_channels=4"]  # which reads all keys
    words += ["segment.channels=4", f"data.source=pairs:{tmp_path}", "data.masks.classes=2", "data.scale=(40,40)"]
    words += ["train.duration=1 steps", "optim.warmup=0 steps", "segment.evaluation.stride=(32,32)"]
    words += ["train.probe_every=1 steps"]
    config, seen = load_config(str(ROOT / "configs/segment_own.py"), words), set()
    train(Recorded(config, seen), tmp_path / "run")
    assert flat_keys(config) - seen == set()


def test_fewer_images_of_ones_own_are_seen_more_often():
    epochs = [load_config(str(ROOT / f"configs/own_images.py:s,{n}")).train.duration for n in (5000, 50_000, 200_000)]
    assert epochs == ["300 epochs", "100 epochs", "50 epochs"]
    for wrong in ("x", "s,", "s,many", "s,0"):
        with pytest.raises(ValueError, match="Choices: t, s, b"):
            load_config(str(ROOT / f"configs/own_images.py:{wrong}"))


def test_configs_of_a_task_have_the_same_keys():
    files = {"mae": "mae_b", "distill": "distill_b", "classify": "finetune_b", "probe": "linprobe"}
    files["segment"] = "segment_b"
    base = {name: load_config(str(ROOT / f"configs/{file}.py")) for name, file in files.items()}
    for spec in [*SPECS, *SMALL]:
        config = load_config(str(ROOT / spec))
        # What a config file names itself comes on top.
        named = {key for key in flat_keys(config) if key.startswith("distill.students.")}
        assert flat_keys(config) - named == flat_keys(base[config.task]), spec
        assert len(named) == (2 * len(flat_keys(further_student())) if "family" in spec else 0)


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["train.base_lr=1"], ValueError, r"did you mean 'optim\.base_lr'\? Choices: 'train\.accumulate', 'train\.b"),
        (["teacher.path=x"], ValueError, r"Choices: 'checkpoint\.\*', 'data\.\*', 'distill\.\*', 'init', 'model\.\*'"),
        (
            ["distill.students.a.distill.target=cls"],
            ValueError,
            r"Choices: 'distill\.students\.a\.init', .*a\.model\.\*'",
        ),
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
    with pytest.raises(FileNotFoundError, match=r"no such file.*distill_b.*study/losses"):
        load_config(str(tmp_path / "nothing.py"))
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"no function get_config\(\)"):
        load_config(str(tmp_path / "empty.py"))
    with pytest.raises(ValueError, match=r"run it with `tinymim chain chain:b,s`"):
        load_config("chain:b,s")
    with pytest.raises(ValueError, match="Choices: mae_teacher"):
        load_config(str(ROOT / "configs/digits.py") + ":teacher")


def test_experiments_are_found_by_name(tmp_path, monkeypatch):
    """In ./configs first, then the shipped ones, from any folder; what is misspelt names the nearest."""
    (tmp_path / "configs").mkdir()
    monkeypatch.chdir(tmp_path)
    for spec in ("distill_b", "digits:finetune", "own_images:t,8000"):
        name, _, argument = spec.partition(":")
        expected = load_config(f"{ROOT / 'configs' / name}.py" + (f":{argument}" if argument else ""))
        assert load_config(spec).to_dict() == expected.to_dict()
    assert find_file("study/losses:small") == (ROOT / "configs" / "study" / "losses.py", "small")
    assert [stage.name for stage in read_stages("study/losses:small")] == ["student", "classifier"]
    with pytest.raises(FileNotFoundError, match=r"did you mean 'distill_b'.*'study/losses'"):
        load_config("distil_b")
    with pytest.raises(FileNotFoundError, match=r"The shipped one is called distill_b"):
        load_config("configs/distill_b.py")
    (tmp_path / "configs" / "my.py").write_text(
        "from configs import base, more\ndef get_config():\n    return more.longer(base.mae())\n"
    )
    (tmp_path / "configs" / "more.py").write_text(
        "def longer(config):\n    config.train.duration = '1600 epochs'\n    return config\n"
    )
    assert load_config("my").train.duration == "1600 epochs"
    assert load_config("configs/my.py").task == "mae"
    (tmp_path / "configs" / "distill_b.py").write_text((tmp_path / "configs" / "my.py").read_text())
    assert load_config("distill_b").task == "mae"
    assert {"my", "distill_b", "study/losses"} < set(experiments())
    assert not {"base", "study/pipeline", "study/__init__"} & set(experiments())


def test_a_config_outside_of_configs_may_import_the_shipped_ones(tmp_path):
    (tmp_path / "mine.py").write_text("from configs import finetune_s\nget_config = finetune_s.get_config\n")
    code = f"from tinymim_jax.config import load_config; print(load_config('{tmp_path}/mine.py').task)"
    python = [sys.executable, "-c", code]
    run = subprocess.run(
        python, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert run.stdout == "classify\n", run.stderr


def _python(code, folder, package):
    """Runs `code` in `folder`, with the package that lies in `package`."""
    environment = os.environ | {"PYTHONPATH": str(package)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def test_an_installed_wheel_has_the_experiments(tmp_path):
    """Built from what is in the repository, unpacked, and used from another folder with no checkout in sight."""
    source, installed, elsewhere = (tmp_path / name for name in ("source", "installed", "elsewhere"))
    for name in ("tinymim_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    elsewhere.mkdir()
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options, "-w", tmp_path, source], check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(installed)
        names = file.namelist()
    shipped = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.py")}
    assert {name.removeprefix("tinymim_jax/") for name in names if name.startswith("tinymim_jax/configs/")} == shipped
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "tinymim_jax").rglob("*") if path.is_file()}
    assert {name for name in package if "__pycache__" not in name} <= set(names)
    assert {name.split("/")[0] for name in names} == {"tinymim_jax", wheel.name.rsplit("-", 3)[0] + ".dist-info"}
    code = f"""if True:
        import json, sys
        import tinymim_jax
        from tinymim_jax import config
        from tinymim_jax.cli.main import main
        from tinymim_jax.demo.demo import CONFIG
        from tinymim_jax.sweeps.points import read_stages
        assert tinymim_jax.__file__.startswith({str(installed)!r}), tinymim_jax.__file__
        specs = [name for name in config.experiments() if not name.startswith("study") and name != "chain"]
        loaded = {{name: config.load_config(name).to_dict() for name in [*specs, "digits:finetune", "distill_b"]}}
        stages = [stage.config for spec in ("study/losses:small", "chain:digits") for stage in read_stages(spec)]
        assert all(config.load_config(stage) for stage in stages)
        assert config.load_config(f"{{CONFIG}}:mae_teacher").task == "mae"
        print(json.dumps(loaded))
        main(["sweep", "digits:finetune", "--workdir", "runs/rates", "--list"])
    """
    run = _python(code, elsewhere, installed)
    assert run.returncode == 0, run.stderr
    loaded, *table = run.stdout.splitlines()
    here = {name: load_config(name).to_dict() for name in json.loads(loaded)}
    assert json.loads(loaded) == json.loads(json.dumps(here))
    assert len(here) >= 14
    assert "000_base_lr=0.016" in "\n".join(table)


def test_a_run_of_an_older_version_lacks_keys(tmp_path):
    """Missing keys get their defaults, recorded values stay, and differences are listed."""
    config = load_config("configs/digits.py:finetune")
    old = json.loads(json.dumps(config.to_dict()))
    del old["data"]["crops"], old["classify"]["mixup"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    assert check_same(tmp_path, config) == {}
    now = load_config("configs/digits.py:finetune", ["data.crops=2", "seed=1"])
    with pytest.raises(ValueError, match=r"data\.crops: 1 there, 2 here\n +seed: 0 there, 1 here\n"):
        check_same(tmp_path, now)
    read = from_json(old)
    assert (read.data.crops, read.classify.mixup, read.data.source) == (1, 0.0, "digits")
    with pytest.raises(AttributeError, match="locked"):
        read.new = 1
