"""``difference.py ONE OTHER`` prints how far two averages are apart, relative to the largest value.

Each is a file of safetensors, or a directory of such.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open


def main(*paths: str) -> None:
    with ExitStack() as stack:
        one, other = (opened(Path(path), stack) for path in paths)
        if one.keys() != other.keys():
            raise SystemExit(f"not the same tensors: {sorted(one.keys() ^ other.keys())[:5]}")
        largest = scale = 0.0
        for name in one:
            mine, theirs = (tensors[name].get_tensor(name).double() for tensors in (one, other))
            if mine.shape != theirs.shape:
                raise SystemExit(f"{name} is {tuple(mine.shape)} and {tuple(theirs.shape)}")
            largest = max(largest, float((mine - theirs).abs().max()))
            scale = max(scale, float(mine.abs().max()))
    print(largest / scale)


def opened(path: Path, stack: ExitStack) -> dict[str, safe_open]:
    """Name → the file that holds the tensor."""
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    handles = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
    return {name: handle for handle in handles for name in handle.keys()}  # noqa: SIM118


torch.set_num_threads(1)
main(*sys.argv[1:])
