"""Runs around a linear classifier: checkpoints that are the truth and noise, so that means win."""

from __future__ import annotations

from pathlib import Path

import torch
from helpers import save
from torch import nn
from torch.utils.data import TensorDataset

from ckptavg.runs.run import Run, open_run

CLASSES, FEATURES = 4, 8
TRUTH = torch.randn(CLASSES, FEATURES, generator=torch.Generator().manual_seed(99))


class Linear(nn.Module):
    """Logits that are linear in the inputs, normalized where asked for."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(FEATURES) if norm else nn.Identity()
        self.head = nn.Linear(FEATURES, CLASSES, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(x))


def samples(seed: int, count: int) -> TensorDataset:
    """Samples whose labels are the classes of the true classifier, sorted by class."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator)
    labels = (x @ TRUTH.T).argmax(1)
    order = labels.argsort(stable=True)
    data = TensorDataset(x[order], labels[order])
    data.targets = labels[order]
    return data


def save_noisy_run(
    directory: Path, count: int = 8, noise: float = 1.0, seed: int = 0, norm: bool = False
) -> Run:
    """Save checkpoints that are the true weights and independent noise."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, count + 1):
        weight = TRUTH + noise * torch.randn(CLASSES, FEATURES, generator=generator)
        state = Linear(norm).state_dict() | {"head.weight": weight}
        save(directory / f"step_{step}.pt", state, step=step)
    return open_run(directory)
