"""The layout of a safetensors output, with the input's metadata that is true of an average."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from ckptavg.errors import first_few, short
from ckptavg.formats.file_layout import FileLayout, OutputTensor
from ckptavg.formats.metric_names import is_metric
from ckptavg.formats.provenance import PROVENANCE
from ckptavg.formats.safetensors.header import build_header

# Entries that describe the layout of the input file. The output is laid out anew.
_FILE_ENTRIES = ("format", "DCP_SHARDING_INFO", "DCP_VERSION")
# Prefix of kohya's entries about training. Hashes there are the base model's, and stay true.
_TRAINER = "ss_"
_HASHES = frozenset(["hash", "sha1", "sha256", "sha512", "md5", "crc32", "checksum", "digest"])
# Most names in a note.
_MOST_NAMES = 12
_BETWEEN_WORDS = re.compile(r"[^a-z0-9]+")


def lay_out(name: str, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> FileLayout:
    """Plan a safetensors file.

    Args:
        name: The file's name in its directory; empty if the output is this file.
        tensors: The file's tensors.
        metadata: Text entries of the file's header.

    Returns:
        The layout, with byte offsets in the file.

    Raises:
        UnsupportedTensorError: The format cannot store one of the element types.
    """
    header, offsets = build_header(((t.name, t.dtype, t.shape) for t in tensors), metadata)
    end = max((offsets[t.name] + t.nbytes for t in tensors), default=len(header))
    return FileLayout(name, end, [(0, header)], offsets)


def header_metadata(
    provenance: str, template: Mapping[str, str], momentary: Collection[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Make the metadata of an output's header from that of the last input.

    Args:
        provenance: How the output was made, as JSON.
        template: The metadata of the last input.
        momentary: Names of entries that are true of the last input alone.

    Returns:
        The metadata, and notes about the entries that were left out as untrue.
    """
    untrue: list[str] = []
    for name, value in template.items():
        is_momentary = name in momentary and not name.startswith(_TRAINER)
        if is_momentary or _is_of_these_weights(name, value):
            untrue.append(name)
    left_out = {*_FILE_ENTRIES, *untrue}
    entries = {name: value for name, value in template.items() if name not in left_out}
    notes = []
    if untrue:
        shown = first_few([short(name) for name in untrue], _MOST_NAMES)
        notes.append(f"not taken over from the header, as untrue of an average: {shown}")
    return {**entries, "format": "pt", PROVENANCE: provenance}, notes


def _is_of_these_weights(name: str, value: str) -> bool:
    """Return True if an entry is a hash or a score of the input's own weights."""
    if name.startswith(_TRAINER):
        return False
    words = set(_BETWEEN_WORDS.split(name.lower()))
    return bool(words & _HASHES) or (_is_number(value) and is_metric(name))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
