"""Checkpoints to measure with: tensors as a transformer has them, a few hundred of them.

As a program it writes a run, in a process of its own so that the caller stays small:
``python checkpoints.py DIR --checkpoints N --bytes B --dtype float32 --kinds safetensors pt``.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
INDEX = "model.safetensors.index.json"
_SEED = 20240229
_LAYERS = 24
_WIDTHS = 12 * _LAYERS + 16  # weights in widths squared: the layers', and an embedding
_SMALLEST = 8

Shapes = Mapping[str, tuple[int, ...]]


def shapes(numel: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a transformer of about this many parameters; 291 tensors."""
    width = max(_SMALLEST, math.isqrt(numel // _WIDTHS) // 8 * 8)
    found: dict[str, tuple[int, ...]] = {}
    for layer in range(_LAYERS):
        found |= {f"h.{layer}.{name}": shape for name, shape in _layer(width).items()}
    found |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    rest = numel - sum(map(math.prod, found.values()))
    return {"wte.weight": (max(1, rest // width), width), **found}


def _layer(width: int) -> dict[str, tuple[int, ...]]:
    return {
        "ln_1.weight": (width,), "ln_1.bias": (width,),
        "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
        "attn.out.weight": (width, width), "attn.out.bias": (width,),
        "ln_2.weight": (width,), "ln_2.bias": (width,),
        "mlp.up.weight": (4 * width, width), "mlp.up.bias": (4 * width,),
        "mlp.down.weight": (width, 4 * width), "mlp.down.bias": (width,),
    }  # fmt: skip


def shard_name(number: int, count: int) -> str:
    """The name that a sharded Hugging Face directory gives its shard."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def spread(names: Shapes, count: int) -> list[list[str]]:
    """Share the tensors out to shards of about the same size, the largest tensors first."""
    shards: list[list[str]] = [[] for _ in range(count)]
    filled = [0] * count
    for name in sorted(names, key=lambda name: -math.prod(names[name])):
        least = filled.index(min(filled))
        shards[least].append(name)
        filled[least] += math.prod(names[name])
    return shards


def write_index(directory: Path, shards: Mapping[str, list[str]]) -> None:
    """Make a directory of shards one that transformers would load."""
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text('{"model_type": "gpt2"}')


def sparse(path: Path, names: Shapes) -> None:
    """A safetensors file of float32 zeros that takes no room: a header and a hole."""
    header: dict[str, object] = {}
    end = 0
    for name, shape in names.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def sparse_run(directory: Path, checkpoints: int, nbytes: int, shards: int = 0) -> list[Path]:
    """Write a run of sparse checkpoints.

    Args:
        directory: Of the run; made.
        checkpoints: How many.
        nbytes: Of each.
        shards: Files of each in a directory of its own; 0 for a plain file each.
    """
    directory.mkdir(parents=True)
    names = shapes(nbytes // 4)
    paths = []
    for step in range(1, checkpoints + 1):
        if not shards:
            paths.append(directory / f"step_{step}.safetensors")
            sparse(paths[-1], names)
            continue
        paths.append(directory / f"checkpoint-{step}")
        paths[-1].mkdir()
        parts = {
            shard_name(i, shards): part for i, part in enumerate(spread(names, shards), start=1)
        }
        for shard, part in parts.items():
            sparse(paths[-1] / shard, {name: names[name] for name in part})
        write_index(paths[-1], parts)
    return paths


def states(checkpoints: int, nbytes: int, dtype: str) -> Iterator[dict[str, torch.Tensor]]:
    """State dicts of a training that wanders around one point, the same every time."""
    import torch

    made = torch.float64 if dtype == "float64" else torch.float32
    random = torch.Generator().manual_seed(_SEED)
    names = shapes(nbytes // SIZES[dtype])
    for _ in range(checkpoints):
        yield {
            name: torch.empty(shape, dtype=made)
            .normal_(0.01, 0.02, generator=random)
            .to(getattr(torch, dtype))
            for name, shape in names.items()
        }


def main() -> None:
    """Write a run in each of the kinds asked for, the same values in all."""
    import torch
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--checkpoints", type=int, required=True)
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--dtype", choices=SIZES, default="float32")
    parser.add_argument("--kinds", nargs="+", choices=("safetensors", "pt", "sharded"))
    parser.add_argument("--shards", type=int, default=16)
    options = parser.parse_args()
    for kind in options.kinds:
        (options.directory / kind).mkdir(parents=True)
    made = states(options.checkpoints, options.bytes, options.dtype)
    for step, state in enumerate(made, start=1):
        for kind in options.kinds:
            target = options.directory / kind
            if kind == "safetensors":
                save_file(state, target / f"step_{step}.safetensors")
            elif kind == "pt":
                torch.save(state, target / f"step_{step}.pt")
            else:
                _save_sharded(target / f"checkpoint-{step}", state, options.shards)


def _save_sharded(directory: Path, state: dict[str, torch.Tensor], count: int) -> None:
    from safetensors.torch import save_file

    directory.mkdir()
    parts = spread({name: tuple(tensor.shape) for name, tensor in state.items()}, count)
    named = {shard_name(i, count): part for i, part in enumerate(parts, start=1)}
    for shard, part in named.items():
        save_file({name: state[name] for name in part}, directory / shard)
    write_index(directory, named)


if __name__ == "__main__":
    main()
