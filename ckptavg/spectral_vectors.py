"""The vectors of layers under spectral norm, written for weights that are averaged."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace

import torch

from ckptavg.formats.writing import MemorySink, Sink
from ckptavg.groups import Job
from ckptavg.plan import Plan, TensorPlan
from ckptavg.spectral_norm import SpectralNorm, iterate_vectors, most_steps
from ckptavg.stream import start_threads, stream

_LAST = "last"  # the name of the last checkpoint's weight beside the averaged one


def vector_names(plan: Plan) -> set[str]:
    """Names of the vectors that are iterated for an average."""
    return {name for layer in plan.spectral_norms for name in (layer.u, layer.v) if name}


def write_vectors(plan: Plan, tensors: Sequence[TensorPlan], sink: Sink) -> None:
    """Iterate the vectors of an average and hand them to its output.

    A layer's weights are read once more, and averaged in memory; nothing is read of the output.

    Args:
        plan: The average.
        tensors: The output's tensors: those of the plan, tied as its files are.
        sink: Takes the vectors.

    Raises:
        CheckpointError: A file cannot be read.
    """
    if not plan.spectral_norms:
        return
    by_name = {tensor.name: tensor for tensor in plan.tensors}
    steps = most_steps([by_name[layer.weight].shape for layer in plan.spectral_norms])
    values: dict[str, torch.Tensor] = {}
    with start_threads(1) as thread:
        for layer in plan.spectral_norms:
            if by_name[layer.u].tied_to is None:
                values |= thread.submit(_vectors, layer, by_name, plan, steps).result()
    for tensor in tensors:
        first = by_name[tensor.name].tied_to or tensor.name
        if tensor.tied_to is None and first in values:
            _write(sink, tensor.name, values[first])


def _vectors(
    layer: SpectralNorm, by_name: dict[str, TensorPlan], plan: Plan, steps: int
) -> dict[str, torch.Tensor]:
    """The vectors of a layer in the types of the output, by name."""
    names = [name for name in (layer.u, layer.v) if name]
    weight = by_name[layer.weight]
    own = plan.checkpoints[-1].tensors[layer.weight]
    last = replace(
        weight, name=_LAST, sources=(own,), coefficients=(1.0,), divisor=None, tied_to=None,
        owners=plan.checkpoints[-1:],
    )  # fmt: skip
    read = [replace(weight, tied_to=None), last, *(by_name[name] for name in names)]
    sink = MemorySink([tensor.output for tensor in read])
    stream([Job(read, sink, keep_nonfinite=True)], threads=1)
    state = sink.state_dict
    before = [state[name] for name in names]
    u, v = before[0], before[1] if layer.v else None
    iterated = iterate_vectors(state[layer.weight], u, v, state[_LAST], steps)
    after = before if iterated is None else iterated
    return {
        name: vector.to(old.dtype).reshape(old.shape)
        for name, vector, old in zip(names, after, before, strict=False)
    }


def _write(sink: Sink, name: str, values: torch.Tensor) -> None:
    raw = (ctypes.c_uint8 * values.nbytes).from_address(values.data_ptr())
    sink.write(name, 0, memoryview(raw).cast("B"))
