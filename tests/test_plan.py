"""Plans: names of hardware, the roofline, the search, and a complete plan for fake devices."""

import dataclasses
import json
import math
import re
import subprocess

import jax
import pytest
from runs import small_config

from tinymim_jax.cli.main import main
from tinymim_jax.config import load_config
from tinymim_jax.memory import bytes_refused, remedies
from tinymim_jax.plan import compiled as compiled_module
from tinymim_jax.plan.build import plan_experiment
from tinymim_jax.plan.chips import CHIPS, GIB, peak_of
from tinymim_jax.plan.compiled import compile_step
from tinymim_jax.plan.devices import gpu_description
from tinymim_jax.plan.extrapolate import extrapolate
from tinymim_jax.plan.hlo import Work
from tinymim_jax.plan.plan import check_layout, make_plan
from tinymim_jax.plan.report import as_json, as_text
from tinymim_jax.plan.roofline import (
    COMPUTE_EFFICIENCY,
    LINK_LATENCY,
    MEMORY_EFFICIENCY,
    NETWORK_EFFICIENCY,
    NETWORK_LATENCY,
    Collective,
    StepTime,
    collective_seconds,
    step_time,
)
from tinymim_jax.plan.search import largest_batch
from tinymim_jax.plan.topology import parse_topology, topology_of
from tinymim_jax.tasks import TASKS


@pytest.mark.parametrize(
    ("name", "kind", "shape", "chips", "hosts"),
    [
        ("v4-32", "v4", (2, 2, 4), 16, 4),
        ("v5p-32", "v5p", (2, 2, 4), 16, 4),
        ("v5e-64", "v5e", (8, 8), 64, 16),
        ("v5litepod-16", "v5e", (4, 4), 16, 4),
        ("v5e:8x8", "v5e", (8, 8), 64, 16),
        ("v6e-8", "v6e", (2, 4), 8, 1),
        ("v6e-1", "v6e", (1, 1), 1, 1),
        ("tpu7x-16", "tpu7x", (2, 2, 2), 16, 2),
        ("tpu7x:1x1x1", "tpu7x", (1, 1, 1), 2, 1),
        ("b200x8x2", "b200", (2, 8), 16, 2),
        ("a100x8", "a100", (1, 8), 8, 1),
        ("a100-40x4", "a100-40", (1, 4), 4, 1),
        ("H100x8x4", "h100", (4, 8), 32, 4),
        ("cpux8", "cpu", (1, 8), 8, 1),
    ],
)
def test_names_of_hardware(name, kind, shape, chips, hosts):
    topology = parse_topology(name)
    assert (topology.kind, topology.shape, topology.chips, topology.hosts) == (kind, shape, chips, hosts)


def test_slices():
    topology = parse_topology("v5e-16", slices=2)
    assert (topology.chips, topology.hosts, topology.linked) == (32, 8, 16)
    assert topology.describe() == "v5e-16 x 2 slices: 32 chips (4x4 in each of 2 slices) on 8 hosts"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("v5e-48", "not a slice that is offered. Choices: v5e-1, v5e-4"),
        ("v4-33", "counts cores, two for each chip"),
        ("h10x8", "did you mean 'h100x8'"),
        ("v7-8", "is unknown"),
        ("h100x9", "a node has 1 to 8"),
        ("v5e:4x4x4", "slices of v5e have 2 sides"),
        ("h100:2x4", "write h100x8 for 8 GPUs"),
        ("v5e", "Choices: 'v4-8'"),
    ],
)
def test_names_that_are_none(name, said):
    with pytest.raises(ValueError, match="--topology") as error:
        parse_topology(name)
    assert said in str(error.value)


def test_gpus_have_nodes_and_not_slices():
    with pytest.raises(ValueError, match="write h100x8x2 for 2 nodes"):
        parse_topology("h100x8", slices=2)


def test_the_peak_of_a_device():
    assert peak_of("TPU v5 lite") == 197e12
    assert peak_of("TPU v5p") == peak_of("TPU v5") == 459e12
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("TPU7x") == 1153.5e12  # of one of the two devices that jax shows
    assert peak_of("cpu") is None


