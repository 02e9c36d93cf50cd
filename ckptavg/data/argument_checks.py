"""Checks of the models and data that a caller of the library passes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ckptavg.errors import UsageError, first_few, short


def check_model(model: object) -> None:
    """Check that a model is a module, not a class, factory or path.

    Raises:
        UsageError: The model is not a module.
    """
    if isinstance(model, nn.Module):
        return
    remedy = ""
    if callable(model):
        remedy = f"Call it: {getattr(model, '__name__', 'it')}(...)."
    elif isinstance(model, (str, os.PathLike)):
        remedy = "Build the module in Python; its weights are loaded from the checkpoints."
    raise UsageError(f"model is expected to be a torch.nn.Module but is {_describe(model)}", remedy)


def check_forward(forward: object) -> None:
    """Check that a forward function can be called, and is not the name of one.

    Raises:
        UsageError: The function cannot be called.
    """
    if forward is not None and not callable(forward):
        raise UsageError(
            f"forward is expected to be a function of model and batch but is {_describe(forward)}"
        )


def check_data(data: object) -> None:
    """Check that data yields samples or batches and is not a factory, path or dict.

    Raises:
        UsageError: The data is not a Dataset, a sequence or an iterable.
    """
    # A mapping has __getitem__, too, but indices do not lead to samples.
    if isinstance(data, Mapping):
        _refuse_entries(data)
    # A text is iterable and a class may have __getitem__, but neither yields samples.
    gives_items = isinstance(data, Iterable) or hasattr(data, "__getitem__")
    if gives_items and not isinstance(data, (str, bytes, os.PathLike, type)):
        return
    remedy = ""
    # A DataModule is not iterable itself; only the loaders from these methods are.
    if hasattr(data, "val_dataloader"):
        remedy = "Pass what its val_dataloader() or train_dataloader() gives, after setup()."
    elif callable(data):
        remedy = f"Call it: {getattr(data, '__name__', 'it')}(...)."
    raise UsageError(
        f"data is expected to be a Dataset or a loader of batches but is {_describe(data)}", remedy
    )


def _refuse_entries(data: Mapping[Any, Any]) -> None:
    """Refuse a dict of named data sets, or a single batch in a dict."""
    names = [str(key) for key in data]
    remedy = "Pass one of them."
    if any(isinstance(value, torch.Tensor) for value in data.values()):
        remedy = "Put it in a list, if it is a batch."
    raise UsageError(
        f"data is expected to be a Dataset or a loader of batches but is {_describe(data)} of "
        f"{short(first_few(names))}",
        remedy,
    )


def _describe(value: object) -> str:
    """Describe a value for an error message: a path itself, else the type."""
    if isinstance(value, (str, bytes, os.PathLike)):
        return short(repr(value))
    if isinstance(value, type):
        return f"the class {short(value.__name__)}"
    return short(value)
