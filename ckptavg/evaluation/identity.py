"""Identity of model, data and options in memory, by which stored results are recognized."""

from __future__ import annotations

import hashlib
import itertools
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from ckptavg.averaging.plan import Average
from ckptavg.data.loaders import Subset
from ckptavg.data.seeding import Generators
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.resume import Identity
from ckptavg.models.batches import Batches, Forward, bytes_of, is_sequence, tensors_of
from ckptavg.models.runtime import Runtime
from ckptavg.tasks import Task

# Least number of samples by which data are recognized, unless there are fewer.
_SAMPLES = 16
# Plain attributes of modules and tasks, which are their settings.
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class EvaluationCall:
    """Arguments of an evaluation that decide scores beside the weights.

    A module and a task count by class, settings and source file, a function by name and source
    file, data by class, length and some samples spread over the data. Data that can be read only
    once are never recognized.

    Attributes:
        model: As for ``evaluate``.
        data: As for ``evaluate``.
        training: Training data; None without any.
        task: The task.
        forward: As for ``evaluate``.
        runtime: Precision, batch size and seed.
        excluded: Shell patterns of BatchNorm layers that keep their statistics.
        subset: Part of the training data that statistics are recomputed from.
        keep_nonfinite: True to allow averages that are not finite.
    """

    model: nn.Module
    data: Batches | Dataset[Any]
    training: Batches | Dataset[Any] | None
    task: Task
    forward: Forward | None
    runtime: Runtime
    excluded: str | Sequence[str]
    subset: Subset | None
    keep_nonfinite: bool

    def identify(self, candidate: Candidate) -> Identity:
        """Return the identity of all that decides a candidate's scores apart from files."""
        options = dict(self._scoring)
        if candidate.planned:
            options["average"] = _describe_average(candidate.planned[0])
            options["keep_nonfinite"] = self.keep_nonfinite
        if candidate.weights is not None:
            options["weights"] = _digest(candidate.weights.tensors)
        if candidate.recompute:
            options |= self._recomputing
        return Identity(options)

    @cached_property
    def _scoring(self) -> dict[str, Any]:
        forward = None
        if self.forward is not None:
            forward = _describe_code(self.forward)
        return {
            "model": _describe_model(self.model),
            "data": _describe_data(self.data, self.runtime.seed),
            "task": _describe_object(self.task),
            "forward": forward,
            "amp": self.runtime.amp,
            "batch_size": self.runtime.batch_size,
            "seed": self.runtime.seed,
        }

    @cached_property
    def _recomputing(self) -> dict[str, Any]:
        training = None
        if self.training is not None:
            training = _describe_data(self.training, self.runtime.seed)
        return {"training": training, "subset": str(self.subset), "excluded": self.excluded}


def _describe_model(model: nn.Module) -> dict[str, Any]:
    """Describe modules by class and settings, state dict entries by shape and type.

    Values of the state dict do not count, since every candidate replaces them. Values of other
    buffers do.
    """
    entries = {}
    for name, value in model.state_dict().items():
        if isinstance(value, torch.Tensor):
            entries[name] = (list(value.shape), str(value.dtype))
    buffers = {name: value for name, value in model.named_buffers() if name not in entries}
    modules = [(name, _describe_object(module)) for name, module in model.named_modules()]
    return {"modules": modules, "entries": entries, "buffers": _digest(buffers)}


def _describe_average(average: Average) -> str:
    """Compute a digest of the rules of an average: the treatment of each tensor."""
    rules = []
    for tensor in average.plan.tensors:
        rules.append((tensor.name, tensor.dtype.name, tensor.averaged))
    return _digest(rules)


def _describe_object(value: object) -> list[Any]:
    """Describe an object by class, source file and settings, which are its plain attributes."""
    settings = {}
    for name, attribute in getattr(value, "__dict__", {}).items():
        # Evaluation sets the training mode itself, and private attributes are no settings.
        if name != "training" and not name.startswith("_") and _is_plain(attribute):
            settings[name] = repr(attribute)
    return [*_describe_code(type(value)), settings]


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(part, _PLAIN) for part in value)
    return isinstance(value, _PLAIN)


def _describe_code(value: Any) -> list[Any]:
    """Describe a class or a function by name, and by size and time of its source file."""
    # An object that is called, such as a partial function, counts by its class.
    owner = value
    if not hasattr(value, "__qualname__"):
        owner = type(value)
    module = sys.modules.get(owner.__module__)
    file = getattr(module, "__file__", None)
    # torch's own layers do not change under a name.
    if file is None or owner.__module__.startswith("torch."):
        return [owner.__module__, owner.__qualname__]
    status = Path(file).stat()
    return [owner.__module__, owner.__qualname__, status.st_size, status.st_mtime_ns]


def _describe_data(data: Batches | Dataset[Any], seed: int) -> list[Any]:
    """Describe data by class, length and a digest of samples spread evenly."""
    batch_size = None
    if isinstance(data, DataLoader):
        batch_size = data.batch_size
        data = data.dataset
    # Looking at samples of an iterator would use them up.
    if isinstance(data, Iterator):
        return [type(data).__qualname__, str(uuid.uuid4())]
    # Random transforms draw the same values each time, and leave the caller's generators alone.
    with Generators(seed).in_use():
        count, samples = _spread_samples(data)
    return [type(data).__qualname__, count, _digest(samples), batch_size]


def _spread_samples(data: Any) -> tuple[int | None, list[Any]]:
    """Return the number of samples, and some at equal distances.

    Of data without positions, the number is None and the samples are the first.
    """
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        return None, list(itertools.islice(data, _SAMPLES))
    count = len(data)
    positions = range(0, count, max(1, count // _SAMPLES))
    return count, [data[position] for position in positions]


def _digest(value: Any) -> str:
    """Compute a digest of nested values: numbers, texts, arrays, tensors."""
    digest = hashlib.sha256()
    _update(digest, value)
    return digest.hexdigest()[:16]


def _update(digest: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
        digest.update(bytes_of(value))
    elif hasattr(value, "tobytes"):
        # Arrays of numpy, and images of Pillow.
        digest.update(value.tobytes())
    elif isinstance(value, (bytes, *_PLAIN)):
        digest.update(repr(value).encode())
    elif isinstance(value, Mapping):
        for key, part in value.items():
            digest.update(repr(key).encode())
            _update(digest, part)
    elif is_sequence(value):
        for part in value:
            _update(digest, part)
    else:
        digest.update(type(value).__qualname__.encode())
        for tensor in tensors_of(value):
            _update(digest, tensor)