@pytest.mark.parametrize(
    ("kind", "count", "memory", "name"),
    [
        ("NVIDIA H100 80GB HBM3", 8, 0.75 * 85e9, "h100x8"),
        ("NVIDIA H100 80GB HBM3", 1, None, "h100x1"),
        ("NVIDIA A100-SXM4-80GB", 2, 0.75 * 85e9, "a100x2"),
        ("NVIDIA A100-SXM4-40GB", 2, 0.9 * 42e9, "a100-40x2"),
        ("NVIDIA H200", 4, 0.9 * 151e9, "h200x4"),
        ("TPU v4", 4, 30.7 * 2**30, "v4:2x2x1"),
        ("TPU v5", 4, 95 * 2**30, "v5p:2x2x1"),
        ("TPU v5 lite", 8, 15.7 * 2**30, "v5e:2x4"),
        ("TPU v6 lite", 2, None, "v6e:1x2"),
        ("TPU7x", 8, 94 * 2**30, "tpu7x:2x2x1"),
        ("NVIDIA H100 PCIe", 1, 0.75 * 85e9, None),
        ("NVIDIA A100-SXM4-80GB MIG 3g.40gb", 1, 0.75 * 42e9, None),
        ("NVIDIA H100 80GB HBM3", 1, 20e9, None),  # most of the card is not for jax
        ("NVIDIA GeForce RTX 4090", 1, 20e9, None),
        ("cpu", 1, None, None),
    ],
)
def test_the_topology_of_devices(kind, count, memory, name):
    found = topology_of(kind, count, memory and int(memory))
    assert (found and found.name) == name
    if found:
        assert found == parse_topology(name)
        assert found.chips == count


def test_a_chip_of_two_devices():
    """Memory and peak are of a device; hours are billed for whole chips."""
    place = parse_topology("tpu7x-32")
    assert place.describe() == "tpu7x-32: 32 half chips (2x2x4) on 4 hosts"
    assert (place.linked, place.chip.vcpus * place.chips) == (32, 16 * 56)


@pytest.mark.parametrize("kind", [kind for kind, chip in CHIPS.items() if chip.platform == "gpu"])
def test_a_gpu_is_described_to_the_compiler_as_the_table_has_it(kind):
    text = gpu_description(kind)
    reported = {
        name: float(re.search(rf"{name}: (\d+)", text)[1]) for name in ("device_memory_size", "memory_bandwidth")
    }
    assert CHIPS[kind].memory == pytest.approx(0.9 * reported["device_memory_size"], rel=1e-3)
    assert CHIPS[kind].bandwidth == pytest.approx(reported["memory_bandwidth"], rel=1e-3)


def test_the_roofline_by_hand():
    """Two instructions with different bounds, and one all-reduce over two dimensions of a slice."""
    topology, chip = parse_topology("v5e-16"), CHIPS["v5e"]
    work = [
        Work(3, flops=197e12, bytes=8.19e9),
        Work(2, flops=0.0, bytes=819e9),
        Work(1, 0.0, 1e9, "all-reduce", sent=1.6e9, group=16),
    ]
    time = step_time(work, topology)
    assert time.compute == pytest.approx(3 / COMPUTE_EFFICIENCY)
    assert time.memory == pytest.approx(2 / MEMORY_EFFICIENCY)
    sent = 2 * 1.6e9 * 15 / 16 / (chip.link * NETWORK_EFFICIENCY)
    assert time.network == pytest.approx(sent + 2 * LINK_LATENCY * 6)
    assert time.bound == "compute"
    assert time.seconds == time.compute + time.memory + time.network
    assert time.flops == 3 * 197e12


def test_products_of_8_bit_integers_have_a_rate_of_their_own():
    """Half of the FLOPs are of integers: three quarters of the time where these are twice as fast."""
    work = [Work(1, flops=2e12, bytes=0.0, int8=1e12)]
    for name in ("v5e", "v4"):
        chip, time = CHIPS[name], step_time(work, parse_topology(f"{name}-8"))
        assert time.compute == pytest.approx((1e12 + 1e12 / chip.int8) / chip.peak / COMPUTE_EFFICIENCY)
        assert time.int8_flops == 1e12
    assert (CHIPS["v5e"].int8, CHIPS["v4"].int8) == (2, 1)


def test_between_slices_each_chip_sends_its_share():
    one, two = parse_topology("v5e-16"), parse_topology("v5e-16", slices=2)
    inside = collective_seconds("all-reduce", 1e9, 16, one)
    share = 2 * (1e9 / 16 / 2 / (CHIPS["v5e"].network * NETWORK_EFFICIENCY) + NETWORK_LATENCY)
    assert collective_seconds("all-reduce", 1e9, 32, two) == pytest.approx(inside + share)
    assert collective_seconds("all-gather", 1e9, 16, one) == pytest.approx(inside / 2)
    assert collective_seconds("all-reduce", 1e9, 1, one) == 0.0


