"""Modules, Datasets and DataLoaders from specifications."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from ckptavg.data import token_windows
from ckptavg.errors import SpecError
from ckptavg.specs import hugging_face, images, libraries, presets, suggestions
from ckptavg.specs.arguments import Arguments, text_of
from ckptavg.specs.importing import (
    call_named,
    find_object,
    parameters_of,
    split_spec,
    take_or_call,
)
from ckptavg.specs.prefixes import DATA_HELP, LIGHTNING, MODEL_HELP
from ckptavg.specs.recorded import is_lightning_module
from ckptavg.specs.splits import are_columns, is_data, pick_split

log = logging.getLogger("ckptavg")

_CIFAR = {"cifar10": ("CIFAR10", images.CIFAR10), "cifar100": ("CIFAR100", images.CIFAR100)}
_TEXT: dict[str, Callable[..., Any]] = {
    "text": token_windows.open_text,
    "tokens": token_windows.open_tokens,
}


def make_model(spec: str, arguments: Arguments | None = None) -> nn.Module:
    """Build the module that a specification names, without pretrained weights.

    For a LightningModule, ``configure_model`` is called, too, which may create layers.

    Args:
        spec: One of the forms in ``MODEL_HELP``.
        arguments: Keywords for the factory.

    Raises:
        UsageError: The specification has none of these forms.
        SpecError: The model cannot be found, or building fails.
    """
    kind, name = split_spec(spec, MODEL_HELP, suggestions.suggest_model(spec))
    keywords = dict(arguments or {})
    if kind == "torchvision":
        model = libraries.torchvision_model(spec, name, keywords)
    elif kind == "timm":
        model = libraries.timm_model(spec, name, keywords)
    elif kind == "hf":
        model = call_named(spec, hugging_face.build_model, (name,), keywords)
    else:
        suggestions.refuse_mistyped(spec, "model")
        user_spec = spec
        if kind == LIGHTNING:
            user_spec = name
        model = take_or_call(user_spec, keywords, lambda value: isinstance(value, nn.Module))
        if is_lightning_module(type(model)):
            call_named(f"{user_spec}.configure_model", model.configure_model, (), {})
    if not isinstance(model, nn.Module):
        raise SpecError(
            f"{spec} is expected to return a torch.nn.Module but returned a {type(model).__name__}"
        )
    return model


def make_data(
    spec: str,
    arguments: Arguments | None = None,
    *,
    train: bool,
    model_spec: str = "",
    image_settings: Mapping[str, Any] | None = None,
) -> Any:
    """Build the Dataset or DataLoader that a specification names.

    Image folders and CIFAR directories take ``transform=path/file.py:fn`` or ``transform=none``.
    Without a transform, images are prepared by the preset of the model: of timm and Hugging Face
    models, and for image folders also of torchvision models. Without a preset an image folder gets
    the resize, centre crop and normalization of ImageNet, and CIFAR the normalization of CIFAR.
    ``size``, ``crop``, ``mean`` and ``std`` change a preset. The preparation is logged.

    A text file is tokenized by the tokenizer of an ``hf:DIR`` model, or of ``tokenizer=DIR``.
    Windows of a text or of a file of tokens have the length of the model's context, at most 1024,
    and 1024 where the context is unknown. ``length`` and ``stride`` override this (see
    ``ckptavg.data.token_windows``).

    A factory may return several named data sets, or a Lightning DataModule. ``split`` names the one
    to use where the names are not clear.

    Args:
        spec: One of the forms in ``DATA_HELP``.
        arguments: Keywords for the factory.
        train: True for the training split of a CIFAR directory or of a factory's return value,
            False for the evaluation split.
        model_spec: Specification of the model that gets the data, for preset, context and
            tokenizer.
        image_settings: Image settings of a timm model's training.

    Returns:
        A Dataset or a loader.

    Raises:
        UsageError: The specification has none of these forms.
        SpecError: The data cannot be found, or building fails.
    """
    kind, name = split_spec(spec, DATA_HELP, suggestions.suggest_data(spec))
    keywords = dict(arguments or {})
    if kind == "imagefolder" or kind in _CIFAR:
        settings = image_settings or {}
        return _image_data(spec, kind, Path(name), keywords, model_spec, settings, train=train)
    if kind in _TEXT:
        return call_named(
            spec, _TEXT[kind], (name,), {**_text_arguments(kind, model_spec), **keywords}
        )
    suggestions.refuse_mistyped(spec, "data")
    return _own_data(spec, keywords, train=train)


def _own_data(spec: str, keywords: dict[str, Any], *, train: bool) -> Any:
    """Get the data from a user's object or factory."""
    split = None
    # A factory with a parameter of this name gets the split; otherwise it selects from the result.
    if "split" in keywords and not _takes(spec, "split"):
        split = text_of(keywords.pop("split"))
    result = take_or_call(spec, keywords, _is_finished)
    data = pick_split(spec, result, split, train=train)
    if not is_data(data):
        remedy = ""
        if are_columns(data):
            remedy = "Return torch.utils.data.TensorDataset(inputs, labels)."
        raise SpecError(
            f"{spec} is expected to return a Dataset or a DataLoader "
            f"but returned a {type(data).__name__}",
            remedy,
        )
    return data


