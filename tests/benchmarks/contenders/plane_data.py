"""Data, weights and coordinates of a plane, for those who score it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from scene import CLASSES, Scene
from torch.utils.data import DataLoader, TensorDataset

WEIGHT_DECAY = 5e-4
_SEED = 20240302


def loader(scene: Scene) -> DataLoader[Any]:
    """Photos, or images in memory where the scene has no photos; in the same order every time."""
    if scene.width:
        return scene.loader(shuffle=False)
    random = torch.Generator().manual_seed(_SEED)
    images = torch.randn(scene.images, 3, scene.crop, scene.crop, generator=random)
    labels = torch.randint(CLASSES, (scene.images,), generator=random)
    return DataLoader(TensorDataset(images, labels), scene.batch_size)


def save_coordinates(scene: Scene, points: Iterable[tuple[float, float]]) -> None:
    """Store (x, y) of the points, for others to score."""
    (Path(scene.directory) / "points.json").write_text(json.dumps([*points]))


def load_coordinates(scene: Scene) -> list[tuple[float, float]]:
    """The stored (x, y) of the points."""
    return [
        tuple(point) for point in json.loads((Path(scene.directory) / "points.json").read_text())
    ]