@pytest.mark.parametrize("start", [1, 8, 64, 300, 5000])
def test_the_largest_batch_in_few_tries(start):
    asked = []

    def needed(images):
        asked.append(images)
        return 2e9 + 40e6 * images + 1e5 * images**1.2  # not quite a line

    found = largest_batch(needed, start, 16e9)
    assert found is not None
    assert found.needed == int(needed(found.images)) <= 16e9
    assert needed(1.1 * found.images) > 16e9
    assert len(asked) <= 6 + 2


def test_the_largest_batch_where_refusals_name_no_size():
    found = largest_batch(lambda images: 1e9 + 1e8 * images if images <= 150 else math.inf, 256, 16e9, tries=8)
    assert found is not None
    assert 128 <= found.images <= 150


def test_the_largest_batch_where_the_compiler_makes_it_fit():
    """Memory stays just below the limit over a range of batches, as when the compiler recomputes values."""
    asked = []

    def needed(images):
        asked.append(images)
        return min(1e9 + 3e7 * images, 15e9) if images <= 3000 else 20e9

    found = largest_batch(needed, 4096, 16e9)
    assert found is not None
    assert 2300 <= found.images <= 3000
    assert len(asked) <= 7


def test_no_batch_fits():
    assert largest_batch(lambda images: 2e9 + images, 64, 1e9, tries=12) is None


def test_remedies_come_in_their_order():
    config = small_config("mae_teacher", "train.batch_size=64", "model.remat=dots")
    words = [" ".join(each.words) for each in remedies(config, chips=8, per_host=8, fsdp=1, fitting=3)]
    assert words == [
        "model.remat=full",
        "model.scan=True model.remat=full",
        "--fsdp 8",
        "train.accumulate=4",
        "train.batch_size=24",
    ]


@pytest.mark.parametrize(
    ("words", "fsdp", "said"),
    [
        (("train.batch_size=60",), 1, "cannot be split over the 8 chips of cpux8: choose a multiple of 8, such as 56"),
        (("train.batch_size=4",), 1, "such as 8, or at most 4 chips for this batch"),
        (("train.accumulate=3",), 1, "choose a multiple of 24, such as 24 or 48"),
        ((), 3, "--fsdp 3 does not divide the 8 chips of cpux8. Choices: 1, 2, 4, 8"),
    ],
)  # fmt: skip
def test_layouts_that_cannot_be_trained(words, fsdp, said):
    config = small_config("mae_teacher", "train.batch_size=32", *words)
    with pytest.raises(ValueError, match=r"batch_size|fsdp") as error:
        check_layout(config, parse_topology("cpux8"), fsdp)
    assert said in str(error.value)


def test_what_a_refusal_says():
    text = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.25G of 15.75G hbm. Exceeded by 17.50G."
    assert bytes_refused(text) == int(33.25 * GIB)
    assert bytes_refused("INTERNAL: something else") is None


def test_a_compiler_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(compiled_module.importlib.util, "find_spec", lambda name: None)
    for name, command in (("v5e-8", r"tinymim-jax\[plan\]"), ("h100x8", r"tinymim-jax\[plan-cuda\]")):
        with pytest.raises(ImportError, match=command):
            compile_step(small_config("mae_teacher"), parse_topology(name), cache="")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["linprobe", "finetune_t_star"])
def test_configs_whose_checkpoint_is_yet_to_be_named(name):
    """A ViT-B replaces a missing probed encoder or supervised teacher."""
    config = load_config(f"configs/{name}.py", ["train.batch_size=2"])
    planned = plan_experiment(config)
    sizes = sum(math.prod(x.shape) for x in jax.tree.leaves(planned.frozen))
    # timm's vit_base_patch16_224 has 86,567,656 parameters, of which 197 x 768 are a learned position table.
    head = 768 * 1000 + 1000
    assert sizes == 86_567_656 - 197 * 768 - (head if name == "linprobe" else 0)
    assert any("taken as a ViT-B" in note for note in planned.notes)
    needed, executed = planned.flops
    assert needed == executed
    block, patches = 2 * 197 * 12 * 768**2 + 4 * 197**2 * 768, 2 * 196 * 768 * 768
    if name == "linprobe":  # of the head the products forward and for its weights
        assert needed == pytest.approx(2 * (12 * block + patches + 2 * 2 * 768 * 1000), rel=1e-6)
    else:
        assert needed > 2 * (12 * block + patches)
    words = [word for remedy in remedies(config, 1, 1, 1, 1) for word in remedy.words]
    assert any("remat" in word for word in words) == (name != "linprobe")


