"""The choice of an output's format: the path's suffix decides which layout is planned.

The offset of every byte is known before the first byte is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ckptavg.errors import UsageError
from ckptavg.formats import Checkpoint, safetensors_layout
from ckptavg.formats.file_layout import Layout, OutputTensor
from ckptavg.formats.huggingface import writer as huggingface_writer
from ckptavg.formats.provenance import Provenance
from ckptavg.formats.torch_save import writer as torch_writer

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
# Layouts of checkpoints that are one file.
FILE_LAYOUTS = ("safetensors", "torch")


def lay_out(
    path: str, tensors: Sequence[OutputTensor], provenance: Provenance, template: Checkpoint
) -> Layout:
    """Plan an output in the format that the suffix of the path names.

    Args:
        path: ``.safetensors``, one of ``TORCH_SUFFIXES``, or no suffix for a directory.
        tensors: The output's tensors, under bare names.
        provenance: The record of how the output was made.
        template: The last checkpoint, whose layout, configuration and shards are followed.

    Returns:
        The layout of all files of the output.

    Raises:
        UsageError: The suffix is not known.
        UnsupportedTensorError: The format cannot store one of the element types.
    """
    suffix = Path(path).suffix
    text = provenance.to_json()
    if suffix == ".safetensors":
        metadata, untrue = safetensors_layout.header_metadata(
            text, template.metadata, template.momentary
        )
        single = safetensors_layout.lay_out("", tensors, metadata)
        return Layout(False, [single], notes=tuple(untrue))
    if suffix in TORCH_SUFFIXES:
        file, notes = torch_writer.lay_out(path, tensors, text, template)
        return Layout(False, [file], notes=tuple(notes))
    # A trailing slash and a suffix of digits (step.500) are those of directories.
    if suffix and not path.endswith("/") and not suffix[1:].isdigit():
        expected = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise UsageError(
            f"the output's suffix is expected to be one of {expected}, or none for a directory, "
            f"but got {suffix!r}"
        )
    if template.layout == "distributed":
        from ckptavg.formats.dcp import (  # noqa: PLC0415 - loads torch's, which is large
            writer as dcp_writer,
        )

        return dcp_writer.lay_out(tensors, text, template)
    return huggingface_writer.lay_out(tensors, text, template)


def has_suffix(name: str) -> bool:
    """Return True if the suffix of a name makes the output a single file."""
    return Path(name).suffix in (".safetensors", *TORCH_SUFFIXES)
