"""A store in memory for inputs at URLs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.memory import MemoryFileSystem

from ckptavg.io import remote


class Store(MemoryFileSystem):
    """A file system in memory that remembers what it was asked for, and fails as it is told.

    Attributes:
        ranges: (path, start, end) of every read.
        batches: Bytes of what was asked for at once.
        failures: Errors that the next reads end in.
    """

    protocol = "store"
    store = {}
    pseudo_dirs = [""]
    ranges = []
    batches = []
    failures = []

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + str(path).removeprefix("store://").strip("/")

    def cat_ranges(self, paths, starts, ends, **options):
        self.batches.append(sum(b - a for a, b in zip(starts, ends, strict=True)))
        return super().cat_ranges(paths, starts, ends, **options)

    def cat_file(self, path, start=None, end=None, **options):
        self.ranges.append((self._strip_protocol(path), start, end))
        if self.failures:
            raise self.failures.pop(0)
        return super().cat_file(path, start, end, **options)


def open_store(monkeypatch: Any) -> Store:
    """Register an empty store under ``store://`` until the test ends."""
    fsspec.register_implementation("store", Store, clobber=True)
    for name, value in (("store", {}), ("ranges", []), ("batches", []), ("failures", [])):
        monkeypatch.setattr(Store, name, value)
    monkeypatch.setattr(Store, "pseudo_dirs", [""])
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    remote._shared_pieces.cache_clear()
    return Store()


def upload(path: Path, name: str = "run") -> str:
    """Put a file or a directory in the store."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            below = f"{name}/{file.relative_to(path).as_posix()}" if path.is_dir() else name
            Store().pipe_file(f"/{below}", file.read_bytes())
    return f"store://{name}"