def test_micro_batches_of_a_segmentation_are_another_training():
    config = load_config("configs/segment_b.py", [])
    costs = {each.words: each.cost for each in remedies(config, chips=2, per_host=2, fsdp=1, fitting=4)}
    assert "batch norm averages over one of them: another training" in costs["train.accumulate=2",]
    assert TASKS["segment"].images_per_core < TASKS["classify"].images_per_core / 10  # of crops of 512, benchmarks/


def test_segmentation_is_planned_without_its_data():
    """Published: 160,000 steps of 16 images. Its products, counted by another program: 7.5 EFLOP."""
    planned = plan_experiment(load_config("configs/segment_t.py", ["train.batch_size=2"]))
    assert any("taken as 20,210 images of 150 classes" in note for note in planned.notes)
    needed, executed = planned.flops
    assert needed == executed
    assert needed / 2 * 16 * 160_000 == pytest.approx(7.5e18, rel=0.02)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("plans"))


TINY = [
    "model.embed_dim=16", "model.depth=2", "model.heads=2", "model.patch_size=8", "model.image_size=(16,16)",
    "data.eval_resize=16", "train.batch_size=32", "mae.decoder_dim=8", "mae.decoder_depth=1", "mae.decoder_heads=2",
]  # fmt: skip


@pytest.mark.slow
def test_the_command_and_what_it_keeps(cache, data_dir, capsys, monkeypatch):
    """One compilation in a child process for eight fake devices, as JSON; the second plan uses the cache."""
    words = ["--config", "configs/digits.py:mae_teacher", "--topology", "cpux8", "--data_dir", data_dir]
    words += ["--cache", cache, "--quick"]
    with pytest.raises(SystemExit) as ended:
        main(["plan", *words, "--json", *TINY])
    assert ended.value.code == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"]
    sizes = plan["bytes"]
    assert sizes["optimizer"] == pytest.approx(2 * sizes["parameters"], rel=0.01)  # two moments of each
    assert sizes["parameters"] == 4 * plan["parameters"]["all"]
    assert sum(size for name, size in sizes.items() if name not in ("all", "limit")) == sizes["all"]
    assert plan["images_per_second"] == pytest.approx(32 / plan["step"]["seconds"])
    assert plan["step"]["flops"] * 8 == pytest.approx(plan["flops_per_step"], rel=0.02)
    assert plan["run"]["chip_hours"] == pytest.approx(8 * plan["run"]["hours"])
    assert plan["collectives"][0]["kind"] == "all-reduce"

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("compiled again"))
    with pytest.raises(SystemExit):
        main(["plan", *words, *TINY, "seed=5", "optim.base_lr=1e-5"])
    text = capsys.readouterr().out
    assert "fits: 32 images in a batch, 4 on each chip" in text
    assert "all-reduce over 8 chips" in text
    assert "assumed and not measured" in text


class Compiler:
    """Replaces compile_step: a program needs a number of bytes per image, fewer with remat."""

    def __init__(self, limit: float):
        self.limit, self.asked = limit, []

    def __call__(self, config, topology, *, fsdp=1, **_):
        images = config.train.batch_size // config.train.accumulate // topology.chips
        self.asked.append((images, config.model.remat, config.model.scan, fsdp))
        needed = int(1e6 + images * {"none": 1e9, "dots": 6e8, "full": 4e8}[config.model.remat])
        refused = needed > self.limit
        sizes = (0, 0, 0) if refused else (10**6, needed - 10**6, 0)
        hlo = "" if refused else "ENTRY %main (a: f32[8,8]) -> f32[8,8] {\n  ROOT %a = f32[8,8]{1,0} copy(%a)\n}\n"
        return compiled_module.Compiled(*sizes, needed, refused, hlo, "a stand-in")


