"""``--model`` and ``--data`` strings → a module, a Dataset or a DataLoader."""

from __future__ import annotations

import ast
import importlib
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import NoneType
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from ckptavg import text
from ckptavg.errors import CheckpointError, SpecError, UsageError, short
from ckptavg.factories import (
    Arguments,
    call_factory,
    call_named,
    extra,
    find_factory,
    parameters_of,
    similar,
    split_spec,
)
from ckptavg.formats import bounded_json
from ckptavg.hub import is_cached, offline

log = logging.getLogger("ckptavg")
Transform = Callable[[Any], Any]

MODEL_HELP = "torchvision:NAME, timm:NAME, hf:DIR, package.module:factory or path/file.py:factory"
DATA_HELP = (
    "imagefolder:DIR, cifar10:DIR, cifar100:DIR, text:FILE, tokens:FILE, "
    "package.module:factory or path/file.py:factory"
)
_CIFAR = {
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_TEXT: dict[str, Callable[..., Any]] = {"text": text.of_text, "tokens": text.of_tokens}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def parse_arguments(pairs: Iterable[str]) -> dict[str, Any]:
    """``key=value`` strings as keyword arguments; values are Python literals, else text.

    Raises:
        UsageError: One has no ``=``, or no identifier before it.
    """
    found: dict[str, Any] = {}
    for pair in pairs:
        key, separator, text = pair.partition("=")
        if not separator or not key.isidentifier():
            raise UsageError(f"an argument is expected to be key=value but got {pair!r}")
        found[key] = _literal(text)
    return found


def make_model(spec: str, arguments: Arguments | None = None) -> nn.Module:
    """Build the module that a specification names, without pretrained weights.

    Args:
        spec: As ``MODEL_HELP`` lists them.
        arguments: Keywords for the factory.

    Raises:
        SpecError: It cannot be found, or fails.
    """
    kind, name = split_spec(spec, MODEL_HELP)
    keywords = dict(arguments or {})
    if kind == "torchvision":
        models = _torchvision("models")
        if name not in models.list_models():
            raise SpecError(
                f"torchvision has no model {name!r}", similar(name, models.list_models())
            )
        builder = models.get_model_builder(name)
        if "weights_backbone" in parameters_of(builder):
            keywords.setdefault("weights_backbone", None)  # else it would be downloaded
        model = call_named(spec, builder, (), keywords)
    elif kind == "timm":
        timm = extra("timm", "timm")
        model = call_named(spec, timm.create_model, (name,), {"pretrained": False, **keywords})
    elif kind == "hf":
        model = call_named(spec, _hugging_face_model, (name,), keywords)
    else:
        model = call_factory(spec, keywords)
    if not isinstance(model, nn.Module):
        raise SpecError(
            f"{spec} is expected to return a torch.nn.Module but returned a {type(model).__name__}"
        )
    return model


def make_data(
    spec: str, arguments: Arguments | None = None, *, train: bool, model_spec: str = ""
) -> Any:
    """Build the Dataset or DataLoader that a specification names.

    Image folders and CIFAR directories take ``transform=path/file.py:fn``. Else an image folder is
    prepared by the preset of the torchvision model's weights, and without one by the usual resize,
    centre crop and normalization; CIFAR by its own normalization. What is used is logged.

    A text file becomes tokens by the tokenizer of an ``hf:DIR`` model, or of ``tokenizer=DIR``. The
    windows of it, or of a file of tokens, are as long as that model's context, 1024 at most and
    where it is not known; ``length`` and ``stride`` say otherwise (``ckptavg.text``).

    Args:
        spec: As ``DATA_HELP`` lists them.
        arguments: Keywords for the factory.
        train: Which split of a CIFAR directory.
        model_spec: The model that will see the data, for its preset, context and tokenizer.

    Raises:
        SpecError: It cannot be found, or fails.
    """
    kind, name = split_spec(spec, DATA_HELP)
    keywords = dict(arguments or {})
    if kind == "imagefolder":
        datasets = _torchvision("datasets")
        _check_image_folder(Path(name))
        transform = _transform(keywords) or _image_transform(model_spec)
        data = call_named(spec, datasets.ImageFolder, (name,), {"transform": transform, **keywords})
    elif kind in _CIFAR:
        class_name, mean, std = _CIFAR[kind]
        factory = getattr(_torchvision("datasets"), class_name)
        _check_cifar(kind, Path(name))
        transform = _transform(keywords) or _cifar_transform(class_name, mean, std)
        data = call_named(
            spec, factory, (name,), {"train": train, "transform": transform, **keywords}
        )
    elif kind in _TEXT:
        data = call_named(spec, _TEXT[kind], (name,), {**_of_model(kind, model_spec), **keywords})
    else:
        data = call_factory(spec, keywords)
    if not isinstance(data, (Dataset, DataLoader)) and not hasattr(data, "__iter__"):
        raise SpecError(
            f"{spec} is expected to return a Dataset or a DataLoader "
            f"but returned a {type(data).__name__}"
        )
    return data


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def _check_image_folder(directory: Path) -> None:
    if not directory.is_dir() or not any(child.is_dir() for child in directory.iterdir()):
        state = "has no folder a class" if directory.is_dir() else "does not exist"
        raise SpecError(f"{directory} {state}", "Expected imagefolder:DIR with DIR/CLASS/*.png.")


def _check_cifar(kind: str, directory: Path) -> None:
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[kind]
    if not (directory / folder).is_dir():
        raise SpecError(
            f"{directory} does not hold {folder}", "Name the directory that the archive unpacks in."
        )


def _torchvision(part: str) -> Any:
    """A part of torchvision, or a plain word about why it cannot be imported.

    Its compiled operators fit one torch only; beside another one, its import fails with
    "operator torchvision::nms does not exist".
    """
    try:
        return importlib.import_module(f"torchvision.{part}")
    except ModuleNotFoundError as error:
        raise SpecError(
            "torchvision is not installed", "Install it with pip install torchvision pillow."
        ) from error
    except (RuntimeError, ImportError, AttributeError, OSError) as error:
        raise SpecError(
            f"torchvision is installed but does not fit the installed torch ({error})",
            "Install both from the same source in one command: pip install torch torchvision.",
        ) from error


def _hugging_face_model(directory: str, **keywords: Any) -> Any:
    """A transformers model of the class that a directory's config names, freshly initialized.

    Nothing is downloaded, nor is the hub asked for anything.
    """
    if not (Path(directory) / "config.json").is_file():
        raise SpecError(f"{directory} is no directory with a config.json", "Expected hf:DIR.")
    transformers = extra("transformers", "transformers")
    keywords.setdefault("trust_remote_code", False)  # else it asks on the terminal
    try:
        with offline():
            config = transformers.AutoConfig.from_pretrained(
                directory, local_files_only=True, **keywords
            )
            names = config.architectures or []
            if not names or not hasattr(transformers, names[0]):
                raise SpecError(
                    f"{directory}/config.json names no architecture that transformers knows"
                )
            for settings in _settings(config, transformers.PretrainedConfig):
                if settings.get("use_pretrained_backbone"):
                    settings["use_pretrained_backbone"] = False
            return getattr(transformers, names[0])(config)
    except Exception as error:
        backbone = _lacking_backbone(Path(directory))
        if backbone is None:
            raise
        raise SpecError(
            f"{directory}/config.json names the backbone {short(backbone)}, of which this machine "
            "has no configuration",
            f"Fetch it first: hf download {short(backbone)} config.json.",
        ) from error


def _settings(config: Any, kind: type) -> Iterator[dict[str, Any]]:
    """The settings of a configuration and of all that are in it.

    Args:
        config: Plain values, or a configuration.
        kind: The class of configurations.
    """
    waiting, seen = [config], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        settings = vars(value) if isinstance(value, kind) else value
        if isinstance(settings, dict):
            waiting += settings.values()
            yield settings


def _lacking_backbone(directory: Path) -> str | None:
    """The hub's name of a backbone that a configuration names and the cache does not have."""
    try:
        config = bounded_json.read(directory / "config.json")
    except (OSError, ValueError, CheckpointError):
        return None
    for settings in _settings(config, NoneType):
        backbone = settings.get("backbone")
        if isinstance(backbone, str) and "/" in backbone:
            repository = backbone.rpartition(":")[2]
            if not is_cached(repository):
                return repository
    return None


def _of_model(kind: str, model_spec: str) -> dict[str, Any]:
    """What text data takes from an ``hf:DIR`` model unless it is told otherwise."""
    home, _, directory = model_spec.partition(":")
    if home != "hf":
        return {}
    found: dict[str, Any] = {"length": text.default_length(Path(directory))}
    return {**found, "tokenizer": directory} if kind == "text" else found


def _transform(keywords: dict[str, Any]) -> Transform | None:
    """The transform that the user named, taken out of the keywords."""
    spec = keywords.pop("transform", None)
    if spec is None:
        return None
    kind, name = split_spec(str(spec), "transform=path/file.py:fn")
    log.info("images are prepared by %s", spec)
    return find_factory(kind, name)


def _image_transform(model_spec: str) -> Transform:
    if model_spec.startswith("torchvision:"):
        weights = _torchvision("models").get_model_weights(model_spec.partition(":")[2])
        default = getattr(weights, "DEFAULT", None)
        if default is not None:
            log.info("images are prepared by the preset of %s", default)
            preset: Transform = default.transforms()
            return preset
    log.info("images are resized to 256, cropped to 224 and normalized as ImageNet's")
    transforms = _torchvision("transforms")
    steps = [transforms.Resize(256), transforms.CenterCrop(224)]
    return _normalizing(steps, *_IMAGENET)


def _cifar_transform(name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Transform:
    log.info("images are normalized as %s's", name)
    return _normalizing([], mean, std)


def _normalizing(steps: list[Any], mean: tuple[float, ...], std: tuple[float, ...]) -> Transform:
    transforms = _torchvision("transforms")
    composed: Transform = transforms.Compose(
        [*steps, transforms.ToTensor(), transforms.Normalize(mean, std)]
    )
    return composed
