"""Memory of this machine that is free, within the limit of its container."""

import pathlib

_CONTAINERS = (  # version 2 of control groups, version 1: (limit, in use, details)
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
    ),
)
_CACHED = ("inactive_file ", "active_file ")  # files in memory, which are given up when a program needs the room


def available_memory(root: str = "/") -> int | None:
    """Bytes that programs may still allocate: the least of what Linux and the control group say; None if unknown.

    Args:
      root: folder in which proc and sys are.
    """
    found = []
    for line in _text(root, "/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(1024 * int(line.split()[1]))
    for limit, used, details in _CONTAINERS:
        bound, spent = _text(root, limit).strip(), _text(root, used).strip()
        cached = [line for line in _text(root, details).splitlines() if line.startswith(_CACHED)]
        if bound.isdigit() and spent.isdigit():
            found.append(max(0, int(bound) - int(spent) + sum(int(line.split()[1]) for line in cached)))
    return min(found) if found else None


def _text(root: str, path: str) -> str:
    try:
        return (pathlib.Path(root) / path.lstrip("/")).read_text()
    except OSError:
        return ""
