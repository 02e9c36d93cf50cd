"""Selection of the tensor to score from a model's outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch

from ckptavg.errors import EvaluationError, first_few

_NAMES = ("logits", "out")  # transformers' outputs and most dicts, torchvision's segmentation
_REMEDY = (
    "Give a forward function that returns it alone: fn(model, batch), by --forward path/file.py:fn "
    "or in Python forward=fn."
)
_LISTED = 4  # outputs that an error lists


def take_output(
    outputs: object, fits: Callable[[torch.Tensor], bool] | None = None
) -> torch.Tensor:
    """Take the tensor to score from the return value of a model.

    This is a bare tensor, the entry ``logits`` or ``out``, or the only tensor in a tuple, list,
    mapping or dataclass. Tensors without axes, such as a loss, do not count, since they have no
    samples. Features beside logits, early exits and auxiliary heads cannot be distinguished by
    shape, so several tensors are an error.

    Args:
        outputs: Return value of the model.
        fits: Returns True for a tensor of a shape that can be scored; decides among several tensors
            if exactly one fits.

    Raises:
        EvaluationError: There is no tensor, or there are several.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs
    named = _named_output(outputs)
    if named is not None:
        return take_output(named, fits)
    candidates = [(path, tensor) for path, tensor in _tensors_in(outputs) if tensor.dim()]
    if len(candidates) > 1 and fits is not None:
        fitting = [(path, tensor) for path, tensor in candidates if fits(tensor)]
        candidates = fitting if len(fitting) == 1 else candidates
    if not candidates:
        raise EvaluationError(
            f"the model is expected to return logits but returned a {type(outputs).__name__} "
            "without any",
            _REMEDY,
        )
    if len(candidates) > 1:
        shapes = [f"{path} of shape {tuple(tensor.shape)}" for path, tensor in candidates]
        raise EvaluationError(
            f"the model returns {len(candidates)} tensors and which of them is to be scored is not "
            f"said: {first_few(shapes, _LISTED)}",
            _REMEDY,
        )
    return candidates[0][1]


def _named_output(outputs: object) -> object:
    """Return the entry or attribute ``logits`` or ``out``; None if there is neither."""
    for name in _NAMES:
        output = outputs.get(name) if isinstance(outputs, Mapping) else getattr(outputs, name, None)
        if output is not None:
            return output
    return None


def _tensors_in(outputs: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in nested outputs with a path each: ``[0]``, ``['pred'][1]``."""
    if isinstance(outputs, torch.Tensor):
        yield path, outputs
        return
    parts: list[tuple[str, object]] = []
    if isinstance(outputs, Mapping):
        parts = [(f"[{key!r}]", part) for key, part in outputs.items()]
    elif isinstance(outputs, (list, tuple)):
        parts = [(f"[{number}]", part) for number, part in enumerate(outputs)]
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        names = [field.name for field in dataclasses.fields(outputs)]
        parts = [(f".{name}", getattr(outputs, name)) for name in names]
    for step, part in parts:
        yield from _tensors_in(part, path + step)
