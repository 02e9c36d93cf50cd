"""Batches of any kind that loaders give: tensors in a batch, size, moves to a device."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import operator
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
"""A user's function that runs a model on a batch: ``forward(model, batch)``."""

LABELS = ("labels", "label", "target", "targets", "y")
"""Common names of labels, in the order of the search."""

BARE_IN_LIST = 2
BARE_IN_STREAM = 4
"""Number of axes from which a lone tensor is a batch; items of a stream are usually samples."""


def is_sequence(value: Any) -> bool:
    """Return True if a value is a tuple or a list of parts; a PackedSequence is not."""
    return isinstance(value, (list, tuple)) and not isinstance(value, PackedSequence)


def is_array(value: Any) -> bool:
    """Return True if a value is a numpy array of numbers."""
    # numpy is not imported here: without numpy in the process there are no arrays.
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf"


def is_object(value: Any) -> bool:
    """Return True if a value is an object of a class beyond tensors and plain types."""
    plain = (torch.Tensor, Mapping, list, tuple, str, bytes, bool, int, float, type(None))
    if isinstance(value, PackedSequence):
        return True
    return not isinstance(value, plain) and not is_array(value)


def with_tensors_for_arrays(value: Any, device: torch.device | None = None) -> Any:
    """Replace the numpy arrays in a batch by tensors.

    Args:
        value: A batch.
        device: Device of the new tensors; the CPU where None.

    Returns:
        A new batch; the same object if the batch has no arrays.
    """
    if is_array(value):
        return torch.tensor(value, device=device)
    if isinstance(value, dict):
        entries: dict[Any, Any] = {}
        is_changed = False
        for key, part in value.items():
            entries[key] = with_tensors_for_arrays(part, device)
            is_changed |= entries[key] is not part
        if is_changed:
            return entries
        return value
    if is_sequence(value):
        parts = [with_tensors_for_arrays(part, device) for part in value]
        if all(map(operator.is_, parts, value)):
            return value
        return _sequence_like(value, parts)
    return value


def _sequence_like(value: Any, parts: list[Any]) -> Any:
    """Make a tuple, a list or a named tuple of new parts."""
    if hasattr(value, "_fields"):
        # A named tuple takes its fields one by one.
        return type(value)(*parts)
    return type(value)(parts)


def parts_of(value: Any) -> list[Any]:
    """List the parts of a mapping, a tuple or a list, or the attributes of an object."""
    if isinstance(value, Mapping):
        return [*value.values()]
    if is_sequence(value):
        return [*value]
    if is_object(value) and hasattr(value, "__dict__"):
        return [*vars(value).values()]
    return []


def to_device(
    value: Any, device: torch.device, memory_format: torch.memory_format = torch.preserve_format
) -> Any:
    """Move the tensors of a batch to a device.

    Copies to CUDA come from pinned memory, so that the program does not wait for the copies.
    Containers keep their types, and the given batch is not changed. An object with a ``to`` method
    is moved by that method. Float64 tensors stay in place if the device is Apple's mps, which has
    no float64.

    Args:
        value: A batch.
        device: Target device.
        memory_format: Memory format of the tensors with four axes.

    Returns:
        A batch with the moved tensors.
    """
    if isinstance(value, torch.Tensor):
        return _tensor_to_device(value, device, memory_format)
    if isinstance(value, (dict, UserDict)):
        moved = copy.copy(value)
        for key, part in value.items():
            moved[key] = to_device(part, device, memory_format)
        return moved
    if is_sequence(value):
        return _sequence_like(value, [to_device(part, device, memory_format) for part in value])
    if moves_itself(value):
        # Some classes replace their own tensors in to(), so a copy is moved.
        moved = copy.copy(value)
        returned = moved.to(device)
        # Some classes move themselves in place and return None.
        if returned is None:
            return moved
        return returned
    return _fields_to_device(value, device, memory_format)


