"""Preparation of images for a model, by a user's transform, by options or by a preset."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptavg.errors import SpecError
from ckptavg.specs.arguments import Arguments, plain_value, text_of
from ckptavg.specs.importing import call_named, find_object, required_parameters, split_spec
from ckptavg.specs.libraries import import_torchvision

log = logging.getLogger("ckptavg")

Transform = Callable[[Any], Any]

OPTIONS = ("size", "crop", "mean", "std")
"""Arguments of image data that change a preset."""

# Mean and standard deviation per channel, for values from 0 to 1.
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR10 = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
CIFAR100 = ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
_KNOWN: dict[Any, str] = {IMAGENET: "ImageNet", CIFAR10: "CIFAR10", CIFAR100: "CIFAR100"}
_CHANNELS = 3
# Factor of enlargement from which on the user is warned.
_FAR_LARGER = 2
# Image files whose size is read.
_MOST_LOOKED_AT = 16
# Parameters of transform factories that choose between training and evaluation.
_ROLES = ("train", "training", "is_train", "is_training")


@dataclass(frozen=True)
class Preset:
    """Default preparation of the images of a model or data set.

    Attributes:
        name: Name of the model in notes; empty for a preset of no model.
        size: Size after resizing in pixels: the shorter side, or (height, width); None for no
            resizing.
        crop: Side of the centre crop in pixels, or (height, width); None for no crop.
        mean: Mean per channel; None for no normalization.
        std: Standard deviation per channel; None for no normalization.
        transform: Complete transform from the model's library; None to build one from the fields.
        interpolation: Argument of torchvision's ``Resize``; the default of ``Resize`` where None.
    """

    name: str
    size: int | tuple[int, int] | None
    crop: int | tuple[int, int] | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    transform: Transform | None = None
    interpolation: Any = None

    @property
    def resize(self) -> int | None:
        """Shorter side after resizing, in pixels."""
        if isinstance(self.size, tuple):
            return min(self.size)
        return self.size

    def describe(self) -> str:
        """Word the note on the preparation of images."""
        steps: list[str] = []
        if self.size is not None:
            steps.append(f"resized to {_side_text(self.size)}")
        if self.crop is not None:
            steps.append(f"cropped to {_side_text(self.crop)}")
        if self.mean is None:
            steps.append("not normalized")
        elif (dataset := _KNOWN.get((self.mean, self.std))) is not None:
            steps.append(f"normalized as {dataset}'s")
        else:
            steps.append(f"normalized by mean {_numbers(self.mean)} and std {_numbers(self.std)}")
        *earlier, last = steps
        if not earlier:
            return last
        return f"{', '.join(earlier)} and {last}"

    def to_transform(self) -> Transform:
        """Make the transform from an image to a tensor."""
        if self.transform is not None:
            return self.transform
        transforms = import_torchvision("transforms")
        steps: list[Any] = []
        if self.size is not None:
            resizing = {}
            if self.interpolation is not None:
                resizing["interpolation"] = self.interpolation
            steps.append(transforms.Resize(self.size, **resizing))
        if self.crop is not None:
            steps.append(transforms.CenterCrop(self.crop))
        steps.append(transforms.ToTensor())
        if self.mean is not None:
            steps.append(transforms.Normalize(self.mean, self.std))
        composed: Transform = transforms.Compose(steps)
        return composed

    def log(self) -> None:
        """Log the preparation of images."""
        if self.name:
            log.info("images are prepared by the preset of %s: %s", self.name, self.describe())
        else:
            log.info("images are %s", self.describe())


DEFAULT_PRESET = Preset("", 256, 224, *IMAGENET)
"""Evaluation preset of most models trained on ImageNet."""


def take_options(keywords: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Remove the transform and the preset options from keywords.

    Returns:
        The specification of the transform, None where there is none; and the options by name.

    Raises:
        SpecError: Both a transform and options are given.
    """
    transform = keywords.pop("transform", None)
    options = {name: plain_value(keywords.pop(name)) for name in OPTIONS if name in keywords}
    if transform is not None and options:
        raise SpecError(
            f"transform= prepares images by itself, so {', '.join(options)} would do nothing",
            "Give one or the other.",
        )
    return transform, options


def load_transform(spec: Any) -> Transform:
    """Load the transform of ``transform=``: a transform, a function of the image, or a factory.

    Raises:
        SpecError: The object cannot be found, or gives no transform.
    """
    text = text_of(spec)
    if text.lower() == "none":
        log.info("images become tensors from 0 to 1, and nothing else is done to them")
        only_tensors: Transform = import_torchvision("transforms").ToTensor()
        return only_tensors
    kind, name = split_spec(text, "transform=path/file.py:fn or transform=none")
    value = find_object(kind, name)
    log.info("images are prepared by %s", text)
    if (arguments := _factory_arguments(value)) is not None:
        value = call_named(text, value, (), arguments)
    if not callable(value):
        raise SpecError(
            f"{text} is expected to be a function of an image, or to return one, "
            f"but gives a {type(value).__name__}"
        )
    transform: Transform = value
    return _by_keyword(transform)