def test_what_to_change_is_tried_in_order(monkeypatch, data_dir):
    compiler = Compiler(CHIPS["cpu"].memory)
    monkeypatch.setattr("tinymim_jax.plan.plan.compile_step", compiler)
    config = small_config("mae_teacher", "train.batch_size=80")
    plan = make_plan(config, parse_topology("cpux8"), data_dir=data_dir)
    assert not plan.fits
    assert plan.time is None
    assert plan.largest is not None
    assert plan.largest.images == 4
    assert plan.remedy is not None
    remedy, fitting = plan.remedy
    assert remedy.words == ("model.remat=full",)  # 10 images: 4.001 GB of 4.295
    assert fitting.fits
    assert compiler.asked[-2:] == [(10, "dots", False, 1), (10, "full", False, 1)]
    text = as_text(plan)
    assert "DOES NOT FIT: 80 images in a batch, 10 on each chip; 9.31 of 4.00 GiB" in text
    assert "to make it fit: model.remat=full" in text
    assert "largest batch that was seen to fit: 32" in text
    answer = as_json(plan)
    assert answer["remedy"]["plan"]["fits"]
    assert answer["step"] is None
    json.dumps(answer)


def test_libtpu_plans_a_small_step(tmp_path, data_dir):
    pytest.importorskip("libtpu")
    config = small_config("mae_teacher", "train.batch_size=32", "model.dtype=bfloat16")
    plan = make_plan(config, parse_topology("v5e-8"), cache=str(tmp_path), data_dir=data_dir, search=False)
    assert plan.fits
    assert plan.compiler.startswith("libtpu")
    assert plan.collectives[0].kind == "all-reduce"


