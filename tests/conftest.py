"""What all tests share: eight fake CPU devices, caches of their own, shape checks, the golden files, the order."""

import gc
import json
import os
import pathlib
import tempfile

from processes import cpu_devices

os.environ.update({**(_CPU := cpu_devices(8)), **os.environ})
if "xla_force_host_platform_device_count" not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += " " + _CPU["XLA_FLAGS"]

# Compiled programs are shared by all tests and by the processes that they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="tinymim-tests-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

# Programs do not record where each operation was called from: recording it takes a few hundredths of the time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")

# Indexes of image files (data/sources) are kept here, not in the user's cache.
if "TINYMIM_CACHE" not in os.environ:
    _INDEXES = tempfile.TemporaryDirectory(prefix="tinymim-tests-")
    os.environ["TINYMIM_CACHE"] = _INDEXES.name

import numpy as np
import pytest
from jaxtyping import install_import_hook

# Annotated array shapes of ops, models and targets are checked in tests only.
_HOOK = install_import_hook(
    ["tinymim_jax.ops", "tinymim_jax.models", "tinymim_jax.tasks.distill.targets"], "beartype.beartype"
)
_HOOK.__enter__()

# Tracing makes many objects that live on; with Python's defaults, garbage collection takes a tenth of the time.
gc.freeze()
gc.set_threshold(100_000, 20, 50)

# Files that take long, longest first: with `pytest -n 2 --dist loadfile` a file goes to one worker, so its fixtures are
# made once, and no long one is left for the end. Files that are not named come after these. Every second of the first
# ones starts processes, so that one worker at a time does.
_LONGEST_FIRST = (
    "sweep", "distill", "faults", "train", "chain", "several_students", "tpu_vm", "configs", "starter", "kernels",
    "study", "foreign_tasks", "readme", "teacher_families", "report", "stem", "benchmark_input", "moving_taps",
    "mixup", "segment_task", "models", "several_teachers", "analysis", "live_probe", "cnn", "golden",
    "segmentation_parity", "foreign", "placement", "segmentation_export", "tasks", "memory", "plan", "evaluate",
    "replay", "resume", "finetune", "targets", "suites", "formats", "prepare", "checkpoints", "exits",
    "benchmark_step", "wide_last", "inference", "int8", "segmentation_run", "export",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {f"test_{name}": number for number, name in enumerate(_LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="module")
def optimized():
    """Turns XLA's optimizations on, for tests of the optimized program.

    Use it by `pytestmark = pytest.mark.usefixtures("optimized")`. The flags of `processes.cpu_devices` remain.
    """
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def golden_dir() -> pathlib.Path:
    """The folder of the golden files: $TINYMIM_GOLDEN, or tests/golden."""
    return pathlib.Path(os.environ.get("TINYMIM_GOLDEN") or pathlib.Path(__file__).parent / "golden")


class Golden:
    """Arrays that the authors' PyTorch code wrote, and the sizes of its models in `meta`."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory
        self.meta = json.loads((directory / "meta.json").read_text())

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.directory / name) as file:
            return {key: file[key] for key in file.files}

    def path(self, name: str) -> pathlib.Path:
        return self.directory / name


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden(golden_dir())


def relative_error(got, want) -> float:
    """Largest absolute difference over the largest magnitude of `want`."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"shape {got.shape} against {want.shape}"
    return float(np.max(np.abs(got - want)) / max(np.max(np.abs(want)), 1e-30))


@pytest.fixture(scope="session")
def close():
    """`close(got, want, 1e-5)`: agreement relative to the largest magnitude in the array."""

    def check(got, want, tolerance: float, what: str = "") -> None:
        error = relative_error(got, want)
        assert error <= tolerance, f"{what}: relative error {error:.2e} is above {tolerance:.0e}"

    return check


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory) -> str:
    """A data folder in which the digits data set is prepared."""
    from tinymim_jax.data.sources.sources import open_source

    folder = str(tmp_path_factory.mktemp("data"))
    open_source("digits", split="train", data_dir=folder)
    return folder


@pytest.fixture(scope="session")
def mae_run(tmp_path_factory, data_dir) -> pathlib.Path:
    """A finished MAE run of four steps; four heads in every block. For reading only: tests that write take a copy."""
    from runs import small_config

    from tinymim_jax.train import train

    workdir = tmp_path_factory.mktemp("mae_run") / "run"
    train(small_config("mae_teacher", "model.heads=4"), workdir, data_dir=data_dir)
    return workdir


@pytest.fixture(scope="session")
def photo() -> np.ndarray:
    """A photograph, uint8 [427, 640, 3]."""
    return pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")
