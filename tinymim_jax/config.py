"""Experiment files: Python modules with `get_config()`, whose values `key=value` words on the command line change."""

import ast
import importlib.machinery
import importlib.util
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from tinymim_jax.errors import unknown

_PACKAGE = pathlib.Path(__file__).parent
# The shipped experiments: beside the package in a checkout, inside it in an installed wheel (setup.py puts them there).
SHIPPED = next(
    (folder for folder in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if (folder / "base.py").is_file()),
    _PACKAGE / "configs",
)
_NO_EXPERIMENTS = ("__init__", "base", "pipeline")


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The locked config of an experiment, changed by "key=value" words.

    Args:
      spec: a file or the name of a shipped experiment, as `find_file` describes, with ":ARGUMENT" for get_config.

    Raises FileNotFoundError for an unknown name and ValueError for a file without get_config() or a wrong override.
    """
    module, argument = load_file(spec)
    if not hasattr(module, "get_config"):
        chain = f"; it has get_chain(), so run it with `tinymim chain {spec}`" if hasattr(module, "get_chain") else ""
        raise ValueError(f"{module.__file__} has no function get_config(){chain}. configs/digits.py is an example")
    config = module.get_config(argument) if argument else module.get_config()
    apply_overrides(config, overrides)
    return config.lock()


def load_file(spec: str) -> tuple[Any, str]:
    """The module that `spec` names, and the argument behind the colon ("" for none)."""
    path, argument = find_file(spec)
    return _import(path), argument


def find_file(spec: str) -> tuple[pathlib.Path, str]:
    """Splits "FILE.py", "NAME", or either with ":ARGUMENT", into the file's absolute path and the argument.

    A NAME, such as distill_b or study/losses, is looked up in ./configs and then among the shipped experiments.

    Raises FileNotFoundError, with the nearest name, for what does not exist.
    """
    name, _, argument = spec.partition(":")
    path = pathlib.Path(name).expanduser()
    if path.suffix == ".py":
        if path.is_file():
            return path.resolve(), argument
        shipped = name.removeprefix("configs/").removesuffix(".py")
        hint = f"The shipped one is called {shipped}" if shipped in experiments() else _choices()
        raise FileNotFoundError(f"{name}: no such file. {hint}")
    for folder in _folders():
        if name in experiments(folder):
            return (folder / f"{name}.py").resolve(), argument
    raise FileNotFoundError(f"{unknown('--config', name, experiments())}. Or give a file: PATH.py")


def experiments(*folders: pathlib.Path) -> list[str]:
    """Names that `find_file` accepts: files of ./configs and shipped ones, without .py, relative to their folder."""
    found = {
        path.relative_to(folder).with_suffix("").as_posix()
        for folder in folders or _folders()
        for path in folder.rglob("*.py")
        if path.stem not in _NO_EXPERIMENTS
    }
    return sorted(found)


def from_json(values: dict[str, Any]) -> ConfigDict:
    """The locked config that a run wrote to its config.json; keys that did not exist then get their defaults."""
    return ConfigDict(completed(values)).lock()


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """The contents of a config.json, with defaults for the keys that the version which wrote it did not have.

    The default of every new key is the behaviour before that key existed, so the experiment stays the same.
    """
    default = defaults(str(values.get("task")))
    if not default:
        return values
    filled = _filled(default, values)
    for section, make in _open_sections(filled).items():
        first, second = section.split(".")
        entries = {name: _filled(make().to_dict(), entry) for name, entry in filled[first][second].items()}
        filled[first] = filled[first] | {second: entries}
    return filled


def defaults(task: str) -> dict[str, Any]:
    """The default values of all keys of a task's experiments, as nested dicts; {} for an unknown task."""
    make = getattr(_execute(SHIPPED / "base.py"), task, None)
    return make().to_dict() if make else {}


def key_names(config: ConfigDict) -> list[str]:
    """All keys that an override may set; NAME stands for the name of an entry that the override adds (`has_key`)."""
    return flat_names(config) + [
        f"{section}.NAME.{key}" for section, make in _open_sections(config).items() for key in flat_names(make())
    ]


def has_key(names: Iterable[str], key: str) -> bool:
    """Whether `key` is one of `key_names`, also by the name of a new entry."""
    return key in names or re.sub(r"^(\w+\.\w+\.)[A-Za-z]\w*\.", r"\1NAME.", key) in names


