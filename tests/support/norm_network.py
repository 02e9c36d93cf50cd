"""A network with one BatchNorm layer, its states, and data whose statistics differ from theirs."""

import torch
from torch import nn

from ckptavg.models.runtime import Runtime

RUNTIME = Runtime(torch.device("cpu"), batch_size=16)


class Net(nn.Module):
    """Linear, BatchNorm, linear, and a buffer of integers."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2)
        self.register_buffer("table", torch.arange(3))

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


def state_of(seed, model=Net, dtype=torch.float32):
    """A state dict of random values in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(value.shape, generator=generator).to(dtype)
        if value.is_floating_point()
        else value + seed
        for name, value in model().state_dict().items()
    }


X = 5 + 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
BATCHES = X.split(16)
