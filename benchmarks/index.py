"""Seconds that the index of a folder with many image files takes: the first time, and from the cache.

    python benchmarks/index.py --files 200000 --folders 1000

Makes a folder of that many names (hard links to empty files) in --location, and removes it at the end. One JSON line
goes to standard output; `per_million` is in proportion. `cpu` is processor time, which other work on the machine
disturbs less.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
_LINKS = 1000  # names of one file; file systems allow 65,000 at most

# A process of its own each time: nothing is left from before but what the operating system keeps.
_OPEN = """
import sys, time
from tinymim_jax.data.sources.sources import open_source
began = time.perf_counter(), time.process_time()
source = open_source(f"folder:{sys.argv[1]}", split="train")
print(time.perf_counter() - began[0], time.process_time() - began[1], len(source))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=200_000, help="how many (default 200000)")
    parser.add_argument("--folders", type=int, default=1000, help="folders, each a class (default 1000)")
    parser.add_argument("--location", default=tempfile.gettempdir(), help="where they are made (default: the system's)")
    parser.add_argument(
        "--cold", action="store_true", help="make Linux forget the names it holds in memory first (needs root)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.location) as scratch:
        make_files(Path(scratch), options.files, options.folders)
        result = {"files": options.files, "folders": options.folders, "cold": options.cold}
        for name in ("first", "cached"):
            if options.cold:
                forget_names()
            result[name] = open_once(scratch, options.files)
    print(json.dumps(result))


def make_files(root: Path, files: int, folders: int) -> None:
    """Writes LOCATION/train/CLASS/NAME.JPEG, hard links to empty files."""
    (root / ".files").mkdir()
    number = 0
    for folder in range(folders):
        place = root / "train" / f"n{folder:08}"
        place.mkdir(parents=True)
        for _ in range(files * folder // folders, files * (folder + 1) // folders):
            target = root / ".files" / str(number // _LINKS)
            if number % _LINKS == 0:
                target.touch()
            os.link(target, place / f"{place.name}_{number * 7919 % 999983}_{number}.JPEG")
            number += 1
    time.sleep(2.5)  # folders that were changed less than two seconds ago are not cached


def open_once(root: str, files: int) -> dict[str, float]:
    """Seconds until the source is there, in a new process."""
    environment = dict(os.environ, TINYMIM_CACHE=f"{root}/.cache", PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", _OPEN, root]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    wall, cpu, found = map(float, done.stdout.split())
    if found != files:
        sys.exit(f"{found:.0f} files were found of {files}")
    scale = 1e6 / files
    return {"seconds": wall, "cpu": cpu, "per_million": wall * scale, "cpu_per_million": cpu * scale}


def forget_names() -> None:
    """Empties Linux's caches of names and inodes."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("2")


if __name__ == "__main__":
    main()
