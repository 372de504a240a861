"""`tinymim distill`: what it finds, chooses and refuses, and the whole of it with children in this process."""

import io
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from commands import run
from PIL import Image
from runs import small_config

import tinymim_jax
from tinymim_jax.checkpoints.params import save_params
from tinymim_jax.cli import distill as command
from tinymim_jax.cli import main as cli
from tinymim_jax.config import load_config
from tinymim_jax.models.vit import ViT
from tinymim_jax.plan import compiled
from tinymim_jax.plan.hlo import work_of
from tinymim_jax.plan.roofline import step_time
from tinymim_jax.plan.topology import parse_topology
from tinymim_jax.resume import as_json
from tinymim_jax.runtime.exits import Interrupted
from tinymim_jax.runtime.host_memory import available_memory
from tinymim_jax.runtime.workdir import RunState, read_state
from tinymim_jax.starter import api, child, choices, decisions, helpers, space, timing
from tinymim_jax.starter.choices import CLASSIFIER, STUDENT, Hardware, Measured
from tinymim_jax.starter.data import find_data, source_name
from tinymim_jax.starter.decisions import runs_of
from tinymim_jax.starter.preparing import judge
from tinymim_jax.starter.request import Request, check_output, check_same
from tinymim_jax.starter.teacher import choose_tap, find_teacher
from tinymim_jax.sweeps.children import Children
from tinymim_jax.sweeps.points import Run
from tinymim_jax.train import train

CPU = Hardware("cpu", 1, "cpu")
SMALL = ("model.depth=1", "train.batch_size=8", "train.duration=3 steps", "optim.warmup=1 steps")