def apply_overrides(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Sets dotted keys from "key=value" words. A value is a Python literal if it can be read as one, else a string.

    A key of an entry that is not there yet, such as distill.teachers.dino.path, adds it with its default values.
    """
    names = key_names(config)
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not an override: write key=value, for example optim.base_lr=1e-3")
        if not has_key(names, key):
            entry = f".{key.split('.')[2]}." if key.count(".") > 2 else ".NAME."
            choices = [name.replace(".NAME.", entry) for name in names]
            raise unknown("override", key, choices, shown=_section(choices, key))
        if key not in names:
            _add_entry(config, key)
        _set(config, key, text)


def _section(names: list[str], key: str) -> list[str]:
    """What there is in the innermost section that `key` names correctly; `.*` stands for a section within it."""
    parts = key.split(".")[:-1]
    while parts and not any(name.startswith(".".join(parts) + ".") for name in names):
        parts.pop()
    prefix = "".join(f"{part}." for part in parts)
    inside = (name.removeprefix(prefix).split(".") for name in names if name.startswith(prefix))
    return sorted({prefix + first + (".*" if rest else "") for first, *rest in inside})


def parse(text: str) -> Any:
    """Reads the value of an override: a Python literal, true, false or none; anything else is a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def flat_names(config: ConfigDict, prefix: str = "") -> list[str]:
    """All keys of a config, nested ones as dotted names."""
    names = []
    for key in config:
        value = config[key]
        names += flat_names(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [f"{prefix}{key}"]
    return names


def _set(config: ConfigDict, key: str, text: str) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        config = getattr(config, parent)
    old = config[name]
    # A string key may have a choice that is called none.
    value = text if text == "none" and isinstance(old, str) else parse(text)
    if isinstance(old, bool) != isinstance(value, bool) and old is not None:
        raise TypeError(f"{key}={value!r} has the wrong type: it is {old!r} now")
    if isinstance(old, str) and not isinstance(value, str):
        raise TypeError(f"{key}={value!r} has the wrong type: it is the string {old!r} now")
    try:
        config[name] = value
    except (TypeError, ValueError) as error:
        raise TypeError(f"{key}={value!r} has the wrong type: it is {old!r} now") from error


def _open_sections(config: Mapping[str, Any]) -> dict[str, Callable[[], ConfigDict]]:
    """Sections (SECTION.SECTION) of `config` whose entries the user names, with the function that makes an entry."""
    found = _execute(SHIPPED / "base.py").OPEN_SECTIONS
    return {section: make for section, make in found.items() if section.split(".")[0] in config}


def _add_entry(config: ConfigDict, key: str) -> None:
    first, second, name, _ = key.split(".", 3)
    with config.unlocked():
        if name not in config[first][second]:
            config[first][second][name] = _open_sections(config)[f"{first}.{second}"]()


def _filled(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values` and, for keys that it lacks, those of `defaults`; nested dicts likewise."""
    filled = defaults | values
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(filled[key], dict):
            filled[key] = _filled(default, filled[key])
    return filled


def _folders() -> list[pathlib.Path]:
    """Where names of experiments are looked up, in this order."""
    own = pathlib.Path("configs")
    return [SHIPPED] if not own.is_dir() or own.resolve() == SHIPPED.resolve() else [own, SHIPPED]


def _choices() -> str:
    return f"Shipped experiments: {', '.join(experiments(SHIPPED))}"


def _import(path: pathlib.Path) -> Any:
    """Executes an experiment file. It can import `configs` and the package that contains the file.

    `from configs import base` means the `configs` folder around the file, if there is one, and then the shipped one,
    wherever the command runs.
    """
    own = [folder for folder in path.parents if folder.name == "configs"][:1]
    _provide_configs([str(folder) for folder in dict.fromkeys([*own, SHIPPED.resolve()])])
    package = path.parent
    while (package.parent / "__init__.py").exists():
        package = package.parent
    root = str(package.parent)
    sys.path.insert(0, root)
    try:
        return _execute(path)
    finally:
        sys.path.remove(root)


def _provide_configs(folders: list[str]) -> None:
    """Makes `import configs.NAME` look in these folders, and nowhere else."""
    known = sys.modules.get("configs")
    if known is not None and list(getattr(known, "__path__", ())) == folders:
        return
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        del sys.modules[name]  # read from other folders
    package = types.ModuleType("configs")
    package.__path__ = folders
    package.__spec__ = importlib.machinery.ModuleSpec("configs", None, is_package=True)
    sys.modules["configs"] = package


def _execute(path: pathlib.Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
