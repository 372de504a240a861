"""The report of a prepared data set: merges the sidecars of the shards and formats a summary."""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)  # in percent
_PERCENTS = "/".join(map(str, _QUANTILES))
_SHOWN = 5  # images that the table lists for each reason


def split_report(accounts: Iterable[Mapping[str, Any]], class_names: tuple[str, ...]) -> dict[str, Any]:
    """Merges the sidecars of one split's shards, given in shard order. Widths and heights are those before resizing."""
    totals: collections.Counter[str] = collections.Counter()
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    listed: dict[str, list] = {"rejected": [], "warnings": []}
    for account in accounts:
        totals["read"] += account["last"] - account["first"]
        for key in ("records", "file_bytes", "bytes_before", "bytes_after"):
            totals[key] += account[key]
        for key in ("classes", "formats", "actions", "widths", "heights", "short_sides"):
            counts[key].update(account[key])
        for key, entries in listed.items():
            entries.extend(account[key])
    classes = {name: counts["classes"][str(label)] for label, name in enumerate(class_names)}
    return {
        "images": totals["records"],
        "read": totals["read"],
        "bytes_before": totals["bytes_before"],
        "bytes_after": totals["bytes_after"],
        "file_bytes": totals["file_bytes"],
        "classes": classes,
        "without_class": totals["records"] - sum(classes.values()),
        "formats": dict(counts["formats"]),
        "actions": dict(counts["actions"]),
        "width": _quantiles(counts["widths"]),
        "height": _quantiles(counts["heights"]),
        "short_side": _quantiles(counts["short_sides"]),
        **listed,
    }


def table(report: Mapping[str, Any]) -> str:
    """The report as text: a few lines for each split."""
    lines = []
    for name, split in report["splits"].items():
        lines.append(f"{name}: {split['images']:,} images of {split['read']:,} read, {_done(split)}")
        if split["classes"]:
            fewest, most = (choose(split["classes"].items(), key=lambda item: item[1]) for choose in (min, max))
            mean = sum(split["classes"].values()) / len(split["classes"])
            lines.append(
                f"  {len(split['classes']):,} classes: fewest {fewest[1]:,} ({fewest[0]}), "
                f"most {most[1]:,} ({most[0]}), mean {mean:,.1f}"
            )
        if not split["classes"]:
            lines.append("  no class labels")
        elif split["without_class"]:
            lines.append(f"  images without a class: {split['without_class']:,}")
        for side in ("width", "height", "short_side"):
            values = [str(split[side][str(percent)]) for percent in _QUANTILES]
            lines.append(f"  {side.replace('_', ' ')} before resizing: {' '.join(values)} ({_PERCENTS} %)")
        lines.append(f"  images: {size(split['bytes_before'])} before, {size(split['bytes_after'])} after")
        for kind in ("rejected", "warnings"):
            lines.extend(_reasons(kind, split[kind]))
    lines.append(f"{report['images_this_run']:,} images in {report['seconds']:,.1f} s, {_speed(report)}")
    return "\n".join(lines)


def size(count: float) -> str:
    """1234567 -> '1.2 MB'."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _quantiles(counter: Mapping[str, int]) -> dict[str, int]:
    values = sorted((int(value), count) for value, count in counter.items())
    total, found, passed = sum(count for _, count in values), {}, 0
    ranks = iter([(percent, percent * (total - 1) // 100) for percent in _QUANTILES])
    percent, rank = next(ranks)
    for value, count in values:
        passed += count
        while rank < passed:
            found[str(percent)] = value
            percent, rank = next(ranks, (None, total))
    return found


def _done(split: Mapping[str, Any]) -> str:
    words = {"kept": "unchanged", "resized": "resized", "reencoded": "re-encoded at their own size"}
    done = [f"{split['actions'][action]:,} {words[action]}" for action in words if action in split["actions"]]
    return ", ".join([*done, f"{len(split['rejected']):,} rejected"])


def _reasons(kind: str, entries: list[dict[str, Any]]) -> list[str]:
    alike: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
    for entry in entries:
        alike[re.sub(r"\d+", "N", entry["reason"].split(" (")[0])].append(entry)
    lines = []
    for reason, group in sorted(alike.items(), key=lambda item: -len(item[1])):
        lines.append(f"  {kind}, {len(group):,}: {reason}")
        lines.extend(f"    {entry['description']}: {entry['reason']}" for entry in group[:_SHOWN])
        lines.extend([f"    and {len(group) - _SHOWN:,} more, in report.json"] if len(group) > _SHOWN else [])
    return lines


def _speed(report: Mapping[str, Any]) -> str:
    speed = report["images_per_second"]
    return f"{speed:,.0f} images/s" if speed else "all shards were finished before this run"
