"""Paths of outputs, with checks before an output is written or replaced."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ckptavg.errors import OutputError, first_few
from ckptavg.errors.printable import size_text
from ckptavg.errors.system import guard_writes
from ckptavg.io import temporaries

# Kinds that a rename would replace by a file, which cuts off their readers and writers.
_NO_FILES = {
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
}
_MOUNTS = Path("/proc/self/mountinfo")
_MOUNT_POINT = 4  # field of a line in ``_MOUNTS``, counted from 0


def follow(path: Path) -> Path:
    """Return the absolute path to write for an output.

    A link is followed, as by ``torch.save``.
    """
    if path.is_symlink():
        return Path(os.path.realpath(path))
    return path.absolute()


def check_target(path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Check that an output may be written, before any work begins.

    Leftovers of crashed runs are cleared first: they take room, or are the output itself.

    Args:
        path: The output.
        overwrite: True if an existing output may be replaced.
        inputs: Checkpoints that are being read, which must not be changed.

    Raises:
        OutputError: The output may not be written.
    """
    check_no_input(path, inputs)
    with guard_writes(path):
        target = follow(path)
        _check_parent(target.parent)
        # Before any look at the target: a run that crashed during a swap has set the target aside.
        temporaries.remove_stale(target)
        _check_kind(target)
        if os.path.lexists(path) and not overwrite:
            raise OutputError(
                f"{path} exists already",
                "Pass `overwrite=True` to replace it.",
            )
        if not os.access(target, os.W_OK) and target.exists():
            raise OutputError(
                f"{path} may not be written to",
                "Change its permissions, or choose another `out`.",
            )


def check_no_input(path: Path, inputs: Iterable[Path]) -> None:
    """Check that an output is not an input, not within an input, and holds no input.

    Raises:
        OutputError: The output and an input overlap.
    """
    output = _resolve(path)
    for source in inputs:
        resolved = _resolve(source)
        if _is_within(resolved, output) or _is_within(output, resolved):
            raise OutputError(f"the output {path} is an input ({source})", "Choose another `out`.")


def check_replaceable(path: Path, *, directory: bool, names: Collection[str]) -> None:
    """Check that an output replaces only files that ckptavg writes.

    Args:
        path: The output, which may exist.
        directory: True if the output will be a directory.
        names: Relative paths of the files in a directory that may be replaced.

    Raises:
        OutputError: Other files would be lost.
    """
    target = follow(path)
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    if directory != stat.S_ISDIR(mode):
        kinds = ["a file", "a directory"]
        raise OutputError(
            f"{path} is {kinds[not directory]} and is not replaced by {kinds[directory]}",
            "Choose another `out`.",
        )
    if not directory:
        return
    others = sorted(_list_others(target, names))
    if others:
        raise OutputError(
            f"{path} is not replaced: it holds files that ckptavg did not write, "
            f"{first_few(others)}",
            "Move them elsewhere, or choose another `out`.",
        )


def check_room(path: Path, needed: int) -> None:
    """Check that the disk has room for an output.

    Args:
        path: The output.
        needed: Size of the output in bytes.

    Raises:
        OutputError: The disk has less free space.
    """
    with guard_writes(path):
        free = shutil.disk_usage(follow(path).parent).free
    if needed > free:
        raise OutputError(
            f"{path} needs {size_text(needed)} where {size_text(free)} are free, "
            f"{size_text(needed - free)} too little",
            "Make room, or choose `out` on another disk.",
        )


def _resolve(path: Path) -> str:
    """Return a path with links resolved and a separator at the end."""
    # The separator keeps /a/b from being a beginning of /a/bc.
    return os.path.realpath(path).rstrip(os.sep) + os.sep


def _is_within(path: str, directory: str) -> bool:
    """Return True if a resolved path is the directory or below the directory."""
    return path.startswith(directory)


def _check_parent(parent: Path) -> None:
    """Check that the directory of an output exists and may be written to.

    Raises:
        OutputError: The directory does not exist, or may not be written to.
    """
    if not parent.is_dir():
        raise OutputError(f"the directory {parent} does not exist", "Create it first.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"the directory {parent} may not be written to", "Choose another `out`.")


def _check_kind(path: Path) -> None:
    """Check that a path is free, or has a file or a directory that can be renamed.

    Raises:
        OutputError: The path is a device, a pipe, a socket or a mount point.
    """
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    # A link that is still one after ``follow`` leads to itself: let the system raise its error.
    if stat.S_ISLNK(mode):
        path.stat()
    for is_kind, kind in _NO_FILES.items():
        if is_kind(mode):
            raise OutputError(f"{path} is {kind} and is not replaced by a file", "Name a file.")
    if _is_mount_point(path):
        raise OutputError(
            f"{path} is a mount point, which cannot be replaced", "Name something below it."
        )


def _is_mount_point(path: Path) -> bool:
    """Return True if a file system, or a part of a file system, is mounted at a path."""
    # ``ismount`` alone misses bind mounts, by which containers mount single files, too.
    if os.path.ismount(path):
        return True
    if sys.platform != "linux" or not _MOUNTS.exists():
        return False
    lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    mounts = {line.split(" ")[_MOUNT_POINT] for line in lines}
    escaped = os.path.realpath(path)
    # The kernel writes these in octal. The backslash first: the other escapes begin with it.
    for character in "\\ \t\n":
        escaped = escaped.replace(character, f"\\{ord(character):03o}")
    return escaped in mounts


def _list_others(directory: Path, names: Collection[str]) -> Iterator[str]:
    """List the paths below a directory except the files in ``names`` and the parent directories."""
    homes: set[str] = set()
    for name in names:
        homes.update(parent.as_posix() for parent in Path(name).parents)
    for folder, folders, files in os.walk(directory, onerror=_raise):
        below = Path(folder).relative_to(directory)
        for entries, expected in ((folders, homes), (files, names)):
            for entry in entries:
                name = (below / entry).as_posix()
                if name not in expected:
                    yield name


def _raise(error: OSError) -> None:
    """Raise an error of ``os.walk``, unless a directory is gone."""
    # A directory that another run removes meanwhile cannot be lost by this run.
    if not isinstance(error, FileNotFoundError):
        raise error
