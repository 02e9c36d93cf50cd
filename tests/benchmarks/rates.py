"""Rates without decoding, in one process: ``rates.py SCENE OUT ROUNDS limit|statistics [K]``.

Writes seconds of every round by name, and what else there is to know, as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders.scene import CLASSES, Scene, synchronize
from measuring import Trial, Usage, alternate
from safetensors.torch import load_file
from torch.optim import swa_utils
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

import ckptavg

_SEED = 20240302
Work = dict[str, Callable[[], Any]]


def main(directory: str, out: str, rounds: str, part: str, count: str = "1") -> None:
    """Measure a part and write what was found."""
    scene = Scene.load(directory)
    images = _images(scene)
    if part == "limit":
        found = {"seconds": _measured(scene, _limit(scene, images, int(count)), int(rounds))}
    else:
        found = _statistics(scene, images, int(rounds))
    Path(out).write_text(json.dumps(found))


def _images(scene: Scene) -> torch.Tensor:
    """Decoded photos, some dark and some bright, so that batches differ; in host memory."""
    random = torch.Generator().manual_seed(_SEED)
    images = torch.randn(scene.images, 3, scene.crop, scene.crop, generator=random)
    return images.add_(torch.randn(scene.images, 1, 1, 1, generator=random))


def _measured(scene: Scene, work: Work, rounds: int) -> dict[str, list[float]]:
    """Seconds of each round, in alternation, after one that does not count."""

    def timed(function: Callable[[], Any]) -> Usage:
        synchronize(scene.device)
        start = time.perf_counter()
        function()
        synchronize(scene.device)
        return Usage(time.perf_counter() - start)

    trials = [Trial(name, lambda f=function: timed(f)) for name, function in work.items()]
    found = alternate(trials, rounds, progress=lambda line: print(line, file=sys.stderr))
    return {name: [usage.seconds for usage in usages] for name, usages in found.items()}


def _limit(scene: Scene, images: torch.Tensor, count: int) -> Work:
    """Evaluation of all images and of one batch, and the models' bare forward of all."""
    paths = scene.averaged[:count]
    template = scene.network()
    labels = torch.arange(len(images)) % CLASSES

    def evaluated(number: int) -> None:
        loader = _whole_batches(scene, TensorDataset(images[:number], labels[:number]))
        ckptavg.evaluate(paths, template, loader, device=scene.device)

    models = [_loaded(scene, path).eval() for path in paths]
    batches = images.to(scene.device).split(scene.batch_size)

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                for model in models:
                    model(batch)

    return {
        "all": lambda: evaluated(len(images)),
        "first": lambda: evaluated(scene.batch_size),
        "bare": bare,
    }


def _whole_batches(scene: Scene, data: TensorDataset) -> DataLoader[Any]:
    """Index a batch at once: collating single tensors would be measured otherwise."""
    sampler = BatchSampler(SequentialSampler(data), scene.batch_size, drop_last=False)
    return DataLoader(data, batch_size=None, sampler=sampler, pin_memory=scene.device == "cuda")


def _loaded(scene: Scene, path: Path) -> torch.nn.Module:
    model = scene.network()
    model.load_state_dict(load_file(path))
    return model.to(scene.device)


def _statistics(scene: Scene, images: torch.Tensor, rounds: int) -> dict[str, Any]:
    """Passes over batches on the device, and how far the first layer's variances are off."""
    model = _loaded(scene, scene.averaged[0])
    batches = images.to(scene.device).split(scene.batch_size)
    layer = next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d))
    wanted = _population_variance(model, layer, batches)
    found = {}

    def then_noted(name: str, function: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            function()
            variance = layer.running_var.double().cpu()
            found[name] = float(((variance - wanted).abs() / wanted).max())

        return run

    passes: Work = {
        "ckptavg": lambda: ckptavg.update_bn(model, batches, device=scene.device),
        "torch": lambda: swa_utils.update_bn(batches, model),
    }
    if (update_bn_stats := _fvcore()) is not None:
        passes["fvcore"] = lambda: update_bn_stats(model.train(), batches, len(batches))
    work = {name: then_noted(name, function) for name, function in passes.items()}
    seconds = _measured(scene, {"bare": lambda: _forward(model.train(), batches), **work}, rounds)
    return {"seconds": seconds, "off": found}


def _fvcore() -> Callable[..., None] | None:
    """Its function, or None where it is not installed."""
    try:
        from fvcore.nn.precise_bn import update_bn_stats
    except ImportError:
        return None
    return update_bn_stats


@torch.no_grad()
def _forward(model: torch.nn.Module, batches: tuple[torch.Tensor, ...]) -> None:
    for batch in batches:
        model(batch)


def _population_variance(
    model: torch.nn.Module, layer: torch.nn.Module, batches: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """Of a layer's inputs, a channel each, by two passes in float64; divided by N − 1."""
    zero = torch.zeros((), dtype=torch.float64)
    total, count = _sums(model, layer, batches, zero, 1)
    squares, _ = _sums(model, layer, batches, total / count, 2)
    return (squares / (count - 1)).flatten()


def _sums(
    model: torch.nn.Module,
    layer: torch.nn.Module,
    batches: tuple[torch.Tensor, ...],
    centre: torch.Tensor,
    power: int,
) -> tuple[torch.Tensor, int]:
    """Of the powers of a layer's centred inputs, a channel each; and how many were summed."""
    sums: list[torch.Tensor] = []
    counts: list[int] = []

    def observe(_: Any, inputs: tuple[torch.Tensor]) -> None:
        values = inputs[0].double().cpu().transpose(0, 1).flatten(1)
        sums.append((values - centre).pow(power).sum(1, keepdim=True))
        counts.append(values.shape[1])

    with layer.register_forward_pre_hook(observe):
        _forward(model.train(), batches)
    return torch.stack(sums).sum(0), sum(counts)


if __name__ == "__main__":
    main(*sys.argv[1:])
