"""From the options of a command to a model, its runtime and its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ckptavg import sources
from ckptavg.batches import Runtime


def model_and_runtime(settings: Mapping[str, Any]) -> tuple[nn.Module, Runtime]:
    """The model that was named, and where and how it runs."""
    arguments = sources.parse_arguments(settings["model_arg"])
    model = sources.make_model(settings["model_spec"], arguments)
    return model, Runtime.on(settings["device"], model, **runtime_options(settings))


def runtime_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The loader options by the names that the API has for them."""
    return {name: settings[name] for name in ("amp", "batch_size", "workers", "seed")}


def training_data(settings: Mapping[str, Any]) -> Any:
    """What ``--train-data`` names."""
    return _data(settings, "train_data", train=True)


def evaluation_data(settings: Mapping[str, Any]) -> Any:
    """What ``--data`` names."""
    return _data(settings, "data", train=False)


def _data(settings: Mapping[str, Any], name: str, *, train: bool) -> Any:
    arguments = sources.parse_arguments(settings[f"{name}_arg"])
    return sources.make_data(
        settings[name], arguments, train=train, model_spec=settings["model_spec"]
    )