def _takes(spec: str, name: str) -> bool:
    """Return True if the object of a specification takes an argument of a name."""
    value = find_object(*split_spec(spec, DATA_HELP))
    return callable(value) and {name, "kwargs"} & {*parameters_of(value)} != set()


def _is_finished(value: Any) -> bool:
    """Return True for a finished data set, even a callable one; False for a factory."""
    return not callable(value) or isinstance(value, (Dataset, DataLoader))


def _image_data(
    spec: str,
    kind: str,
    directory: Path,
    keywords: dict[str, Any],
    model_spec: str,
    settings: Mapping[str, Any],
    *,
    train: bool,
) -> Any:
    """Build a Dataset of images, prepared for a model."""
    datasets = libraries.import_torchvision("datasets")
    # Checked first: the errors of torchvision do not suggest another directory.
    if kind in _CIFAR:
        suggestions.check_cifar(kind, directory)
        name, moments = _CIFAR[kind]
        factory, default_preset = getattr(datasets, name), images.Preset("", None, None, *moments)
        keywords = {"train": train, **keywords}
    else:
        suggestions.check_image_folder(directory)
        factory, default_preset = datasets.ImageFolder, images.DEFAULT_PRESET
    transform_spec, options = images.take_options(keywords)
    resize = None
    if transform_spec is not None:
        transform = images.load_transform(transform_spec)
    else:
        preset = _preset_of(model_spec, settings, is_cifar=kind in _CIFAR) or default_preset
        if options:
            preset = images.adapt_preset(preset, options)
        preset.log()
        transform = preset.to_transform()
        # No warning of small images for a size that the user has chosen.
        if "size" not in options:
            resize = preset.resize
    data = call_named(spec, factory, (str(directory),), {"transform": transform, **keywords})
    if resize is not None:
        # All images of CIFAR have this size.
        sizes = [(32, 32)]
        if kind not in _CIFAR:
            paths = [path for path, _ in getattr(data, "samples", ())]
            sizes = images.image_sizes(paths)
        images.warn_of_small_images(sizes, resize)
    return data


def _preset_of(
    model_spec: str, settings: Mapping[str, Any], *, is_cifar: bool
) -> images.Preset | None:
    """Look up the image preset of a model; None for a model without a preset."""
    library, _, name = model_spec.partition(":")
    if library == "timm":
        return presets.timm_preset(name, settings)
    if library == "hf" and (directory := _directory_of(name)) is not None:
        return presets.hugging_face_preset(directory)
    if library == "torchvision" and not is_cifar:
        return presets.torchvision_preset(name)
    return None


def _text_arguments(kind: str, model_spec: str) -> dict[str, Any]:
    """Return the default arguments of text data for an ``hf:DIR`` model."""
    library, _, name = model_spec.partition(":")
    if library != "hf" or (directory := _directory_of(name)) is None:
        return {}
    arguments: dict[str, Any] = {"length": token_windows.default_length(directory)}
    if kind == "text":
        arguments["tokenizer"] = str(hugging_face.find_tokenizer_directory(directory))
    return arguments


def _directory_of(name: str) -> Path | None:
    """Return the directory of an ``hf:DIR`` model; None where there is none."""
    # Building the model reports a missing directory.
    try:
        return hugging_face.find_model_directory(name)
    except SpecError:
        return None
