"""Imports go down only, and the core needs neither TensorFlow nor torch."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Floor of each part of the package: a module may import from its own floor or below (docs/design.md).
FLOORS = {
    "cli": 7, "__main__": 7,
    "plan": 6, "sweeps": 6, "demo": 6, "starter": 6,
    "train": 5, "evaluation": 5, "run_log": 5, "analysis": 5, "reports": 5,
    "experiment": 4, "memory": 4, "state": 4, "flops": 4, "resume": 4,
    "tasks": 3,
    "checkpoints": 2, "convert": 2, "optim": 2, "sharding": 2, "metrics": 2, "loggers": 2,
    "models": 1, "data": 1,
    "ops": 0, "runtime": 0, "pages": 0, "errors": 0, "markdown": 0, "config": 0, "class_names": 0,
}  # fmt: skip


TASKS = {path.name for path in (ROOT / "tinymim_jax" / "tasks").iterdir() if (path / "task.py").exists()}


def package_imports(path: pathlib.Path) -> set[str]:
    """Dotted modules that a file imports, at any depth of nesting."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


def part(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


FILES = sorted((ROOT / "tinymim_jax").rglob("*.py"))


def name_of(path: pathlib.Path) -> str:
    relative = path.relative_to(ROOT / "tinymim_jax")
    return relative.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path):
    own = name_of(path)
    if own == "__init__":
        return
    assert own in FLOORS, f"give {own!r} a floor"
    for module in package_imports(path):
        if module.startswith("tinymim_jax."):
            assert FLOORS[part(module)] <= FLOORS[own], f"{own} imports {module} from a floor above"


def test_no_files_import_each_other_in_a_circle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in FILES}
    graph = {module: package_imports(path) & modules.keys() for module, path in modules.items()}
    assert len(tuple(graphlib.TopologicalSorter(graph).static_order())) == len(FILES)  # or a CycleError


def test_floors_keep_to_themselves():
    for path in FILES:
        own, imported = name_of(path), package_imports(path)
        roots = {module.split(".")[0] for module in imported}
        if own == "data":
            assert not roots & {"jax", "flax", "optax"}, f"{path} imports jax"
            assert not any(m.startswith("tinymim_jax.models") for m in imported)
        if own == "ops":
            assert not roots & {"flax", "ml_collections"}, f"{path} is above its floor"
        if FLOORS.get(own, 7) <= 2 and own != "config":
            assert "ml_collections" not in roots, f"{path} sees a ConfigDict"
        if own == "tasks" and path.parent.name in TASKS:
            others = tuple(f"tinymim_jax.tasks.{task}" for task in TASKS if task != path.parent.name)
            assert not any(module.startswith(others) for module in imported), f"{path} imports another task"
        assert not roots & {"torch", "tensorflow"}, f"{path} imports {roots}"


def asks_for_a_task(node: ast.AST) -> bool:
    """Whether a comparison or a match statement asks which task `config.task` names."""
    if not isinstance(node, ast.Compare | ast.Match):
        return False
    asked = list(ast.walk(node if isinstance(node, ast.Compare) else node.subject))
    attribute = any(isinstance(n, ast.Attribute) and n.attr == "task" for n in asked)
    item = any(isinstance(n, ast.Subscript) and getattr(n.slice, "value", None) == "task" for n in asked)
    return (attribute or item) and any(isinstance(n, ast.Constant) and n.value in TASKS for n in ast.walk(node))


def test_only_tasks_compare_a_task_with_a_name():
    source = 'if config.task == "mae" or config["task"] in ("probe",): pass\nmatch config.task:\n  case "mae": pass'
    assert sum(asks_for_a_task(node) for node in ast.walk(ast.parse(source))) == 3
    for path in FILES:
        if name_of(path) != "tasks":
            found = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if asks_for_a_task(node)]
            assert not found, f"{path}, lines {found}: what depends on the task belongs to its TaskType (tasks/task.py)"


def test_configs_import_configs_alone():
    for path in (ROOT / "configs").rglob("*.py"):
        roots = {module.split(".")[0] for module in package_imports(path)}
        assert roots <= {"configs", "ml_collections", "math"}, f"{path} imports {roots}"


def test_importing_everything_imports_no_tensorflow():
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES if path.stem not in ("__main__",)
    ]
    code = "import sys\n" + "\n".join(f"import {m.removesuffix('.__init__')}" for m in modules)
    code += "\nbad = {'tensorflow', 'torch'} & set(sys.modules)\nassert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=120)
