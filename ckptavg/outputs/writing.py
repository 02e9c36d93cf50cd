"""Outputs while they are written: opened together, hashed, sealed and published when complete."""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch

from ckptavg.errors import OutputError, first_few
from ckptavg.formats import Checkpoint
from ckptavg.formats.file_layout import OutputTensor
from ckptavg.formats.provenance import Provenance
from ckptavg.io.atomic import Publication
from ckptavg.io.stamp import changed
from ckptavg.outputs.digests import InputDigests, Leaves, OutputDigest
from ckptavg.outputs.provenance import with_digests
from ckptavg.outputs.sinks import FileSink, Sink
from ckptavg.outputs.target import Target, lay_out_target, layout_notes

log = logging.getLogger("ckptavg")


class OutputWriter:
    """Writer of one output; the bytes are hashed where the output records digests.

    Args:
        target: The output.
        files: Sink of the output's files.

    Attributes:
        target: The output, with the provenance as written last.
        files: Sink of the output's files.
        sink: Sink for the output's tensors.
    """

    def __init__(self, target: Target, files: FileSink) -> None:
        self.target = target
        self.files = files
        self._hash: OutputDigest | None = None
        self.sink: Sink = files
        self._begin_hash()

    @property
    def leaves(self) -> list[Leaves]:
        """The digests of the output's leaves; empty where the output records no digests."""
        if self._hash is None:
            return []
        return [self._hash.leaves]

    def write_state_dict(self, state_dict: Mapping[str, torch.Tensor]) -> None:
        """Write tensors that are in memory. A second call replaces what the first has written.

        Args:
            state_dict: The output's tensors, under bare names.

        Raises:
            OutputError: The tensors cannot be written.
        """
        self._begin_hash()
        for tensor in self.target.tensors:
            if tensor.tied_to is None and state_dict[tensor.name].numel():
                # The bytes are passed by their address: NumPy, the usual way, lacks bfloat16.
                values = state_dict[tensor.name].detach().cpu().contiguous()
                raw = (ctypes.c_uint8 * values.nbytes).from_address(values.data_ptr())
                self.sink.write(tensor.name, 0, memoryview(raw).cast("B"))

    def change_provenance(self, provenance: Provenance) -> None:
        """Replace the provenance by one of any length, before tensors are written.

        Args:
            provenance: The new provenance.

        Raises:
            OutputError: There is not enough room.
        """
        provenance = provenance.with_checksum()
        if provenance == self.target.provenance:
            return
        layout = lay_out_target(self.target, provenance)
        self.files.begin_anew(layout)
        self.target = replace(self.target, layout=layout, provenance=provenance)

    def seal(self, inputs: InputDigests | None) -> None:
        """Store the digests once every tensor has been written, where the output records any.

        Args:
            inputs: The digests of the checkpoints that the output is made of.

        Raises:
            CheckpointError: The layout would be different now: the template has changed.
        """
        if self._hash is None:
            return
        target, provenance = self.target, self.target.provenance.with_digest(self._hash.digest)
        if inputs is not None and target.sources:
            provenance = with_digests(provenance, target.sources, inputs.of, self._hash.digest)
        layout = lay_out_target(target, provenance)
        if not target.layout.fits(layout):
            raise changed(target.template.path)
        self.files.replace(layout)
        self.target = replace(target, layout=layout, provenance=provenance)

    def _begin_hash(self) -> None:
        if self.target.provenance.digest is not None:
            self._hash = OutputDigest(self.files, self.target.tensors)
            self.sink = self._hash


@dataclass
class OpenTargets:
    """Outputs that are being written.

    Attributes:
        writers: One per output.
        inputs: Hashes the checkpoints that the outputs are made of; None where no output records
            digests of checkpoints.
    """

    writers: Sequence[OutputWriter]
    inputs: InputDigests | None

    @classmethod
    def of(cls, targets: Sequence[Target], files: Sequence[FileSink]) -> OpenTargets:
        """Join outputs and the sinks of their files.

        Args:
            targets: The outputs.
            files: One sink per output.
        """
        writers = [OutputWriter(t, f) for t, f in zip(targets, files, strict=True)]
        outputs = cls(writers, None)
        outputs.restart_input_digests()
        return outputs

    @property
    def sinks(self) -> list[Sink]:
        """The sinks for the tensors of each output."""
        return [writer.sink for writer in self.writers]

    @property
    def leaves(self) -> list[Leaves]:
        """The digests of the leaves of all inputs and outputs."""
        leaves: list[Leaves] = []
        if self.inputs is not None:
            leaves.append(self.inputs.leaves)
        for writer in self.writers:
            leaves += writer.leaves
        return leaves

    @property
    def provenances(self) -> list[Provenance]:
        """The provenance of each output, as written once the outputs are published."""
        return [writer.target.provenance for writer in self.writers]

    def restart_input_digests(self) -> None:
        """Forget the digests of inputs, as a read that failed may have hashed half of a tensor."""
        sources: list[Checkpoint] = []
        for writer in self.writers:
            sources += writer.target.sources
        self.inputs = InputDigests(sources) if sources else None


@contextmanager
def open_targets(
    targets: Sequence[Target], tensors: Sequence[Sequence[OutputTensor]] | None = None
) -> Iterator[OpenTargets]:
    """Open outputs for writing, and seal and publish them once all are complete.

    Args:
        targets: The outputs.
        tensors: The tensors of each output's files as they will be written; those of the targets
            where None.

    Raises:
        OutputError: An output cannot be written. Outputs that are not published yet are dropped.
        CheckpointError: A checkpoint that an output follows has changed.
    """
    with ExitStack() as stack:
        publications: list[Publication] = []
        for target in targets:
            publication = Publication(
                target.path,
                directory=target.layout.directory,
                overwrite=target.overwrite,
                replaceable=target.replaceable,
            )
            publications.append(stack.enter_context(publication))
        # Closed before publishing: network file systems report failed writes only on closing.
        with ExitStack() as open_files:
            files: list[FileSink] = []
            written = tensors or [target.tensors for target in targets]
            for target, publication, names in zip(targets, publications, written, strict=True):
                sink = FileSink(target.layout, publication.temporary, names, path=target.path)
                files.append(open_files.enter_context(sink))
            outputs = OpenTargets.of(targets, files)
            yield outputs
            for writer in outputs.writers:
                writer.seal(outputs.inputs)
                writer.files.finish()
        _publish(targets, publications)
    for note in layout_notes(targets):
        log.info(note)


def _publish(targets: Sequence[Target], publications: Sequence[Publication]) -> None:
    """Move outputs to the final paths.

    Raises:
        OutputError: An output cannot be published. The message names the published outputs.
    """
    # All paths are checked before any output is published. The first output needs no check here:
    # its own publication makes the check, before anything is published.
    for target in targets[1:]:
        if not target.overwrite and os.path.lexists(target.path):
            raise OutputError(
                f"{target.path} has appeared while the output was being written",
                "Pass `overwrite=True` to replace it.",
            )
    published: list[str] = []
    for target, publication in zip(targets, publications, strict=True):
        try:
            publication.publish()
        except OutputError as error:
            if published:
                error.message += f" ({first_few(published)} had been written)"
            raise
        published.append(str(target.path))
