"""Checkpoints known by how their files begin, whatever the files are called."""

from __future__ import annotations

from ckptavg.errors import CheckpointError
from ckptavg.formats.torch_save import legacy_reader
from ckptavg.io import paths
from ckptavg.io.paths import Location

# Bytes: the name of a zip file's first entry is among them.
_LONGEST = 512
_ZIP, _ENTRY_NAME = b"PK\x03\x04", 30
# Bytes: the limit of the safetensors library.
_LONGEST_HEADER = 100 << 20


def begins_as_checkpoint(path: Location) -> bool:
    """Tell whether a file begins as those of ``torch.save`` or safetensors.

    A file that cannot be read does not.
    """
    try:
        with paths.open_binary(path) as file:
            begin = file.read(_LONGEST)
    except (CheckpointError, OSError):
        return False
    if begin.startswith(_ZIP):
        size = int.from_bytes(begin[26:28], "little")
        name = begin[_ENTRY_NAME : _ENTRY_NAME + size]
        return name.endswith((b"/data.pkl", b"/version", b"/.format_version", b"/byteorder"))
    header = int.from_bytes(begin[:8], "little")
    is_safetensors = begin[8:9] == b"{" and 0 < header < _LONGEST_HEADER
    return is_safetensors or begin.startswith(legacy_reader.START)
