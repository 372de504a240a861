"""Experiment files: Python modules with `get_config()`, changed by `key=value` words on the command line."""

import ast
import importlib.util
import pathlib
import sys
from collections.abc import Iterable
from typing import Any

from ml_collections import ConfigDict

from tinymim_jax.errors import unknown

_BASE = pathlib.Path(__file__).parents[1] / "configs" / "base.py"


def load_config(spec: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The locked config of FILE.py, or FILE.py:ARGUMENT (passed to get_config), changed by "key=value" words."""
    module, argument = load_file(spec)
    if not hasattr(module, "get_config"):
        raise AttributeError(f"--config {module.__file__} has no function get_config(); see configs/base.py")
    config = module.get_config(argument) if argument else module.get_config()
    apply_overrides(config, overrides)
    return config.lock()


def load_file(spec: str) -> tuple[Any, str]:
    """The module FILE.py of "FILE.py" or "FILE.py:ARGUMENT", and the argument ("" for none)."""
    file, _, argument = spec.partition(":")
    path = pathlib.Path(file).resolve()
    if not path.is_file():
        raise FileNotFoundError(f"--config {file}: no such file. Shipped ones are in the repository's configs/")
    return _import(path), argument


def from_json(values: dict[str, Any]) -> ConfigDict:
    """The locked config that a run wrote to its config.json; keys that came later have their defaults."""
    return ConfigDict(completed(values)).lock()


def completed(values: dict[str, Any]) -> dict[str, Any]:
    """A run's config.json with the keys that its version did not have: a new key's default is what was done before."""
    base = _import(_BASE) if _BASE.is_file() else None  # a package without the repository has no defaults
    make = getattr(base, str(values.get("task")), None)
    return _filled(make().to_dict(), values) if make else values


def apply_overrides(config: ConfigDict, overrides: Iterable[str]) -> None:
    """Sets dotted keys from "key=value" words; values are Python literals, anything else is a string."""
    names = flat_names(config)
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"{word!r} is not an override: write key=value, for example optim.base_lr=1e-3")
        if key not in names:
            raise unknown("override", key, names)
        _set(config, key, text)


def parse(text: str) -> Any:
    """The value of an override: a Python literal, true, false or none, or else a string."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None}.get(text.lower(), text)


def flat_names(config: ConfigDict, prefix: str = "") -> list[str]:
    """All keys of a config, dotted."""
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
    # Of a key that takes strings, 'none' is one of its choices.
    value = text if text == "none" and isinstance(old, str) else parse(text)
    if isinstance(old, bool) != isinstance(value, bool) and old is not None:
        raise TypeError(f"{key}={value!r} has the wrong type: it is {old!r} now")
    if isinstance(old, str) and not isinstance(value, str):
        raise TypeError(f"{key}={value!r} has the wrong type: it is the string {old!r} now")
    try:
        config[name] = value
    except (TypeError, ValueError) as error:
        raise TypeError(f"{key}={value!r} has the wrong type: it is {old!r} now") from error


def _filled(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """`values`, and of `defaults` what they lack."""
    filled = defaults | values
    for key, default in defaults.items():
        if isinstance(default, dict) and isinstance(filled[key], dict):
            filled[key] = _filled(default, filled[key])
    return filled


def _import(path: pathlib.Path) -> Any:
    # `from configs.base import ...` must work from wherever the command is run, and from configs/study/ too.
    package = path.parent
    while (package.parent / "__init__.py").exists():
        package = package.parent
    root = str(package.parent)
    sys.path.insert(0, root)
    try:
        spec = importlib.util.spec_from_file_location(f"_config_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(root)
    return module
