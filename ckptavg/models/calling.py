"""Calls of a model on a batch: the signature of ``forward`` decides which parts are passed.

- Of a mapping, a named tuple or an object, what bears the names of parameters goes by keyword.
- Of a tuple or list, the first goes in: (x, y); or as many as are required: (a, b, y), ((a, b), y).
  A mask that stands behind them is passed where the model has a place for one. What else stands
  behind is not, since it is labels more often than an optional input.
- A list of images is passed as a list.
- A list of one mapping is that mapping, and arrays of numpy's are tensors.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from inspect import Parameter
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

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
from ckptavg.models.signatures import NAMED, Signature

log = logging.getLogger("ckptavg")
# Models for which the warning about parts that the model does not get was logged.
_warned_models: Any = WeakIdKeyDictionary()
_REMEDY = (
    "Say how it is called by a function fn(model, batch): forward=fn in Python, "
    "--forward path/file.py:fn on the command line."
)
_WHOLES = frozenset(
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
    batch = _plain(model, batch)
    if is_sequence(batch) and not _is_record(signature, batch):
        inputs, other_parts = _lead(signature, batch)
        if _may_lack(signature, inputs, other_parts) and model not in _warned_models:
            _warned_models[model] = True
            log.warning(
                "of the %d parts of a batch the model's %s gets %d; if it takes more, name a "
                "function fn(model, batch) that passes them: forward=fn in Python, "
                "--forward path/file.py:fn on the command line",
                len(batch), signature, len(batch) - len(other_parts),
            )  # fmt: skip
        batch = inputs
    return call_on_inputs(model, batch)


def call_on_inputs(model: nn.Module, inputs: Any) -> Any:
    """Run a model on the inputs of a batch, without the labels.

    Args:
        model: Any module.
        inputs: A tensor; a mapping, of which it gets what its forward names; a tuple of as many
            inputs as it requires; a list, which is one input; or an object.

    Raises:
        EvaluationError: They are not what the model's forward requires.
    """
    signature = Signature.of(model)
    inputs = _plain(model, inputs)
    if isinstance(inputs, Mapping):
        return _call_by_name(model, signature, inputs)
    if _is_record(signature, inputs):
        return _call_by_name(model, signature, inputs._asdict())
    if is_sequence(inputs):
        return _call_in_order(model, signature, inputs)
    if is_object(inputs):
        attributes = _attributes(signature, inputs)
        if attributes:
            return _call_with_keywords(model, signature, attributes)
    elif not isinstance(inputs, torch.Tensor):
        raise _undecided(signature, inputs)
    if len(signature.required) > 1:
        raise _undecided(signature, inputs)
    return _call_with_one(model, signature, inputs)


def split_batch(model: nn.Module, batch: Any) -> tuple[Any, torch.Tensor]:
    """Part a batch into inputs, as ``call_on_inputs`` takes them, and labels.

    Labels stand behind the inputs that the model requires, or under one of the usual names. Those
    with a name do not reach a model that does without.

    Raises:
        EvaluationError: There are no labels.
    """
    signature = Signature.of(model)
    return _split(signature, _plain(model, batch), f", and the model has {signature}")


def split_labels(batch: Any) -> tuple[Any, torch.Tensor]:
    """Part a batch as ``split_batch`` does, for any model with a single input.

    Raises:
        EvaluationError: There are no labels.
    """
    anything = Signature((Parameter("_", Parameter.POSITIONAL_ONLY),))
    return _split(anything, _plain(None, batch))


def inputs_of(model: nn.Module, batch: Any) -> Any:
    """Return the inputs of a batch with or without labels, as ``call_on_inputs`` takes them."""
    batch = _plain(model, batch)
    try:
        return split_batch(model, batch)[0]
    except EvaluationError:
        signature = Signature.of(model)
        if is_sequence(batch) and not _is_record(signature, batch):
            return _lead(signature, batch)[0]
        return batch


def _split(signature: Signature, batch: Any, known: str = "") -> tuple[Any, torch.Tensor]:
    named = batch._asdict() if _is_record(signature, batch) else batch
    if isinstance(named, Mapping):
        key = next((k for k in LABELS if _as_labels(named.get(k)) is not None), None)
        if key is not None:
            required = {p.name for p in signature.required}
            inputs = {k: v for k, v in named.items() if k != key or k in required}
            return inputs, _as_labels(named[key])
    elif is_sequence(batch):
        inputs, other_parts = _lead(signature, batch) if batch else (batch, ())
        labels = _as_labels(other_parts[0]) if other_parts else None
        if labels is not None:
            return inputs, labels
        if not other_parts and _ends_in_labels(signature, inputs):
            return inputs, inputs[-1]
    elif is_object(batch):
        for key in LABELS:
            if isinstance(getattr(batch, key, None), torch.Tensor):
                return batch, getattr(batch, key)
    raise EvaluationError(
        f"a batch is expected to be (inputs, labels), or a dict with one of {', '.join(LABELS)}, "
        f"but is {describe_batch(batch)}{known}",
        "Let the data give one of these, or name a task of your own whose split() knows it: "
        "--task path/file.py:Task on the command line.",
    )


def _as_labels(part: Any) -> Any:
    """Return the labels that a part of a batch is, holds by name or lists; None without any."""
    if isinstance(part, torch.Tensor):
        return part
    if isinstance(part, Mapping):
        return next((v for k in LABELS if isinstance(v := part.get(k), torch.Tensor)), None)
    if isinstance(part, (list, tuple)) and part and all(isinstance(n, (int, float)) for n in part):
        return torch.tensor(part)
    return None


def _plain(model: nn.Module | None, batch: Any) -> Any:
    """Replace arrays by tensors, and take a mapping out of a pipeline's list of one.

    Pipelines on several GPUs give a list of one mapping for each.
    """
    if isinstance(batch, list) and len(batch) == 1 and isinstance(batch[0], Mapping):
        batch = batch[0] if is_batch(batch[0]) else batch
    weight = None if model is None else next(model.parameters(), None)
    return with_tensors_for_arrays(batch, None if weight is None else weight.device)


def _ends_in_labels(signature: Signature, inputs: Any) -> bool:
    """Return True if the model requires the scored labels as the last input."""
    names = [p.name for p in signature.required]
    return (
        isinstance(inputs, tuple)
        and len(inputs) == len(names) > 1
        and names[-1] in LABELS
        and len(names[-1]) > 1  # not y, which may be anything
        and isinstance(inputs[-1], torch.Tensor)
    )


def _is_record(signature: Signature, value: Any) -> bool:
    """Return True for a named tuple whose fields are the model's required parameters."""
    fields = getattr(value, "_fields", None)
    if not isinstance(value, tuple) or not is_sequence(value) or not fields:
        return False
    required = {p.name for p in signature.required}
    return required.issubset(fields) if required else not signature.names.isdisjoint(fields)


