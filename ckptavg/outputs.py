"""Outputs: laid out and checked before any work, opened together, published when all are whole."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ckptavg import digests
from ckptavg.errors import CheckpointError, OutputError, UsageError, first_few
from ckptavg.formats import Checkpoint, storage
from ckptavg.formats.layout import lay_out
from ckptavg.formats.output import Layout, OutputTensor
from ckptavg.formats.publish import Publication, check_room, check_target
from ckptavg.formats.writing import FileSink
from ckptavg.plan import copy_plan
from ckptavg.version import __version__

log = logging.getLogger("ckptavg")
StateDict = dict[str, torch.Tensor]


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
    """

    path: Path
    tensors: Sequence[OutputTensor]
    layout: Layout
    overwrite: bool
    made: Mapping[str, Any]
    template: Checkpoint


def prepare(
    out: str | os.PathLike[str],
    tensors: Sequence[OutputTensor],
    made: Mapping[str, Any],
    inputs: Sequence[Checkpoint],
    *,
    companions: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Target:
    """Lay an output out and make sure that it may and can be written.

    Args:
        out: A path whose suffix decides the format, see ``lay_out``.
        tensors: What it will hold, under bare names.
        made: Its provenance.
        inputs: The checkpoints that it is made of; none of them may be the output, and the last
            one's layout and configuration are followed.
        companions: Contents of files that have to stand beside the weights, by name.
        overwrite: Replace an existing output.

    Raises:
        OutputError: It may not be written, or there is too little room.
        UsageError: The path does not say how, or is a file where there are companions.
    """
    storage.check_output(out)
    places = [str(name) for c in inputs for name in (c.path, *(f.path for f in c.files))]
    names = [Path(place) for place in places if not storage.is_url(place)]
    check_target(Path(out), overwrite=overwrite, inputs=names)
    layout = lay_out(os.fspath(out), tensors, made, inputs[-1])
    if companions and not layout.directory:
        raise UsageError(
            f"{out} would be a file, but {first_few(list(companions))} has to stand beside the "
            "weights",
            "Name a directory: -o with no suffix.",
        )
    layout.companions.update(companions or {})
    check_room(Path(out), layout.size)
    return Target(Path(out), tensors, layout, overwrite, made, inputs[-1])


def prepare_copy(
    checkpoint: Checkpoint,
    out: str | os.PathLike[str],
    made: Mapping[str, Any],
    *,
    overwrite: bool,
) -> Target:
    """As ``prepare``, for a checkpoint whose tensors are all taken."""
    return prepare(out, copy_plan(checkpoint).outputs, made, [checkpoint], overwrite=overwrite)


def check_together(targets: Sequence[Target]) -> None:
    """Make sure that several outputs can be written at once.

    Raises:
        UsageError: Two of them are one.
        OutputError: There is too little room for all.
    """
    paths = [target.path.absolute() for target in targets]
    for path in paths:
        if paths.count(path) > 1:
            raise UsageError(f"two averages would be written to {path}", "Give each its own name.")
        if set(path.parents) & set(paths):
            raise UsageError(f"{path} would lie within another output", "Give each its own name.")
    rooms: dict[int, int] = {}
    for path, target in zip(paths, targets, strict=True):
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
                Publication(t.path, directory=t.layout.directory, overwrite=t.overwrite)
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
                "Pass --overwrite to replace it.",
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


def rewrite_provenance(target: Target, sink: FileSink, made: Mapping[str, Any]) -> None:
    """Put another provenance of the same length into an output that is being written.

    Raises:
        CheckpointError: It would be laid out otherwise now: what it follows has changed.
    """
    layout = lay_out(os.fspath(target.path), target.tensors, made, target.template)
    if not target.layout.fits(layout):
        raise CheckpointError(
            f"{target.template.path} changed while it was being read",
            "Wait until the training run has finished writing it, then try again.",
        )
    sink.replace(layout)


def provenance(
    scheme: str,
    checkpoints: Sequence[Checkpoint],
    coefficients: Sequence[float],
    batchnorm: str,
    ties: Sequence[Sequence[str]] = (),
    base: Checkpoint | None = None,
) -> dict[str, Any]:
    """How an output was made, as plain values for JSON.

    Returns:
        ``version``, ``scheme``, ``checkpoints`` (each with ``path``, ``step``, ``coefficient``,
        ``size`` in bytes and ``mtime`` in seconds), ``bn``, and where there are any, ``base`` (the
        checkpoint that gave the rest, if it is none of them) and ``tied`` names.
    """
    made: dict[str, Any] = {
        "version": __version__,
        "scheme": scheme,
        "checkpoints": [
            _account(c, step=c.step, coefficient=coefficient)
            for c, coefficient in zip(checkpoints, coefficients, strict=True)
        ],
        "bn": batchnorm,
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
