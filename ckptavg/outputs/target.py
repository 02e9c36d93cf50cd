"""Outputs: laid out and checked before any work, opened together, published when complete."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ckptavg.errors import CkptavgError, OutputError, UsageError, first_few
from ckptavg.errors.system import guard_reads, guard_writes
from ckptavg.formats import Checkpoint, is_checkpoint_directory, open_checkpoint
from ckptavg.formats.file_layout import Layout, OutputTensor
from ckptavg.formats.provenance import Provenance
from ckptavg.formats.registry import lay_out
from ckptavg.io.atomic import Publication
from ckptavg.io.output_paths import (
    check_no_input,
    check_replaceable,
    check_room,
    check_target,
    follow,
)
from ckptavg.io.paths import Location, RemotePath, check_output, is_url
from ckptavg.io.stamp import changed
from ckptavg.outputs import digests
from ckptavg.outputs.sinks import FileSink

log = logging.getLogger("ckptavg")
StateDict = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Target:
    """An output that has been checked: there is permission and room to write the output.

    Attributes:
        path: Path of the output.
        tensors: Tensors of the output, under bare names.
        layout: Files of the output, and the position of each tensor in the files.
        overwrite: True if an existing output is replaced.
        provenance: Provenance of the output.
        template: The checkpoint whose layout and configuration the output follows.
        replaceable: Files that may be removed from an existing directory at the path, by their
            paths below the directory.
    """

    path: Path
    tensors: Sequence[OutputTensor]
    layout: Layout
    overwrite: bool
    provenance: Provenance
    template: Checkpoint
    replaceable: frozenset[str] = frozenset()


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

    Raises:
        OutputError: The output may not be written, or there is too little room.
        UsageError: The path does not decide a format, or the path is a file although there are
            companions.
    """
    check_output(out)
    path = Path(out)
    input_paths = [str(name) for c in inputs for name in (c.path, *(f.path for f in c.files))]
    # A dict is an ordered set here: a run may be of thousands of files, most of them named twice.
    names = dict.fromkeys(Path(name) for name in input_paths if not is_url(name))
    _check_neighbours(path, [n for n in neighbours if n not in names])
    check_no_input(path, names)
    _check_no_run(path, is_run, overwrite=overwrite)
    check_target(path, overwrite=overwrite)
    # The provenance may be copied from an input, whose list of files is not this output's.
    provenance = provenance.with_files([])
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
    return Target(path, tensors, layout, overwrite, provenance, inputs[-1], replaceable)


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
            "Name a directory: -o with no suffix.",
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
        f"the output {path} is a file of the run that is averaged", "Choose another -o."
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
        "Name something new by -o.",
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
    return [] if provenance is None else provenance.files


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
            raise UsageError(f"{path} would lie within another output", "Give each its own name.")
    # Outputs on the same file system share its room: file system → bytes of the outputs on it.
    rooms: dict[int, int] = {}
    for path, target in zip(paths, targets, strict=True):
        with guard_writes(path):
            device = path.parent.stat().st_dev
        rooms[device] = rooms.get(device, 0) + target.layout.size
        check_room(path, rooms[device])


@contextmanager
def opened(targets: Sequence[Target]) -> Iterator[list[FileSink]]:
    """Open sinks for outputs, and publish the outputs once all are complete.

    Raises:
        OutputError: An output cannot be written. Outputs that are not published yet are dropped.
    """
    with ExitStack() as publications:
        written = [
            publications.enter_context(
                Publication(
                    t.path,
                    directory=t.layout.directory,
                    overwrite=t.overwrite,
                    replaceable=t.replaceable,
                )
            )
            for t in targets
        ]
        with ExitStack() as files:
            sinks = [
                files.enter_context(
                    FileSink(t.layout, publication.temporary, t.tensors, path=t.path)
                )
                for t, publication in zip(targets, written, strict=True)
            ]
            yield sinks
            for sink in sinks:
                sink.finish()
        _publish(targets, written)
    for note in dict.fromkeys(note for t in targets for note in t.layout.notes):
        log.info(note)


def _publish(targets: Sequence[Target], written: Sequence[Publication]) -> None:
    """Move outputs to the final paths.

    Raises:
        OutputError: An output cannot be published. The message names the published outputs.
    """
    # All paths are checked before any output is published. The first output needs no check here:
    # its own publication makes the check, before anything is published.
    for target in targets[1:]:
        if not target.overwrite and os.path.lexists(target.path):
            raise OutputError(
                f"{target.path} has appeared while it was being made",
                "Pass --overwrite (in Python overwrite=True) to replace it.",
            )
    published: list[str] = []
    for target, publication in zip(targets, written, strict=True):
        try:
            publication.publish()
        except OutputError as error:
            if published:
                error.message += f" ({first_few(published)} had been written)"
            raise
        published.append(str(target.path))


def fill(
    target: Target,
    file: FileSink | None,
    state_dict: Mapping[str, torch.Tensor],
    provenance: Provenance,
) -> Provenance:
    """Write tensors that are in memory into an opened output.

    Args:
        target: The output.
        file: The output's sink; None where another process writes the output.
        state_dict: The output's tensors, under bare names.
        provenance: The output's provenance. A digest in it is replaced by that of the tensors.

    Returns:
        The provenance as written.
    """
    if file is None:
        return provenance
    sink = digests.OutputDigest(file, target.tensors) if provenance.digest is not None else file
    for tensor in target.tensors:
        if tensor.tied_to is None and state_dict[tensor.name].numel():
            # The bytes are passed by their address: NumPy, the usual way, lacks bfloat16.
            values = state_dict[tensor.name].detach().cpu().contiguous()
            raw = (ctypes.c_uint8 * values.nbytes).from_address(values.data_ptr())
            sink.write(tensor.name, 0, memoryview(raw).cast("B"))
    if isinstance(sink, digests.OutputDigest):
        provenance = provenance.with_digest(sink.digest)
        rewrite_provenance(target, file, provenance)
    return provenance


def change_provenance(target: Target, file: FileSink | None, provenance: Provenance) -> Target:
    """Replace an output's provenance by one of any length, while no tensor has been written.

    Args:
        target: The output, opened.
        file: The output's sink; None where another process writes the output.
        provenance: The new provenance.

    Returns:
        The output with the new provenance and a layout for it.

    Raises:
        OutputError: There is not enough room.
    """
    if provenance == target.provenance:
        return target
    provenance = provenance.with_checksum()
    companions = target.layout.companions
    layout = _lay_out(target.path, target.tensors, provenance, target.template, companions)
    if file is not None:
        file.begin_anew(layout)
    return replace(target, layout=layout, provenance=provenance)


def rewrite_provenance(target: Target, sink: FileSink, provenance: Provenance) -> None:
    """Replace the provenance of an output that is being written by one of the same length.

    Args:
        target: The output, opened.
        sink: The output's sink.
        provenance: The new provenance.

    Raises:
        CheckpointError: The layout would be different now: the template has changed.
    """
    layout = lay_out(os.fspath(target.path), target.tensors, provenance, target.template)
    if not target.layout.fits(layout):
        raise changed(target.template.path)
    sink.replace(layout)
