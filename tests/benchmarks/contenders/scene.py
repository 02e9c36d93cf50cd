"""What is scored, and how the programs that do so report what they took.

A scene is a directory: a run of checkpoints, averages of it, photos, and ``scene.json``. Nothing
here imports torch before it is needed, so that the benchmark itself can stay small.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch.utils.data import DataLoader

CLASSES = 10
SMALL = "small"
_SEED = 20240229
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_DESCRIPTION = "scene.json"


@dataclass(frozen=True)
class Scene:
    """What is scored, and how.

    Attributes:
        directory: Holds it.
        model: A name of torchvision's, or ``small`` for three convolutions with BatchNorm.
        checkpoints: In the run.
        averages: How many different ones of the run are stored.
        images: Photos, or tensors in memory.
        width: Of a photo, in pixels; 0 where the images are in memory only.
        height: Of a photo, in pixels.
        crop: Width and height of what the model sees.
        batch_size: Of every loader.
        workers: Of every loader.
        device: ``cpu`` or ``cuda``.
    """

    directory: str
    model: str
    checkpoints: int
    averages: int
    images: int
    width: int
    height: int
    crop: int
    batch_size: int
    workers: int
    device: str

    @classmethod
    def load(cls, directory: str) -> Scene:
        """The scene in a directory."""
        return cls(**json.loads((Path(directory) / _DESCRIPTION).read_text()))

    def save(self) -> None:
        """Describe the scene in its directory."""
        (Path(self.directory) / _DESCRIPTION).write_text(json.dumps(asdict(self)))

    @property
    def run(self) -> Path:
        """The run of checkpoints."""
        return Path(self.directory) / "run"

    @property
    def photos(self) -> Path:
        """A directory a class."""
        return Path(self.directory) / "photos"

    @property
    def schemes(self) -> list[str]:
        """One an average: they are of the same checkpoints, with other weights."""
        return [f"ema:decay={0.5 + 0.4 * i / self.averages:.4f}" for i in range(self.averages)]

    @property
    def averaged(self) -> list[Path]:
        """The stored averages, one a scheme."""
        directory = Path(self.directory) / "averages"
        return [directory / f"{i:03}.safetensors" for i in range(self.averages)]

    def network(self) -> torch.nn.Module:
        """A freshly initialized model, the same every time."""
        import torch

        torch.manual_seed(_SEED)
        if self.model == SMALL:
            return _small_network(self.crop)
        from torchvision.models import get_model

        return get_model(self.model, weights=None, num_classes=CLASSES)

    def loader(self, *, shuffle: bool) -> DataLoader[Any]:
        """Decode the photos as torchvision's classifiers are evaluated; same order every time."""
        import torch
        from torch.utils.data import DataLoader
        from torchvision import transforms
        from torchvision.datasets import ImageFolder

        steps = [
            transforms.Resize(round(self.crop * 256 / 224)), transforms.CenterCrop(self.crop),
            transforms.ToTensor(), transforms.Normalize(_MEAN, _STD),
        ]  # fmt: skip
        return DataLoader(
            ImageFolder(str(self.photos), transforms.Compose(steps)),
            self.batch_size,
            shuffle=shuffle,
            num_workers=self.workers,
            pin_memory=self.device == "cuda",
            generator=torch.Generator().manual_seed(_SEED),
        )


def _small_network(crop: int) -> torch.nn.Module:
    """Three convolutions with BatchNorm, for images of CROP pixels."""
    from torch import nn

    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 32, 64):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
            nn.ReLU(), nn.MaxPool2d(2),
        ]  # fmt: skip
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * (crop // 8) ** 2, CLASSES))


Score = tuple[float, float]
"""Top-1 in %, and NLL in nats."""


@contextmanager
def reported(scene: Scene, out: str) -> Iterator[list[Score]]:
    """Measure a program's work, imports of torch and torchvision excepted, and write it to OUT.

    Yields:
        Where its scores go, one a candidate.
    """
    import torch
    import torchvision  # noqa: F401

    scores: list[Score] = []
    before, start = _peak(), time.perf_counter()
    yield scores
    synchronize(scene.device)
    seconds = time.perf_counter() - start
    on_device = torch.cuda.max_memory_allocated() if scene.device == "cuda" else 0
    report = {"seconds": seconds, "peak": _peak() - before, "device_peak": on_device}
    Path(out).write_text(json.dumps({**report, "scores": scores}))


def synchronize(device: str) -> None:
    """Wait for a device to be done."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _peak() -> int:
    """Bytes that this process has held at most."""
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])
