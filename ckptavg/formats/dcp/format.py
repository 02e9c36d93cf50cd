"""The format of ``torch.distributed.checkpoint``, as an entry of the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptavg.formats import state_dict, training_record
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.formats.dcp import reader
from ckptavg.formats.file_layout import Layout, OutputTensor
from ckptavg.formats.format import DirectoryFormat, Unfinished
from ckptavg.formats.huggingface.trainer_state import find_record
from ckptavg.formats.parts import (
    Part,
    build_checkpoint,
    find_provenance,
    note_non_tensors,
    select,
    tensor_names,
)
from ckptavg.formats.safe_pickle.values import Sharded
from ckptavg.io.paths import Location

if TYPE_CHECKING:
    from ckptavg.formats.lightning import Meta


class Distributed(DirectoryFormat):
    """Directories of ``torch.distributed.checkpoint``."""

    name = "distributed"
    label = "torch.distributed.checkpoint directories"
    is_written = True

    def detects(self, directory: Location) -> bool:
        """Return True if a directory holds the metadata of the format."""
        return reader.is_distributed(directory)

    def open(self, directory: Location, key: str | None) -> Checkpoint | None:
        """Open a directory by its metadata."""
        if not reader.is_distributed(directory):
            return None
        part = self._read(directory, key)
        record = find_record(directory) or part.record
        return build_checkpoint(directory, self, [part], record)

    def _read(self, directory: Location, key: str | None) -> Part:
        """Read the metadata, and find the weights in the saved object."""
        opened = reader.read(directory)
        weights = state_dict.find_weights(str(directory), opened.tree, key)
        sharded = select(weights.entry, Sharded)
        tensors = {name: opened.tensor(tensor) for name, tensor in sharded.items()}
        return Part(
            format=self,
            stamps=opened.stamps_of(tensors),
            tensors=tensors,
            refused={},
            record=training_record.from_tree(opened.tree, weights.record_key),
            provenance=find_provenance(opened.tree),
            key=weights.key,
            networks={name: tensor_names(entry) for name, entry in weights.networks.items()},
            notes=(*weights.notes, *note_non_tensors(weights.entry)),
            other_entries=state_dict.describe_other_entries(opened.tree, weights.paths),
        )

    def owns(self, name: str) -> bool:
        """Return True for the name of a shard."""
        return name.lower().endswith(reader.SUFFIX)

    def is_part(self, path: Location) -> bool:
        """Return True for a shard."""
        return path.suffix == reader.SUFFIX

    def why_unfinished(self, directory: Location) -> Unfinished | None:
        """Describe a directory of shards without metadata."""
        if not any(directory.glob(f"*{reader.SUFFIX}")):
            return None
        return Unfinished(
            f"holds parts of one model but no {reader.METADATA}, which is written last and says "
            "how they fit"
        )

    def read_meta(self, checkpoint: Checkpoint, *, plain: bool = False) -> Meta | None:
        """Read Lightning's file beside the shards."""
        from ckptavg.formats import lightning  # noqa: PLC0415 - needs torch

        return lightning.read_meta(checkpoint.path, plain=plain)

    def read_settings(self, checkpoint: Checkpoint) -> Mapping[Any, Any]:
        """Read the hyperparameters that Lightning keeps beside the shards."""
        meta = self.read_meta(checkpoint)
        return {} if meta is None else meta.entries

    def lay_out(
        self, tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint
    ) -> Layout:
        """Plan a directory like the last input.

        Args:
            tensors: Tensors of the output, under bare names.
            provenance: Record of how the output was made, as JSON.
            template: The last input.
        """
        from ckptavg.formats.dcp import writer  # noqa: PLC0415 - loads torch's, which is large

        return writer.lay_out(tensors, provenance, template)


DISTRIBUTED = Distributed()