def _attributes(signature: Signature, value: Any) -> dict[str, Any]:
    """Return the attributes of an object that a model takes; none if it takes the object.

    Labels that it does not require are left out.
    """
    required = [p.name for p in signature.required]
    if not required or (len(required) == 1 and required[0] in _WHOLES):
        return {}
    wanted = {name: getattr(value, name, None) for name in required}
    if any(part is None or callable(part) for part in wanted.values()):
        return {}
    for name in signature.names.difference(wanted, LABELS):
        if isinstance(getattr(value, name, None), torch.Tensor):
            wanted[name] = getattr(value, name)
    return wanted


def _lead(signature: Signature, batch: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """Part a tuple or list into inputs, as ``call_on_inputs`` takes them, and the rest.

    Raises:
        EvaluationError: It is empty.
    """
    if not batch:
        raise _undecided(signature, batch)
    first, count = batch[0], len(signature.required)
    if count < 2 and _is_one_list(signature, batch):
        return [*batch], ()
    if is_zipped(batch):  # for each part of a sample, a list
        lists = [[*part] for part in batch]
        return (lists[0], lists[1:]) if count < 2 else (tuple(lists[:count]), lists[count:])
    if isinstance(first, Mapping) or _is_record(signature, first):
        return first, batch[1:]
    return _with_masks(signature, batch) or _in_order(signature, batch)


def _in_order(signature: Signature, batch: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """Part a tuple or list by the number of inputs that the model requires."""
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
    """Return the inputs by name and the rest, if a mask is among the inputs.

    It may stand with the input, ((x, mask), y), or behind it, (x, mask, y) and (x, y, mask).
    """
    if is_sequence(batch[0]):
        inputs = _with_mask(signature, batch[0], sure=True)
        return None if inputs is None else (inputs, batch[1:])
    leading = max(1, len(signature.required))
    for at in range(leading, len(batch)):
        sure = at == leading and len(batch) > leading + 1
        inputs = _with_mask(signature, (*batch[:leading], batch[at]), sure=sure)
        if inputs is not None:
            return inputs, (*batch[leading:at], *batch[at + 1 :])
    return None


def _with_mask(signature: Signature, parts: Sequence[Any], *, sure: bool) -> dict[str, Any] | None:
    """Return inputs by name, if the last is a mask with a parameter behind the other inputs.

    Args:
        signature: The model's.
        parts: What may be the inputs.
        sure: Whether labels stand elsewhere; else a mask is known by its type alone.
    """
    mask_names = [p.name for p in signature.parameters if "mask" in p.name and p.default is None]
    led = signature.required or [p for p in (signature.first,) if p is not None]
    if not mask_names or len(parts) != len(led) + 1 or any(p.kind not in NAMED for p in led):
        return None
    first, mask = parts[0], parts[-1]
    if not isinstance(first, torch.Tensor) or not isinstance(mask, torch.Tensor):
        return None
    if mask.dim() < 2 or mask.is_floating_point() or mask.shape != first.shape[: mask.dim()]:
        return None
    if mask.dtype != torch.bool and not (sure and bool(((mask == 0) | (mask == 1)).all())):
        return None
    names = [p.name for p in led]
    return dict(zip([*names, mask_names[0]], parts, strict=True))


def _may_lack(signature: Signature, inputs: Any, rest: Sequence[Any]) -> bool:
    """Return True if parts behind the inputs may be further inputs of the model.

    Something stands between them and what is last, and is no label by its shape, or lengths by the
    name of a parameter; and the model has a place for it.
    """
    if len(rest) < 2 or not isinstance(rest[0], torch.Tensor):
        return False
    input_names = inputs.keys() if isinstance(inputs, Mapping) else ()
    free = [p.name for p in signature.parameters if p.default is None and p.name not in input_names]
    free = [name for name in free if name not in LABELS]
    if not free:
        return signature.many and not signature.parameters and rest[0].dim() > 1
    return rest[0].dim() > 1 or any("len" in name for name in free)


def _is_one_list(signature: Signature, batch: Sequence[Any]) -> bool:
    """Return True if a list is one input: a list of images, or of samples without a collate."""
    first = signature.first
    if first is not None and _speaks_of(first, ("list", "sequence")):
        shapes = {part.dim() if isinstance(part, torch.Tensor) else None for part in batch}
        return len(shapes) == 1 and shapes.isdisjoint({None, 0, 1})
    if not isinstance(batch, list):
        return False
    if all(isinstance(part, Mapping) for part in batch):
        keys = batch[0].keys()
        return signature.names.isdisjoint(keys) and all(part.keys() == keys for part in batch)
    return len(batch) > 1 and is_object(batch[0]) and len({type(part) for part in batch}) == 1


def _call_by_name(model: nn.Module, signature: Signature, inputs: Mapping[str, Any]) -> Any:
    """Run a model on the parts of a mapping that bear the names of parameters."""
    has_known_names = not signature.names.isdisjoint(inputs)
    if has_known_names and all(p.name in inputs for p in signature.required):
        return _call_with_keywords(model, signature, inputs)
    if not signature.parameters and signature.further:
        return model(**{k: v for k, v in inputs.items() if k not in LABELS})
    if has_known_names or len(signature.required) > 1:
        raise _undecided(signature, inputs)
    # None of the names is known: the one tensor, unless the model wants the whole.
    tensors = [v for k, v in inputs.items() if k not in LABELS and isinstance(v, torch.Tensor)]
    if signature.first is not None and _wants_whole(signature.first):
        return model(inputs)
    return model(tensors[0] if len(tensors) == 1 else inputs)


def _call_with_keywords(model: nn.Module, signature: Signature, named: Mapping[str, Any]) -> Any:
    """Run a model on keywords; ``**inputs`` gets the remaining tensors, labels aside."""
    keywords = {name: value for name, value in named.items() if name in signature.names}
    if signature.further:
        for name, value in named.items():
            if isinstance(value, torch.Tensor) and name not in LABELS:
                keywords[name] = value
    unnamed = [p.name for p in signature.parameters if p.kind is Parameter.POSITIONAL_ONLY]
    args = [named[name] for name in unnamed if name in named]
    return model(*args, **{k: v for k, v in keywords.items() if k not in unnamed})


def _call_in_order(model: nn.Module, signature: Signature, inputs: Sequence[Any]) -> Any:
    """Run a model on a list as one input, or on a tuple of inputs."""
    if len(signature.required) < 2 and (
        isinstance(inputs, list) or not signature.takes(len(inputs))
    ):
        return _call_with_one(model, signature, [*inputs])
    if not signature.takes(len(inputs)):
        raise _undecided(signature, inputs)
    names = [p.name for p in signature.required if p.kind is Parameter.KEYWORD_ONLY]
    placed = len(inputs) - len(names)
    return model(*inputs[:placed], **dict(zip(names, inputs[placed:], strict=True)))


def _call_with_one(model: nn.Module, signature: Signature, value: Any) -> Any:
    only = signature.required[0] if signature.required else None
    if only is not None and only.kind is Parameter.KEYWORD_ONLY:
        return model(**{only.name: value})
    return model(value)


def _wants_whole(parameter: Parameter) -> bool:
    return parameter.name in _WHOLES or _speaks_of(parameter, ("dict", "mapping"))


def _speaks_of(parameter: Parameter, kinds: tuple[str, ...]) -> bool:
    """Return True if a parameter is annotated as a container of the given kinds."""
    noted = parameter.annotation
    is_class = isinstance(noted, type) and not hasattr(noted, "__origin__")  # not list[Tensor]
    text = str(noted.__name__ if is_class else noted).lower()
    text = text.replace("typing.", "").replace("collections.abc.", "")
    return text.removeprefix("optional[").startswith(kinds)


def _undecided(signature: Signature, batch: Any) -> EvaluationError:
    return EvaluationError(
        f"a batch is {describe_batch(batch)}, from which the model's {signature} cannot be called",
        _REMEDY,
    )