def _factory_arguments(value: Any) -> Arguments | None:
    """Return the arguments for a transform factory; None for an object that is a transform."""
    if isinstance(value, type):
        return {}
    if not hasattr(value, "__code__") and not hasattr(value, "func"):
        # An object with ``__call__``, such as a torchvision Compose.
        return None
    parameters = required_parameters(value)
    if not parameters and not _takes_anything(value):
        return {}
    if len(parameters) == 1 and parameters[0] in _ROLES:
        return {parameters[0]: False}
    return None


def _takes_anything(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    # inspect.CO_VARARGS: the function has *args.
    return code is not None and bool(code.co_flags & 0x04)


class _ByKeyword:
    """Adapter of an albumentations transform, which takes ``image=array`` and returns a dict."""

    def __init__(self, transform: Callable[..., Mapping[str, Any]]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> Any:
        """Transform a PIL image."""
        # Imported on demand: only albumentations transforms need numpy here.
        import numpy  # noqa: PLC0415

        return self.transform(image=numpy.asarray(image))["image"]


def _by_keyword(transform: Transform) -> Transform:
    home = type(transform).__module__.partition(".")[0]
    if home in ("albumentations", "albucore"):
        return _ByKeyword(transform)
    return transform


def adapt_preset(preset: Preset, options: Mapping[str, Any]) -> Preset:
    """Change a preset by a user's options.

    Args:
        preset: The preset without options.
        options: Values by the names in ``OPTIONS``; None leaves a step out.

    Raises:
        SpecError: The value of an option is invalid.
    """
    size, crop = preset.size, preset.crop
    if "size" in options:
        size = _read_side("size", options["size"])
        # A single size is that of the shorter side, so only a crop makes images of one shape.
        crop = None
        if isinstance(size, int):
            crop = size
    if "crop" in options:
        crop = _read_side("crop", options["crop"])
        # The ratio of resize to crop stays that of the preset.
        if "size" not in options and isinstance(preset.size, int) and isinstance(crop, int):
            preset_crop = preset.size
            if isinstance(preset.crop, int):
                preset_crop = preset.crop
            size = round(crop * preset.size / preset_crop)
    mean, std = preset.mean, preset.std
    if "mean" in options:
        mean = _read_channels("mean", options["mean"])
    if "std" in options:
        std = _read_channels("std", options["std"])
    # Normalization needs both; without one of them there is none.
    if mean is None or std is None:
        mean = std = None
    return Preset("", size, crop, mean, std, interpolation=preset.interpolation)


def _read_side(name: str, value: Any) -> int | tuple[int, int] | None:
    if value is None or value is False:
        return None
    if _is_side(value):
        return int(value)
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_side, value)):
        return value[0], value[1]
    raise SpecError(
        f"{name} is expected to be a number of pixels, HEIGHT,WIDTH or none but got {value!r}"
    )


def _is_side(value: Any) -> bool:
    return type(value) is int and value > 0


def _read_channels(name: str, value: Any) -> tuple[float, ...] | None:
    if value is None or value is False:
        return None
    values = value
    if not isinstance(value, (list, tuple)):
        values = [value] * _CHANNELS
    numbers = tuple(float(v) for v in values if type(v) in (int, float))
    if len(numbers) != _CHANNELS or (name == "std" and min(numbers) <= 0):
        raise SpecError(
            f"{name} is expected to be one number, {_CHANNELS} with commas between, or none "
            f"but got {value!r}"
        )
    return numbers


def warn_of_small_images(sizes: Sequence[tuple[int, int]], resize: int | None) -> None:
    """Warn of images that resizing enlarges more than twofold.

    Args:
        sizes: Width and height of some images, in pixels.
        resize: Shorter side after resizing, in pixels; None for no resizing.
    """
    if resize is None or not sizes or resize <= _FAR_LARGER * max(map(min, sizes)):
        return
    widths, heights = zip(*sizes, strict=True)
    width, height = round(statistics.median(widths)), round(statistics.median(heights))
    log.warning(
        "images are %dx%d but are resized to %d: the argument size=%d leaves them as they are",
        width, height, resize, min(width, height),
    )  # fmt: skip


def image_sizes(paths: Sequence[str | Path]) -> list[tuple[int, int]]:
    """Read width and height of a sample of image files, skipping unreadable files."""
    # Imported on demand: only image data needs PIL.
    from PIL import Image  # noqa: PLC0415

    sizes: list[tuple[int, int]] = []
    stride = -(-len(paths) // _MOST_LOOKED_AT) or 1
    for path in paths[::stride]:
        try:
            with Image.open(path) as image:
                sizes.append(image.size)
        except (OSError, ValueError):
            continue
    return sizes


def _side_text(side: int | tuple[int, int]) -> str:
    if isinstance(side, int):
        return str(side)
    return f"{side[0]}x{side[1]}"


def _numbers(values: Sequence[float] | None) -> str:
    return ", ".join(f"{value:g}" for value in values or ())
