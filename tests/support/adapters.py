"""LoRA adapters written by hand, in PEFT's layout."""

import json

import torch
from helpers import save

A, B = "base_model.model.l.lora_A.weight", "base_model.model.l.lora_B.weight"
HEAD = "base_model.model.head.weight"


def write_adapters(directory, states, suffix=".safetensors", **config):
    """Write a run of adapters."""
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    for i, state in enumerate(states, 1):
        save(directory / f"step_{i}" / f"adapter_model{suffix}", state)
        (directory / f"step_{i}" / "adapter_config.json").write_text(json.dumps(settings))
    return directory


def factors(seed, dtype=torch.float32):
    """An adapter of one layer, with a whole weight beside it."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {A: (2, 5), B: (3, 2), HEAD: (3, 3)}
    return {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
