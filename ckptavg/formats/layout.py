"""Where every byte of an output will lie, known before the first one is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptavg.errors import UsageError
from ckptavg.formats import Checkpoint, adapter, deepspeed, huggingface, safetensors, torch_pickle
from ckptavg.formats.table import OutputTensor

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
_SHARD_BYTES = 5_000_000_000  # what Hugging Face splits at, where the input was not split already


@dataclass
class FileLayout:
    """One file of an output.

    Attributes:
        name: Its name in the output directory; empty if the output is this file.
        size: Bytes in all.
        parts: Offset and contents of everything that is no tensor.
        offsets: Byte offset of each tensor.
        checksums: Tensor name → offsets at which the CRC-32 of its bytes is stored, little-endian.
    """

    name: str
    size: int
    parts: list[tuple[int, bytes]]
    offsets: dict[str, int]
    checksums: dict[str, list[int]] = field(default_factory=dict)


@dataclass
class Layout:
    """A whole output.

    Attributes:
        directory: Whether it is a directory.
        files: Its files with tensors.
        companions: Contents of the other files, by name.
    """

    directory: bool
    files: list[FileLayout]
    companions: dict[str, bytes] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(f.size for f in self.files) + sum(map(len, self.companions.values()))


def lay_out(
    path: str, tensors: Sequence[OutputTensor], provenance: Mapping[str, Any], template: Checkpoint
) -> Layout:
    """Plan an output by the suffix of its path.

    Args:
        path: ``.safetensors``, one of ``TORCH_SUFFIXES``, or no suffix for a directory.
        tensors: What it will hold, under bare names.
        provenance: How it was made.
        template: The checkpoint whose configuration, shards and names a directory follows.

    Raises:
        UsageError: The suffix is unknown.
        UnsupportedTensorError: The format cannot store one of the element types.
    """
    suffix = Path(path).suffix
    text = json.dumps(dict(provenance))
    if suffix == ".safetensors":
        return Layout(False, [_safetensors("", tensors, {"format": "pt", "ckptavg": text})])
    if suffix in TORCH_SUFFIXES:
        return Layout(False, [_torch_zip(tensors, text)])
    if suffix and not path.endswith("/") and not suffix[1:].isdigit():
        expected = ", ".join((".safetensors", *TORCH_SUFFIXES))
        raise UsageError(
            f"the output's suffix is expected to be one of {expected}, or none for a directory, "
            f"but got {suffix!r}"
        )
    return _directory(tensors, text, template)


def _safetensors(
    name: str, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]
) -> FileLayout:
    header, offsets = safetensors.build_header(
        ((t.name, t.dtype, t.shape) for t in tensors), metadata
    )
    end = max((offsets[t.name] + t.nbytes for t in tensors), default=len(header))
    return FileLayout(name, end, [(0, header)], offsets)


def _torch_zip(tensors: Sequence[OutputTensor], provenance: str) -> FileLayout:
    stored = [t for t in tensors if t.tied_to is None]
    keys = {t.name: str(i) for i, t in enumerate(stored)}
    views = [(t.name, t.dtype, t.shape, keys[t.tied_to or t.name]) for t in tensors]
    archive = torch_pickle.Archive()
    archive.add("data.pkl", torch_pickle.dumps(views, {"ckptavg": provenance}))
    archive.add("byteorder", b"little")
    for tensor in stored:
        archive.reserve(f"data/{keys[tensor.name]}", tensor.nbytes, tensor.name)
    archive.add("version", b"3\n")
    parts = archive.close()
    return FileLayout("", archive.size, parts, archive.offsets, archive.checksums)


def _directory(tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint) -> Layout:
    """A Hugging Face directory, split into shards as its input was."""
    own = template.layout in ("huggingface", adapter.LAYOUT)
    as_stored = template.stored_names if own else {}
    bare = {as_stored.get(t.name, t.name): t.name for t in tensors}
    renamed = [OutputTensor(name, t.dtype, t.shape) for name, t in zip(bare, tensors, strict=True)]
    metadata = {"format": "pt", "ckptavg": provenance}
    shards = _shards(renamed, template)
    files = [_safetensors(name, shard, metadata) for name, shard in shards.items()]
    for file in files:
        file.offsets = {bare[name]: at for name, at in file.offsets.items()}
    companions = _companions(template, tensors)
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(t.nbytes for t in renamed)},
            "weight_map": {t.name: name for name, shard in shards.items() for t in shard},
        }
        stem = files[0].name.split("-0")[0]
        companions[f"{stem}.safetensors.index.json"] = json.dumps(index, indent=2).encode()
    return Layout(True, files, companions)


def _shards(tensors: Sequence[OutputTensor], template: Checkpoint) -> dict[str, list[OutputTensor]]:
    """File name → tensors: as the template splits them, or by size where it does not."""
    groups: dict[object, list[OutputTensor]] = {}
    if template.layout == "huggingface" and len(template.files) > 1:
        home = {template.stored_names[n]: t.pieces[0].file for n, t in template.tensors.items()}
        first = template.files[0].path
        for tensor in tensors:
            groups.setdefault(home.get(tensor.name, first), []).append(tensor)
    else:
        filled, number = 0, 0
        for tensor in tensors:
            if filled and filled + tensor.nbytes > _SHARD_BYTES:
                filled, number = 0, number + 1
            groups.setdefault(number, []).append(tensor)
            filled += tensor.nbytes
    if template.layout == adapter.LAYOUT:  # which PEFT has in one file
        return {adapter.WEIGHTS: list(tensors)}
    stem = _stem(template)
    if len(groups) == 1:
        return {f"{stem}.safetensors": list(tensors)}
    count = len(groups)
    return {
        f"{stem}-{i:05d}-of-{count:05d}.safetensors": group
        for i, group in enumerate(groups.values(), 1)
    }


def _stem(template: Checkpoint) -> str:
    main = huggingface.main_file(template.path) if template.layout == "huggingface" else None
    diffusers = main is not None and main.name.startswith("diffusion_pytorch_model")
    return "diffusion_pytorch_model" if diffusers else "model"


def _companions(template: Checkpoint, tensors: Sequence[OutputTensor]) -> dict[str, bytes]:
    """The template's configuration and tokenizer files, with the element type as written."""
    if template.layout not in ("huggingface", adapter.LAYOUT, deepspeed.LAYOUT):
        return {}
    found = {path.name: path.read_bytes() for path in huggingface.companions(template.path)}
    before = {t.dtype.name for t in template.tensors.values() if t.dtype.kind == "float"}
    after = {t.dtype.name for t in tensors if t.dtype.kind == "float"}
    if "config.json" in found and before != after and len(after) == 1:
        found["config.json"] = _with_dtype(found["config.json"], next(iter(after)))
    return found


def _with_dtype(config: bytes, dtype: str) -> bytes:
    """A model's configuration with the element type in it changed; as it is if it is no such."""
    try:
        values = json.loads(config)
    except (ValueError, RecursionError):
        return config
    if not isinstance(values, dict):
        return config
    known = {name: dtype for name in ("dtype", "torch_dtype") if name in values}
    return json.dumps(values | known, indent=2).encode() if known else config
