"""One average after another, as scripts do it: ``one_by_one.py SCENE OUT COUNT torch|fvcore``.

Each is loaded, has its BatchNorm statistics recomputed, and is scored: a pass over the training
data and one over the evaluation data.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from safetensors.torch import load_file
from scene import Scene, Score, reported
from torch.nn.functional import cross_entropy
from torch.optim import swa_utils
from torch.utils.data import DataLoader


def main(directory: str, out: str, count: str, statistics: str) -> None:
    scene = Scene.load(directory)
    recompute = {"torch": with_torch, "fvcore": with_fvcore}[statistics]
    with reported(scene, out) as scores:
        model = scene.network().to(scene.device)
        for path in scene.averaged[: int(count)]:
            model.load_state_dict(load_file(path))
            recompute(model, scene.loader(shuffle=True), scene.device)
            scores.append(score(model, scene.loader(shuffle=False), scene.device))


def with_torch(model: torch.nn.Module, loader: DataLoader[Any], device: str) -> None:
    """Mean of the batches' variances."""
    swa_utils.update_bn(loader, model, device=torch.device(device))


def with_fvcore(model: torch.nn.Module, loader: DataLoader[Any], device: str) -> None:
    """Variance of the population."""
    from fvcore.nn.precise_bn import update_bn_stats

    model.train()
    inputs = (images.to(device, non_blocking=True) for images, _ in loader)
    update_bn_stats(model, inputs, num_iters=len(loader))


@torch.inference_mode()
def score(model: torch.nn.Module, loader: DataLoader[Any], device: str) -> Score:
    """Top-1 in % and NLL; nothing waits for the device before the end."""
    model.eval()
    right = torch.zeros((), device=device, dtype=torch.int64)
    nll = torch.zeros((), device=device)
    count = 0
    for images, labels in loader:
        outputs = model(images.to(device, non_blocking=True))
        wanted = labels.to(device, non_blocking=True)
        right += (outputs.argmax(1) == wanted).sum()
        nll += cross_entropy(outputs, wanted, reduction="sum")
        count += len(labels)
    return 100 * float(right) / count, float(nll) / count


if __name__ == "__main__":
    main(*sys.argv[1:])
