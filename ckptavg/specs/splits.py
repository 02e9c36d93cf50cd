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
_EVALUATION = ("validation", "valid", "val", "eval", "dev", "test", "testing")
_HOOKS = ("train_dataloader", "val_dataloader", "test_dataloader")


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
    if not isinstance(value, (tuple, list)) or not all(hasattr(part, "shape") for part in value):
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
    if split is None:
        name = _find_role(list(parts), _TRAINING if train else _EVALUATION)
        lacking = f"not one alone is for {'training' if train else 'scoring'} by its name"
    else:
        name = split if split in parts else None
        lacking = f"none is called {split!r}"
    if name is None:
        names = ", ".join(short(name) for name in parts)
        raise SpecError(
            f"{spec} gives several data sets ({names}), of which {lacking}", "Pass split=NAME."
        )
    log.info("the data of %s is its %s", spec, name)
    return parts[name]


def _find_role(names: Sequence[str], role: Sequence[str]) -> str | None:
    """Find the single name that stands for a role: as the whole name, else as a word within."""
    for word in role:
        exact = [name for name in names if name.lower() == word]
        named = exact or [name for name in names if word in re.split("[^a-z]+", name.lower())]
        if named:
            return named[0] if len(named) == 1 else None
    return None


def _named_parts(value: Any) -> dict[str, Any] | None:
    """Return several data sets by name; None for a single data set."""
    parts: dict[str, Any] | None = None
    if isinstance(value, Mapping):
        parts = {str(name): part for name, part in value.items()}
    elif isinstance(value, (tuple, list)) and len(value) <= 3:
        parts = {str(number): part for number, part in enumerate(value)}
    elif hasattr(value, "train_ds") and hasattr(value, "valid_ds"):
        parts = {"train": value.train, "valid": value.valid}
    if not parts:
        return None
    by_role = isinstance(value, Mapping) and {*map(str.lower, parts)} <= {*_TRAINING, *_EVALUATION}
    return parts if by_role or all(map(_is_part, parts.values())) else None


def _is_part(value: Any) -> bool:
    """Tell a data set or loader from a batch or a sample."""
    if isinstance(value, (Dataset, DataLoader)):
        return True
    home = type(value).__module__.partition(".")[0]
    return home in ("datasets", "webdataset", "fastai", "timm")


def _is_data_module(value: Any) -> bool:
    """Return True for a Lightning DataModule, from either of the two Lightning packages."""
    # By methods, so that neither package is imported.
    needed = ("prepare_data", "setup", *_HOOKS)
    return not isinstance(value, type) and all(callable(getattr(value, n, None)) for n in needed)


def _from_data_module(spec: str, module: Any, split: str | None, *, train: bool) -> Any:
    """Get a loader from a DataModule, with the calls that a Trainer makes."""
    names = [name.removesuffix("_dataloader") for name in _HOOKS]
    wanted = ["train"] if train else ["val", "test"]
    if split is not None:
        wanted = [{"validation": "val", "valid": "val"}.get(split, split)]
        if wanted[0] not in names:
            raise SpecError(f"{spec} has no split {split!r}", f"It has {', '.join(names)}.")
    defined = [name for name in wanted if _is_defined(getattr(module, f"{name}_dataloader"))]
    if not defined:
        hooks = " or ".join(f"{name}_dataloader" for name in wanted)
        raise SpecError(f"{spec} gives a {type(module).__name__} that defines no {hooks}")
    hook = f"{defined[0]}_dataloader"
    try:
        # Lightning's Trainer makes these calls in this order; setup("fit") makes validation data.
        module.prepare_data()
        module.setup("test" if defined[0] == "test" else "fit")
        loader = getattr(module, hook)()
    except Exception as error:
        raise SpecError(
            f"{spec}: {hook} of {type(module).__name__} failed: {describe_failure(error)}",
            "--debug shows where.",
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


def _is_defined(hook: Callable[..., Any]) -> bool:
    """Return True for a hook defined by the user; the hook of the base class only raises."""
    return not getattr(hook, "__qualname__", "").startswith("DataHooks.")
