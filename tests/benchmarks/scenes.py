"""Make a scene to score, in a process of its own: ``scenes.py DIR``, which holds ``scene.json``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from contenders.scene import CLASSES, Scene
from PIL import Image, ImageChops
from safetensors.torch import save_file

import ckptavg

_SEED = 20240301
_NOISE = 0.1  # of a tensor's own spread, in each checkpoint
_COARSE = 16  # pixels of a photo that vary together, grain aside
_GRAIN = 6  # standard deviation, of 255
_QUALITY = 90


def main(directory: str) -> None:
    """Fill a directory that holds nothing but a scene's description."""
    scene = Scene.load(directory)
    scene.run.mkdir()
    _checkpoints(scene)
    names = {path.name: scheme for path, scheme in zip(scene.averaged, scene.schemes, strict=True)}
    run = ckptavg.open_run(scene.run)
    ckptavg.average_many(run, names, out_dir=scene.averaged[0].parent)
    _photos(scene)


def _checkpoints(scene: Scene) -> None:
    """A training that wanders around where it began."""
    random = torch.Generator().manual_seed(_SEED)
    state = scene.network().state_dict()
    for step in range(1, scene.checkpoints + 1):
        moved = {name: _moved(tensor, random) for name, tensor in state.items()}
        save_file(moved, scene.run / f"step_{step}.safetensors")


def _moved(tensor: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    if not tensor.is_floating_point() or tensor.numel() < 2:
        return tensor.clone()
    return tensor + _NOISE * tensor.std() * torch.randn(tensor.shape, generator=random)


def _photos(scene: Scene) -> None:
    """JPEG files that take as long to decode as photos of their size: shapes, colours, grain."""
    if not scene.width:
        return
    random = torch.Generator().manual_seed(_SEED)
    size = (scene.width, scene.height)
    grain = Image.effect_noise(size, _GRAIN).convert("RGB")
    for number in range(scene.images):
        folder = scene.photos / f"class{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        photo = ImageChops.add(_shapes(size, random), grain, offset=-128)
        photo.save(folder / f"{number:06}.jpg", quality=_QUALITY)


def _shapes(size: tuple[int, int], random: torch.Generator) -> Image.Image:
    """Blotches of any colour around one that is the photo's own."""
    width, height = (max(2, pixels // _COARSE) for pixels in size)
    colour = 60 + 130 * torch.rand(3, generator=random)
    values = colour + 35 * torch.randn(height, width, 3, generator=random)
    pixels = values.clamp(0, 255).to(torch.uint8)
    small = Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist()))
    return small.resize(size, Image.Resampling.BICUBIC)


if __name__ == "__main__":
    main(str(Path(sys.argv[1]).resolve()))
