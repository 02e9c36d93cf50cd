"""``--model`` and ``--data`` strings → a module, a Dataset or a DataLoader."""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.utils.data import DataLoader, Dataset

from ckptavg.errors import SpecError, UsageError

log = logging.getLogger("ckptavg")
Arguments = Mapping[str, Any]
Transform = Callable[[Any], Any]

MODEL_HELP = "torchvision:NAME, timm:NAME, hf:DIR, package.module:factory or path/file.py:factory"
DATA_HELP = (
    "imagefolder:DIR, cifar10:DIR, cifar100:DIR, package.module:factory or path/file.py:factory"
)
_CIFAR = {
    "cifar10": ("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_PREFIXES = ("torchvision", "timm", "hf", "imagefolder", "cifar10", "cifar100")
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
    kind, name = _split(spec, MODEL_HELP)
    keywords = dict(arguments or {})
    if kind == "torchvision":
        models = _torchvision("models")
        if name not in models.list_models():
            raise SpecError(
                f"torchvision has no model {name!r}", _similar(name, models.list_models())
            )
        builder = models.get_model_builder(name)
        if "weights_backbone" in _parameters(builder):
            keywords.setdefault("weights_backbone", None)  # else it would be downloaded
        model = _call(spec, builder, (), keywords)
    elif kind == "timm":
        timm = _extra("timm", "timm")
        model = _call(spec, timm.create_model, (name,), {"pretrained": False, **keywords})
    elif kind == "hf":
        model = _call(spec, _hugging_face_model, (name,), keywords)
    else:
        model = _call(spec, _factory(kind, name), (), keywords)
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

    Args:
        spec: As ``DATA_HELP`` lists them.
        arguments: Keywords for the factory.
        train: Which split of a CIFAR directory.
        model_spec: The model that will see the data, for its preset.

    Raises:
        SpecError: It cannot be found, or fails.
    """
    kind, name = _split(spec, DATA_HELP)
    keywords = dict(arguments or {})
    if kind == "imagefolder":
        datasets = _torchvision("datasets")
        _check_image_folder(Path(name))
        transform = _transform(keywords) or _image_transform(model_spec)
        data = _call(spec, datasets.ImageFolder, (name,), {"transform": transform, **keywords})
    elif kind in _CIFAR:
        class_name, mean, std = _CIFAR[kind]
        factory = getattr(_torchvision("datasets"), class_name)
        _check_cifar(kind, Path(name))
        transform = _transform(keywords) or _cifar_transform(class_name, mean, std)
        data = _call(spec, factory, (name,), {"train": train, "transform": transform, **keywords})
    else:
        data = _call(spec, _factory(kind, name), (), keywords)
    if not isinstance(data, (Dataset, DataLoader)) and not hasattr(data, "__iter__"):
        raise SpecError(
            f"{spec} is expected to return a Dataset or a DataLoader "
            f"but returned a {type(data).__name__}"
        )
    return data


def call_factory(spec: str) -> Any:
    """What ``package.module:name()`` or ``path/file.py:name()`` gives.

    Raises:
        SpecError: It cannot be found, or fails.
    """
    kind, name = _split(spec, "package.module:factory or path/file.py:factory")
    return _call(spec, _factory(kind, name), (), {})


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


def _split(spec: str, expected: str) -> tuple[str, str]:
    kind, separator, name = spec.rpartition(":") if ".py:" in spec else spec.partition(":")
    if not separator or not kind or not name:
        raise UsageError(f"expected {expected} but got {spec!r}")
    return kind, name


def _factory(home: str, name: str) -> Callable[..., Any]:
    """What ``package.module:name`` or ``path/file.py:name`` names.

    Raises:
        SpecError: The module is not found or fails on import, or has no such attribute.
    """
    module = _module_from_file(Path(home)) if home.endswith(".py") else _module(home)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            offered = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise SpecError(f"{home} has no attribute {name!r}", _similar(name, offered))
        found = getattr(found, part)
    if not callable(found):
        raise SpecError(f"{home}:{name} is expected to be callable but is a {type(found).__name__}")
    factory: Callable[..., Any] = found
    return factory


def _module(name: str) -> ModuleType:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed_import(name, error) from error
        raise SpecError(
            f"no module named {error.name!r} is found",
            _meant(name)
            or f"Run from the directory that holds it, set PYTHONPATH, or name {MODEL_HELP}.",
        ) from error
    except Exception as error:
        raise _failed_import(name, error) from error


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SpecError(f"the file {path} does not exist", "Expected path/file.py:factory.")
    home = str(path.resolve().parent)
    if home not in sys.path:
        sys.path.insert(0, home)  # for its own imports, and for workers that import it again
    names = (path.stem, f"ckptavg_user_{path.stem}")  # the latter where the former is in use
    for name in names:
        loaded = sys.modules.get(name)
        if getattr(loaded, "__file__", None) == str(path.resolve()) and loaded is not None:
            return loaded
    name = next((n for n in names if n not in sys.modules), names[-1])
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise SpecError(f"{path} cannot be imported")
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[name] = module

    try:
        loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed_import(str(path), error) from error
    return module


def _failed_import(name: str, error: Exception) -> SpecError:
    return SpecError(
        f"importing {name} failed: {type(error).__name__}: {error}", "--debug shows where."
    )


def _call(
    spec: str, factory: Callable[..., Any], args: tuple[Any, ...], keywords: Arguments
) -> Any:
    try:
        return factory(*args, **keywords)
    except SpecError:
        raise
    except Exception as error:
        accepted = _parameters(factory)
        unknown = isinstance(error, TypeError) and accepted and set(keywords) - set(accepted)
        closed = unknown and "kwargs" not in accepted
        remedy = f"It takes {', '.join(accepted)}." if closed else "--debug shows where."
        raise SpecError(f"{spec} failed: {type(error).__name__}: {error}", remedy) from error


def _parameters(factory: Callable[..., Any]) -> list[str]:
    try:
        return list(inspect.signature(factory).parameters)
    except (TypeError, ValueError):
        return []


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


def _extra(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SpecError(
            f"{package} cannot be imported: {error}", f"Install it with pip install {package}."
        ) from error


def _hugging_face_model(directory: str, **keywords: Any) -> Any:
    """A transformers model of the class that a directory's config names, freshly initialized."""
    if not (Path(directory) / "config.json").is_file():
        raise SpecError(f"{directory} is no directory with a config.json", "Expected hf:DIR.")
    transformers = _extra("transformers", "transformers")
    config = transformers.AutoConfig.from_pretrained(directory, **keywords)
    names = config.architectures or []
    if not names or not hasattr(transformers, names[0]):
        raise SpecError(f"{directory}/config.json names no architecture that transformers knows")
    return getattr(transformers, names[0])(config)


def _transform(keywords: dict[str, Any]) -> Transform | None:
    """The transform that the user named, taken out of the keywords."""
    spec = keywords.pop("transform", None)
    if spec is None:
        return None
    kind, name = _split(str(spec), "transform=path/file.py:fn")
    log.info("images are prepared by %s", spec)
    return _factory(kind, name)


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


def _meant(module: str) -> str:
    """The prefix that a mistyped one was meant to be, if it is like one."""
    close = difflib.get_close_matches(module, _PREFIXES, 1, 0.7)
    return f"Did you mean {close[0]}:?" if close else ""


def _similar(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), 3, 0.4)
    return f"Did you mean {', '.join(close)}?" if close else "Check the name."
