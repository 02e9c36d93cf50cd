"""A plane point by point, as scripts do it: ``plane_one_by_one.py SCENE OUT STATISTICS STRIDE``.

The axes are those of ``plane.py`` of Garipov et al. 2018: flattened weights, orthogonalized. Each
point's weights are loaded, its BatchNorm statistics recomputed over the training data, and it is
scored on the training and on the evaluation data. STATISTICS is ``torch`` for ``update_bn``, or
``population`` for the variance of all values, as ckptavg has it. Every STRIDE-th point is scored.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from one_by_one import score, with_torch
from plane_data import WEIGHT_DECAY, load_coordinates, loader
from safetensors.torch import load_file
from scene import Scene, reported
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.utils.data import DataLoader


def main(directory: str, out: str, statistics: str, stride: str) -> None:
    scene = Scene.load(directory)
    recompute = {"torch": with_torch, "population": with_population}[statistics]
    coordinates = load_coordinates(scene)[:: int(stride)]
    with reported(scene, out) as scores:
        model = scene.network().to(scene.device)
        origin, across, up = axes(scene, model)
        for x, y in coordinates:
            vector = origin + x * across + y * up
            vector_to_parameters(vector.float(), model.parameters())
            recompute(model, loader(scene), scene.device)
            norm = float(vector.square().sum())
            _, loss = score(model, loader(scene), scene.device)
            top1, _ = score(model, loader(scene), scene.device)
            scores.append((top1, loss + WEIGHT_DECAY / 2 * norm))


def axes(scene: Scene, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """First checkpoint, direction to the middle one, and that to the last, orthogonalized."""
    vectors = []
    for path in sorted(scene.run.iterdir(), key=lambda path: int(path.stem.split("_")[1])):
        model.load_state_dict(load_file(path))
        vectors.append(parameters_to_vector(model.parameters()).detach().double())
    first, middle, last = vectors[0], vectors[len(vectors) // 2], vectors[-1]
    across = (middle - first) / (middle - first).norm()
    up = last - first
    up = up - (up @ across) * across
    return first, across, up / up.norm()


@torch.no_grad()
def with_population(model: nn.Module, batches: DataLoader[Any], device: str) -> None:
    """Sums and sums of squares of each layer's inputs, in float64."""
    sums: dict[nn.Module, list[torch.Tensor]] = {}

    def add(layer: nn.Module, inputs: tuple[torch.Tensor]) -> None:
        values = inputs[0].double()
        count = torch.tensor(values.numel() / values.shape[1])
        axes = [0, 2, 3]
        parts = [count, values.sum(axes), values.square().sum(axes)]
        known = sums.get(layer)
        if known is not None:
            parts = [a + b for a, b in zip(known, parts, strict=True)]
        sums[layer] = parts

    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    hooks = [layer.register_forward_pre_hook(add) for layer in layers]
    model.train()
    for images, _ in batches:
        model(images.to(device))
    for hook in hooks:
        hook.remove()
    for layer in layers:
        count, total, squares = sums[layer]
        mean = total / count
        layer.running_mean.copy_(mean)
        layer.running_var.copy_((squares - count * mean.square()) / (count - 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
