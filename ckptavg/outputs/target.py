"""Outputs: laid out, and checked for permission and room, before any work."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ckptavg.errors import CkptavgError, OutputError, UsageError, first_few
from ckptavg.errors.system import guard_reads, guard_writes
from ckptavg.formats import Checkpoint, is_checkpoint_directory, open_checkpoint
from ckptavg.formats.file_layout import Layout, OutputTensor
from ckptavg.formats.provenance import Provenance
from ckptavg.formats.registry import lay_out
from ckptavg.io.output_paths import (
    check_no_input,
    check_replaceable,
    check_room,
    check_target,
    follow,
)
from ckptavg.io.paths import Location, RemotePath, check_output, is_url
from ckptavg.outputs.provenance import with_digests

log = logging.getLogger("ckptavg")


@dataclass(frozen=True)
class Target:
    """An output that has been checked: there is permission and room to write the output.

    Attributes:
        out: Path of the output as given. The suffix or a slash at the end decides the format.
        tensors: Tensors of the output, under bare names.
        layout: Files of the output, and the position of each tensor in the files.
        overwrite: True if an existing output is replaced.
        provenance: Provenance of the output.
        template: The checkpoint whose layout and configuration the output follows.
        replaceable: Files that may be removed from an existing directory at the path, by their
            paths below the directory.
        sources: The checkpoints that the provenance lists, in its order, where the output records
            digests of them.
    """

    out: str
    tensors: Sequence[OutputTensor]
    layout: Layout
    overwrite: bool
    provenance: Provenance
    template: Checkpoint
    replaceable: frozenset[str] = frozenset()
    sources: Sequence[Checkpoint] = ()

    @property
    def path(self) -> Path:
        """Path of the output."""
        return Path(self.out)


def prepare(
    out: str | os.PathLike[str],
    tensors: Sequence[OutputTensor],
    provenance: Provenance,
    inputs: Sequence[Checkpoint],
    *,
    is_run: Callable[[Path], bool],
    companions: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    neighbours: Iterable[Location] = (),
    hashed: Sequence[Checkpoint] = (),
) -> Target:
    """Lay an output out, and check permission and room before any work.

    Args:
        out: Path of the output. The suffix decides the format, see ``lay_out``.
        tensors: Tensors of the output, under bare names.
        provenance: Provenance of the output.
        inputs: The checkpoints that the output is made of. The output must not replace an input.
            The output follows the layout and configuration of the last input.
        is_run: Returns True for a directory with checkpoints of a training, which must not be
            replaced.
        companions: Contents of files that have to stand beside the weights, by name.
        overwrite: Replace an existing output.
        neighbours: Files of the inputs' runs, selected or not. Of these files the output may
            replace only an average.
        hashed: The checkpoints that the provenance lists, in its order, to record digests of these
            and of the output; empty to record none.

    Raises:
        OutputError: The output may not be written, or there is too little room.
        UsageError: The path does not decide a format, or the path is a file although there are
            companions.
    """
    check_output(out)
    path = Path(out)
    names = _local_files(inputs)
    _check_neighbours(path, [n for n in neighbours if n not in names])
    check_no_input(path, names)
    _check_no_run(path, is_run, overwrite=overwrite)
    check_target(path, overwrite=overwrite)
    # The provenance may be copied from an input, whose list of files is not this output's.
    provenance = provenance.with_files([])
    if hashed:
        provenance = with_digests(provenance, hashed)
    layout = _lay_out(out, tensors, provenance, inputs[-1], companions or {})
    replaceable = frozenset[str]()
    if layout.directory:
        provenance = provenance.with_files(layout.names).with_checksum()
        # The provenance lists the files, whose names only a first layout gives: so lay out again.
        layout = _lay_out(out, tensors, provenance, inputs[-1], companions or {})
        replaceable = frozenset([*layout.names, *_recorded_files(path)])
    check_replaceable(path, directory=layout.directory, names=replaceable)
    check_room(path, layout.size)
    if path.is_symlink():
        log.info("%s is a link: %s is written", path, follow(path))
    return Target(
        os.fspath(out), tensors, layout, overwrite, provenance, inputs[-1], replaceable, hashed
    )


def layout_notes(targets: Iterable[Target]) -> list[str]:
    """List the notes on parts of inputs that outputs lack, each note once."""
    notes: dict[str, None] = {}
    for target in targets:
        notes |= dict.fromkeys(target.layout.notes)
    return list(notes)


def _local_files(inputs: Iterable[Checkpoint]) -> dict[Path, None]:
    """List the paths of inputs and of their files, without URLs."""
    # A dict is an ordered set here: a run may be of thousands of files, most of them named twice.
    names: dict[Path, None] = {}
    for checkpoint in inputs:
        for name in (str(checkpoint.path), *(stamp.path for stamp in checkpoint.files)):
            if not is_url(name):
                names[Path(name)] = None
    return names


def lay_out_target(target: Target, provenance: Provenance) -> Layout:
    """Lay an output out anew with another provenance.

    Args:
        target: The output.
        provenance: The new provenance.

    Raises:
        CheckpointError: The checkpoint that the output follows cannot be read.
    """
    companions = target.layout.companions
    return _lay_out(target.out, target.tensors, provenance, target.template, companions)


def _lay_out(
    out: str | os.PathLike[str],
    tensors: Sequence[OutputTensor],
    provenance: Provenance,
    template: Checkpoint,
    companions: Mapping[str, bytes],
) -> Layout:
    with guard_reads(template.path):
        layout = lay_out(os.fspath(out), tensors, provenance, template)
    if companions and not layout.directory:
        raise UsageError(
            f"{out} would be a file, but {first_few(list(companions))} has to stand beside the "
            "weights",
            "Name a directory: `out` without a suffix.",
        )
    layout.put(companions)
    return layout


def _check_neighbours(path: Path, neighbours: Iterable[Location]) -> None:
    """Make sure that an output does not replace a file of the runs that the inputs are from.

    An average that ckptavg wrote there may be replaced: commonly the next average replaces it.

    Raises:
        OutputError: The output would replace a file of a run.
    """
    if not os.path.lexists(path):
        return
    real_path = os.path.realpath(path)
    if all(isinstance(n, RemotePath) or os.path.realpath(n) != real_path for n in neighbours):
        return
    with suppress(CkptavgError):
        if open_checkpoint(real_path).is_average:
            return
    raise OutputError(
        f"the output {path} is a file of the run that is averaged", "Choose another `out`."
    )


def _check_no_run(path: Path, is_run: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Make sure that an output does not replace a run, as when input and output are swapped.

    The directory of a single model may be replaced when ``overwrite`` asks for that.

    Raises:
        OutputError: The path is a directory of checkpoints that ckptavg did not write.
    """
    if not path.is_dir() or _recorded_files(path):
        return
    is_model = is_checkpoint_directory(path)
    if is_model and overwrite:
        return
    try:
        if not (is_model or is_run(path)):
            return
    except OSError:
        # Another process may be replacing the directory. Later checks tell more about the cause.
        return
    raise OutputError(
        f"{path} is a directory that holds checkpoints, and no output of ckptavg: were the output "
        "and the input swapped?",
        "Choose another `out`.",
    )


def _recorded_files(path: Path) -> list[str]:
    """List the files of an existing directory that the directory's provenance records."""
    if not path.is_dir():
        return []
    try:
        provenance = open_checkpoint(path).provenance
    except CkptavgError:
        # ckptavg did not write this directory.
        return []
    if provenance is None:
        return []
    return provenance.files


def check_together(targets: Sequence[Target]) -> None:
    """Make sure that several outputs can be written at once.

    Raises:
        UsageError: Two outputs have the same path, or an output is below another output.
        OutputError: There is too little room for all outputs together.
    """
    paths = [follow(target.path) for target in targets]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(f"two averages would be written to {path}", "Give each its own name.")
        if set(path.parents) & set(paths):
            raise UsageError(f"{path} would be within another output", "Give each its own name.")
    # Outputs on the same file system share its room: file system → bytes of the outputs on it.
    rooms: dict[int, int] = {}
    for path, target in zip(paths, targets, strict=True):
        with guard_writes(path):
            # That of the directory, since the output itself need not exist.
            device = path.parent.stat().st_dev
        rooms[device] = rooms.get(device, 0) + target.layout.size
        check_room(path, rooms[device])
