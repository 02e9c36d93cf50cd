"""Image presets of models: from torchvision's weights, timm's and Hugging Face's settings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ckptavg.data.hub import offline
from ckptavg.errors import SpecError
from ckptavg.optional import import_optional
from ckptavg.specs.images import Preset
from ckptavg.specs.libraries import import_torchvision

_PROCESSOR = "preprocessor_config.json"


def torchvision_preset(name: str) -> Preset | None:
    """Look up the preset of a torchvision model's default weights; None without such weights."""
    weights = import_torchvision("models").get_model_weights(name)
    default = getattr(weights, "DEFAULT", None)
    if default is None:
        return None
    transform = default.transforms()
    mean, std = getattr(transform, "mean", None), getattr(transform, "std", None)
    return Preset(
        str(default),
        _side(getattr(transform, "resize_size", None)),
        _side(getattr(transform, "crop_size", None)),
        None if mean is None else tuple(mean),
        None if std is None else tuple(std),
        transform,
        getattr(transform, "interpolation", None),
    )


def timm_preset(name: str, settings: Mapping[str, Any]) -> Preset:
    """Resolve a timm model's data configuration, as timm's own validation does.

    Args:
        name: Name of the model, with or without a tag.
        settings: Arguments of the training, where known: ``img_size``, ``mean``, ...

    Raises:
        SpecError: timm cannot make a transform from the configuration.
    """
    data = import_optional("timm.data", "timm")
    models = import_optional("timm.models", "timm")
    configured = models.get_pretrained_cfg(name)
    pretrained = {} if configured is None else configured.to_dict()
    tag = pretrained.get("tag")
    try:
        config = data.resolve_data_config({"in_chans": None, **settings}, pretrained_cfg=pretrained)
        transform = data.create_transform(**config, is_training=False)
    except Exception as error:
        raise SpecError(
            f"timm makes no transform for {name}: {type(error).__name__}: {error}",
            "Name one by transform=path/file.py:fn.",
        ) from error
    side = min(config["input_size"][-2:])
    full = f"{name}.{tag}" if tag and "." not in name else name
    trained = f", with the training's own {', '.join(settings)}" if settings else ""
    return Preset(
        f"timm's {full}{trained}",
        math.floor(side / config["crop_pct"]),
        side,
        tuple(config["mean"]),
        tuple(config["std"]),
        transform,
        _interpolation(config["interpolation"]),
    )


def hugging_face_preset(directory: Path) -> Preset | None:
    """Read the image processor beside a Hugging Face model; None where there is none.

    Raises:
        SpecError: transformers cannot load the image processor.
    """
    if not (directory / _PROCESSOR).is_file():
        return None
    transformers = import_optional("transformers", "transformers")
    try:
        with offline():
            processor = transformers.AutoImageProcessor.from_pretrained(
                str(directory), local_files_only=True, trust_remote_code=False
            )
    except Exception as error:
        raise SpecError(
            f"{directory / _PROCESSOR} cannot be used: {type(error).__name__}: {error}",
            "Name a transform by transform=path/file.py:fn.",
        ) from error
    settings = dict(processor.size or {}) if getattr(processor, "do_resize", False) else {}
    sides = [side for side in settings.values() if isinstance(side, int)]
    crops = dict(getattr(processor, "crop_size", None) or {})
    is_cropped = getattr(processor, "do_center_crop", False)
    is_normalized = getattr(processor, "do_normalize", False)
    return Preset(
        f"{directory / _PROCESSOR}",
        min(sides, default=None),
        min(crops.values(), default=None) if is_cropped else None,
        tuple(processor.image_mean) if is_normalized else None,
        tuple(processor.image_std) if is_normalized else None,
        ImageProcessor(processor),
    )


class ImageProcessor:
    """Adapter of a transformers image processor to a transform of one image."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Any:
        """Return the image as a tensor (channels, height, width)."""
        return self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def _side(sizes: Any) -> int | tuple[int, int] | None:
    """Convert a size of a torchvision preset, a number or a list of one or two sides."""
    if isinstance(sizes, int):
        return sizes
    sides = tuple(sizes) if isinstance(sizes, (list, tuple)) else ()
    if len(sides) == 2:
        return sides[0], sides[1]
    return sides[0] if sides else None


def _interpolation(name: str) -> Any:
    """Look up torchvision's interpolation mode by name; None for an unknown name."""
    modes = import_torchvision("transforms").InterpolationMode
    return {mode.value: mode for mode in modes}.get(name)