def write_images(folder: pathlib.Path, count: int, *, side: int = 16, seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        pixels = rng.integers(0, 256, (side, side, 3)).astype(np.uint8) // 2 + 64 * seed
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> pathlib.Path:
    """Two classes of 24 images of 16 x 16 pixels."""
    folder = tmp_path_factory.mktemp("pictures")
    for seed, name in enumerate(("dark", "bright")):
        write_images(folder / name, 24, seed=seed)
    return folder


def save_teacher(folder: pathlib.Path, **changes) -> pathlib.Path:
    fields = {"embed_dim": 24, "depth": 2, "heads": 2, "patch_size": 8, "image_size": (16, 16)} | changes
    vit = ViT(**fields)
    params = jax.jit(vit.init)(jax.random.key(0), np.zeros((1, *vit.image_size, 3), np.float32))["params"]
    save_params(folder, {"encoder": params}, {"encoder": vit.record()})
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> pathlib.Path:
    return save_teacher(tmp_path_factory.mktemp("teacher") / "vit")


class InProcess(Children):
    """Runs every command in this process."""

    def run_words(self, words, log, *, prefix=""):
        try:
            if words[0] == "tinymim_jax":
                cli.main(list(words[1:]))
            else:
                child.main(list(words[1:]))
        except SystemExit as stop:
            return stop.code, ["tinymim x: see above"]
        return 0, []

    def run_point(self, point, *, prefix="", watch=None):
        (each,) = point.runs
        if read_state(each.workdir).name == "finished":
            return read_state(each.workdir)
        where = {"data_dir": self.options[self.options.index("--data_dir") + 1]} if "--data_dir" in self.options else {}
        return RunState("finished", result=train(load_config(each.config, each.overrides), each.workdir, **where))


@pytest.fixture
def _in_process(monkeypatch):
    monkeypatch.setattr(helpers, "Children", InProcess)
    monkeypatch.setattr("tinymim_jax.runtime.distributed.initialize_distributed", lambda: None)
    monkeypatch.setattr(child, "end_with_parent_of_environment", lambda: None)
    monkeypatch.setattr(child, "_MEASURED_SECONDS", 0.0)


# What the user gives


def test_data_is_a_folder_shards_or_a_name(pictures, tmp_path):
    assert source_name(str(pictures)) == f"folder:{pictures}"
    assert source_name("tar:/data/x") == "tar:/data/x"
    assert source_name("cifar10") == "cifar10"
    (tmp_path / "a-000.tar").touch()
    assert source_name(str(tmp_path)) == f"tar:{tmp_path}"
    (tmp_path / "b.zip").touch()
    with pytest.raises(ValueError, match="an archive: unpack it"):
        source_name(str(tmp_path / "b.zip"))
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        source_name(str(tmp_path / "none"))


def test_splits_classes_and_sizes(pictures, tmp_path):
    data = find_data(str(pictures))
    assert (data.train_split, data.eval_split) == ("all[:80%]", "all[80%:]")
    assert (data.train_images, data.eval_images, data.short_side) == (38, 10, 16)
    assert data.class_names == ("bright", "dark")
    labels = np.bincount([0] * data.train_images)  # 38 images in two classes
    assert abs(data.per_class - labels[0] / 2) <= 4
    assert find_data(str(pictures), labels=False).class_names == ()
    shutil.copytree(pictures, tmp_path / "s" / "train")
    shutil.copytree(pictures, tmp_path / "s" / "val")
    split = find_data(str(tmp_path / "s"))
    assert (split.train_split, split.eval_split, split.train_images) == ("train", "val", 48)
    given = find_data(str(pictures), overrides={"data.train_split": "all[:50%]", "data.eval_split": "all[50%:]"})
    assert (given.train_images, given.eval_images) == (24, 24)


def test_wrong_data(pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        find_data(str(tmp_path / "empty"))
    write_images(tmp_path / "few", 5)
    with pytest.raises(ValueError, match="at least 20 and 1 are needed"):
        find_data(str(tmp_path / "few"))
    shutil.copytree(pictures / "dark", tmp_path / "one" / "dark")
    shutil.copytree(pictures / "bright", tmp_path / "one" / "dark" / "more")
    with pytest.raises(ValueError, match=r"only one class, 'dark'.*--no_labels"):
        find_data(str(tmp_path / "one"))
    assert find_data(str(tmp_path / "one"), labels=False).train_images == 38
    for number in range(30):
        (tmp_path / "broken").mkdir(exist_ok=True)
        (tmp_path / "broken" / f"{number}.jpg").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"can be decoded, such as .*broken.*: repair or replace"):
        find_data(str(tmp_path / "broken"))


def test_wrong_teachers(tmp_path):
    for given, message in (
        (tmp_path / "none", "does not exist: give the workdir of a run"),
        ("mae_vit_base", "names a published teacher; its file is needed:\ndownload https"),
        (tmp_path, "holds 0 PyTorch files: give the file itself"),
    ):
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            find_teacher(str(given), tmp_path / "converted")
    from safetensors.numpy import save_file

    save_file({"layer1.0.conv1.weight": np.zeros((8, 3, 3, 3), np.float32)}, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match="is not a Vision Transformer that can be read") as error:
        find_teacher(str(tmp_path / "resnet.safetensors"), tmp_path / "converted")
    assert "of another kind of network, choose a ViT" in str(error.value)
    assert not (tmp_path / "converted").exists()
    golden = pathlib.Path(__file__).parent / "golden" / "teachers" / "timm_convnext.safetensors"
    with pytest.raises(ValueError, match=r"is a convnext: .* which convolutional networks do not have.*target=output"):
        find_teacher(str(golden), tmp_path / "cnn")


def test_a_pytorch_file_is_converted_once(teacher, tmp_path, capsys):
    """The teacher's own weights, exported as timm names them, come back bit for bit."""
    assert run(capsys, "export", teacher, "--to", "vit", "--output", tmp_path / "vit.safetensors")[0] == 0
    found = find_teacher(str(tmp_path / "vit.safetensors"), tmp_path / "converted")
    assert found.encoder["embed_dim"] == 24
    before = (tmp_path / "converted" / "model.json").stat().st_mtime_ns
    again = find_teacher(str(tmp_path / "vit.safetensors"), tmp_path / "converted")
    assert again == found
    assert (tmp_path / "converted" / "model.json").stat().st_mtime_ns == before


def test_another_file_is_converted_anew(teacher, tmp_path, capsys):
    """What a refused command or a dry run left is not taken for the teacher that is given now."""
    other = save_teacher(tmp_path / "other", embed_dim=32)
    files = []
    for path in (teacher, other):
        files.append(tmp_path / f"{path.name}.safetensors")
        assert run(capsys, "export", path, "--to", "vit", "--output", files[-1])[0] == 0
    widths = [find_teacher(str(file), tmp_path / "converted").encoder["embed_dim"] for file in files]
    assert widths == [24, 32]
    shutil.copy(files[0], files[1])  # the same name, with other content
    assert find_teacher(str(files[1]), tmp_path / "converted").encoder["embed_dim"] == 24


# What is chosen


@pytest.mark.parametrize(
    ("depth", "extra", "tap"), [(24, {}, 18), (32, {}, 24), (12, {}, 12), (6, {"decoder": {}}, 4), (6, {}, 6)]
)
def test_tap(depth, extra, tap):
    assert choose_tap({"encoder": {"depth": depth}} | extra)[0] == tap


def test_presets():
    assert [choices.nearest_preset(n) for n in (200, 5_000, 20_000, 50_000, 200_000, 1_281_167)] == [
        *("5k", "5k", "50k", "50k", "50k", "1M")
    ]
    config = load_config("distill_images:s,1M")  # the published recipe
    assert (config.train.batch_size, config.train.duration, config.optim.base_lr) == (4096, "300 epochs", 1.5e-4)
    for wrong in ("x,5k", "s,6k"):
        with pytest.raises(ValueError, match="Sizes: pico, nano, hybrid, t, s, b; presets: 5k, 50k, 1M"):
            load_config(f"distill_images:{wrong}")
    with pytest.raises(ValueError, match="did you mean 'pico'"):
        choices.find_student("pica")
    assert choices.find_student("ti") == "Ti"


def test_choices_follow_data_teacher_and_hardware(pictures, teacher):
    data, found = find_data(str(pictures)), find_teacher(str(teacher), pictures / "unused")
    specs = choices.config_specs("pico", "5k", data)
    assert set(specs) == {STUDENT, CLASSIFIER}
    configs = {stage: load_config(spec) for stage, spec in specs.items()}
    chosen = {(c.stage, c.key): c.value for c in choices.choose(data, found, CPU, configs)}
    assert chosen[STUDENT, "model.image_size"] == chosen[CLASSIFIER, "model.image_size"] == (16, 16)
    assert chosen[STUDENT, "model.patch_size"] == 8
    assert chosen[STUDENT, "train.batch_size"] == 4  # 38 images: at least eight updates an epoch
    assert chosen[STUDENT, "optim.base_lr"] == pytest.approx(2e-3 * math.sqrt(256 / 4), rel=0.02)
    assert chosen[STUDENT, "model.dtype"] == "float32"
    assert (STUDENT, "distill.heads") not in chosen  # 2 heads divide 96
    gpus = choices.choose(data, found, Hardware("gpu", 8, "A100"), configs)
    values = {(c.stage, c.key): c.value for c in gpus}
    assert values[STUDENT, "train.batch_size"] == 8  # one image for each device
    assert (STUDENT, "model.dtype") not in values


def test_heads_that_do_not_divide_the_width(pictures, tmp_path):
    found = find_teacher(str(save_teacher(tmp_path / "t", embed_dim=48, heads=12)), tmp_path)
    data = find_data(str(pictures))
    config = {STUDENT: load_config("distill_images:nano,5k")}
    chosen = {c.key: c.value for c in choices.choose(data, found, CPU, config)}
    assert chosen["distill.heads"] == "resplit"
    assert chosen["distill.relation_heads"] == 8  # gcd(128, 48) = 16; its largest divisor up to 12


def test_hours():
    config = load_config("distill_images:s,5k")
    measured = Measured(seconds=2.0, micro_batches=4, steps=10_000, parameters=1, trained=1)
    chosen, takes = choices.fit_hours(STUDENT, config, measured, 1.0, alone=False)
    values = {c.key: c.value for c in chosen}
    assert values["train.duration"] == "1170 steps"  # 65 % of 3600 s, 2 s each
    assert values["optim.warmup"] == "117 steps"
    assert values["train.accumulate"] == 4
    assert takes == pytest.approx(1170 * 2 / 3600)
    chosen, _ = choices.fit_hours(STUDENT, config, measured, 1.0, alone=False, lost=0.25)
    duration = next(c for c in chosen if c.key == "train.duration")
    assert duration.value == "877 steps"  # 65 % of 2700 s
    assert "65% of 1 hours, less 15m00s for starting, at 2 s a step" in duration.why
    with pytest.raises(ValueError, match=r"time for 0 of them: give at least 0\.27 hours"):
        choices.fit_hours(STUDENT, config, measured, 0.1, alone=False, lost=0.25)
    chosen, takes = choices.fit_hours(STUDENT, config, measured, 100.0, alone=True)
    assert "train.duration" not in {c.key for c in chosen}  # never more than the preset
    assert takes == pytest.approx(10_000 * 2 / 3600)
    with pytest.raises(ValueError, match=r"time for 11 of them: give at least 0\.017 hours"):
        choices.fit_hours(STUDENT, config, measured, 0.01, alone=False)


class Answers:
    """Helpers whose child processes answer at once; `asked` lists what was asked of them."""

    def __init__(self, *, planned=None, reading=0.1):
        self.planned, self.seconds, self.asked = planned, reading, []

    def plan(self, topology, config, data_dir, *, name, memory):
        self.asked.append((name, topology, memory))
        if self.planned is None:
            raise helpers.Failed("to plan for h100x1 without having one, xla_cuda13 is needed\npip install it")
        return {"seconds": self.planned, "micro_batches": 2, "steps": 70, "parameters": 5, "trained": 4}

    def reading(self, *_):
        return self.seconds

    def measure(self, *_):
        return {"seconds": 9.0, "micro_batches": 1, "steps": 70, "parameters": 5, "trained": 4}


def test_steps_are_planned_on_accelerators_and_measured_elsewhere(caplog):
    config, gpu = load_config("distill_images:s,5k"), Hardware("gpu", 1, "NVIDIA H100 80GB HBM3", int(6.4e10))
    answers = Answers(planned=0.2)
    found = timing.step_time(answers, "student", config, gpu, None, 4)
    assert answers.asked == [("plan_student", "h100x1", gpu.memory)]
    assert (found.seconds, found.micro_batches) == (pytest.approx(0.2 * timing.RESERVE), 2)
    assert found.by == "planned for h100x1: 0.2 s of the roofline, times 1.5"
    waiting = timing.step_time(Answers(planned=0.2, reading=0.7), "student", config, gpu, None, 4)
    assert waiting.seconds == 0.7
    assert "the devices wait" in waiting.by
    caplog.set_level("INFO")
    for answers, hardware, why in (
        (Answers(planned=0.2), CPU, ""),
        (Answers(planned=0.2), Hardware("gpu", 1, "NVIDIA L4", 2 * 10**10), "does not know NVIDIA L4"),
        (Answers(), gpu, "xla_cuda13 is needed"),
    ):
        found = timing.step_time(answers, "student", config, hardware, None, 4)
        assert (found.seconds, found.by) == (9.0, "measured")
        assert why in caplog.text
    assert not Answers(planned=0.2).asked


HLO = "ENTRY %main (a: f32[8192,8192]) -> f32[8192,8192] {\n  ROOT %a = f32[8192,8192]{1,0} copy(%a)\n}\n"


def compile_step(config, topology, **_):
    """In place of plan's compiler: a step of 1 MB and 1 GB for each image."""
    needed = 10**9 * (config.train.batch_size // config.train.accumulate // topology.chips)
    return compiled.Compiled(10**6, needed - 10**6, 0, needed, False, HLO, "a stand-in")


@pytest.mark.usefixtures("_in_process")
def test_hours_are_planned_on_an_accelerator(pictures, teacher, data_dir, tmp_path, capsys, monkeypatch):
    """A machine of one device of the kind "cpu", which plan knows, with memory for three images."""
    monkeypatch.setattr("tinymim_jax.plan.plan.compile_step", compile_step)
    monkeypatch.setattr(timing, "topology_of", lambda *_: parse_topology("cpux1"))
    here = {"platform": "gpu", "devices": 1, "kind": "cpu", "memory": int(3.3e9)}
    monkeypatch.setitem(child.FUNCTIONS, "hardware", lambda: here)
    monkeypatch.setitem(child.FUNCTIONS, "read", lambda **_: {"seconds": 0.0})
    ticks = iter([0.0, 0.5, 0.5, 1.0])  # half a second for each of two trainings, which starts and compiles again
    monkeypatch.setattr(decisions, "time", types.SimpleNamespace(monotonic=lambda: next(ticks)))
    line = words(pictures, teacher, tmp_path / "out", "--dry_run", "--hours", "0.002")
    line = [word for word in line if "duration" not in str(word)]
    status, out, err = run(capsys, *line)
    assert status == 0, out + err
    step = timing.RESERVE * step_time(work_of(HLO), parse_topology("cpux1")).seconds
    assert step > 0.005
    assert f"| student | train.duration | {int((7.2 - 2) * 0.65 / step)} steps |" in out
    assert "planned for cpux1" in out
    assert "| student | train.accumulate | 4 | compiled: 4 parts fit into memory |" in out  # 8 images
    with pytest.raises(ValueError, match="not even one image on each device"):
        child.plan(as_json(small_config("mae_teacher")), "cpux1", data_dir, memory=10**8)


def test_a_batch_of_the_input_pipeline_is_timed(pictures, monkeypatch):
    monkeypatch.setattr(child, "_MEASURED_SECONDS", 0.0)
    config = load_config("own_images:pico,48", [f"data.source=folder:{pictures}", "train.batch_size=4"])
    assert 0 < child.read(as_json(config), None, 0)["seconds"] < 60


def test_the_user_has_the_last_word(pictures, teacher, tmp_path):
    data, found = find_data(str(pictures)), find_teacher(str(teacher), tmp_path)
    specs = choices.config_specs("pico", "5k", data)
    configs = {stage: load_config(spec) for stage, spec in specs.items()}
    chosen = choices.choose(data, found, CPU, configs)
    runs = runs_of(tmp_path, specs, chosen, {"train.batch_size": 16, "student.optim.base_lr": 0.5})
    student, classifier = (load_config(each.config, each.overrides) for each in runs)
    assert (student.train.batch_size, classifier.train.batch_size) == (16, 16)
    assert student.optim.base_lr == 0.5 != classifier.optim.base_lr
    assert classifier.init == str(tmp_path / STUDENT)
    with pytest.raises(ValueError, match=r"did you mean 'train.batch_size'"):
        runs_of(tmp_path, specs, chosen, {"train.batchsize": 16})


def test_converting_pays_for_many_views_of_large_images(photo):
    buffer = io.BytesIO()
    Image.fromarray(photo).resize((2048, 1536)).save(buffer, "JPEG", quality=95)
    large = [buffer.getvalue()] * 4
    often = judge(large, 50_000, 50_000 * 400, (32, 32), 36)
    assert often.pays
    assert 0 < often.needed < 50_000 * len(large[0])
    assert not judge(large, 50_000, 50_000, (32, 32), 36).pays  # once: converting costs as much as reading
    assert not judge(large, 20, 100, (32, 32), 36).pays  # less than two minutes


# What does not fit


def test_a_full_disk_is_noticed_before_the_start(tmp_path, monkeypatch):
    measured = Measured(seconds=1.0, micro_batches=1, steps=1, parameters=10**8, trained=10**8)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9))
    with pytest.raises(OSError, match=r"about 5\.7 GB are needed .* 1\.0 GB are free.*checkpoint.keep=1"):
        space.check_space(tmp_path / "new", [(measured, 3)], 0)
    needed = space.check_space(tmp_path, [(Measured(1.0, 1, 1, 10**6, 10**6), 3)], 10**6)
    assert needed == 100 * 2**20 + 10**6 + 4 * 4 * 3 * 10**6 + 8 * 10**6


