"""Selection of the tensor to score from a model's outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

import torch

from ckptavg.errors import EvaluationError, first_few

_NAMES = ("logits", "out")  # transformers' outputs and most dicts, torchvision's segmentation
_REMEDY = "Pass `forward=fn`, a function fn(model, batch) that returns only the tensor to score."
# Number of outputs that an error lists.
_MOST_LISTED = 4


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
    candidates = {}
    for path, tensor in _tensors_in(outputs):
        if tensor.dim():
            candidates[path] = tensor
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    if fits is not None:
        fitting = [tensor for tensor in candidates.values() if fits(tensor)]
        if len(fitting) == 1:
            return fitting[0]
    raise _ambiguous(outputs, candidates)


def _ambiguous(outputs: object, candidates: Mapping[str, torch.Tensor]) -> EvaluationError:
    """Word the error about outputs without a tensor to score, or with several."""
    if not candidates:
        return EvaluationError(
            f"the model is expected to return logits but returned a {type(outputs).__name__} "
            "without any",
            _REMEDY,
        )
    shapes = [f"{path} of shape {tuple(tensor.shape)}" for path, tensor in candidates.items()]
    return EvaluationError(
        f"the model returns {len(candidates)} tensors and it is unknown which to score: "
        f"{first_few(shapes, _MOST_LISTED)}",
        _REMEDY,
    )


def _named_output(outputs: object) -> object:
    """Return the entry or attribute ``logits`` or ``out``; None if there is neither."""
    for name in _NAMES:
        output = getattr(outputs, name, None)
        if isinstance(outputs, Mapping):
            output = outputs.get(name)
        if output is not None:
            return output
    return None


def _tensors_in(outputs: object, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors in nested outputs with a path each: ``[0]``, ``['pred'][1]``."""
    if isinstance(outputs, torch.Tensor):
        yield path, outputs
    elif isinstance(outputs, Mapping):
        for key, part in outputs.items():
            yield from _tensors_in(part, f"{path}[{key!r}]")
    elif isinstance(outputs, (list, tuple)):
        for number, part in enumerate(outputs):
            yield from _tensors_in(part, f"{path}[{number}]")
    elif dataclasses.is_dataclass(outputs) and not isinstance(outputs, type):
        for field in dataclasses.fields(outputs):
            yield from _tensors_in(getattr(outputs, field.name), f"{path}.{field.name}")
