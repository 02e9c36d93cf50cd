"""A task of your own: pixels that belong to the ink of noisy handwritten digits.

    pip install ".[examples]"
    python examples/segmentation_task.py

trains a small network to tell ink from paper, saves a checkpoint every fourth epoch and compares
the last checkpoint with the average and the ensemble. On the command line, the task is named by
its file:

    ckptavg eval --run segmentation-run --compare fge --model examples/segmentation_task.py:model \
        --train-data examples/segmentation_task.py:train_data \
        --data examples/segmentation_task.py:test_data \
        --task examples/segmentation_task.py:Segmentation
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom
from torch.utils.data import DataLoader, TensorDataset

import ckptavg
from ckptavg.tasks import Metric

TRAIN_IMAGES = 400
NOISE = 0.35  # standard deviation, of pixels between 0 and 1
INK = 0.5  # a pixel at least this dark is ink
EPOCHS = 40
SAVE_EVERY = 4  # epochs


class PixelAccuracy:
    """Share of pixels with the right class, and the mean intersection over union of the classes."""

    def __init__(self) -> None:
        self.confusion = torch.zeros(2, 2, dtype=torch.int64)  # target × predicted class

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Count a batch: probabilities (N, 2, H, W) against classes (N, H, W)."""
        pairs = 2 * targets.flatten() + predictions.argmax(1).flatten()
        counts = torch.bincount(pairs, minlength=4).view(2, 2)
        # Counts stay on their device: no sample waits for the processor.
        self.confusion = self.confusion.to(counts.device) + counts

    def compute(self) -> dict[str, float]:
        """Return the metrics, and the number of pixels."""
        confusion = self.confusion.double()
        right = confusion.diagonal()
        union = confusion.sum(0) + confusion.sum(1) - right
        pixels = confusion.sum()
        return {
            "accuracy": float(100 * right.sum() / pixels),
            "miou": float(100 * (right / union).mean()),
            "n": int(pixels),
        }

    def state(self) -> list[int]:
        """Return the counts as plain values: torchrun's processes exchange them."""
        return self.confusion.flatten().tolist()

    def merge(self, state: list[int]) -> None:
        """Add another process' counts."""
        self.confusion = self.confusion.cpu() + torch.tensor(state).view(2, 2)


class Segmentation(ckptavg.Task):
    """Two classes per pixel, from a model that gives ``{"out": logits}`` as torchvision's do."""

    metrics = (
        Metric("accuracy", "pixels %", ".2f", higher=True),
        Metric("miou", "mIoU %", ".2f", higher=True),
    )

    def predict(self, outputs: dict[str, Tensor], targets: Tensor) -> Tensor:  # noqa: ARG002
        """Return probabilities: the ensemble is the mean of what this returns."""
        return outputs["out"].softmax(1)

    def scores(self) -> PixelAccuracy:
        """Return an empty score of one candidate."""
        return PixelAccuracy()


class SmallFCN(nn.Module):
    """Three convolutions with BatchNorm, and a class per pixel."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (1, 16, 16):
            layers += [nn.Conv2d(inputs, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)]
            layers.append(nn.ReLU())
        self.layers = nn.Sequential(*layers)
        self.classes = nn.Conv2d(16, 2, 1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Return the logits (N, 2, H, W) of images (N, 1, H, W)."""
        return {"out": self.classes(self.layers(images))}


def model() -> nn.Module:
    """Return the network, untrained."""
    return SmallFCN()


def train_data() -> TensorDataset:
    """Return the training images with noise, and the class of each pixel."""
    return _noisy(slice(0, TRAIN_IMAGES), seed=0)


def test_data() -> TensorDataset:
    """Return the other images, with noise of their own."""
    return _noisy(slice(TRAIN_IMAGES, None), seed=1)


def _noisy(part: slice, seed: int) -> TensorDataset:
    digits: Any = load_digits()
    images = torch.tensor(digits.images[part] / 16, dtype=torch.float32).unsqueeze(1)
    ink = (images[:, 0] >= INK).long()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(images + NOISE * noise, ink)


def train(out: Path) -> None:
    """Train at a constant learning rate, and save checkpoints along the way."""
    torch.manual_seed(0)
    network = model()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.2, momentum=0.9)
    loader = DataLoader(train_data(), batch_size=20, shuffle=True)
    for epoch in range(1, EPOCHS + 1):
        for images, ink in loader:
            loss = F.cross_entropy(network(images)["out"], ink)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        if epoch % SAVE_EVERY == 0:
            checkpoint = {"state_dict": network.state_dict(), "epoch": epoch, "lr": 0.2}
            torch.save(checkpoint, out / f"epoch_{epoch:02d}.pt")


def main() -> None:
    """Train, then compare the last checkpoint, the average and the ensemble."""
    parser = argparse.ArgumentParser(description="Segment digits, average, compare.")
    parser.add_argument("--out", type=Path, default=Path("segmentation-run"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    train(out)
    results = ckptavg.compare(
        out, model(), test_data(), train_data=train_data(), ensemble=True, task=Segmentation()
    )
    print(results)


if __name__ == "__main__":
    main()
