"""The format of ``torch.save``, as an entry of the registry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptavg.errors import CheckpointError
from ckptavg.formats import state_dict, training_record, tree
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.formats.damage import damaged
from ckptavg.formats.deepspeed import tags
from ckptavg.formats.file_layout import Layout, OutputTensor
from ckptavg.formats.format import FileFormat
from ckptavg.formats.parts import (
    Part,
    find_provenance,
    note_non_tensors,
    select,
    tensor_names,
)
from ckptavg.formats.provenance import Provenance
from ckptavg.formats.safe_pickle.values import (
    MalformedPickle,
    OrderedEntries,
    Refused,
    TensorView,
)
from ckptavg.formats.torch_save import legacy_reader, zip_reader
from ckptavg.io.paths import Location
from ckptavg.io.stamp import FileStamp

_ARRAYS = "the weights are NumPy arrays, which an output has as tensors of torch's"
# Byte offset of the name in a zip entry.
_ENTRY_NAME = 30
# Ends of the name of a file's first zip entry.
_FIRST_ENTRIES = (b"/data.pkl", b"/version", b"/.format_version", b"/byteorder")


class TorchSave(FileFormat):
    """Files of ``torch.save``: zip files, and the pickles of versions before 1.6."""

    name = "torch"
    label = "torch.save"
    suffixes = (".pt", ".pth", ".ckpt", ".bin", ".pt.tar", ".pth.tar", ".ckpt.tar")
    rare_suffixes = (".tar", ".pyth")
    output_suffixes = (".pt", ".pth", ".ckpt", ".bin", ".tar")

    def looks_like(self, start: bytes) -> bool:
        """Return True for any zip file, and for the magic number of older files."""
        return zip_reader.looks_like(start)

    def begins(self, start: bytes) -> bool:
        """Return True if the first entry of a zip file is one that ``torch.save`` writes."""
        if not start.startswith(zip_reader.START):
            return start.startswith(legacy_reader.START)
        # The length of the name is a 16-bit number in the header of the zip entry.
        size = int.from_bytes(start[26:28], "little")
        return start[_ENTRY_NAME : _ENTRY_NAME + size].endswith(_FIRST_ENTRIES)

    def read(self, path: Location, stamp: FileStamp, key: str | None) -> Part:
        """Read the pickle of a file, and find the weights in the saved object.

        Args:
            path: The file.
            stamp: The file's stamp.
            key: Dotted path of the entry that holds the weights; None to find the entry.
        """
        opened = zip_reader.read(path)
        if path.suffix == ".safetensors":
            raise CheckpointError(
                f"{path} was written by torch.save, not as safetensors", f"Call it {path.stem}.pt."
            )
        try:
            weights = state_dict.find_weights(str(path), opened.tree, key)
        except MalformedPickle as error:
            raise damaged(path, str(error)) from error
        views = select(weights.entry, TensorView)
        tensors = {name: opened.tensor(view) for name, view in views.items()}
        tags.refuse_placeholders(path, opened.tree, tensors)
        refused = select(weights.entry, Refused)
        notes = [*weights.notes, *note_non_tensors(weights.entry)]
        if opened.arrays:
            notes.append(_ARRAYS)
        return Part(
            format=self,
            stamps=(stamp,),
            tensors=tensors,
            refused={name: value.why for name, value in refused.items()},
            record=training_record.from_tree(
                opened.tree, weights.record_key, path.name, opened.number
            ),
            provenance=_find_provenance(opened, weights.key),
            key=weights.key,
            networks={name: tensor_names(entry) for name, entry in weights.networks.items()},
            notes=tuple(notes),
            other_entries=state_dict.describe_other_entries(opened.tree, weights.paths),
        )

    def read_settings(self, checkpoint: Checkpoint) -> Mapping[Any, Any]:
        """Read the entries beside the weights, as plain values."""
        from ckptavg.formats.safe_pickle.allowlist import CarryOver  # noqa: PLC0415 - needs torch

        # Without a key the file is the state dict itself, and nothing is beside the weights.
        if not checkpoint.key:
            return {}
        saved = zip_reader.read(checkpoint.path).tree
        if not isinstance(saved, dict):
            return {}
        weights = checkpoint.key.partition(".")[0]
        entries = {name: value for name, value in saved.items() if name != weights}
        carry_over = CarryOver(key=checkpoint.key, plain=False, tensor=lambda *_: None, replaced={})
        return carry_over.filter_entries(entries)

    def lay_out(
        self, path: str, tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint
    ) -> Layout:
        """Plan a file with the entries of the last input.

        Args:
            path: The output, whose suffix decides the form.
            tensors: Tensors of the output, under bare names.
            provenance: Record of how the output was made, as JSON.
            template: The last input.
        """
        from ckptavg.formats.torch_save import writer  # noqa: PLC0415 - needs torch

        file, notes = writer.lay_out(path, tensors, provenance, template)
        return Layout(False, [file], notes=tuple(notes))


def _find_provenance(opened: zip_reader.TorchFile, key: str) -> Provenance | None:
    """Find the provenance of a file: beside the weights, or attached to the state dict."""
    provenance = Provenance.from_json(opened.provenance) or find_provenance(opened.tree)
    entry = tree.value_at(opened.tree, key)
    if provenance is None and isinstance(entry, OrderedEntries):
        return Provenance.from_json(entry.account)
    return provenance


TORCH_SAVE = TorchSave()
