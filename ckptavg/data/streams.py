"""Distinction of samples and batches, and collation of samples into batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from ckptavg.errors import EvaluationError
from ckptavg.models.batches import BARE_IN_LIST, is_array, is_batch, is_sequence, parts_of

Collate = Callable[[list[Any]], Any]


def is_dataset(data: Any) -> bool:
    """Tell whether data yields, or may yield, samples that still need collation.

    This holds for a torch Dataset and for any object with a length and items, such as a Hugging
    Face data set or a list of samples. It does not hold for a list of batches, nor for a stream
    that loads batches through an inner DataLoader, such as webdataset's WebLoader.
    """
    if isinstance(data, (DataLoader, Mapping)):
        return False
    if isinstance(data, Dataset):
        return not _loads_itself(data)
    if is_sequence(data):
        return bool(len(data)) and not is_batch(data[0], BARE_IN_LIST)
    return hasattr(data, "__len__") and hasattr(data, "__getitem__")


def with_tensors(data: Any) -> Any:
    """Switch a Hugging Face data set from plain lists to tensors; return other data unchanged."""
    settings = getattr(data, "format", None)
    if isinstance(settings, Mapping):
        kind = settings.get("type", "")
    else:
        # The IterableDataset of Hugging Face has no ``format`` but an attribute ``_formatting``.
        kind = getattr(data, "_formatting", "")
    if kind is not None or not callable(getattr(data, "with_format", None)):
        return data
    return data.with_format("torch")


def is_sample(item: Any) -> bool:
    """Return True if an item is certainly one sample: a row or image with a scalar label."""
    if not isinstance(item, Mapping) and not is_sequence(item):
        return False
    axes: set[int] = set()
    has_number = False
    for part in parts_of(item):
        if isinstance(part, torch.Tensor) or is_array(part):
            axes.add(part.ndim)
        elif isinstance(part, int):
            has_number = True
    has_number |= 0 in axes
    axes.discard(0)
    # A part with two axes may be a batch of rows, one with four a batch of images.
    return has_number and bool(axes) and axes <= {1, 3}


def batch_samples(items: Iterator[Any], size: int) -> Iterator[Any]:
    """Collate the samples of an iterator into batches; pass batches through unchanged."""
    # The first item decides; chain puts it back.
    first = [*islice(items, 1)]
    items = chain(first, items)
    if not first or not is_sample(first[0]):
        yield from items
        return
    while samples := [*islice(items, size)]:
        yield collate(samples)


class BatchStream(IterableDataset[Any]):
    """Stream of batches: collated samples, or the items of a stream that yields batches.

    Args:
        data: The stream.
        size: Samples per batch.
        collate: Collates a list of samples into a batch.
    """

    def __init__(self, data: IterableDataset[Any], size: int, collate: Collate) -> None:
        self.data = data
        self.size = size
        self.collate = collate

    def __iter__(self) -> Iterator[Any]:
        items = iter(self.data)
        first = [*islice(items, 1)]
        if first and is_batch(first[0]):
            yield from chain(first, items)
            return
        items = chain(first, items)
        while samples := [*islice(items, self.size)]:
            yield self.collate(samples)


def collate_of(data: Any) -> Collate:
    """Return the collate function of a Dataset: its own ``collate_fn`` or torch's default."""
    collate_fn: Collate | None = getattr(data, "collate_fn", None)
    if callable(collate_fn):
        return collate_fn
    return collate


def collate(samples: list[Any]) -> Any:
    """Collate samples as torch does.

    Raises:
        EvaluationError: The samples differ in shape, or are of a type that torch cannot collate.
    """
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        remedy = "Give them one shape, or pass a DataLoader with a collate_fn of its own."
        if isinstance(samples[0], Mapping) and "input_ids" in samples[0]:
            remedy = (
                "Pad them, or pass a DataLoader with a collate_fn that does, such as "
                "transformers' DataCollatorWithPadding(tokenizer)."
            )
        if isinstance(error, TypeError):
            remedy = f"Make them tensors, arrays or numbers, images by a transform. {remedy}"
        raise EvaluationError(f"the samples do not make a batch: {error}", remedy) from error


def _loads_itself(data: Any) -> bool:
    """Return True if a stream holds a DataLoader, as an attribute or in a pipeline list."""
    if not isinstance(data, IterableDataset):
        return False
    for value in vars(data).values():
        if isinstance(value, DataLoader):
            return True
        if is_sequence(value) and any(isinstance(part, DataLoader) for part in value):
            return True
    return False
