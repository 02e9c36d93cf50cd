"""The paths of outputs, and the checks before anything there is written or replaced."""

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

# Kinds that a rename would replace by a file, with whatever reads or writes them cut off.
_NO_FILES = {
    stat.S_ISCHR: "a device",
    stat.S_ISBLK: "a device",
    stat.S_ISFIFO: "a pipe",
    stat.S_ISSOCK: "a socket",
}
_MOUNTS = Path("/proc/self/mountinfo")
_MOUNT_POINT = 4  # field of a line there


def follow(path: Path) -> Path:
    """Return the absolute path to write for an output. A link is written through, as by torch."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()


def check_target(path: Path, *, overwrite: bool, inputs: Iterable[Path] = ()) -> None:
    """Make sure that an output may be written, before any work begins.

    Leftovers of dead runs are cleared first: they take room, or are the output itself.

    Args:
        path: The output.
        overwrite: True if an existing output may be replaced.
        inputs: Checkpoints that are being read; none of them may be touched.

    Raises:
        OutputError: The output may not be written.
    """
    check_no_input(path, inputs)
    with guard_writes(path):
        target = follow(path)
        _check_parent(target.parent)
        # Before any look at the target: a run that died within a swap has set it aside.
        temporaries.clear(target)
        _check_kind(target)
        if os.path.lexists(path) and not overwrite:
            raise OutputError(
                f"{path} exists already",
                "Pass --overwrite (in Python overwrite=True) to replace it.",
            )
        if not os.access(target, os.W_OK) and target.exists():
            raise OutputError(
                f"{path} may not be written to", "Give yourself the right to, or choose another -o."
            )


def check_no_input(path: Path, inputs: Iterable[Path]) -> None:
    """Make sure that an output is none of its inputs, within none, and holds none.

    Raises:
        OutputError: It is.
    """
    output = _resolve(path)
    for source in inputs:
        resolved = _resolve(source)
        if _is_within(resolved, output) or _is_within(output, resolved):
            raise OutputError(f"the output {path} is an input ({source})", "Choose another -o.")


def check_replaceable(path: Path, *, directory: bool, names: Collection[str]) -> None:
    """Make sure that an output replaces nothing but files that ckptavg writes.

    Args:
        path: The output, which may exist.
        directory: True if the output will be a directory.
        names: Paths below a directory of the files that may be replaced.

    Raises:
        OutputError: Something else would be lost.
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
    """Make sure that the disk has room for an output.

    Args:
        path: The output.
        needed: Its bytes.

    Raises:
        OutputError: The disk has not.
    """
    with guard_writes(path):
        free = shutil.disk_usage(follow(path).parent).free
    if needed > free:
        raise OutputError(
            f"{path} needs {size_text(needed)} where {size_text(free)} are free, "
            f"{size_text(needed - free)} too little",
            "Make room or choose another disk with -o.",
        )


def _resolve(path: Path) -> str:
    """Return a path with links resolved, and with a separator at its end."""
    return os.path.realpath(path).rstrip(os.sep) + os.sep


def _is_within(path: str, directory: str) -> bool:
    """Tell whether a resolved path is a directory or lies below it."""
    return path.startswith(directory)


def _check_parent(parent: Path) -> None:
    if not parent.is_dir():
        raise OutputError(f"the directory {parent} does not exist", "Create it first.")
    if not os.access(parent, os.W_OK):
        raise OutputError(f"the directory {parent} may not be written to", "Choose another -o.")


def _check_kind(path: Path) -> None:
    """Make sure that there is nothing at a path, or a file or a directory that can be renamed."""
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    # Still a link though followed: it leads to itself, and the system's own error says so.
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
    """Tell whether a file system, or a part of one, is mounted at a path."""
    # It looks at directories only, while containers mount single files too.
    if os.path.ismount(path):
        return True
    if sys.platform != "linux" or not _MOUNTS.exists():
        return False
    lines = _MOUNTS.read_text(errors="surrogateescape").splitlines()
    mounts = {line.split(" ")[_MOUNT_POINT] for line in lines}
    escaped = os.path.realpath(path)
    # The kernel writes these in octal. The backslash first, since it begins the others.
    for character in "\\ \t\n":
        escaped = escaped.replace(character, f"\\{ord(character):03o}")
    return escaped in mounts


def _strangers(directory: Path, names: Collection[str]) -> Iterator[str]:
    """List the paths below a directory except some files and the directories of those."""
    homes = {parent.as_posix() for name in names for parent in Path(name).parents}
    for folder, folders, files in os.walk(directory, onerror=_raise):
        below = Path(folder).relative_to(directory)
        for entries, expected in ((folders, homes), (files, names)):
            for entry in entries:
                name = (below / entry).as_posix()
                if name not in expected:
                    yield name


def _raise(error: OSError) -> None:
    # What another run takes away meanwhile cannot be lost by this one.
    if not isinstance(error, FileNotFoundError):
        raise error
