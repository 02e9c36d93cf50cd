"""Loading of weights into a module, matched by name."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ckptavg.errors import ModelError, first_few
from ckptavg.formats.wrappers import bare_names
from ckptavg.models.hollow import real_tensors, stand_ins

# Bytes above which a model is too large to copy for a trial.
_LARGE = 1 << 30
_Trial = tuple[dict[int, Any], dict[str, bool]]
"""Memo of ``copy.deepcopy``, and options of ``load_state_dict``."""


def load_into(model: nn.Module, state_dict: Mapping[str, torch.Tensor], origin: str) -> None:
    """Copy weights into a module, regardless of wrappers' prefixes on either side.

    Args:
        model: The module. Weights are converted to the module's own dtypes.
        state_dict: The weights, by bare name.
        origin: Path of the weights, for messages.

    Raises:
        ModelError: Names or shapes do not fit.
    """
    states = model.state_dict(keep_vars=True)
    tensors = {name: value for name, value in states.items() if isinstance(value, torch.Tensor)}
    bare = bare_names(list(tensors))
    full_names = {bare[name]: name for name in tensors if name in bare}
    loadable = {
        full_names[name]: tensor for name, tensor in state_dict.items() if name in full_names
    }
    extra = [
        name for name in state_dict if name not in full_names and not _is_beside(name, full_names)
    ]
    lost = [name for name in full_names.values() if name not in loadable]
    reached = {tensors[name].data_ptr() for name in loadable if _is_real(tensors[name])}
    # Counts of batches may be missing, and so may tensors that share memory with a loaded tensor.
    spare = {
        name
        for name in lost
        if name.endswith("num_batches_tracked")
        or (_is_real(tensors[name]) and tensors[name].data_ptr() in reached)
    }
    lost = [name for name in lost if name not in spare]
    misshapen = [
        name
        for name, tensor in loadable.items()
        if not is_lazy(tensors[name]) and tensors[name].shape != tensor.shape
    ]
    if lost or extra or misshapen:
        prefix = next((full_name.removesuffix(name) for name, full_name in full_names.items()), "")
        loadable |= {prefix + name: state_dict[name] for name in extra}
        if not _torch_takes(model, loadable, spare):
            if lost or extra:
                misfit, remedy = _misfit(lost, extra), _remedy(set(full_names), set(state_dict))
            else:
                first = misshapen[0]
                misfit = _misshape(first, loadable[first], tensors[first])
                remedy = (
                    "Check the model and its arguments, such as num_classes (--model, --model-arg)."
                )
            raise ModelError(f"{origin} does not fit the model: {misfit}", remedy)
    model.load_state_dict(loadable, strict=False)


def _misfit(lost: list[str], extra: list[str]) -> str:
    """Describe missing and extra names."""
    parts = [f"the model needs {first_few(lost)}"] if lost else []
    parts += [f"the checkpoint has {first_few(extra)}"] if extra else []
    return "; ".join(parts)


def _misshape(name: str, given: torch.Tensor, own: torch.Tensor) -> str:
    """Describe a weight whose shape does not fit."""
    shape, wanted = tuple(given.shape), tuple(own.shape)
    return f"{name} has the shape {shape} where the model has {wanted}"


def _torch_takes(
    model: nn.Module, state_dict: Mapping[str, torch.Tensor], spare: Collection[str]
) -> bool:
    """Return True if the model's own loading code makes names and shapes fit.

    Observers resize their buffers on loading. Layers rename the weights of older versions.
    The load is tried on a copy, since torch keeps the weights that it has loaded before an error.
    The first copy has no values. Weights are assigned to it, since torch warns about copies into
    tensors without values. For a model that is not large, a whole copy is tried next.

    Args:
        model: The model.
        state_dict: The weights, by the model's names.
        spare: Names that may be missing.
    """
    tensors = real_tensors(model)
    trials: list[_Trial] = [(stand_ins(tensors), {"assign": True})]
    if sum(tensor.nbytes for tensor in tensors) <= _LARGE:
        trials.append(({}, {}))
    for memo, options in trials:
        try:
            trial = copy.deepcopy(model, memo)
            keys = trial.load_state_dict(state_dict, strict=False, **options)
        # A user's module may raise any error.
        except Exception:
            continue
        return not keys.unexpected_keys and {*keys.missing_keys} <= {*spare}
    return False


def _is_beside(name: str, places: Mapping[str, str]) -> bool:
    """Return True if a weight belongs to a directory beside the model's own.

    For example, ``hf:DIR`` names the model in the root of a sentence-transformer. The weights of
    its Dense module are in a directory beside that model.
    """
    folder, slash, _ = name.rpartition("/")
    return bool(slash) and not any(bare_name.startswith(f"{folder}/") for bare_name in places)


def unwrap_distributed(model: nn.Module) -> nn.Module:
    """Return the module inside DistributedDataParallel.

    The wrapper's first forward pass broadcasts buffers. It would wait for processes without data.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        inner: nn.Module = model.module
        return inner
    return model


def bare_module(model: nn.Module) -> nn.Module:
    """Return the module inside torch.compile, DataParallel and DistributedDataParallel.

    Attributes that are set on a layer have no effect in compiled code. Replicas of DataParallel
    would call the layer from several threads.
    """
    while True:
        model = unwrap_distributed(model)
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _remedy(model: set[str], checkpoint: set[str]) -> str:
    """Suggest a remedy for names that do not fit."""
    for larger, smaller, is_so in (
        (checkpoint, model, "The checkpoint's names begin"),
        (model, checkpoint, "The model's names begin"),
    ):
        prefix = next((n[: -len(m)] for m in sorted(smaller) for n in larger if _ends(n, m)), "")
        if prefix and larger == {prefix + name for name in smaller}:
            return f"{is_so} with {prefix!r}: name a model whose modules are called as in training."
    # A file with several networks has all of the model's names under one of its entries.
    first = min(model, default="")
    entries = sorted(name[: -len(first) - 1] for name in checkpoint if _ends(name, first))
    fitting = [e for e in entries if all(f"{e}.{name}" in checkpoint for name in model)]
    if fitting:
        keys = first_few([f"--key {entry}" for entry in fitting])
        return f"If the file has several networks, take the one that fits: {keys}."
    return "Check the model and its arguments (--model, --model-arg)."


def _ends(name: str, tail: str) -> bool:
    """Return True if a dotted name ends with another dotted name."""
    return name.endswith(f".{tail}")


def _is_real(tensor: torch.Tensor) -> bool:
    """Return True if a tensor has elements; a lazy module's tensor has none before a batch."""
    return not is_lazy(tensor) and tensor.numel() > 0
