"""Where every byte of an output will lie, known before the first one is written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ckptavg.errors import UsageError, first_few
from ckptavg.formats import (
    Checkpoint,
    adapter,
    deepspeed,
    huggingface,
    safetensors,
    torch_layout,
)
from ckptavg.formats.output import FileLayout, Layout, OutputTensor
from ckptavg.formats.table import PROVENANCE

TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".tar")
FILE_LAYOUTS = ("safetensors", "torch")  # of checkpoints that are one file
_SHARD_BYTES = 5_000_000_000  # what Hugging Face splits at, where the input was not split already


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
        return Layout(False, [_safetensors("", tensors, {"format": "pt", PROVENANCE: text})])
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
        from ckptavg.formats import dcp_layout  # noqa: PLC0415 - loads torch's, which is large

        return dcp_layout.lay_out(tensors, text, template)
    return _directory(tensors, text, template)


def has_suffix(name: str) -> bool:
    """Whether a name says that an output is a file, and of which kind."""
    return Path(name).suffix in (".safetensors", *TORCH_SUFFIXES)


def _safetensors(
    name: str, tensors: Sequence[OutputTensor], metadata: Mapping[str, str]
) -> FileLayout:
    header, offsets = safetensors.build_header(
        ((t.name, t.dtype, t.shape) for t in tensors), metadata
    )
    end = max((offsets[t.name] + t.nbytes for t in tensors), default=len(header))
    return FileLayout(name, end, [(0, header)], offsets)


def _directory(tensors: Sequence[OutputTensor], provenance: str, template: Checkpoint) -> Layout:
    """A Hugging Face directory, split into shards as its input was."""
    own = template.layout in ("huggingface", adapter.LAYOUT)
    bare = {template.stored_name(t.name) if own else t.name: t.name for t in tensors}
    renamed = [OutputTensor(name, t.dtype, t.shape) for name, t in zip(bare, tensors, strict=True)]
    metadata = {"format": "pt", PROVENANCE: provenance}
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
    lacking = template.layout != adapter.LAYOUT and "config.json" not in companions
    notes = ["the output has no config.json, which the input lacks too"] if lacking else []
    if code := [name for name in companions if name.endswith(".py")]:
        notes.append(f"code of the input's is copied along: {first_few(code)}")
    return Layout(True, files, companions, tuple(notes))


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
