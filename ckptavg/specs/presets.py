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
    return Preset(
        str(default),
        _side(getattr(transform, "resize_size", None)),
        _side(getattr(transform, "crop_size", None)),
        _channels(getattr(transform, "mean", None)),
        _channels(getattr(transform, "std", None)),
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
    pretrained: dict[str, Any] = {}
    if configured is not None:
        pretrained = configured.to_dict()
    try:
        config = data.resolve_data_config({"in_chans": None, **settings}, pretrained_cfg=pretrained)
        transform = data.create_transform(**config, is_training=False)
    except Exception as error:
        raise SpecError(
            f"timm makes no transform for {name}: {type(error).__name__}: {error}",
            "Name one by transform=path/file.py:fn.",
        ) from error
    side = min(config["input_size"][-2:])
    title = f"timm's {name}"
    if pretrained.get("tag") and "." not in name:
        title += f".{pretrained['tag']}"
    if settings:
        title += f", with the training's own {', '.join(settings)}"
    return Preset(
        title,
        # As timm's transform computes the size before the crop.
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
    return Preset(
        f"{directory / _PROCESSOR}",
        _shortest_side(processor, "do_resize", "size"),
        _shortest_side(processor, "do_center_crop", "crop_size"),
        _normalization(processor, "image_mean"),
        _normalization(processor, "image_std"),
        ImageProcessor(processor),
    )


def _shortest_side(processor: Any, step: str, name: str) -> int | None:
    """Return the shortest side of an image processor's size; None without the step.

    Args:
        processor: An image processor of transformers.
        step: Attribute that is True if the step is done.
        name: Attribute with the sides in pixels, by name.
    """
    if not getattr(processor, step, False):
        return None
    sizes = dict(getattr(processor, name, None) or {})
    return min((side for side in sizes.values() if isinstance(side, int)), default=None)


def _normalization(processor: Any, name: str) -> tuple[float, ...] | None:
    """Return the mean or standard deviation of an image processor; None where it has none."""
    if not getattr(processor, "do_normalize", False):
        return None
    return tuple(getattr(processor, name))


def _channels(values: Any) -> tuple[float, ...] | None:
    """Return values per channel as a tuple."""
    if values is None:
        return None
    return tuple(values)


class ImageProcessor:
    """Adapter of a transformers image processor to a transform of one image."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Any) -> Any:
        """Return the image as a tensor (channels, height, width)."""
        # Image files may be grey, or have a palette or transparency.
        return self.processor(image.convert("RGB"), return_tensors="pt")["pixel_values"][0]


def _side(sizes: Any) -> int | tuple[int, int] | None:
    """Convert a size of a torchvision preset, a number or a list of one or two sides."""
    if isinstance(sizes, int):
        return sizes
    if not isinstance(sizes, (list, tuple)) or not sizes:
        return None
    if len(sizes) == 2:
        return sizes[0], sizes[1]
    side: int = sizes[0]
    return side


def _interpolation(name: str) -> Any:
    """Look up torchvision's interpolation mode by name; None for an unknown name."""
    modes = import_torchvision("transforms").InterpolationMode
    return {mode.value: mode for mode in modes}.get(name)
