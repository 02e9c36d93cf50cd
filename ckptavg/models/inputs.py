"""Inputs and labels in a batch, by the signature of a model's ``forward``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import Parameter
from typing import Any

import torch
from torch import nn

from ckptavg.errors import EvaluationError
from ckptavg.models.batches import (
    LABELS,
    describe_batch,
    is_batch,
    is_object,
    is_sequence,
    is_zipped,
    with_tensors_for_arrays,
)
from ckptavg.models.signatures import NAMED, Signature, is_annotated_as


def split_batch(model: nn.Module, batch: Any) -> tuple[Any, torch.Tensor]:
    """Split a batch into inputs for ``call_on_inputs`` and labels.

    Labels are behind the inputs that the model requires, or under one of the names of labels. Named
    labels are not passed to a model that does not require labels.

    Raises:
        EvaluationError: There are no labels.
    """
    signature = Signature.of(model)
    return _split(signature, with_plain_parts(model, batch), f", and the model has {signature}")


def split_labels(batch: Any) -> tuple[Any, torch.Tensor]:
    """Split a batch as ``split_batch`` does, for any model with a single input.

    Raises:
        EvaluationError: There are no labels.
    """
    anything = Signature((Parameter("_", Parameter.POSITIONAL_ONLY),))
    return _split(anything, with_plain_parts(None, batch))


def inputs_of(model: nn.Module, batch: Any) -> Any:
    """Return the inputs for ``call_on_inputs`` of a batch with or without labels."""
    batch = with_plain_parts(model, batch)
    try:
        return split_batch(model, batch)[0]
    except EvaluationError:
        signature = Signature.of(model)
        if is_sequence(batch) and not is_record(signature, batch):
            return lead_inputs(signature, batch)[0]
        return batch


def _split(signature: Signature, batch: Any, model_text: str = "") -> tuple[Any, torch.Tensor]:
    """Split a batch into inputs and labels.

    Args:
        signature: Signature of the model.
        batch: The batch, with tensors for arrays.
        model_text: Description of the model in the error message.
    """
    named = batch
    if is_record(signature, batch):
        named = batch._asdict()
    parts = None
    if isinstance(named, Mapping):
        parts = _split_mapping(signature, named)
    elif is_sequence(batch):
        parts = _split_sequence(signature, batch)
    elif is_object(batch):
        parts = _split_object(batch)
    if parts is not None:
        return parts
    raise EvaluationError(
        f"a batch is expected to be (inputs, labels), or a dict with one of {', '.join(LABELS)}, "
        f"but is {describe_batch(batch)}{model_text}",
        "Let the data give one of these, or name a task of your own whose split() does, by "
        "`task=Task`.",
    )


def _split_mapping(signature: Signature, batch: Mapping[str, Any]) -> tuple[Any, Any] | None:
    """Split a mapping into inputs and labels; None without labels."""
    for key in LABELS:
        labels = _as_labels(batch.get(key))
        if labels is None:
            continue
        if key in signature.required_names:
            return dict(batch), labels
        return {name: part for name, part in batch.items() if name != key}, labels
    return None


def _split_sequence(signature: Signature, batch: Any) -> tuple[Any, Any] | None:
    """Split a tuple or list into inputs and labels; None without labels."""
    if not batch:
        return None
    inputs, other_parts = lead_inputs(signature, batch)
    if other_parts:
        labels = _as_labels(other_parts[0])
        if labels is None:
            return None
        return inputs, labels
    if _ends_in_labels(signature, inputs):
        return inputs, inputs[-1]
    return None


def _split_object(batch: Any) -> tuple[Any, Any] | None:
    """Return an object and the labels in one of its attributes; None without labels."""
    for name in LABELS:
        labels = getattr(batch, name, None)
        if isinstance(labels, torch.Tensor):
            return batch, labels
    return None


def _as_labels(part: Any) -> Any:
    """Convert a part of a batch to labels: a tensor, an entry, or a list; None without labels."""
    if isinstance(part, torch.Tensor):
        return part
    if isinstance(part, Mapping):
        for name in LABELS:
            if isinstance(part.get(name), torch.Tensor):
                return part[name]
        return None
    if isinstance(part, (list, tuple)) and part and all(isinstance(n, (int, float)) for n in part):
        return torch.tensor(part)
    return None


def with_plain_parts(model: nn.Module | None, batch: Any) -> Any:
    """Replace arrays by tensors, and take a mapping out of a list of one.

    Pipelines for several GPUs yield a list of one mapping per GPU.
    """
    is_list_of_one = isinstance(batch, list) and len(batch) == 1
    if is_list_of_one and isinstance(batch[0], Mapping) and is_batch(batch[0]):
        batch = batch[0]
    return with_tensors_for_arrays(batch, _device_of(model))


def _device_of(model: nn.Module | None) -> torch.device | None:
    """Return the device of a model's first weight; None without a weight."""
    if model is None:
        return None
    for weight in model.parameters():
        return weight.device
    return None


def _ends_in_labels(signature: Signature, inputs: Any) -> bool:
    """Return True if the model requires the scored labels as the last input."""
    names = signature.required_names
    return (
        isinstance(inputs, tuple)
        and len(inputs) == len(names) > 1
        and names[-1] in LABELS
        and len(names[-1]) > 1  # not y, which may be anything
        and isinstance(inputs[-1], torch.Tensor)
    )


def is_record(signature: Signature, value: Any) -> bool:
    """Return True for a named tuple whose fields are the model's required parameters."""
    fields = getattr(value, "_fields", None)
    if not isinstance(value, tuple) or not is_sequence(value) or not fields:
        return False
    required = signature.required_names
    if not required:
        return not signature.names.isdisjoint(fields)
    return set(required).issubset(fields)