def map_tensors(value: Any, convert: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Copy dicts, lists and tuples with converted tensors, and share all else.

    Args:
        value: A batch, or a part of a batch.
        convert: Converts a tensor to a new tensor.
    """
    if isinstance(value, torch.Tensor):
        return convert(value)
    if isinstance(value, (dict, UserDict)):
        copied = copy.copy(value)
        for key, part in value.items():
            copied[key] = map_tensors(part, convert)
        return copied
    if isinstance(value, (list, tuple)):
        return _sequence_like(value, [map_tensors(part, convert) for part in value])
    return value


def moves_itself(value: Any) -> bool:
    """Return True if a value is an object or mapping with a ``to`` method."""
    return (is_object(value) or isinstance(value, Mapping)) and callable(getattr(value, "to", None))


def _fields_to_device(value: Any, device: torch.device, memory_format: torch.memory_format) -> Any:
    """Move the tensors of a dataclass, or of a mapping that cannot be changed."""
    if isinstance(value, Mapping):
        return {key: to_device(part, device, memory_format) for key, part in value.items()}
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    moved = copy.copy(value)
    for name, part in vars(value).items():
        # A frozen dataclass refuses setattr.
        object.__setattr__(moved, name, to_device(part, device, memory_format))
    return moved


def _tensor_to_device(
    value: torch.Tensor, device: torch.device, memory_format: torch.memory_format
) -> torch.Tensor:
    """Move a tensor to a device, without waiting for copies to CUDA."""
    if device.type == "mps" and value.dtype == torch.float64:
        return value
    if device.type == "cuda" and value.device.type == "cpu" and not value.is_pinned():
        value = value.pin_memory()
    # torch refuses channels_last for any other number of axes.
    if value.dim() != 4:
        memory_format = torch.preserve_format
    # Only copies to CUDA may be asynchronous. After an asynchronous copy to the CPU, the program
    # could read values before the copy ends.
    return value.to(device, non_blocking=device.type == "cuda", memory_format=memory_format)


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a batch, except those inside objects other than dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping) or is_sequence(value) or dataclasses.is_dataclass(value):
        for part in parts_of(value):
            yield from tensors_of(part)


def bytes_of(tensor: torch.Tensor) -> bytes:
    """Return the bytes of a tensor's values, row by row."""
    values = tensor.detach().cpu().contiguous()
    if not values.nbytes:
        return b""
    return ctypes.string_at(values.data_ptr(), values.nbytes)


def describe_batch(value: Any) -> str:
    """Describe a batch by types and shapes: ``(float32 of 8 × 3 × 224 × 224, int64 of 8)``."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of {_describe_shape(value.shape)}"
    if is_array(value):
        return f"array of {value.dtype} of {_describe_shape(value.shape)}"
    if isinstance(value, Mapping) and value:
        entries = [f"{key}: {describe_batch(part)}" for key, part in value.items()]
        return f"{{{first_few(entries, 6)}}}"
    if is_sequence(value) and len(value):
        parts = first_few([describe_batch(part) for part in value])
        if isinstance(value, tuple):
            return f"({parts})"
        return f"[{parts}]"
    return f"a {type(value).__name__}"


def _describe_shape(shape: Sequence[int]) -> str:
    """Describe a shape: ``8 × 3``; a shape without axes is one value."""
    return " × ".join(map(str, shape)) or "one value"


def is_batched(value: Any) -> bool:
    """Return True if a value consists of tensors with equally many samples on the first axis."""
    tensors, waiting = list[torch.Tensor](), [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, torch.Tensor):
            tensors.append(part)
        elif isinstance(part, Mapping) or is_sequence(part):
            waiting += parts_of(part)
        elif part is not None:
            return False
    if not tensors or not tensors[0].dim():
        return False
    return all(tensor.shape[:1] == tensors[0].shape[:1] for tensor in tensors)


def is_zipped(batch: Any) -> bool:
    """Return True if a batch is a list of parts, each a list with a value per sample.

    ``tuple(zip(*samples))`` makes a batch of this form, for images of different sizes and targets.
    """
    if not is_sequence(batch) or len(batch) < 2 or not all(map(is_sequence, batch)):
        return False
    if not batch[0] or any(len(part) != len(batch[0]) for part in batch):
        return False
    for part in batch:
        if any(isinstance(value, Mapping) for value in part):
            return True
    return not is_batched(batch)


def size_of(batch: Any) -> int:
    """Count the samples in a batch; 0 where the count is unknown."""
    if _is_tensor_or_array(batch):
        return _size_of_tensor(batch)
    if is_object(batch):
        return _size_of_object(batch)
    parts = parts_of(batch)
    if is_zipped(parts):
        return len(parts[0])
    if is_sequence(batch) and _are_samples(parts):
        return sum(map(_size_of_sample, parts))
    return _size_of_parts(parts)


def _size_of_parts(parts: Sequence[Any]) -> int:
    """Count the samples by the first tensor with rows, or the first part with samples."""
    for part in parts:
        if _is_tensor_or_array(part) and part.ndim:
            return int(part.shape[0])
    for part in parts:
        size = size_of(part)
        if size:
            return size
    return 0


def _is_tensor_or_array(value: Any) -> bool:
    """Return True if a value is a tensor or a numpy array of numbers."""
    return isinstance(value, torch.Tensor) or is_array(value)


def _size_of_tensor(value: Any) -> int:
    """Count the samples in a tensor or array: rows, or one value without axes."""
    if value.ndim == 0:
        return 1
    return int(value.shape[0])


def _size_of_sample(value: Any) -> int:
    """Count the samples in an element of a list: an object may hold several."""
    if is_object(value):
        return max(size_of(value), 1)
    return 1


def _size_of_object(batch: Any) -> int:
    """Count the samples in an object, such as a graph or a packed sequence.

    Without a count of its own, the object has as many samples as its first tensor has rows.
    """
    if isinstance(batch, PackedSequence):
        # The first step is one that every sequence has.
        return int(batch.batch_sizes[0])
    # PyTorch Geometric has num_graphs, DGL and TensorDict have batch_size.
    for name in ("num_graphs", "batch_size"):
        size = getattr(batch, name, None)
        # TensorDict has a batch size per axis; the first axis is samples.
        if isinstance(size, (tuple, list)) and size:
            size = size[0]
        if isinstance(size, int):
            return size
    for part in parts_of(batch):
        if isinstance(part, torch.Tensor) and part.dim():
            return part.shape[0]
    return 0


def _are_samples(parts: Sequence[Any]) -> bool:
    """Return True if values are samples: images of different sizes, mappings, or objects."""
    if parts and all(isinstance(part, Mapping) for part in parts):
        return not any(map(is_batched, parts))
    if parts and all(map(is_object, parts)):
        return True
    shapes: set[torch.Size] = set()
    channels: set[int] = set()
    for part in parts:
        if not isinstance(part, torch.Tensor) or part.dim() != 3:
            return False
        shapes.add(part.shape)
        channels.add(part.shape[0])
    return len(shapes) > 1 and len(channels) == 1


def is_batch(item: Any, bare: int = BARE_IN_STREAM) -> bool:
    """Return True if an item is a batch: the first axis of all tensors has the same length.

    Args:
        item: The first item of the data.
        bare: Number of axes from which a lone tensor is a batch.
    """
    if is_zipped(item) or moves_itself(item):
        return True
    tensors, list_lengths, waiting = list[torch.Tensor](), set[int](), [item]
    while waiting:
        part = waiting.pop()
        if isinstance(part, PackedSequence):
            return True
        if isinstance(part, torch.Tensor):
            tensors.append(part)
        elif is_array(part):
            # Only the shape counts here, so that no values are copied.
            tensors.append(torch.empty(part.shape, device="meta"))
        elif is_sequence(part) and part and not any(map(_holds_more, part)):
            # For example, a list of the samples' names.
            list_lengths.add(len(part))
        elif isinstance(part, Mapping) or is_sequence(part):
            waiting += parts_of(part)
        elif is_object(part):
            waiting += [p for p in parts_of(part) if isinstance(p, torch.Tensor)]
        # A plain number is the label of a single sample.
        elif isinstance(part, (bool, int, float)):
            return False
    if len(tensors) == 1 and not list_lengths:
        return tensors[0].dim() >= bare
    lengths = list_lengths | set(map(_length_of, tensors))
    has_rows = any(tensor.dim() > 1 for tensor in tensors)
    return has_rows and len(lengths) == 1 and 0 not in lengths


def _length_of(tensor: torch.Tensor) -> int:
    """Return the length of a tensor's first axis; 0 without axes."""
    if tensor.dim() == 0:
        return 0
    return tensor.shape[0]


def _holds_more(part: Any) -> bool:
    """Return True if an element of a list is a container, an object or a tensor."""
    is_container = isinstance(part, Mapping) or is_sequence(part) or is_object(part)
    return is_container or _is_tensor_or_array(part)
