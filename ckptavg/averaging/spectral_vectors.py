"""Singular vectors of layers under spectral norm, computed for averaged weights."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from ckptavg.averaging.planning.spectral_norm import SpectralNorm, iterate_vectors, limit_steps
from ckptavg.averaging.planning.tensor_plan import Plan, TensorPlan
from ckptavg.averaging.read_groups import Job
from ckptavg.averaging.stream import start_threads, stream
from ckptavg.formats import Checkpoint
from ckptavg.outputs.sinks import MemorySink, Sink, StateDict

# Follows a weight's name for the last checkpoint's own. No tensor's name has a NUL.
_LAST = "\0last"
# Elements of the weights that are read at once, which bounds the memory of many small layers.
_MOST_ELEMENTS = 1 << 22


def vector_names(plan: Plan) -> set[str]:
    """Return the names of the vectors that are iterated for an average."""
    return set().union(*(layer.vectors for layer in plan.spectral_norms))


def write_vectors(plan: Plan, tensors: Sequence[TensorPlan], sink: Sink) -> None:
    """Run the power iteration for an average's vectors, and write the vectors to the output.

    The weights of the layers are read again and averaged in memory. Nothing is read from the
    output.

    Args:
        plan: The average.
        tensors: The output's tensors: the plan's tensors, tied as in the output's files.
        sink: Receives the vectors.

    Raises:
        CheckpointError: A file cannot be read.
    """
    if not plan.spectral_norms:
        return
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    # The vectors of a tied layer are those of its first name.
    layers = [layer for layer in plan.spectral_norms if by_name[layer.u].tied_to is None]
    steps = limit_steps([by_name[layer.weight].shape for layer in layers])
    values: dict[str, torch.Tensor] = {}
    # A thread of its own, since the caller's may flush denormals or split operations.
    with start_threads(1) as thread:
        for group in _groups(layers, by_name):
            state = _read(group, by_name, plan.checkpoints[-1])
            values |= thread.submit(_iterate, group, state, steps).result()
    for tensor in tensors:
        first = by_name[tensor.name].tied_to or tensor.name
        if tensor.tied_to is None and first in values:
            _write(sink, tensor.name, values[first])


def _groups(
    layers: Sequence[SpectralNorm], by_name: Mapping[str, TensorPlan]
) -> Iterator[list[SpectralNorm]]:
    """Group the layers whose weights are read together, so that few are in memory."""
    group: list[SpectralNorm] = []
    filled = 0
    for layer in layers:
        size = by_name[layer.weight].output.numel
        if group and filled + size > _MOST_ELEMENTS:
            yield group
            group, filled = [], 0
        group.append(layer)
        filled += size
    if group:
        yield group


def _read(
    layers: Sequence[SpectralNorm], by_name: Mapping[str, TensorPlan], last: Checkpoint
) -> StateDict:
    """Average the weights of layers, and read the last checkpoint's weights and vectors."""
    plans: dict[str, TensorPlan] = {}
    for layer in layers:
        weight = replace(by_name[layer.weight], tied_to=None)
        last_weight = replace(
            weight, name=layer.weight + _LAST, sources=(last.tensors[layer.weight],),
            owners=(last,), coefficients=(1.0,), divisor=None,
        )  # fmt: skip
        vectors = [replace(by_name[name], tied_to=None) for name in layer.vectors]
        for tensor in (weight, last_weight, *vectors):
            plans[tensor.name] = tensor
    # The stream of the outputs has already refused or noted values that are not finite.
    sink = MemorySink([tensor.output for tensor in plans.values()])
    stream([Job([*plans.values()], sink, keep_nonfinite=True)])
    return sink.state_dict


def _iterate(
    layers: Sequence[SpectralNorm], state: Mapping[str, torch.Tensor], steps: int
) -> StateDict:
    """Run the power iteration for several layers.

    Args:
        layers: The layers.
        state: Averaged weights, the last checkpoint's weights and the vectors, by name.
        steps: Largest number of steps per layer.

    Returns:
        Name → vector, in the shape and type of the output.
    """
    values: StateDict = {}
    for layer in layers:
        vectors = [state[name] for name in layer.vectors]
        weight, last = state[layer.weight], state[layer.weight + _LAST]
        # Vectors that are right already stay as they are.
        iterated = iterate_vectors(weight, vectors, last, steps) or vectors
        # Not strict: the iteration gives v too, which some layers do not keep.
        for name, vector in zip(layer.vectors, iterated, strict=False):
            values[name] = vector.to(state[name].dtype).reshape(state[name].shape)
    return values


def _write(sink: Sink, name: str, values: torch.Tensor) -> None:
    # The bytes are passed by address, since NumPy has no bfloat16.
    raw = (ctypes.c_uint8 * values.nbytes).from_address(values.data_ptr())
    sink.write(name, 0, memoryview(raw).cast("B"))
