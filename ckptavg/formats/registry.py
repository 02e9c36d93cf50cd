"""Where every byte of an output will lie, known before the first one is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptavg.errors import UsageError
from ckptavg.formats import Checkpoint, safetensors_layout
from ckptavg.formats.file_layout import Layout, OutputTensor
from ckptavg.formats.huggingface import writer
from ckptavg.formats.torch_save import writer as torch_layout

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
FILE_LAYOUTS = ("safetensors", "torch")  # of checkpoints that are one file


def lay_out(
    path: str, tensors: Sequence[OutputTensor], provenance: Mapping[str, Any], template: Checkpoint
) -> Layout:
    """Plan an output by the suffix of its path.

    Args:
        path: ``.safetensors``, one of ``TORCH_SUFFIXES``, or no suffix for a directory.
        tensors: What it will hold, under bare names.
        provenance: How it was made.
        template: The last checkpoint, whose layout, configuration and shards are followed.

    Raises:
        UsageError: The suffix is unknown.
        UnsupportedTensorError: The format cannot store one of the element types.
    """
    suffix = Path(path).suffix
    text = json.dumps(dict(provenance))
    if suffix == ".safetensors":
        metadata, untrue = safetensors_layout.header_metadata(
            text, template.metadata, template.momentary
        )
        single = safetensors_layout.lay_out("", tensors, metadata)
        return Layout(False, [single], notes=tuple(untrue))
    if suffix in TORCH_SUFFIXES:
        file, notes = torch_layout.lay_out(path, tensors, text, template)
        return Layout(False, [file], notes=tuple(notes))
    if suffix and not path.endswith("/") and not suffix[1:].isdigit():
        expected = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise UsageError(
            f"the output's suffix is expected to be one of {expected}, or none for a directory, "
            f"but got {suffix!r}"
        )
    if template.layout == "distributed":
        from ckptavg.formats.dcp import (  # noqa: PLC0415 - loads torch's, which is large
            writer as dcp_layout,
        )

        return dcp_layout.lay_out(tensors, text, template)
    return writer.lay_out(tensors, text, template)


def has_suffix(name: str) -> bool:
    """Whether a name says that an output is a file, and of which kind."""
    return Path(name).suffix in (".safetensors", *TORCH_SUFFIXES)
