"""Small images in memory, for the trainer and for ckptavg: CIFAR files, image folders, digits.

The trainer and ckptavg read the same data through the same functions:

    --data examples/images.py:test --data-arg root=DIR
    --train-data examples/images.py:train --train-data-arg root=DIR

``root`` is a directory with CIFAR-10's or CIFAR-100's Python files, or one with the image folders
``train/CLASS/`` and ``test/CLASS/``; without it, the data are scikit-learn's handwritten digits.
``limit=N`` takes N images, spread evenly over the split: enough for a figure, not for a table.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own custom
from torch.utils.data import Dataset
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

DIGITS_FOR_TRAINING = 1000
# Mean and standard deviation of CIFAR-10's training images, per channel of values from 0 to 1.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Images:
    """Decoded images of one split.

    Attributes:
        pixels: uint8, (N, 3, H, W).
        labels: int64, (N,).
        classes: Number of classes.
        padding: Pixels by which a training image is shifted at most, in each direction.
        flips: True if a training image may be mirrored.
    """

    pixels: Tensor
    labels: Tensor
    classes: int
    padding: int = 4
    flips: bool = True

    def to(self, device: torch.device) -> Images:
        """Return the images on a device."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def thin(self, limit: int) -> Images:
        """Return as many images as the limit says, spread evenly; all where it is 0."""
        if limit == 0:
            return self
        positions = spread(len(self.labels), limit)
        return replace(self, pixels=self.pixels[positions], labels=self.labels[positions])

    def augment(self, indices: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return images, shifted and mirrored at random, as uint8 (N, 3, H, W).

        Args:
            indices: Positions of the images, (N,), on the device of the images.
            generator: Source of the random numbers, on the processor.
        """
        images = F.pad(self.pixels[indices], (self.padding,) * 4)
        count, _, height, width = (*indices.shape, *self.pixels.shape[1:])
        shifts = torch.randint(2 * self.padding + 1, (2, count, 1), generator=generator)
        rows = (shifts[0] + torch.arange(height)).to(images.device)
        columns = shifts[1] + torch.arange(width)
        if self.flips:
            mirrored = torch.rand(count, 1, generator=generator) < 0.5
            columns = torch.where(mirrored, columns.flip(1), columns)
        columns = columns.to(images.device)
        batch = torch.arange(count, device=images.device).view(-1, 1, 1)
        # Indexing around the channels puts these last: (N, H, W, 3).
        crops = images[batch, :, rows.unsqueeze(2), columns.unsqueeze(1)]
        return crops.permute(0, 3, 1, 2)


def spread(count: int, limit: int) -> list[int]:
    """Return positions spread evenly over a sequence; all where there are no more than the limit.

    An image folder is sorted by class, so each class keeps its share.

    Args:
        count: Length of the sequence.
        limit: Number of positions; all where 0.
    """
    if limit < 0:
        raise SystemExit(f"limit is {limit}; 0 or more images can be taken")
    if limit == 0 or limit >= count:
        return list(range(count))
    return [index * count // limit for index in range(limit)]


def normalize(pixels: Tensor) -> Tensor:
    """Return uint8 images (N, 3, H, W) as float32, with mean 0 and variance 1 over CIFAR-10."""
    mean = torch.tensor(MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(3, 1, 1)
    return (pixels.float() / 255 - mean) / std


class Normalized(Dataset[tuple[Tensor, Tensor]]):
    """Images as a network takes them, with their labels.

    Args:
        images: The images.
        augmented: Shift and mirror each image at random, as in training.
    """

    def __init__(self, images: Images, *, augmented: bool) -> None:
        self.images = images
        self.augmented = augmented
        self.targets = images.labels.tolist()

    def __len__(self) -> int:
        return len(self.images.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """Return several samples at once: a DataLoader asks for a batch in one call."""
        chosen = torch.tensor(indices)
        images = self.images
        pixels = images.augment(chosen) if self.augmented else images.pixels[chosen]
        return list(zip(normalize(pixels), images.labels[chosen], strict=True))


def train(root: str = "", limit: int = 0) -> Normalized:
    """Return the training images, augmented as the trainer does."""
    return Normalized(load(root, "train", limit), augmented=True)


def train_plain(root: str = "", limit: int = 0) -> Normalized:
    """Return the training images as they are, to score networks on."""
    return Normalized(load(root, "train", limit), augmented=False)


def test(root: str = "", limit: int = 0) -> Normalized:  # noqa: PT028
    """Return the test images."""
    return Normalized(load(root, "test", limit), augmented=False)


@cache
def load(root: str, split: str, limit: int = 0) -> Images:
    """Decode one split, once per process.

    Args:
        root: Directory with CIFAR's Python files or image folders; scikit-learn's digits if empty.
        split: ``train`` or ``test``.
        limit: Number of images to take, spread evenly over the split; all where 0.

    Raises:
        SystemExit: The directory holds neither.
    """
    if not root:
        return _digits(split).thin(limit)
    if (Path(root) / split).is_dir():
        return _image_folder(Path(root) / split, limit)
    for name in ("CIFAR10", "CIFAR100"):
        images = _cifar(name, root, split)
        if images is not None:
            return images.thin(limit)
    raise SystemExit(
        f"{root} holds neither CIFAR's Python files (cifar-10-batches-py, cifar-100-python) nor "
        "the image folders train/ and test/"
    )


def _digits(split: str) -> Images:
    pixels, digits = load_digits(return_X_y=True)
    part = slice(0, DIGITS_FOR_TRAINING) if split == "train" else slice(DIGITS_FOR_TRAINING, None)
    gray = torch.from_numpy(pixels[part] * (255 / 16)).to(torch.uint8).view(-1, 1, 8, 8)
    labels = torch.from_numpy(digits[part]).long()
    return Images(gray.expand(-1, 3, -1, -1).contiguous(), labels, 10, padding=1, flips=False)


def _cifar(name: str, root: str, split: str) -> Images | None:
    """Return a split of CIFAR's Python files, or None if the directory does not hold them."""
    try:
        data = getattr(torchvision.datasets, name)(root, train=split == "train")
    except RuntimeError:
        return None
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Images(pixels, torch.tensor(data.targets), len(data.classes))


def _image_folder(root: Path, limit: int) -> Images:
    """Decode an image folder; all images must have the same size."""
    folder = ImageFolder(str(root))
    chosen = [folder.samples[position] for position in spread(len(folder.samples), limit)]

    def decode(path: str) -> Tensor:
        return torch.from_numpy(np.array(default_loader(path))).permute(2, 0, 1)

    with ThreadPoolExecutor() as threads:
        decoded = list(threads.map(decode, [path for path, _ in chosen]))
    sizes = {tuple(image.shape) for image in decoded}
    if len(sizes) > 1:
        raise SystemExit(f"the images below {root} have several sizes: {sorted(sizes)[:3]}")
    labels = torch.tensor([label for _, label in chosen])
    return Images(torch.stack(decoded), labels, len(folder.classes))
