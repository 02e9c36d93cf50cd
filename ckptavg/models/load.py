"""Loading of weights into a module, matched by name."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import dataclass
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
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items():
        if isinstance(value, torch.Tensor):
            tensors[name] = value
    match = _match_names(tensors, state_dict)
    spare = _spare_names(tensors, match)
    missing = [name for name in match.missing if name not in spare]
    misshapen: list[str] = []
    for name, tensor in match.loadable.items():
        if not is_lazy(tensors[name]) and tensors[name].shape != tensor.shape:
            misshapen.append(name)
    loadable = match.loadable
    if missing or match.extra or misshapen:
        # Names that the model lacks are in the same place as the names that it has.
        for name in match.extra:
            loadable[match.prefix + name] = state_dict[name]
        if not _torch_takes(model, loadable, spare):
            if missing or match.extra:
                misfit = _describe_names(missing, match.extra)
                remedy = _remedy(set(match.full_names), set(state_dict))
            else:
                name = misshapen[0]
                misfit = _describe_shapes(name, loadable[name], tensors[name])
                remedy = "Check `model` and its arguments, such as num_classes."
            raise ModelError(f"{origin} does not fit the model: {misfit}", remedy)
    # Not strict: all names were checked above, and spare ones may be missing.
    model.load_state_dict(loadable, strict=False)


@dataclass(frozen=True)
class _NameMatch:
    """Match of a state dict's weights and a model's tensors.

    Attributes:
        full_names: The model's names, by bare name.
        loadable: Weights by the model's names.
        extra: Bare names of weights that the model lacks.
        missing: The model's names of tensors without a weight.
    """

    full_names: dict[str, str]
    loadable: dict[str, torch.Tensor]
    extra: list[str]
    missing: list[str]

    @property
    def prefix(self) -> str:
        """Prefix of the wrappers around the model."""
        for bare_name, full_name in self.full_names.items():
            return full_name.removesuffix(bare_name)
        return ""


def _match_names(
    tensors: Mapping[str, torch.Tensor], state_dict: Mapping[str, torch.Tensor]
) -> _NameMatch:
    """Match weights and tensors of a model by bare name."""
    bare = bare_names(list(tensors))
    full_names = {bare[name]: name for name in tensors if name in bare}
    loadable: dict[str, torch.Tensor] = {}
    extra: list[str] = []
    for name, tensor in state_dict.items():
        if name in full_names:
            loadable[full_names[name]] = tensor
        elif not _is_beside(name, full_names):
            extra.append(name)
    missing = [name for name in full_names.values() if name not in loadable]
    return _NameMatch(full_names, loadable, extra, missing)


def _spare_names(tensors: Mapping[str, torch.Tensor], match: _NameMatch) -> set[str]:
    """List the missing names that a load does not need.

    These are counts of batches, and tensors that share memory with a loaded tensor.
    """
    loaded = {tensors[name].data_ptr() for name in match.loadable if _is_real(tensors[name])}
    spare: set[str] = set()
    for name in match.missing:
        is_shared = _is_real(tensors[name]) and tensors[name].data_ptr() in loaded
        # Checkpoints from before torch counted batches lack the counts.
        if is_shared or name.endswith("num_batches_tracked"):
            spare.add(name)
    return spare


def _describe_names(missing: list[str], extra: list[str]) -> str:
    """Describe missing and extra names."""
    parts: list[str] = []
    if missing:
        parts.append(f"the model needs {first_few(missing)}")
    if extra:
        parts.append(f"the checkpoint has {first_few(extra)}")
    return "; ".join(parts)


def _describe_shapes(name: str, weight: torch.Tensor, expected: torch.Tensor) -> str:
    """Describe a weight whose shape does not fit."""
    return f"{name} has the shape {tuple(weight.shape)} where the model has {tuple(expected.shape)}"


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
    if not slash:
        return False
    return not any(bare_name.startswith(f"{folder}/") for bare_name in places)


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
        prefix = _common_prefix(larger, smaller)
        if prefix:
            return f"{is_so} with {prefix!r}: name a model whose modules are called as in training."
    keys = [f"`key={entry!r}`" for entry in _entries_that_fit(model, checkpoint)]
    if keys:
        return f"If the file has several networks, take the one that fits: {first_few(keys)}."
    return "Check `model` and its arguments."


def _common_prefix(larger: set[str], smaller: set[str]) -> str:
    """Return the prefix that turns one set of names into the other; empty if there is none."""
    for name in sorted(smaller):
        for full_name in larger:
            if _ends(full_name, name):
                prefix = full_name.removesuffix(name)
                if larger == {prefix + name for name in smaller}:
                    return prefix
                return ""
    return ""


def _entries_that_fit(model: set[str], checkpoint: set[str]) -> list[str]:
    """List the entries of a file with several networks that have all of a model's names."""
    first = min(model, default="")
    entries: list[str] = []
    for full_name in sorted(checkpoint):
        entry = full_name.removesuffix(f".{first}")
        if entry != full_name and all(f"{entry}.{name}" in checkpoint for name in model):
            entries.append(entry)
    return entries


def _ends(name: str, tail: str) -> bool:
    """Return True if a dotted name ends with another dotted name."""
    return name.endswith(f".{tail}")


def _is_real(tensor: torch.Tensor) -> bool:
    """Return True if a tensor has elements; a lazy module's tensor has none before a batch."""
    return not is_lazy(tensor) and tensor.numel() > 0
