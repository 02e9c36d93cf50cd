"""Paths of outputs: what may stand there before, and what of it may go."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from ckptavg.errors import OutputError, first_few
from ckptavg.formats import leftovers
from ckptavg.system_errors import guard_writes

_NO_FILES = {
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
}
_MOUNTS = Path("/proc/self/mountinfo")
_MOUNT_POINT = 4  # field of a line there


def follow(path: Path) -> Path:
    """The absolute path that is written for an output: a link is written through, as by torch."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()


def check_target(path: Path, *, overwrite: bool, inputs: Iterable[Path]) -> None:
    """Make sure that an output may be written, before any work begins.

    What dead runs have left of it is cleared first: it takes room, or is the output itself.

    Args:
        path: The output.
        overwrite: Whether an existing one may be replaced.
        inputs: Checkpoints that are being read; none of them may be touched.

    Raises:
        OutputError: It may not.
    """
    for source in inputs:
        if _is_within(source, path) or _is_within(path, source):
            raise OutputError(f"the output {path} is an input ({source})", "Choose another -o.")
    with guard_writes(path):
        target = follow(path)
        _check_parent(target.parent)
        leftovers.clear(target)
        _check_kind(target)
        if os.path.lexists(path) and not overwrite:
            raise OutputError(f"{path} exists already", "Pass --overwrite to replace it.")
        if not os.access(target, os.W_OK) and target.exists():
            raise OutputError(
                f"{path} may not be written to", "Give yourself the right to, or choose another -o."
            )


def check_replaceable(path: Path, *, directory: bool, names: Collection[str]) -> None:
    """Make sure that an output takes nothing away but what it has itself, or had before.

    Args:
        path: The output, which may exist.
        directory: Whether it will be a directory.
        names: Files that may go, by their paths below it, if it is a directory.

    Raises:
        OutputError: It would take something else away.
    """
    target = follow(path)
    try:
        mode = target.lstat().st_mode
    except FileNotFoundError:
        return
    if directory != stat.S_ISDIR(mode):
        kinds = ("a directory", "a file") if directory else ("a file", "a directory")
        raise OutputError(
            f"{path} is {kinds[1]} and is not replaced by {kinds[0]}", "Choose another -o."
        )
    strangers = sorted(_strangers(target, names)) if directory else []
    if strangers:
        raise OutputError(
            f"{path} is not replaced: it holds what ckptavg did not write, {first_few(strangers)}",
            "Move that elsewhere, or choose another -o.",
        )


def check_room(path: Path, needed: int) -> None:
    """Make sure that ``needed`` bytes fit on the disk that ``path`` will lie on.

    Raises:
        OutputError: They do not.
    """
    with guard_writes(path):
        free = shutil.disk_usage(follow(path).parent).free
    if needed > free:
        raise OutputError(
            f"{path} needs {needed / 1e9:.3f} GB where {free / 1e9:.3f} GB are free",
            "Make room or choose another disk with -o.",
        )


def _is_within(path: Path, directory: Path) -> bool:
    """Whether a path is another one or lies below it, links resolved."""
    resolved, other = (Path(os.path.realpath(one)) for one in (path, directory))
    return resolved == other or other in resolved.parents


def _check_parent(parent: Path) -> None:
    if not parent.is_dir():
        raise OutputError(f"the directory {parent} does not exist", "Create it first.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"the directory {parent} may not be written to", "Choose another -o.")


def _check_kind(path: Path) -> None:
    """Make sure that nothing, a file or a directory stands at a path, which can be renamed."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):  # still a link though followed: it leads to itself
        path.stat()
    for is_kind, kind in _NO_FILES.items():
        if is_kind(mode):
            raise OutputError(f"{path} is {kind} and is not replaced by a file", "Name a file.")
    if _is_mount_point(path):
        raise OutputError(
            f"{path} is a mount point, which cannot be replaced", "Name something below it."
        )


def _is_mount_point(path: Path) -> bool:
    """Whether a file system, or a part of one, is mounted at a path; containers mount files."""
    if os.path.ismount(path):
        return True
    if sys.platform != "linux" or not _MOUNTS.exists():
        return False
    lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    mounts = {line.split(" ")[_MOUNT_POINT] for line in lines}
    escaped = os.path.realpath(path)
    for character in "\\ \t\n":  # the backslash first, since it begins the others
        escaped = escaped.replace(character, f"\\{ord(character):03o}")
    return escaped in mounts


def _strangers(directory: Path, names: Collection[str]) -> Iterator[str]:
    """What in a directory is none of some files, nor a directory of theirs."""
    homes = {parent.as_posix() for name in names for parent in Path(name).parents}
    for folder, folders, files in os.walk(directory, onerror=_raise):
        below = Path(folder).relative_to(directory)
        for entries, known in ((folders, homes), (files, names)):
            for entry in entries:
                name = (below / entry).as_posix()
                if name not in known:
                    yield name


def _raise(error: OSError) -> None:
    raise error
