"""Models of torchvision and timm by name, without their pretrained weights."""

from __future__ import annotations

import importlib
from typing import Any

from ckptavg.errors import SpecError
from ckptavg.optional import import_optional
from ckptavg.specs.arguments import Arguments
from ckptavg.specs.importing import call_named, parameters_of, similar


def import_torchvision(part: str) -> Any:
    """Import a part of torchvision.

    Its compiled operators fit one torch only; beside another one, its import fails with
    "operator torchvision::nms does not exist".

    Raises:
        SpecError: It cannot be imported; with the remedy for either reason.
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


def torchvision_model(spec: str, name: str, arguments: Arguments) -> Any:
    """Build a torchvision model."""
    models = import_torchvision("models")
    if name not in models.list_models():
        raise SpecError(f"torchvision has no model {name!r}", similar(name, models.list_models()))
    builder = models.get_model_builder(name)
    if "weights_backbone" in parameters_of(builder):
        arguments = {"weights_backbone": None, **arguments}  # else it would be downloaded
    return call_named(spec, builder, (), arguments)


def timm_model(spec: str, name: str, arguments: Arguments) -> Any:
    """Build a timm model."""
    timm = import_optional("timm", "timm")
    keywords = {"pretrained": False, **arguments}
    try:
        return call_named(spec, timm.create_model, (name,), keywords)
    except SpecError as error:
        if ":" in name or timm.is_model(name):
            raise
        names = timm.list_models()
        raise SpecError(
            f"timm has no model {name!r}", similar(name.partition(".")[0], names)
        ) from error
