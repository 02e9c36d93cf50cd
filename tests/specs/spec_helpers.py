"""Files of factories, and what images of one colour become."""

import importlib
from pathlib import Path

import pytest
import torch

from ckptavg.errors import SpecError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
COLOUR = (255, 51, 0)

FACTORIES = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

WIDTH = 3

class Family:
    @staticmethod
    def small():
        return nn.Linear(1, 1)

def make_net(width=WIDTH, bias=True):
    return nn.Linear(width, 2, bias=bias)

def make_data(samples=4):
    return TensorDataset(torch.ones(samples, 3), torch.zeros(samples))

def make_loader():
    return DataLoader(make_data(), 2)

def make_number():
    return 3

def make_nothing():
    return None

def broken():
    raise ValueError("no such width")

def named(spec, factory):
    return nn.Linear(spec, factory)

def invert(image):
    return 255 - torch.tensor(image.getpixel((0, 0)))
"""


def write(path, text=FACTORIES):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    importlib.invalidate_caches()
    return path


def error_of(build, *args, kind=SpecError, **keywords):
    with pytest.raises(kind) as caught:
        build(*args, **keywords)
    return str(caught.value)


def normalized(colour, mean, std):
    return [(c / 255 - m) / s for c, m, s in zip(colour, mean, std, strict=True)]


def assert_uniform(image, size, expected):
    """An image of one colour after its transform."""
    assert image.shape == (3, *size)
    torch.testing.assert_close(
        image, torch.tensor(expected)[:, None, None].expand_as(image), atol=1e-4, rtol=1e-4
    )
