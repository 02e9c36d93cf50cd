"""Models of torchvision and timm by name, without pretrained weights."""

from __future__ import annotations

import importlib
from typing import Any

from ckptavg.errors import SpecError
from ckptavg.optional import import_optional
from ckptavg.specs.arguments import Arguments
from ckptavg.specs.importing import call_named, parameters_of, similar


def import_torchvision(part: str) -> Any:
    """Import a part of torchvision.

    The compiled operators of torchvision fit a single version of torch. With another version the
    import fails with "operator torchvision::nms does not exist".

    Raises:
        SpecError: torchvision is not installed, or does not fit the installed torch.
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
    """Build a torchvision model.

    Args:
        spec: The specification, for messages.
        name: Name of the model.
        arguments: Keywords of the model's builder.

    Raises:
        SpecError: There is no such model, or building fails.
    """
    models = import_torchvision("models")
    if name not in models.list_models():
        raise SpecError(f"torchvision has no model {name!r}", similar(name, models.list_models()))
    builder = models.get_model_builder(name)
    if "weights_backbone" in parameters_of(builder):
        # By default, torchvision downloads the weights of a backbone.
        arguments = {"weights_backbone": None, **arguments}
    return call_named(spec, builder, (), arguments)


def timm_model(spec: str, name: str, arguments: Arguments) -> Any:
    """Build a timm model.

    Args:
        spec: The specification, for messages.
        name: Name of the model, with or without a tag.
        arguments: Keywords of ``timm.create_model``.

    Raises:
        SpecError: There is no such model, or building fails.
    """
    timm = import_optional("timm", "timm")
    keywords = {"pretrained": False, **arguments}
    try:
        return call_named(spec, timm.create_model, (name,), keywords)
    except SpecError as error:
        # The name is right, or that of another source such as hf-hub:, so the error is another.
        if ":" in name or timm.is_model(name):
            raise
        names = timm.list_models()
        raise SpecError(
            f"timm has no model {name!r}", similar(name.partition(".")[0], names)
        ) from error
