"""Digests of weights by nothing but the documented rule, and weights to take them of."""

import hashlib
import json

import torch


def by_rule(state, leaf=2**20):
    """A state dict's digest, by nothing but the rule in the docstring of ``digests``."""
    whole = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name]
        flat = tensor.contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""
        size = leaf * tensor.element_size()
        leaves = [
            hashlib.sha256(raw[at : at + size]).hexdigest() for at in range(0, len(raw), size)
        ]
        dtype = str(tensor.dtype).removeprefix("torch.")
        line = json.dumps([name, dtype, list(tensor.shape), leaves]) + "\n"
        whole.update(line.encode())
    return "sha256-tree:" + whole.hexdigest()


def randoms(seed):
    """Weights of three types."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "body.weight": torch.randn(9, 5, generator=generator),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "count": torch.tensor(seed),
    }


def flip(path, at):
    """Flip one bit of a file."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)