def test_free_memory_of_a_machine_and_of_a_container(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   50 kB\n")
    assert available_memory(str(tmp_path)) == 50 * 1024
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    for name, text in (("max", "40000"), ("current", "30000"), ("stat", "anon 1\ninactive_file 5000\n")):
        (group / f"memory.{name}").write_text(text)
    assert available_memory(str(tmp_path)) == 15_000
    assert available_memory(str(tmp_path / "none")) is None


@pytest.mark.usefixtures("_in_process")
def test_no_room_in_memory(pictures, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(child, "available_memory", lambda: 2**20)
    status, out, err = run(capsys, *words(pictures, teacher, tmp_path / "out"))
    assert status == 1
    assert "out of memory" in out + err
    assert "What helps" in out + err
    assert not (tmp_path / "out" / "student").exists()


# The command


def words(data, teacher, output, *more):
    return [
        "distill",
        data,
        "--teacher",
        teacher,
        "--student",
        "pico",
        "--output",
        output,
        "--workers",
        0,
        *SMALL,
        *more,
    ]


@pytest.mark.usefixtures("_in_process")
def test_one_line_does_it_all_and_the_same_line_goes_on(pictures, teacher, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out"
    line = words(pictures, teacher, output, "--export", "hub", "--compile_cache", "")
    calls = []
    real = InProcess.run_point

    def stopped_once(self, point, **options):
        calls.append(point.runs[0].name)
        return RunState("interrupted") if len(calls) == 1 else real(self, point, **options)

    monkeypatch.setattr(InProcess, "run_point", stopped_once)
    status, out, err = run(capsys, *line)
    assert status == 75, out + err
    assert "run the same command again to continue" in out
    chosen = json.loads((output / "choices.json").read_text())
    status, out, err = run(capsys, *line)
    assert status == 0, out + err
    assert json.loads((output / "choices.json").read_text()) == chosen
    assert calls == ["student", "student", "classifier"]
    summary = json.loads((output / "summary.json").read_text())
    assert set(summary["knn"]) == {"teacher", "before", "after"}
    for name, value in summary["knn"].items():
        assert 0 <= value <= 1
        known = json.loads((output / "work" / f"knn_{name}.json").read_text())
        assert known["examples"] == 10
    assert summary["classifier"]["top1"] == json.loads((output / "classifier" / "result.json").read_text())["top1"]
    config = json.loads((output / "student" / "config.json").read_text())
    for stage, key, value, _ in chosen["decided"]["choices"]:
        if stage == "student":
            section, field = key.split(".", 1) if key.count(".") == 1 else (None, None)
            assert section is None or config[section][field] == value
    assert (output / "model" / "model.safetensors").exists()
    assert "student after distillation" in (output / "report.html").read_text()
    assert summary["step"]["by"] == "measured"
    assert summary["step"]["took"] == timing.real_step(output / "student") > 0
    assert "s were expected (measured)" in (output / "report.html").read_text()
    assert "a step of the distillation" in out
    # Everything is done: nothing is run again, and other arguments are refused. --workers says how, not what.
    assert run(capsys, *line)[0] == 0
    used = []
    monkeypatch.setattr(helpers.Helpers, "training_words", lambda self, data_dir, workers: used.append(workers) or [])
    assert run(capsys, *line, "--workers", "3")[0] == 0
    assert used == [3]
    status, _, err = run(capsys, *line, "seed=1")
    assert status == 1
    assert "was begun with other arguments" in err
    assert "overrides" in err


@pytest.mark.usefixtures("_in_process")
def test_advice_on_small_images(pictures, teacher, tmp_path, monkeypatch, capsys):
    """A trial of eight steps, each followed by a probe."""
    monkeypatch.setattr("tinymim_jax.starter.advise.judge_teacher", lambda **_: None)
    line = words(pictures, teacher, tmp_path / "out", "train.duration=8 steps", "--compile_cache", "")
    status, out, err = run(capsys, "advise", *line[1:])
    assert status == 0, out + err
    found = json.loads((tmp_path / "out" / "advice.json").read_text())
    assert found["answer"] in ("yes", "no", "unclear")
    assert f"Will it help? {found['answer'].upper()}" in out
    rows = [json.loads(text) for text in (tmp_path / "out" / "student" / "metrics.jsonl").read_text().splitlines()]
    probes = [[row["step"], row["probe/knn"]] for row in rows if "probe/knn" in row]
    assert found["curve"] == probes
    assert [step for step, _ in probes] == list(range(1, 9))


@pytest.mark.usefixtures("_in_process")
def test_advice_on_a_teacher_with_random_weights(pictures, teacher, tmp_path, capsys):
    """The teacher has the initial weights of the seed that advice takes, too. Nothing is trained for that."""
    line = words(pictures, teacher, tmp_path / "out", "--compile_cache", "")
    status, out, err = run(capsys, "advise", *line[1:])
    assert status == 0, out + err
    found = json.loads((tmp_path / "out" / "advice.json").read_text())
    assert found["teacher_random"] == found["teacher"]
    assert found["answer"] == "no"
    assert "Will it help? NO: the teacher" in out
    assert "is not better on your images than the same network with random weights" in out
    assert not (tmp_path / "out" / "student").exists()


@pytest.mark.usefixtures("_in_process")
def test_advice_needs_a_curve(pictures, teacher, tmp_path, monkeypatch, capsys):
    accuracies = {"teacher": 0.9, "teacher_random": 0.1, "before": 0.1}
    monkeypatch.setattr("tinymim_jax.starter.advise.measured_knn", lambda *given: accuracies[given[3]])
    line = words(pictures, teacher, tmp_path / "out", "train.probe_every=0 epochs", "--compile_cache", "")
    status, _, err = run(capsys, "advise", *line[1:])
    assert status == 1
    assert "the trial has 0 probes of k-NN accuracy" in err


def test_advice_is_for_one_process(pictures, teacher, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    status, _, err = run(capsys, "advise", *words(pictures, teacher, tmp_path / "out")[1:])
    assert status == 1
    assert "tinymim advise is for one process" in err


@pytest.mark.usefixtures("_in_process")
def test_without_labels_converted_first(pictures, teacher, tmp_path, capsys):
    output = tmp_path / "out"
    line = words(pictures, teacher, output, "--no_labels", "--prepare", "always", "--export", "none")
    status, out, err = run(capsys, *line, "--compile_cache", "")
    assert status == 0, out + err
    summary = json.loads((output / "summary.json").read_text())
    assert summary["knn"] == {}
    assert "classifier" not in summary
    config = json.loads((output / "student" / "config.json").read_text())
    assert (config["data"]["source"], config["data"]["train_split"]) == ("images_18", "train[:80%]")
    assert (output / "data" / "images_18").is_dir()


@pytest.mark.usefixtures("_in_process")
def test_a_dry_run_decides_nothing_for_later(pictures, teacher, tmp_path, capsys):
    status, out, err = run(capsys, *words(pictures, teacher, tmp_path / "out", "--dry_run"))
    assert status == 0, err
    assert "| student | model.image_size | (16, 16) |" in out
    assert not (tmp_path / "out" / "choices.json").exists()


def test_refused_before_anything_is_done(pictures, teacher, tmp_path, capsys):
    for change, message in (
        (["--hours", "0"], "give a number above 0"),
        (["--student", "huge"], "'huge' is unknown"),
        (["--teacher", tmp_path / "nothing"], "does not exist"),
    ):
        status, _, err = run(capsys, *words(pictures, teacher, tmp_path / "out", *change))
        assert status == 1
        assert message in err
    for output in (pictures / "out", pictures / "dark" / "out"):
        status, _, err = run(capsys, *words(pictures, teacher, output))
        assert status == 1
        assert f"--output {output} is inside the images, {pictures}" in err
        assert not output.exists()
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        status, _, err = run(capsys, *words(pictures, teacher, output))
        assert (status, f"{tmp_path / 'file'} is a file; name a folder" in err) == (1, True)
    check_output(pictures.with_name(f"{pictures.name}_distilled"), request(pictures))
    check_output(tmp_path / "new", request("imagenet2012"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"contains 'thesis.tex', which this command did not make"):
        check_same(tmp_path / "full", None)


def request(data) -> Request:
    return Request(data=str(data), teacher="t", student="S", output="o")


@pytest.mark.usefixtures("_in_process")
def test_a_batch_of_more_images_than_all_epochs_have(pictures, teacher, tmp_path, capsys):
    line = [word for word in words(pictures, teacher, tmp_path / "out") if "duration" not in str(word)]
    status, _, err = run(capsys, *line, "train.batch_size=100000")
    assert status == 1
    assert "is less than one step: 38 training images in batches of 100000" in err


def test_a_student_larger_than_its_teacher_is_warned_of(pictures, tmp_path):
    found = find_teacher(str(save_teacher(tmp_path / "t", embed_dim=96, heads=4, depth=4)), tmp_path / "converted")
    small = load_config("distill_images:pico,5k", ["model.depth=3"])
    assert choices.larger_student(found, small) == ""
    text = choices.larger_student(found, load_config("distill_images:pico,5k"))
    assert "the student (12 blocks of width 96) is no smaller than the teacher (4 of width 96)" in text


def test_a_full_disk_during_a_training_says_what_to_do(tmp_path, monkeypatch):
    failed = RunState("failed", detail="[Errno 28] No space left on device")
    monkeypatch.setattr(Children, "run_point", lambda self, point, **_: failed)
    with helpers.Helpers(tmp_path, "") as running, pytest.raises(helpers.Failed, match="make room and run the command"):
        running.train(Run("student", "c", (), tmp_path / "student"), [])


class Finished:
    """A process that has said something and ended; its command line is kept."""

    def __init__(self, code, said):
        self.code, self.stdout = code, io.StringIO(said)

    def __call__(self, words, **_):
        self.words = words
        return self

    def poll(self):
        return self.code

    wait = poll


def test_from_python(tmp_path, monkeypatch):
    (tmp_path / "summary.json").write_text('{"knn": {"after": 0.5}}')
    process = Finished(0, "a line\n")
    monkeypatch.setattr(api.subprocess, "Popen", process)
    given = {"data": "/data/pets", "teacher": pathlib.Path("t"), "output": tmp_path, "student": "Ti"}
    found = tinymim_jax.distill(**given, hours=4, no_labels=True, no_finetune=False, overrides={"data.flip": False})
    assert found["knn"]["after"] == 0.5
    options = cli._parse(process.words[process.words.index("distill") :])
    assert (options.data, options.teacher, options.student, options.hours) == ("/data/pets", "t", "Ti", 4.0)
    assert (options.no_labels, options.no_finetune, options.overrides) == (True, False, ["data.flip=False"])
    monkeypatch.setattr(api.subprocess, "Popen", Finished(1, "a line\ntinymim distill: no images\nlook again\n"))
    with pytest.raises(ValueError, match=r"^no images\nlook again$"):
        tinymim_jax.distill(**given)
    monkeypatch.setattr(api.subprocess, "Popen", Finished(75, ""))
    with pytest.raises(Interrupted, match="the same call continues"):
        tinymim_jax.distill(**given)


@pytest.mark.parametrize("interrupted", [False, True])
def test_from_python_a_process_may_live_longer_than_its_output(interrupted, tmp_path, monkeypatch):
    """Also when Ctrl-C comes in that time: it is passed on, and the end of the process is waited for."""
    (tmp_path / "summary.json").write_text('{"knn": {}}')
    code = """import os, signal, sys, time
signal.signal(signal.SIGINT, lambda *_: os._exit(75))
print("a line", flush=True)
os.close(1); os.close(2)
time.sleep(float(sys.argv[1]))"""
    real, waits = subprocess.Popen, []

    class Process(real):
        def __init__(self, words, **given):
            super().__init__([sys.executable, "-c", code, "60" if interrupted else "0.5"], **given)

        def wait(self, timeout=None):
            waits.append(timeout)
            if interrupted and len(waits) == 1:
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(api.subprocess, "Popen", Process)
    if interrupted:
        with pytest.raises(Interrupted, match="the same call continues"):
            tinymim_jax.distill(data="/data/pets", teacher="t", output=tmp_path)
    else:
        assert tinymim_jax.distill(data="/data/pets", teacher="t", output=tmp_path) == {"knn": {}}


def test_from_python_into_a_closed_pipe(tmp_path, monkeypatch):
    """A script whose output goes to `| head` gets its result, and all output of the command is read."""
    (tmp_path / "summary.json").write_text('{"knn": {}}')
    process = Finished(0, "a line\nanother\n")
    monkeypatch.setattr(api.subprocess, "Popen", process)
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as closed:
        monkeypatch.setattr("sys.stdout", closed)
        found = tinymim_jax.distill(data="/data/pets", teacher="t", output=tmp_path)
        monkeypatch.undo()
    assert found == {"knn": {}}
    assert process.stdout.closed


def test_exports_are_checked_before_the_start(monkeypatch):
    helpers.check_export("none", "hybrid")
    helpers.check_export("hub", "S")
    with pytest.raises(ValueError, match="has no form in timm"):
        helpers.check_export("hub", "hybrid")
    with pytest.raises(ValueError, match="did you mean 'onnx'"):
        helpers.check_export("onx", "S")
    monkeypatch.setattr(helpers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'tinymim-jax\[litert\]'"):
        helpers.check_export("litert", "S")
    assert helpers.export_format("auto") == "hub"


def test_choices_of_the_parser_are_those_of_the_package():
    assert tuple(choices.STUDENTS) == command.STUDENTS
    assert tuple(choices.PRESETS) == command.PRESETS
    assert set(command.EXPORTS) == {"auto", "none", *helpers.EXPORTS}
