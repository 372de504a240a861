"""Whether a workdir may be resumed: what its run recorded, against what is asked for now."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from tinymim_jax.config import from_json


def check_same(workdir: epath.Path, config: ConfigDict) -> None:
    """Raises ValueError where the folder holds another experiment."""
    if rows := differences(workdir, config):
        raise ValueError(
            f"{workdir} holds another experiment:\n" + "\n".join(rows) + "\nChoose another --workdir, or delete it"
        )


def differences(workdir: epath.PathLike, config: ConfigDict) -> list[str]:
    """A line for each key in which the experiment in `workdir` differs from `config`; none where there is none."""
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        return []
    found, wanted = _flat(as_json(from_json(json.loads(path.read_text())))), _flat(as_json(config))
    changes = sorted(key for key in found | wanted if found.get(key) != wanted.get(key))
    return [f"  {key}: {found.get(key)!r} there, {wanted.get(key)!r} here" for key in changes]


def as_json(config: ConfigDict) -> dict[str, Any]:
    """A config as config.json holds it."""
    return json.loads(json.dumps(config.to_dict()))


def _flat(tree: Mapping, prefix: str = "") -> dict:
    rows = {}
    for key, value in tree.items():
        rows |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return rows
