"""Selection of the training or evaluation split from a factory's return value."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ckptavg.errors import SpecError, short
from ckptavg.specs.importing import describe_failure

log = logging.getLogger("ckptavg")

_TRAINING = ("train", "training")
# Searched in this order, so that validation data come before test data.
_EVALUATION = ("validation", "valid", "val", "eval", "dev", "test", "testing")
# Method of a DataModule → stage of its ``setup``.
_STAGES = {"train_dataloader": "fit", "val_dataloader": "fit", "test_dataloader": "test"}
_HOOKS = tuple(_STAGES)
_SPLITS = {"validation": "val", "valid": "val"}


def is_data(value: Any) -> bool:
    """Return True if a value is a data set or a loader."""
    if isinstance(value, (Dataset, DataLoader)):
        return True
    if isinstance(value, (str, bytes, type, Mapping, nn.Module, torch.Tensor)):
        return False
    if are_columns(value):
        return False
    return hasattr(value, "__iter__") or (
        hasattr(value, "__getitem__") and hasattr(value, "__len__")
    )


def are_columns(value: Any) -> bool:
    """Return True for inputs and labels as whole columns, False for a list of batches."""
    if not isinstance(value, (tuple, list)):
        return False
    for part in value:
        if not hasattr(part, "shape"):
            return False
    if isinstance(value, tuple):
        return True
    # A list may hold batches. Columns have equal lengths, and labels no axes beside the samples.
    shapes = [tuple(part.shape) for part in value]
    return (
        len(shapes) > 1
        and len({shape[:1] for shape in shapes}) == 1
        and len(shapes[0]) > 1 >= len(shapes[-1])
    )


def pick_split(spec: str, value: Any, split: str | None, *, train: bool) -> Any:
    """Pick the data for training or for scoring where there are several data sets.

    Several data sets are a ``datasets.DatasetDict`` or another mapping, a Lightning DataModule,
    fastai's DataLoaders, or a tuple of loaders.

    Args:
        spec: Specification of the value, for messages.
        value: One data set or loader, or several.
        split: Name of the data set to pick; where None, the role decides.
        train: True for training data, False for evaluation data.

    Raises:
        SpecError: There is no matching data set, or several match.
    """
    if _is_data_module(value):
        return _from_data_module(spec, value, split, train=train)
    parts = _named_parts(value)
    if parts is None:
        if split is not None:
            kind = type(value).__name__
            raise SpecError(f"{spec} gives a {kind}, of which there are no splits", "Leave split=.")
        return value
    if split is not None:
        name: str | None = split
        lacking = f"none is called {split!r}"
    elif train:
        name = _find_role(list(parts), _TRAINING)
        lacking = "none or several are named for training"
    else:
        name = _find_role(list(parts), _EVALUATION)
        lacking = "none or several are named for scoring"
    if name is None or name not in parts:
        names = ", ".join(map(short, parts))
        raise SpecError(
            f"{spec} gives several data sets ({names}), of which {lacking}", "Pass split=NAME."
        )
    log.info("the data of %s is its %s", spec, name)
    return parts[name]


def _find_role(names: Sequence[str], role: Sequence[str]) -> str | None:
    """Find the single name that stands for a role: as the whole name, else as a word within."""
    for word in role:
        exact: list[str] = []
        within: list[str] = []
        for name in names:
            if name.lower() == word:
                exact.append(name)
            elif word in re.split("[^a-z]+", name.lower()):
                within.append(name)
        named = exact or within
        if len(named) == 1:
            return named[0]
        if named:
            return None
    return None


def _named_parts(value: Any) -> dict[str, Any] | None:
    """Return several data sets by name; None for a single data set."""
    parts: dict[str, Any] | None = None
    if isinstance(value, Mapping):
        parts = {str(name): part for name, part in value.items()}
    elif isinstance(value, (tuple, list)) and len(value) <= 3:
        parts = {str(number): part for number, part in enumerate(value)}
    elif hasattr(value, "train_ds") and hasattr(value, "valid_ds"):
        # fastai's DataLoaders.
        parts = {"train": value.train, "valid": value.valid}
    if not parts:
        return None
    by_role = isinstance(value, Mapping) and {*map(str.lower, parts)} <= {*_TRAINING, *_EVALUATION}
    if by_role or all(map(_is_part, parts.values())):
        return parts
    return None


def _is_part(value: Any) -> bool:
    """Tell a data set or loader from a batch or a sample."""
    if isinstance(value, (Dataset, DataLoader)):
        return True
    home = type(value).__module__.partition(".")[0]
    return home in ("datasets", "webdataset", "fastai", "timm")


def _is_data_module(value: Any) -> bool:
    """Return True for a Lightning DataModule, from either of the two Lightning packages."""
    # By methods, so that neither package is imported.
    if isinstance(value, type):
        return False
    methods = [getattr(value, name, None) for name in ("prepare_data", "setup", *_HOOKS)]
    return all(map(callable, methods))


def _from_data_module(spec: str, module: Any, split: str | None, *, train: bool) -> Any:
    """Get a loader from a DataModule, with the calls that a Trainer makes."""
    hook = _choose_hook(spec, module, split, train=train)
    try:
        # Lightning's Trainer makes these calls in this order; setup("fit") makes validation data.
        module.prepare_data()
        module.setup(_STAGES[hook])
        loader = getattr(module, hook)()
    except Exception as error:
        raise SpecError(
            f"{spec}: {hook} of {type(module).__name__} failed: {describe_failure(error)}"
        ) from error
    # Lightning permits a list of loaders; a list of one is as clear as the loader.
    if isinstance(loader, (list, tuple)) and len(loader) == 1:
        loader = loader[0]
    if isinstance(loader, (list, tuple, Mapping)):
        raise SpecError(
            f"{spec}: {hook} of {type(module).__name__} gives {len(loader)} loaders",
            "Write a function that returns the one.",
        )
    log.info("the batches of %s are those of its %s", spec, hook)
    return loader


def _choose_hook(spec: str, module: Any, split: str | None, *, train: bool) -> str:
    """Choose the first defined method of a DataModule that gives the loader of a split.

    Raises:
        SpecError: There is no such split, or the user has defined no such method.
    """
    if split is not None:
        hooks = [f"{_SPLITS.get(split, split)}_dataloader"]
        if hooks[0] not in _HOOKS:
            names = ", ".join(_HOOKS).replace("_dataloader", "")
            raise SpecError(f"{spec} has no split {split!r}", f"It has {names}.")
    elif train:
        hooks = ["train_dataloader"]
    else:
        hooks = ["val_dataloader", "test_dataloader"]
    for hook in hooks:
        if _is_defined(getattr(module, hook)):
            return hook
    raise SpecError(f"{spec} gives a {type(module).__name__} that defines no {' or '.join(hooks)}")


def _is_defined(hook: Callable[..., Any]) -> bool:
    """Return True for a hook defined by the user; the hook of the base class only raises."""
    return not getattr(hook, "__qualname__", "").startswith("DataHooks.")
