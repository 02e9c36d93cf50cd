"""A safetensors output, with as much of its input's header as is true of an average."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence

from ckptavg.errors import first_few, short
from ckptavg.formats import safetensors
from ckptavg.formats.checkpoint import PROVENANCE
from ckptavg.formats.file_layout import FileLayout, OutputTensor
from ckptavg.formats.metric_names import is_metric

# Entries that describe the file itself, which is laid out anew.
_FILE_ENTRIES = ("format", "DCP_SHARDING_INFO", "DCP_VERSION")
# kohya's entries about the training. Hashes among them are the base model's, and stay true.
_TRAINER = "ss_"
_HASHES = frozenset(["hash", "sha1", "sha256", "sha512", "md5", "crc32", "checksum", "digest"])
_MOST_NAMES = 12  # in a note
_BETWEEN_WORDS = re.compile(r"[^a-z0-9]+")


def lay_out(name: str, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]) -> FileLayout:
    """Plan a safetensors file.

    Args:
        name: The file's name in its directory; empty if the output is this file.
        tensors: The file's tensors.
        metadata: Further entries of the file's header.

    Raises:
        UnsupportedTensorError: The format cannot store one of the element types.
    """
    header, offsets = safetensors.build_header(
        ((t.name, t.dtype, t.shape) for t in tensors), metadata
    )
    end = max((offsets[t.name] + t.nbytes for t in tensors), default=len(header))
    return FileLayout(name, end, [(0, header)], offsets)


def header_metadata(
    provenance: str, template: Mapping[str, str], momentary: Collection[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Make the metadata of an output's header.

    Args:
        provenance: How the output was made, as JSON.
        template: The metadata of the last input.
        momentary: Names of entries that are true of that input alone.

    Returns:
        The metadata, and notes about the input's entries that are not in it.
    """
    untrue = [
        name
        for name, value in template.items()
        if _is_of_these_weights(name, value)
        or (name in momentary and not name.startswith(_TRAINER))
    ]
    left_out = {*_FILE_ENTRIES, *untrue}
    entries = {name: value for name, value in template.items() if name not in left_out}
    notes = []
    if untrue:
        shown = first_few([short(name) for name in untrue], _MOST_NAMES)
        notes.append(f"not taken over from the header, as untrue of an average: {shown}")
    return {**entries, "format": "pt", PROVENANCE: provenance}, notes


def _is_of_these_weights(name: str, value: str) -> bool:
    """Tell whether a header's entry is a hash or a score of the input's own weights."""
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
