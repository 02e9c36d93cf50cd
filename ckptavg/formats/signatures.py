"""Recognition of checkpoints by the first bytes of a file, whatever the name."""

from __future__ import annotations

from ckptavg.errors import CheckpointError
from ckptavg.formats.torch_save import legacy_reader
from ckptavg.io import paths
from ckptavg.io.paths import Location

# Bytes that are read: enough to hold the name of a zip file's first entry.
_LONGEST = 512
# The mark of a zip entry, and the offset of the entry's name.
_ZIP, _ENTRY_NAME = b"PK\x03\x04", 30
# Bytes: the safetensors library takes no longer header.
_LONGEST_HEADER = 100 << 20


def begins_as_checkpoint(path: Location) -> bool:
    """Return True if a file begins like a file of ``torch.save`` or safetensors.

    The answer is False for a file that cannot be read.
    """
    try:
        with paths.open_binary(path) as file:
            begin = file.read(_LONGEST)
    except (CheckpointError, OSError):
        return False
    if begin.startswith(_ZIP):
        # The length of the name is a 16-bit number in the header of the zip entry.
        size = int.from_bytes(begin[26:28], "little")
        name = begin[_ENTRY_NAME : _ENTRY_NAME + size]
        return name.endswith((b"/data.pkl", b"/version", b"/.format_version", b"/byteorder"))
    header = int.from_bytes(begin[:8], "little")
    is_safetensors = begin[8:9] == b"{" and 0 < header < _LONGEST_HEADER
    return is_safetensors or begin.startswith(legacy_reader.START)
