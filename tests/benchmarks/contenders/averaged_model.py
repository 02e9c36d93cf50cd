"""torch's AveragedModel after the fact: ``averaged_model.py OUT CHECKPOINT...``."""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel


def module_of(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """A module with these parameters and no computation."""
    root = torch.nn.Module()
    for name, tensor in state.items():
        module = root
        *parents, last = name.split(".")
        for parent in parents:
            if parent not in module._modules:
                module.add_module(parent, torch.nn.Module())
            module = module.get_submodule(parent)
        module.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    return root


def main(out: str, *paths: str) -> None:
    model = module_of(load_file(paths[0]))
    averaged = AveragedModel(model)
    for path in paths:
        model.load_state_dict(load_file(path))
        averaged.update_parameters(model)
    save_file(averaged.module.state_dict(), out)


main(*sys.argv[1:])