@pytest.fixture(scope="module")
def compiled_plan(data_dir):
    """A plan of 32 images on 8 fake devices from a stand-in compiler."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tinymim_jax.plan.plan.compile_step", Compiler(math.inf))
        config = small_config("mae_teacher", "train.batch_size=32")
        plan = make_plan(config, parse_topology("cpux8"), data_dir=data_dir, search=False)
    time = StepTime(compute=2.0, memory=1.0, network=0.5, flops=1e12, bytes=1e10)
    return dataclasses.replace(plan, time=time, collectives=(Collective("all-reduce", 8, 2, 1e9),))


def test_a_plan_scaled_to_itself(compiled_plan):
    same = extrapolate(compiled_plan, compiled_plan.topology)
    network = 2 * collective_seconds("all-reduce", 5e8, 8, compiled_plan.topology)
    assert dataclasses.replace(same.time, network=0.5) == compiled_plan.time
    assert same.time.network == pytest.approx(network)
    assert same.parts == compiled_plan.parts
    assert same.compiler == "scaled from 4 images on each chip (a stand-in)"


def test_a_scaled_plan_by_hand(compiled_plan):
    """Half the chips and twice the batch: four times the images on each."""
    plan = extrapolate(compiled_plan, parse_topology("cpux4"), batch=64)
    update = 28 * plan.parameters["trained"] / (CHIPS["cpu"].bandwidth * MEMORY_EFFICIENCY)
    assert plan.time.compute == 8.0
    assert plan.time.memory == pytest.approx(4 * (1.0 - update) + update)
    assert plan.parts["temporaries"] == 4 * compiled_plan.parts["temporaries"]
    assert plan.parts["parameters"] == compiled_plan.parts["parameters"]
    assert (plan.flops, plan.steps) == (2 * compiled_plan.flops, compiled_plan.steps / 2)
    assert plan.collectives == (Collective("all-reduce", 4, 2, 1e9),)
    parts = extrapolate(compiled_plan, parse_topology("cpux8"), accumulate=2)
    assert parts.parts["temporaries"] == compiled_plan.parts["temporaries"] / 2
    assert parts.time.compute == compiled_plan.time.compute


def test_an_h200_is_an_h100_with_faster_memory(compiled_plan):
    plan = extrapolate(dataclasses.replace(compiled_plan, topology=parse_topology("h100x8")), parse_topology("h200x8"))
    assert plan.time.memory == pytest.approx(3352 / 4800)
    assert plan.time.compute == 2.0


def test_another_chips_program_is_a_guess_by_the_ratios_of_their_speeds(compiled_plan):
    of_v5e = dataclasses.replace(compiled_plan, topology=parse_topology("v5e-8"))
    plan = extrapolate(of_v5e, parse_topology("v6e-8"), other_program=True)
    assert plan.compiler == "guessed from 4 images on each v5e (a stand-in)"
    assert plan.time.compute == pytest.approx(2.0 * 197 / 918)
    assert plan.time.memory == pytest.approx(819 / 1638)
    assert plan.parts == compiled_plan.parts


def test_what_cannot_be_scaled(compiled_plan):
    with pytest.raises(ValueError, match="a program for cpu says nothing about v5e"):
        extrapolate(compiled_plan, parse_topology("v5e-8"))
    with pytest.raises(ValueError, match="without --fsdp"):
        extrapolate(dataclasses.replace(compiled_plan, fsdp=2), parse_topology("cpux4"))
    with pytest.raises(ValueError, match="only a plan that was compiled"):
        extrapolate(dataclasses.replace(compiled_plan, time=None), parse_topology("cpux4"))


def test_rows_of_the_documented_table(compiled_plan, monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    import plan_table

    row = plan_table._row(dataclasses.replace(compiled_plan, needed=GIB))
    assert row.startswith("| cpux8 | 4 | 1.0 of 4.0 | yes | 3500 | 9 | compute |")
    large = dataclasses.replace(compiled_plan, parts=compiled_plan.parts | {"temporaries": 10 * GIB}, needed=10 * GIB)
    assert "| 10.0 of 4.0 | no: ~`train.accumulate=4` | ~" in plan_table._row(large)
    assert plan_table._row(dataclasses.replace(large, time=None)).endswith("| 10.0 of 4.0 | no | | | | | |")
    text = "a <!-- t: benchmarks/plan_table.py --> old <!-- end of t --> b"
    assert plan_table._replaced(text, "t", "new").split() == text.replace("old", "new").split()


def test_rows_without_a_program_stay_as_they_are(compiled_plan, monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    import plan_table

    table = plan_table.Table("", configs=(), topologies=())
    v5e = dataclasses.replace(compiled_plan, topology=parse_topology("v5e-16"))
    monkeypatch.setattr(table, "compiled", lambda name, topology, **_: v5e if topology == "v5e-16" else None)
    rows = ["| h100x8 | old |", "| v5e-16 | old |"]
    before = "\n".join(["`configs/mae_l.py`: batch 1", "| h100x8 | of mae_l |", "`configs/mae_b.py`: batch 1", *rows])
    rows = plan_table.config_table(table, "mae_b", before).splitlines()[4:]
    assert [row for row in rows if "x8" in row] == ["| h100x8 | old |"]
    assert "old" not in next(row for row in rows if row.startswith("| v5e-16"))
    monkeypatch.setattr(table, "compiled", lambda name, topology, **_: v5e)
    rows = plan_table.config_table(table, "segment_t", "").splitlines()[4:]
    assert len(rows) == 8  # of 12: sixteen images cannot be divided by 64, 256 or by the 32 halves of tpu7x-32


def test_a_row_of_the_table_is_guessed_only_where_no_compiler_refused(compiled_plan, monkeypatch):
    monkeypatch.syspath_prepend("benchmarks")
    import plan_table

    of_v5e = dataclasses.replace(compiled_plan, topology=parse_topology("v5e-16"))
    table = plan_table.Table("", configs=(), topologies=())
    kept = {"v5e-16": of_v5e, "h100x8": dataclasses.replace(compiled_plan, topology=parse_topology("h100x8"))}
    monkeypatch.setattr(table, "compiled", lambda name, topology, only_kept: kept.get(topology))
    for topology, guess, source in [
        ("v6e-16", True, "guessed from 2 images on each v5e"),
        ("v6e-16", False, None),
        ("v5e-64", False, "scaled from 2 images on each chip"),
        ("v5e-64", True, "scaled from 2 images on each chip"),
        ("h200x1", True, "scaled from 4 images on each chip"),
        ("a100x8", True, None),
    ]:
        plan = table.estimated("finetune_t", topology, guess=guess)
        assert (plan and plan.compiler) == (source and f"{source} (a stand-in)"), (topology, guess)


def test_fsdp_splits_what_training_splits(monkeypatch, data_dir):
    monkeypatch.setattr("tinymim_jax.plan.plan.compile_step", Compiler(math.inf))
    config = small_config("mae_teacher", "train.batch_size=32", "model.embed_dim=256")
    one, four = (
        make_plan(config, parse_topology("cpux8"), fsdp=fsdp, data_dir=data_dir, search=False) for fsdp in (1, 4)
    )
    # Of each of two blocks the two MLP kernels have 2^18 elements; qkv, 256 x 768, and the rest stay whole.
    saved = 2 * 2 * 2**18 * 4 * 3 // 4
    assert one.parts["parameters"] - four.parts["parameters"] == saved
    assert one.parts["optimizer"] - four.parts["optimizer"] == 2 * saved


def test_a_linear_probe_of_segmentation_is_planned_without_its_encoder():
    planned = plan_experiment(load_config("configs/segment_linear.py", ["train.batch_size=2"]))
    assert "init=an encoder is not here: taken as an encoder of this config" in planned.notes
    assert {path[0] for path in planned.paths} == {"decode_head"}
