"""Outputs: laid out and checked before any work, opened together, published when all are whole."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ckptavg._version import __version__
from ckptavg.errors import CkptavgError, OutputError, UsageError, first_few
from ckptavg.errors.system import guard_reads, guard_writes
from ckptavg.formats import Checkpoint, is_checkpoint_directory, open_checkpoint
from ckptavg.formats.file_layout import Layout, OutputTensor
from ckptavg.formats.registry import lay_out
from ckptavg.formats.running_statistics import Statistics
from ckptavg.io import paths as storage
from ckptavg.io.atomic import Publication
from ckptavg.io.output_paths import (
    check_no_input,
    check_replaceable,
    check_room,
    check_target,
    follow,
)
from ckptavg.io.paths import Location, RemotePath
from ckptavg.io.stamp import changed
from ckptavg.outputs import digests
from ckptavg.outputs.sinks import FileSink

log = logging.getLogger("ckptavg")
StateDict = dict[str, torch.Tensor]
_FILES = "files"  # in the provenance of a directory


@dataclass(frozen=True)
class Target:
    """An output that may and can be written.

    Attributes:
        path: Where.
        tensors: What it will hold.
        layout: What lies where.
        overwrite: Whether an existing one is replaced.
        made: Its provenance.
        template: The checkpoint that it is laid out like.
        replaceable: Files that an existing directory may lose, by their paths below it.
    """

    path: Path
    tensors: Sequence[OutputTensor]
    layout: Layout
    overwrite: bool
    made: Mapping[str, Any]
    template: Checkpoint
    replaceable: frozenset[str] = frozenset()


def prepare(
    out: str | os.PathLike[str],
    tensors: Sequence[OutputTensor],
    made: Mapping[str, Any],
    inputs: Sequence[Checkpoint],
    *,
    is_run: Callable[[Path], bool],
    companions: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
    neighbours: Iterable[Location] = (),
) -> Target:
    """Lay an output out and make sure that it may and can be written.

    Args:
        out: A path whose suffix decides the format, see ``lay_out``.
        tensors: What it will hold, under bare names.
        made: Its provenance.
        inputs: The checkpoints that it is made of; none of them may be the output, and the last
            one's layout and configuration are followed.
        is_run: Tells a directory with checkpoints of a training, which is not to be replaced.
        companions: Contents of files that have to stand beside the weights, by name.
        overwrite: Replace an existing output.
        neighbours: Files of their runs, taken or not; of these only an average may be replaced.

    Raises:
        OutputError: It may not be written, or there is too little room.
        UsageError: The path does not say how, or is a file where there are companions.
    """
    storage.check_output(out)
    path = Path(out)
    places = [str(name) for c in inputs for name in (c.path, *(f.path for f in c.files))]
    # A dict is an ordered set here: a run may be of thousands of files, most of them named twice.
    names = dict.fromkeys(Path(place) for place in places if not storage.is_url(place))
    _check_neighbours(path, [place for place in neighbours if place not in names])
    check_no_input(path, names)
    _check_no_run(path, is_run, overwrite=overwrite)
    check_target(path, overwrite=overwrite)
    made = {key: value for key, value in made.items() if key != _FILES}
    layout = _lay_out(out, tensors, made, inputs[-1], companions or {})
    replaceable = frozenset[str]()
    if layout.directory:
        made |= {_FILES: sorted(layout.names)}
        if digests.is_recorded(made):
            made = digests.sealed(made)
        layout = _lay_out(out, tensors, made, inputs[-1], companions or {})
        replaceable = frozenset([*layout.names, *_recorded_files(path)])
    check_replaceable(path, directory=layout.directory, names=replaceable)
    check_room(path, layout.size)
    if path.is_symlink():
        log.info("%s is a link: %s is written", path, follow(path))
    return Target(path, tensors, layout, overwrite, made, inputs[-1], replaceable)


def _lay_out(
    out: str | os.PathLike[str],
    tensors: Sequence[OutputTensor],
    made: Mapping[str, Any],
    template: Checkpoint,
    companions: Mapping[str, bytes],
) -> Layout:
    with guard_reads(template.path):
        layout = lay_out(os.fspath(out), tensors, made, template)
    if companions and not layout.directory:
        raise UsageError(
            f"{out} would be a file, but {first_few(list(companions))} has to stand beside the "
            "weights",
            "Name a directory: -o with no suffix.",
        )
    layout.put(companions)
    return layout


def _check_neighbours(path: Path, neighbours: Iterable[Location]) -> None:
    """Make sure that nothing of the runs is replaced that the output is not made of.

    An average that ckptavg wrote among them may be: the next one commonly takes its place.
    """
    if not os.path.lexists(path):
        return
    place = os.path.realpath(path)
    if all(isinstance(n, RemotePath) or os.path.realpath(n) != place for n in neighbours):
        return
    with suppress(CkptavgError):
        if open_checkpoint(place).is_average:
            return
    raise OutputError(
        f"the output {path} is a file of the run that is averaged", "Choose another -o."
    )


def _check_no_run(path: Path, is_run: Callable[[Path], bool], *, overwrite: bool) -> None:
    """Make sure that no run stands at an output's path, where somebody has swapped the two.

    A model's own directory may be replaced, but not at a hint of ours.

    Raises:
        OutputError: Checkpoints lie there that ckptavg did not write.
    """
    if not path.is_dir() or _recorded_files(path):
        return
    is_model = is_checkpoint_directory(path)
    if is_model and overwrite:
        return
    try:
        if not (is_model or is_run(path)):
            return
    except OSError:  # as of one that another process replaces; what is to be written tells more
        return
    raise OutputError(
        f"{path} is a directory that holds checkpoints, and no output of ckptavg: were the output "
        "and the input swapped?",
        "Name something new by -o.",
    )


def _recorded_files(path: Path) -> list[str]:
    """Files of an existing directory that ckptavg wrote, by its own record."""
    if not path.is_dir():
        return []
    try:
        made = open_checkpoint(path).provenance or {}
    except CkptavgError:  # none of ours
        return []
    names = made.get(_FILES)
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def check_together(targets: Sequence[Target]) -> None:
    """Make sure that several outputs can be written at once.

    Raises:
        UsageError: Two of them are one.
        OutputError: There is too little room for all.
    """
    paths = [follow(target.path) for target in targets]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(f"two averages would be written to {path}", "Give each its own name.")
        if set(path.parents) & set(paths):
            raise UsageError(f"{path} would lie within another output", "Give each its own name.")
    rooms: dict[int, int] = {}
    for path, target in zip(paths, targets, strict=True):
        with guard_writes(path):
            device = path.parent.stat().st_dev
        rooms[device] = rooms.get(device, 0) + target.layout.size
        check_room(path, rooms[device])


@contextmanager
def opened(targets: Sequence[Target]) -> Iterator[list[FileSink]]:
    """Sinks for some outputs, which are published once all of them have been filled.

    Raises:
        OutputError: One of them cannot be written; what is not published by then never will be.
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
    """Put outputs in their places; an error says which were there before it."""
    for target in targets[1:]:  # of the first it is seen while nothing is in its place
        if not target.overwrite and os.path.lexists(target.path):
            raise OutputError(
                f"{target.path} has appeared while it was being made",
                "Pass --overwrite (in Python overwrite=True) to replace it.",
            )
    done: list[str] = []
    for target, publication in zip(targets, written, strict=True):
        try:
            publication.publish()
        except OutputError as error:
            if done:
                error.message += f" ({first_few(done)} had been written)"
            raise
        done.append(str(target.path))


