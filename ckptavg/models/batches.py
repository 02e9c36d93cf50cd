"""What a loader gives: batches of any kind, their tensors, and how many samples they hold."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from ckptavg.errors import first_few

Batches = Iterable[Any]
Forward = Callable[[nn.Module, Any], Any]
"""A user's way to run a model on a batch: ``forward(model, batch)``."""

LABELS = ("labels", "label", "target", "targets", "y")
"""The usual names of labels, in the order in which they are looked for."""

BARE_IN_LIST = 2
BARE_IN_STREAM = 4
"""Axes from which a tensor by itself is taken for a batch: a stream's items are samples usually."""


def is_sequence(value: Any) -> bool:
    """Whether a value is a tuple or a list, and so has parts."""
    return isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence)


def is_array(value: Any) -> bool:
    """Whether a value is an array of numpy's that holds numbers."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf"


def is_object(value: Any) -> bool:
    """Whether a value is of a class of the user's or of a library's, such as a graph."""
    plain = (torch.Tensor, Mapping, list, tuple, str, bytes, bool, int, float, type(None))
    if isinstance(value, PackedSequence):
        return True
    return not isinstance(value, plain) and not is_array(value)


def with_tensors_for_arrays(value: Any, device: torch.device | None = None) -> Any:
    """A batch with tensors in the place of numpy's arrays; the same one where it has none.

    Args:
        value: A batch.
        device: Where the new tensors go; the CPU where None.
    """
    if is_array(value):
        return torch.tensor(value, device=device)
    if isinstance(value, dict):
        parts = {key: with_tensors_for_arrays(part, device) for key, part in value.items()}
        is_same = all(parts[key] is part for key, part in value.items())
        return value if is_same else parts
    if is_sequence(value):
        found = [with_tensors_for_arrays(part, device) for part in value]
        if all(new is old for new, old in zip(found, value, strict=True)):
            return value
        return type(value)(*found) if hasattr(value, "_fields") else type(value)(found)
    return value


def parts_of(value: Any) -> list[Any]:
    """The parts of a mapping, a tuple or a list; an object's are its attributes."""
    if isinstance(value, Mapping):
        return [*value.values()]
    if is_sequence(value):
        return [*value]
    return [*vars(value).values()] if is_object(value) and hasattr(value, "__dict__") else []


def to_device(
    value: Any, device: torch.device, form: torch.memory_format = torch.preserve_format
) -> Any:
    """A batch with its tensors moved; to CUDA from pinned memory, so that nothing waits.

    Containers keep their types, and the batch itself stays as it is. An object is moved by its own
    ``to`` if it has one. What is float64 stays where it is if the device is Apple's mps, which has
    none.

    Args:
        value: A batch.
        device: Where to.
        form: Memory format of the tensors with four axes.
    """
    if isinstance(value, torch.Tensor):
        return _tensor_to_device(value, device, form)
    if isinstance(value, (dict, UserDict)):
        moved = copy.copy(value)
        for key, part in value.items():
            moved[key] = to_device(part, device, form)
        return moved
    if is_sequence(value):
        parts = (to_device(part, device, form) for part in value)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if moves_itself(value):
        moved = copy.copy(value)  # whose own tensors some classes replace
        arrived = moved.to(device)
        return moved if arrived is None else arrived
    return _fields_to_device(value, device, form)


