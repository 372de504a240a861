"""Which published weights a run comes from, and their licences: kept in model.json through every further training."""

import json
import logging
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

log = logging.getLogger(__name__)


def lineage_record(config: ConfigDict, whose: str = "this model") -> dict[str, list[dict[str, str]]]:
    """{"lineage": ...} for the model.json of a run, with a log line for each entry; {} without published weights.

    An entry for each of the published weights behind its teacher and its initial weights: `name` (of the converted
    checkpoint), `role` ("teacher" or "init", where it entered), and `family` and `licence` where they are known. Read
    from the model.json of the checkpoints.

    Args:
      whose: the model, for the log.
    """
    found: list[dict[str, str]] = []
    for role, paths in ancestors(config).items():
        for item in [item for path in paths for item in lineage_of(epath.Path(path).expanduser(), role)]:
            if item not in found:
                found.append(item)
    for item in found:
        licence = item.get("licence", "unknown")
        log.info("made from %s (%s), licence %s: it may hold for %s too", item["name"], item["role"], licence, whose)
    return {"lineage": found} if found else {}


def ancestors(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Paths of the checkpoints that a run starts from, by role."""
    task = config.get("task", "")
    section = config.get(task) or {}
    teachers = [section.get("teacher") or {}, *(section.get("teachers") or {}).values()]
    found = {"init": [config.get("init")], "teacher": [teacher.get("path") for teacher in teachers]}
    return {role: [path for path in paths if path] for role, paths in found.items()}


def lineage_of(checkpoint: epath.Path, role: str) -> list[dict[str, str]]:
    """What a checkpoint was made of: what its own model.json lists, or itself where it was converted."""
    try:
        record = json.loads((checkpoint / "model.json").read_text())
    except (OSError, ValueError):
        return []
    source = record.get("source", {})
    listed = [dict(item) for item in record.get("lineage", ())]
    if source.get("family"):
        known = {key: source[key] for key in ("family", "licence") if source.get(key)}
        listed.append({"name": checkpoint.name, "role": role} | known)
    return listed
