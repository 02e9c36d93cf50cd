"""The usual script: ``load_and_add.py OUT CHECKPOINT...``; loads each, adds, divides and saves."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file


def main(out: str, *paths: str) -> None:
    total: dict[str, torch.Tensor] = {}
    for path in paths:
        for name, tensor in load_file(path).items():
            if name in total:
                total[name] += tensor
            else:
                total[name] = tensor.clone()
    for name in total:
        total[name] /= len(paths)
    save_file(total, out)


main(*sys.argv[1:])
