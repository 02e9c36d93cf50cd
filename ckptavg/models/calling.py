"""Calls of a model on a batch: the signature of ``forward`` decides which parts are passed.

- Mapping, named tuple or object: the entries with names of parameters, by keyword.
- Tuple or list: the first part, (x, y), or as many as are required, (a, b, y) and ((a, b), y).
  A mask behind the inputs is passed if the model has a parameter for a mask. Other parts behind
  the inputs are not passed, since these are labels more often than optional inputs.
- List of images: one input.
- List of one mapping: that mapping. Arrays of numpy become tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from inspect import Parameter
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from ckptavg.models.batches import LABELS, is_object, is_sequence
from ckptavg.models.inputs import (
    cannot_decide,
    is_record,
    lead_inputs,
    may_lack_inputs,
    with_plain_parts,
)
from ckptavg.models.signatures import Signature, is_annotated_as

log = logging.getLogger("ckptavg")
# Models for which the warning about parts that the model does not get was logged.
_warned_models: Any = WeakIdKeyDictionary()
_NAMES_OF_BATCHES = frozenset(
    {"batch", "data", "sample", "samples", "example", "examples", "graph", "graphs",
     "batched_inputs", "batch_dict", "data_dict", "tensordict"}
)  # fmt: skip
"""Names of parameters that stand for a batch as a whole."""


def call(model: nn.Module, batch: Any) -> Any:
    """Run a model on a batch, with or without labels.

    Raises:
        EvaluationError: The batch does not hold what the model's forward requires.
    """
    signature = Signature.of(model)
    batch = with_plain_parts(model, batch)
    if is_sequence(batch) and not is_record(signature, batch):
        inputs, other_parts = lead_inputs(signature, batch)
        if may_lack_inputs(signature, inputs, other_parts) and model not in _warned_models:
            _warned_models[model] = True
            log.warning(
                "of the %d parts of a batch the model's %s gets %d; if it takes more, name a "
                "function fn(model, batch) that passes them, by `forward=fn`",
                len(batch), signature, len(batch) - len(other_parts),
            )  # fmt: skip
        batch = inputs
    return call_on_inputs(model, batch)


def call_on_inputs(model: nn.Module, inputs: Any) -> Any:
    """Run a model on the inputs of a batch, without the labels.

    Args:
        model: Any module.
        inputs: A tensor; a mapping, of which the parameters' entries are passed; a tuple of the
            required inputs; a list, which is one input; or an object.

    Raises:
        EvaluationError: The inputs are not what the model's forward requires.
    """
    signature = Signature.of(model)
    inputs = with_plain_parts(model, inputs)
    if isinstance(inputs, Mapping):
        return _call_by_name(model, signature, inputs)
    if is_record(signature, inputs):
        return _call_by_name(model, signature, inputs._asdict())
    if is_sequence(inputs):
        return _call_in_order(model, signature, inputs)
    if is_object(inputs):
        attributes = _attributes(signature, inputs)
        if attributes:
            return _call_with_keywords(model, signature, attributes)
    elif not isinstance(inputs, torch.Tensor):
        raise cannot_decide(signature, inputs)
    if len(signature.required) > 1:
        raise cannot_decide(signature, inputs)
    return _call_with_one(model, signature, inputs)


def _attributes(signature: Signature, value: Any) -> dict[str, Any]:
    """Return the attributes of an object that a model takes; none for a model of whole objects.

    Labels that the model does not require are left out.
    """
    required = signature.required_names
    if not required or (len(required) == 1 and required[0] in _NAMES_OF_BATCHES):
        return {}
    wanted: dict[str, Any] = {}
    for name in required:
        wanted[name] = getattr(value, name, None)
        if wanted[name] is None or callable(wanted[name]):
            return {}
    for name in signature.names.difference(wanted, LABELS):
        if isinstance(getattr(value, name, None), torch.Tensor):
            wanted[name] = getattr(value, name)
    return wanted


def _call_by_name(model: nn.Module, signature: Signature, inputs: Mapping[str, Any]) -> Any:
    """Run a model on the entries of a mapping with the names of parameters."""
    has_known_names = not signature.names.isdisjoint(inputs)
    if has_known_names and all(name in inputs for name in signature.required_names):
        return _call_with_keywords(model, signature, inputs)
    unlabelled = {name: part for name, part in inputs.items() if name not in LABELS}
    if not signature.parameters and signature.further:
        return model(**unlabelled)
    if has_known_names or len(signature.required) > 1:
        raise cannot_decide(signature, inputs)
    if signature.first is not None and _takes_mappings(signature.first):
        return model(inputs)
    # No name is known, but a single tensor can only be the input.
    tensors = [part for part in unlabelled.values() if isinstance(part, torch.Tensor)]
    if len(tensors) == 1:
        return model(tensors[0])
    return model(inputs)


def _call_with_keywords(model: nn.Module, signature: Signature, named: Mapping[str, Any]) -> Any:
    """Run a model on keywords; ``**inputs`` gets the remaining tensors, labels aside."""
    unnamed = [p.name for p in signature.parameters if p.kind is Parameter.POSITIONAL_ONLY]
    args = [named[name] for name in unnamed if name in named]
    keywords: dict[str, Any] = {}
    for name, value in named.items():
        if name in unnamed:
            continue
        is_further = isinstance(value, torch.Tensor) and name not in LABELS
        if name in signature.names or (signature.further and is_further):
            keywords[name] = value
    return model(*args, **keywords)


def _call_in_order(model: nn.Module, signature: Signature, inputs: Sequence[Any]) -> Any:
    """Run a model on a list as one input, or on a tuple of inputs."""
    takes_several = signature.takes(len(inputs))
    if len(signature.required) < 2 and (isinstance(inputs, list) or not takes_several):
        return _call_with_one(model, signature, [*inputs])
    if not takes_several:
        raise cannot_decide(signature, inputs)
    names = [p.name for p in signature.required if p.kind is Parameter.KEYWORD_ONLY]
    by_position = len(inputs) - len(names)
    return model(*inputs[:by_position], **dict(zip(names, inputs[by_position:], strict=True)))


def _call_with_one(model: nn.Module, signature: Signature, value: Any) -> Any:
    """Run a model on a single input."""
    if signature.required and signature.required[0].kind is Parameter.KEYWORD_ONLY:
        return model(**{signature.required[0].name: value})
    return model(value)


def _takes_mappings(parameter: Parameter) -> bool:
    """Return True if a parameter takes a batch as a whole, by its name or annotation."""
    return parameter.name in _NAMES_OF_BATCHES or is_annotated_as(parameter, ("dict", "mapping"))
