"""Average onto a disk that is too small, in a mount namespace of its own.

    unshare -rm python tests/support/small_disk.py DIRECTORY

DIRECTORY holds a ``run`` of files, a ``models`` of directories and an empty ``disk``, where a small
tmpfs is mounted for each case. Prints for each what was said and what is on the disk then, as JSON.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from ckptavg import average, open_run
from ckptavg.errors import CkptavgError

HOME = Path(sys.argv[1])
DISK = HOME / "disk"
OUT = DISK / "swa.safetensors"
no_look = mock.patch("ckptavg.outputs.target.check_room")
no_reserve = mock.patch(
    "os.posix_fallocate", side_effect=OSError(errno.EOPNOTSUPP, "Operation not supported")
)


@contextmanager
def disk(options: str) -> Iterator[None]:
    """A tmpfs at ``disk``."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", DISK], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", DISK], check=True)


def told(out: Path, run: str = "run", **settings: object) -> dict[str, object]:
    """What an average onto the disk says, and what is there then."""
    try:
        average(open_run(HOME / run), out=out, **settings)
        said = "written"
    except CkptavgError as error:
        said = f"{type(error).__name__}: {error}"
    return {"said": said, "left": sorted(path.name for path in DISK.iterdir())}


def looked_at_first() -> dict[str, object]:
    """The room is too small from the beginning."""
    with disk("size=1m"):
        return told(OUT)


def reserving() -> dict[str, object]:
    """It is gone when the output is reserved."""
    with disk("size=1m"), no_look:
        return told(OUT)


def writing() -> dict[str, object]:
    """It is gone when the threads write, where nothing can be reserved."""
    with disk("size=1m"), no_look, no_reserve:
        return told(OUT)


def another_fills_it() -> dict[str, object]:
    """Another program takes it while the average is computed."""
    taken = []

    def fill(done: int, total: int) -> None:
        if not taken:
            taken.append(done)
            with open(DISK / "theirs", "wb", buffering=0) as file:
                try:
                    while file.write(bytes(1 << 16)):
                        pass
                except OSError:
                    return

    with disk("size=3m"), no_reserve:
        return told(OUT, progress=fill)


def companion() -> dict[str, object]:
    """The weights fit and what stands beside them does not."""
    with disk("size=3m"), no_look:
        return told(DISK / "swa", "models")


def no_inodes() -> dict[str, object]:
    """There is room and no place for another file."""
    with disk("size=4m,nr_inodes=2"):
        (DISK / "theirs").touch()
        return told(OUT)


def old_one_stays() -> dict[str, object]:
    """There is room for one, and the old one stays until the new one is whole."""
    with disk("size=3m"):
        OUT.write_bytes(b"old" * (1 << 19))
        answer = told(OUT, overwrite=True)
        return answer | {"old": OUT.read_bytes() == b"old" * (1 << 19)}


def a_dead_run_s_room() -> dict[str, object]:
    """What a dead run reserved is free for the next."""
    with disk("size=3m"):
        left = DISK / ".swa.safetensors.0123abcd.ckptavg-tmp"
        left.write_bytes(bytes(5 << 19))
        return told(OUT)


def read_only() -> dict[str, object]:
    """Nothing can be written at all."""
    with disk("size=4m,ro"):
        return told(OUT)


def limit() -> dict[str, object]:
    """No file may be as large."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with disk("size=4m"), no_reserve:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, hard))
        try:
            return told(OUT)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


CASES: list[Callable[[], dict[str, object]]] = [
    looked_at_first, reserving, writing, another_fills_it, companion, no_inodes, old_one_stays,
    a_dead_run_s_room, read_only, limit,
]  # fmt: skip

if __name__ == "__main__":
    os.umask(0o022)
    print(json.dumps({case.__name__: case() for case in CASES}))
