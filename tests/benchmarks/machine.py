"""The machine that a benchmark runs on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path

from measuring import BenchmarkError

_VERSIONS = """
import importlib.metadata as m, json, sys
names = sys.argv[1:]
print(json.dumps({name: m.version(name) for name in names}))
"""


def about(directory: Path) -> dict[str, str]:
    """What there is without any package."""
    return {
        "CPU": _cpu(),
        "cores": str(cores()),
        "memory": f"{memory('MemTotal') / 1e9:.0f} GB",
        "file system": _file_system(directory.resolve()),
        "Linux": platform.release(),
        "Python": platform.python_version(),
    }


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0))


def versions(python: str, *names: str) -> dict[str, str]:
    """Of installed packages, as that Python finds them."""
    found = subprocess.run(
        [python, "-c", _VERSIONS, *names], check=True, capture_output=True, text=True
    )
    told: dict[str, str] = json.loads(found.stdout)
    return told


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.machine()


def memory(name: str) -> int:
    """Bytes, as the system counts them."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"/proc/meminfo does not tell {name}")


def _file_system(directory: Path) -> str:
    """The type of the file system that holds a directory."""
    kinds = {}
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if directory.is_relative_to(where):
            kinds[where] = kind
    return kinds[max(kinds, key=len)]