def map_tensors(value: Any, convert: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Copy dicts, lists and tuples with converted tensors in them; all else is the same object.

    Args:
        value: A batch, or a part of one.
        convert: Makes a tensor of a tensor.
    """
    if isinstance(value, torch.Tensor):
        return convert(value)
    if isinstance(value, (dict, UserDict)):
        copied = copy.copy(value)
        for key, part in value.items():
            copied[key] = map_tensors(part, convert)
        return copied
    if isinstance(value, (list, tuple)):
        parts = [map_tensors(part, convert) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def moves_itself(value: Any) -> bool:
    """Whether a value is an object with a ``to`` of its own."""
    return (is_object(value) or isinstance(value, Mapping)) and callable(getattr(value, "to", None))


def _fields_to_device(value: Any, device: torch.device, form: torch.memory_format) -> Any:
    """A dataclass, or a mapping that cannot be changed, with its tensors moved."""
    if isinstance(value, Mapping):
        return {key: to_device(part, device, form) for key, part in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    moved = copy.copy(value)
    for name, part in vars(value).items():
        object.__setattr__(moved, name, to_device(part, device, form))
    return moved


def _tensor_to_device(
    value: torch.Tensor, device: torch.device, form: torch.memory_format
) -> torch.Tensor:
    if device.type == "mps" and value.dtype == torch.float64:
        return value
    if device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
        value = value.pin_memory()
    form = form if value.dim() == 4 else torch.preserve_format
    # the other way, what is read before the copy is over would be anything
    return value.to(device, non_blocking=device.type == "cuda", memory_format=form)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a batch, but for those that an object keeps to itself."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping) or is_sequence(value) or dataclasses.is_dataclass(value):
        for part in parts_of(value):
            yield from tensors_of(part)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """A tensor's values in memory, row by row."""
    values = tensor.detach().cpu().contiguous()
    return ctypes.string_at(values.data_ptr(), values.nbytes) if values.nbytes else b""


def described(value: Any) -> str:
    """Types and shapes of what a batch holds: ``(float32 of 8 × 3 × 224 × 224, int64 of 8)``."""
    if isinstance(value, torch.Tensor):
        shape = " × ".join(map(str, value.shape)) or "one value"
        return f"{str(value.dtype).removeprefix('torch.')} of {shape}"
    if is_array(value):
        return f"array of {value.dtype} of {' × '.join(map(str, value.shape)) or 'one value'}"
    if isinstance(value, Mapping) and value:
        held = [f"{key}: {described(part)}" for key, part in value.items()]
        return f"{{{first_few(held, 6)}}}"
    if is_sequence(value) and len(value):
        held = [described(part) for part in value]
        return f"({first_few(held)})" if isinstance(value, tuple) else f"[{first_few(held)}]"
    return f"a {type(value).__name__}"


def is_batched(value: Any) -> bool:
    """Whether a value is made up of tensors whose first axis is samples, as many in each."""
    tensors, waiting = list[torch.Tensor](), [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, torch.Tensor):
            tensors.append(part)
        elif isinstance(part, Mapping) or is_sequence(part):
            waiting += parts_of(part)
        elif part is not None:
            return False
    return bool(tensors) and len({t.shape[:1] for t in tensors}) == 1 and bool(tensors[0].dim())


def is_zipped(batch: Any) -> bool:
    """Whether a batch is a list of the samples' values for each of their parts.

    That is what ``tuple(zip(*samples))`` makes, for images of different sizes and their targets.
    """
    if not is_sequence(batch) or len(batch) < 2 or not all(map(is_sequence, batch)):
        return False
    if {len(part) for part in batch} != {len(batch[0])} or not batch[0]:
        return False
    by_sample = any(isinstance(value, Mapping) for part in batch for value in part)
    return by_sample or not is_batched(batch)


def size_of(batch: Any) -> int:
    """Samples in a batch; 0 where it does not tell."""
    if isinstance(batch, torch.Tensor) or is_array(batch):
        return int(batch.shape[0]) if batch.ndim else 1
    if is_object(batch):
        return _size_of_object(batch)
    parts = parts_of(batch)
    if is_zipped(parts):
        return len(parts[0])
    if is_sequence(batch) and _are_samples(parts):
        return sum(max(size_of(part), 1) if is_object(part) else 1 for part in parts)
    wholes = (part for part in parts if isinstance(part, torch.Tensor) or is_array(part))
    whole = next((part for part in wholes if part.ndim), None)
    if whole is not None:
        return int(whole.shape[0])
    return next((n for part in parts if (n := size_of(part))), 0)


def _size_of_object(batch: Any) -> int:
    """Samples in an object, as graphs, packed sequences and others tell it, or by a tensor."""
    if isinstance(batch, PackedSequence):
        return int(batch.batch_sizes[0])
    for name in ("num_graphs", "batch_size"):
        told = getattr(batch, name, None)
        if isinstance(told, (tuple, list)) and told:
            told = told[0]
        if isinstance(told, int):
            return told
    parts = (part for part in parts_of(batch) if isinstance(part, torch.Tensor) and part.dim())
    return next((part.shape[0] for part in parts), 0)


def _are_samples(parts: Sequence[Any]) -> bool:
    """Whether values are samples: images of several sizes, or mappings or objects of one each."""
    if parts and all(isinstance(part, Mapping) for part in parts):
        return not any(is_batched(part) for part in parts)
    if parts and all(is_object(part) for part in parts):
        return True
    images = [part.shape for part in parts if isinstance(part, torch.Tensor) and part.dim() == 3]
    return len(images) == len(parts) and len({*images}) > 1 and len({s[0] for s in images}) == 1


def is_batch(item: Any, bare: int = BARE_IN_STREAM) -> bool:
    """Whether an item has an axis of samples, by its tensors: the same first axis in all of them.

    Args:
        item: The first that some data gives.
        bare: Axes from which a tensor by itself is a batch.
    """
    if is_zipped(item) or moves_itself(item):
        return True
    tensors, lists, waiting = list[torch.Tensor](), set[int](), [item]
    while waiting:
        part = waiting.pop()
        if isinstance(part, PackedSequence):
            return True
        if isinstance(part, torch.Tensor):
            tensors.append(part)
        elif is_array(part):
            tensors.append(torch.empty(part.shape, device="meta"))
        elif is_sequence(part) and part and not any(map(_holds_more, part)):
            lists.add(len(part))  # names, for instance
        elif isinstance(part, Mapping) or is_sequence(part):
            waiting += parts_of(part)
        elif is_object(part):
            waiting += [p for p in parts_of(part) if isinstance(p, torch.Tensor)]
        elif isinstance(part, (bool, int, float)):  # one sample's label
            return False
    axes = max((tensor.dim() for tensor in tensors), default=0)
    if len(tensors) == 1 and not lists:
        return axes >= bare
    lengths = lists | {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    return axes > 1 and len(lengths) == 1 and 0 not in lengths


def _holds_more(part: Any) -> bool:
    is_tensor = isinstance(part, torch.Tensor) or is_array(part)
    return is_tensor or isinstance(part, Mapping) or is_sequence(part) or is_object(part)
