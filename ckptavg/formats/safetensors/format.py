"""The safetensors format, as an entry of the registry."""

from __future__ import annotations

from collections.abc import Sequence

from ckptavg.formats import training_record
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.formats.file_layout import Layout, OutputTensor
from ckptavg.formats.format import FileFormat
from ckptavg.formats.parts import Part, find_provenance
from ckptavg.formats.provenance import PROVENANCE
from ckptavg.formats.safetensors import header, layout
from ckptavg.io.paths import Location
from ckptavg.io.stamp import FileStamp

# Bytes: the safetensors library takes no longer header.
_LONGEST_HEADER = 100 << 20


class Safetensors(FileFormat):
    """Files of safetensors."""

    name = "safetensors"
    label = "safetensors"
    suffixes = (".safetensors",)
    output_suffixes = suffixes

    def looks_like(self, start: bytes) -> bool:
        """Return True if a file begins with a header's length and a JSON object."""
        return header.looks_like(start)

    def begins(self, start: bytes) -> bool:
        """Return True if a header of a permitted length follows."""
        length = int.from_bytes(start[:8], "little")
        return start[8:9] == b"{" and 0 < length < _LONGEST_HEADER

    def claims(self, path: Location) -> bool:
        """Return True for the format's own suffix."""
        return path.suffix in self.suffixes

    def read(self, path: Location, stamp: FileStamp, key: str | None) -> Part:  # noqa: ARG002
        """Read the header of a file, which has no entries to choose from.

        Args:
            path: The file.
            stamp: The file's stamp.
            key: Not used.
        """
        tensors, metadata = header.read_header(path, stamp.size)
        return Part(
            format=self,
            stamps=(stamp,),
            tensors=tensors,
            refused={},
            record=training_record.from_metadata(metadata),
            provenance=find_provenance(metadata),
            metadata={name: text for name, text in metadata.items() if name != PROVENANCE},
        )

    def lay_out(
        self,
        path: str,  # noqa: ARG002
        tensors: Sequence[OutputTensor],
        provenance: str,
        template: Checkpoint,
    ) -> Layout:
        """Plan a file with the metadata of the last input that is true of an average.

        Args:
            path: Not used: the layout does not depend on the path.
            tensors: Tensors of the output, under bare names.
            provenance: Record of how the output was made, as JSON.
            template: The last input.
        """
        metadata, notes = layout.header_metadata(provenance, template.metadata, template.momentary)
        return Layout(False, [layout.lay_out("", tensors, metadata)], notes=tuple(notes))


SAFETENSORS = Safetensors()