def lead_inputs(signature: Signature, batch: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """Split a tuple or list into inputs for ``call_on_inputs`` and the remaining parts.

    Raises:
        EvaluationError: The batch is empty.
    """
    if not batch:
        raise cannot_decide(signature, batch)
    first, count = batch[0], len(signature.required)
    if count < 2 and _is_one_list(signature, batch):
        return [*batch], ()
    if is_zipped(batch):
        lists = [[*part] for part in batch]
        if count < 2:
            return lists[0], lists[1:]
        return tuple(lists[:count]), lists[count:]
    if isinstance(first, Mapping) or is_record(signature, first):
        return first, batch[1:]
    return _with_masks(signature, batch) or _in_order(signature, batch)


def _in_order(signature: Signature, batch: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """Split a tuple or list by the number of inputs that the model requires."""
    first, count = batch[0], len(signature.required)
    if is_sequence(first):
        if len(first) == 1:
            return first[0], batch[1:]
        if signature.takes(len(first)):
            return tuple(first), batch[1:]
        first = [*first]
    if 1 < count <= len(batch):
        return tuple(batch[:count]), batch[count:]
    return first, batch[1:]


def _with_masks(
    signature: Signature, batch: Sequence[Any]
) -> tuple[dict[str, Any], Sequence[Any]] | None:
    """Return the inputs by name and the remaining parts, if a mask is among the inputs.

    A mask may be beside the input, ((x, mask), y), or behind it, (x, mask, y) and (x, y, mask).
    """
    if is_sequence(batch[0]):
        inputs = _with_mask(signature, batch[0], sure=True)
        if inputs is None:
            return None
        return inputs, batch[1:]
    leading = max(1, len(signature.required))
    for at in range(leading, len(batch)):
        sure = at == leading and len(batch) > leading + 1
        inputs = _with_mask(signature, (*batch[:leading], batch[at]), sure=sure)
        if inputs is not None:
            return inputs, (*batch[leading:at], *batch[at + 1 :])
    return None


def _with_mask(signature: Signature, parts: Sequence[Any], *, sure: bool) -> dict[str, Any] | None:
    """Return inputs by name, if the last part is a mask and the model has a parameter for it.

    Args:
        signature: Signature of the model.
        parts: Possible inputs.
        sure: True if labels are elsewhere; otherwise only the type tells a mask from labels.
    """
    leading = signature.required
    if not leading and signature.first is not None:
        leading = [signature.first]
    if len(parts) != len(leading) + 1 or any(p.kind not in NAMED for p in leading):
        return None
    mask_name = signature.mask_name
    if mask_name is None:
        return None
    first, mask = parts[0], parts[-1]
    if not isinstance(first, torch.Tensor) or not isinstance(mask, torch.Tensor):
        return None
    # A mask has the first axes of the input, and labels mostly have a single axis.
    if mask.dim() < 2 or mask.is_floating_point() or mask.shape != first.shape[: mask.dim()]:
        return None
    # Integers of 0 and 1 may just as well be the labels of two classes.
    if mask.dtype != torch.bool and not (sure and bool(((mask == 0) | (mask == 1)).all())):
        return None
    names = [p.name for p in leading]
    return dict(zip([*names, mask_name], parts, strict=True))


def may_lack_inputs(signature: Signature, inputs: Any, other_parts: Sequence[Any]) -> bool:
    """Return True if parts behind the inputs may be further inputs of the model.

    This is so if a part is between the inputs and the last part, is not labels by its shape or is
    lengths by the name of a parameter, and if the model has a parameter for the part.

    Args:
        signature: Signature of the model.
        inputs: Inputs that are passed.
        other_parts: Parts of the batch behind the inputs.
    """
    if len(other_parts) < 2 or not isinstance(other_parts[0], torch.Tensor):
        return False
    has_rows = other_parts[0].dim() > 1
    used = {*LABELS}
    if isinstance(inputs, Mapping):
        used.update(inputs)
    free = [p.name for p in signature.parameters if p.default is None and p.name not in used]
    if not free:
        return signature.many and not signature.parameters and has_rows
    return has_rows or any("len" in name for name in free)


def _is_one_list(signature: Signature, batch: Sequence[Any]) -> bool:
    """Return True if a list is one input: a list of images, or of samples that are not collated."""
    first = signature.first
    if first is not None and is_annotated_as(first, ("list", "sequence")):
        return _have_equal_axes(batch)
    if not isinstance(batch, list):
        return False
    if all(isinstance(part, Mapping) for part in batch):
        keys = batch[0].keys()
        return signature.names.isdisjoint(keys) and all(part.keys() == keys for part in batch)
    if len(batch) < 2 or not is_object(batch[0]):
        return False
    return all(type(part) is type(batch[0]) for part in batch)


def _have_equal_axes(parts: Sequence[Any]) -> bool:
    """Return True if all parts are tensors with the same number of axes, at least 2."""
    if not all(isinstance(part, torch.Tensor) for part in parts):
        return False
    axes = {part.dim() for part in parts}
    return len(axes) == 1 and min(axes) > 1


def cannot_decide(signature: Signature, batch: Any) -> EvaluationError:
    """Build the error for a batch that does not match a model's signature."""
    return EvaluationError(
        f"a batch is {describe_batch(batch)}, from which the model's {signature} cannot be called",
        "Name a function fn(model, batch) that calls the model, by `forward=fn`.",
    )