def fill(
    target: Target,
    file: FileSink | None,
    state_dict: Mapping[str, torch.Tensor],
    made: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Write tensors that are in memory into an opened output.

    Args:
        target: The output.
        file: Its sink; None where another process writes it.
        state_dict: Its tensors, under bare names.
        made: Its provenance. A digest in it stands for that of what is written.

    Returns:
        The provenance as written.
    """
    if file is None:
        return made
    sink = digests.OutputDigest(file, target.tensors) if digests.is_recorded(made) else file
    for tensor in target.tensors:
        if tensor.tied_to is None and state_dict[tensor.name].numel():
            values = state_dict[tensor.name].detach().cpu().contiguous()
            raw = (ctypes.c_uint8 * values.nbytes).from_address(values.data_ptr())
            sink.write(tensor.name, 0, memoryview(raw).cast("B"))
    if isinstance(sink, digests.OutputDigest):
        made = digests.sealed({**made, digests.DIGEST: sink.digest})
        rewrite_provenance(target, file, made)
    return made


def change_provenance(target: Target, file: FileSink | None, made: Mapping[str, Any]) -> Target:
    """Give an output another provenance, of any length, while it is opened and still empty.

    Args:
        target: The output.
        file: Its sink; None where another process writes it.
        made: The provenance.

    Raises:
        OutputError: There is no room for it.
    """
    if made == target.made:
        return target
    if digests.is_recorded(made):
        made = digests.sealed(made)
    companions = target.layout.companions
    layout = _lay_out(target.path, target.tensors, made, target.template, companions)
    if file is not None:
        file.begin_anew(layout)
    return replace(target, layout=layout, made=made)


def rewrite_provenance(target: Target, sink: FileSink, made: Mapping[str, Any]) -> None:
    """Put another provenance of the same length into an output that is being written.

    Raises:
        CheckpointError: It would be laid out otherwise now: what it follows has changed.
    """
    layout = lay_out(os.fspath(target.path), target.tensors, made, target.template)
    if not target.layout.fits(layout):
        raise changed(target.template.path)
    sink.replace(layout)


def provenance(
    scheme: str,
    checkpoints: Sequence[Checkpoint],
    coefficients: Sequence[float],
    statistics: Statistics,
    ties: Sequence[Sequence[str]] = (),
    base: Checkpoint | None = None,
) -> dict[str, Any]:
    """How an output was made, as plain values for JSON.

    Returns:
        ``version``, ``scheme``, ``checkpoints`` (each with ``path``, ``step``, ``coefficient``,
        ``size`` in bytes and ``mtime`` in seconds), ``bn``, and where there are any, ``bn_layers``
        (the layers that ``bn`` does not hold for, by kind), ``base`` (the checkpoint that gave the
        rest, if it is none of them) and ``tied`` names. A directory's has ``files`` too, the names
        of all that was written.
    """
    made: dict[str, Any] = {
        "version": __version__,
        "scheme": scheme,
        "checkpoints": [
            _account(c, step=c.step, coefficient=coefficient)
            for c, coefficient in zip(checkpoints, coefficients, strict=True)
        ],
        **statistics.plain,
    }
    made |= {} if base is None else {"base": _account(base)}
    return made | ({"tied": [list(group) for group in ties]} if ties else {})


def _account(checkpoint: Checkpoint, **part: float | None) -> dict[str, Any]:
    """What provenance says of a checkpoint, and of its part in the output."""
    return {
        "path": storage.without_secrets(str(checkpoint.path)),
        **part,
        "size": checkpoint.size,
        "mtime": max(stamp.mtime_ns for stamp in checkpoint.files) / 1e9,
    }
