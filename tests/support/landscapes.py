"""A small network with BatchNorm, a run of it, data, and scores of points by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from helpers import save
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from ckptavg.runs.run import Run, open_run

CLASSES = 3


class Net(nn.Module):
    """Linear, BatchNorm, linear: the inputs of the one BatchNorm layer depend on no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(x)).relu())


def state_of(seed: int) -> dict[str, torch.Tensor]:
    """Weights and statistics of their own, with a recorded learning rate in mind."""
    generator = torch.Generator().manual_seed(seed)
    state = Net().state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) / 2)
        if name.endswith("running_var"):
            value.copy_(value.abs() + 0.5)
    return state


def save_run(directory: Path, count: int = 5) -> Run:
    """Save a run whose checkpoints record step and learning rate."""
    for step in range(1, count + 1):
        groups = [{"lr": 0.1 / step, "params": []}]
        optimizer = {"state": {}, "param_groups": groups}
        save(directory / f"step_{step}.pt", state_of(step), step=step, optimizer=optimizer)
    return open_run(directory)


def data_of(seed: int, samples: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = 2 + torch.randn(samples, 4, generator=generator)
    return TensorDataset(x, torch.randint(CLASSES, (samples,), generator=generator))


def weights_at(run: Run, coefficients: tuple[float, ...]) -> dict[str, torch.Tensor]:
    """Σ aᵢ·wᵢ in float64, rounded once."""
    states = [torch.load(c.path, weights_only=True)["state_dict"] for c in run]
    state = {}
    for name, value in states[-1].items():
        if not value.is_floating_point():
            state[name] = value
            continue
        terms = [a * s[name].double() for a, s in zip(coefficients, states, strict=True)]
        state[name] = torch.stack(terms).sum(0).to(value.dtype)
    return state


def network_at(run: Run, coefficients: tuple[float, ...], train: TensorDataset | None) -> nn.Module:
    """The network of a point, with population statistics of the training data."""
    net = Net()
    net.load_state_dict(weights_at(run, coefficients))
    net.eval()
    if train is not None:
        with torch.no_grad():
            inputs = net.body(train.tensors[0]).double()
        net.norm.running_mean.copy_(inputs.mean(0))
        net.norm.running_var.copy_(inputs.var(0))
    return net


def metrics_at(net: nn.Module, data: TensorDataset) -> dict[str, float]:
    """Top-1 in % and NLL in nats by torch's own functions."""
    x, y = data.tensors
    with torch.no_grad():
        logits = copy.deepcopy(net)(x).double()
    top1 = 100 * (logits.argmax(1) == y).double().mean()
    return {"top1": float(top1), "nll": float(functional.cross_entropy(logits, y))}


def norm_of(net: nn.Module) -> float:
    """‖w‖² over the parameters."""
    return sum(float(p.detach().double().square().sum()) for p in net.parameters())
