"""Update rules of custom normalization layers, found by running a copy of the layer.

A custom layer (a subclass of BatchNorm, or any other normalization layer) may transpose its
argument, mask it, or compute its moments itself. In training mode the layer writes a step of a
moving average into its buffers: ``(1 - a) · old + a · batch``. A copy of the layer in float64 runs
with chosen old values. The results give ``a`` and the batch's own statistics.

The number n of values in a mean and a variance is found by moving one value by d. The mean moves by
s · d / n, where s is the factor by which the layer scales its inputs. An unbiased variance has the
second difference 2 · s² · d² / n. So n follows from a ratio of the two, whatever s is. Moving a
value of the padding changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from ckptavg.batchnorm.moments import Moments, batch_moments, merging_device
from ckptavg.batchnorm.norm_layers import is_pair
from ckptavg.models.batches import map_tensors, tensors_of
from ckptavg.models.hollow import TensorConversion, copy_layer
from ckptavg.models.runtime import is_out_of_memory

Rule = Literal["argument", "kernel", "own", "frozen", "unknown"]
"""Rules by which a layer updates its running statistics.

``argument``: torch's kernel computes the moments of the layer's only argument into the buffers.
``kernel``: torch's kernel computes the moments of another tensor. ``own``: the layer computes the
moments itself. ``frozen``: the statistics stay in training mode too. ``unknown``: the layer keeps
no moving average.
"""

# Tolerance of comparisons: a layer may compute in float32, whatever the type of its input.
_CLOSE = 1e-4
# Number of values whose influence on the mean is tried.
_CANDIDATES = 16
# Number of values of an argument from which the rule is found.
_SAMPLE = 1 << 20
_COUNTER = re.compile(r"(?:^|_)(?:count|counter|num_batches\w*|num_updates|steps?)$")
_KERNELS: Mapping[Callable[..., Any], tuple[str, ...]] = {
    nn.functional.batch_norm: (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
    ),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var", "training"),
}

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Values = dict[str, torch.Tensor]
"""Values per statistic: flat, float64; a complex value counts as two."""


class KernelCalls(TorchFunctionMode):
    """A function mode that reports calls of torch's batch normalization for one layer.

    Only calls that update the layer's running statistics are reported.

    Args:
        layer: The layer whose calls are reported.
        take: Called with the input, (N, C, ...), before the kernel runs.
    """

    def __init__(self, layer: nn.Module, take: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._layer, self._take = layer, take

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch, after reporting the input."""
        kwargs = kwargs or {}
        if func in _KERNELS:
            bound = dict(zip(_KERNELS[func], args, strict=False)) | kwargs
            mean = bound.get("running_mean")
            if bound.get("training") and isinstance(mean, torch.Tensor) and self._is_own(mean):
                self._take(bound["input"])
        return func(*args, **kwargs)

    def _is_own(self, tensor: torch.Tensor) -> bool:
        """Return True if a tensor and a buffer of the layer share memory."""
        # The kernel may get a view of a buffer, so addresses are compared.
        for value in self._layer._buffers.values():
            if value is not None and tensor.data_ptr() == value.data_ptr():
                return True
        return False


class LayerUpdate:
    """The update rule of a layer's running statistics.

    Args:
        layer: A layer. Only copies of the layer are run.
        statistics: Names of the buffers that hold running statistics, the mean first.
        forward: The forward pass that the layer has in place of its class's.

    Attributes:
        estimates: True if a number of values had to be guessed from the arguments' sizes.
    """

    def __init__(self, layer: nn.Module, statistics: tuple[str, ...], forward: Any = None) -> None:
        self._layer, self._forward = layer, forward
        self._names = statistics
        self._pair = is_pair(layer, statistics)
        self._recopy(_copy_wide)
        self._start = dict.fromkeys(statistics, 1.0) | {statistics[0]: 0.0}
        self._factors: dict[str, float] = {}
        self.estimates = False

    def rule(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rule:
        """Find the rule of the layer from a call's arguments, which are not changed."""
        # Try float64 first, then the own types: compiled kernels may accept only float32.
        for convert in (_copy_wide, _copy_as_is):
            self._recopy(convert)
            for arguments in _samples(args, kwargs):
                try:
                    with _plain_precision():
                        return self._rule(arguments)
                # A user's layer may raise any error in a copy.
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
        return "unknown"

    def moments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[tuple[str, ...], Moments]:
        """Compute the layer's moments of a call's arguments, which are not changed.

        Returns:
            Moments by the names of the statistics. A mean and a variance share the moments of all
            values. Any other statistic stands alone, as a mean over batches weighted by samples.
        """
        arguments = args, kwargs
        with _plain_precision():
            # Copy the layer anew: a model may pass a mask as an attribute of the layer.
            self._recopy(self._convert)
            values = self._solve(self._run(arguments))
            if isinstance(self._copy, _InstanceNorm):
                count = next(tensors_of(arguments)).shape[0]
                mean, variance = (values[name] for name in self._names)
                return {self._names: Moments(count, mean, variance * count, instances=True)}
            if self._pair:
                return {self._names: self._pool(arguments, values)}
        samples = _count_samples(arguments)
        alone: dict[tuple[str, ...], Moments] = {}
        for name, value in values.items():
            alone[(name,)] = Moments(samples, value, torch.zeros_like(value), instances=True)
        return alone

    def _recopy(self, convert: TensorConversion) -> None:
        """Copy the layer with converted tensors; arguments of later runs are converted alike."""
        self._convert = convert
        self._copy = copy_layer(self._layer, convert, self._forward)
        for part in self._copy.modules():
            if isinstance(part, _NormBase):
                # With a momentum of 1 the buffers then hold the batch's own statistics.
                part.momentum = 1.0
        self._buffers = dict(self._copy._buffers)

    def _rule(self, arguments: Arguments) -> Rule:
        """Find the rule from runs of the copy on a call's arguments."""
        inputs: list[tuple[torch.Tensor, bool]] = []
        base = self._run(arguments, inputs)
        self._factors = self._measure_factors(arguments, base)
        if self._factors and not any(self._factors.values()):
            return "frozen"
        if not self._factors or not all(self._factors.values()):
            return "unknown"
        values = self._solve(base)
        if not self._pair or len(inputs) != 1:
            return "own"
        kernel_input, is_argument = inputs[0]
        if not self._are_moments_of(kernel_input, values):
            return "own"
        # The copy's momentum is 1. A factor other than 1 means that the layer uses its own.
        if is_argument and all(factor == 1 for factor in self._factors.values()):
            return "argument"
        return "kernel"

    def _are_moments_of(self, tensor: torch.Tensor, values: Values) -> bool:
        """Return True if a mean and a variance are those of a tensor."""
        moments = batch_moments(tensor)
        for name, expected in zip(self._names, (moments.mean, moments.variance), strict=True):
            value = values[name]
            if value.shape != expected.shape or not _is_close(value, expected.to(value)):
                return False
        return True

    def _measure_factors(self, arguments: Arguments, base: Values) -> dict[str, float]:
        """Measure the weight of a batch in each statistic.

        Returns:
            Weights from 0 to 1 by statistic; empty if the layer does not take a moving average.
        """
        start, factors = self._start, {}
        shifts = {name: 1.0 + base[name].abs().max().item() for name in base}
        for name, shift in shifts.items():
            moved = self._run(arguments, start=start | {name: start[name] + shift})
            old_weights = (moved[name] - base[name]) / shift
            factors[name] = _without_noise(1 - old_weights.mean().item())
            if not -_CLOSE < factors[name] < 1 + _CLOSE:
                return {}
            expected = base | {name: base[name] + (1 - factors[name]) * shift}
            if not _are_all_close(moved, expected):
                return {}
        # Move all old values at once, twice as far. This confirms that the step is linear and that
        # each statistic depends on its own old value only.
        expected = dict(base)
        shifted = dict(start)
        for name, shift in shifts.items():
            shifted[name] = start[name] + 2 * shift
            expected[name] = base[name] + (1 - factors[name]) * 2 * shift
        if _are_all_close(self._run(arguments, start=shifted), expected):
            return factors
        return {}

    def _solve(self, new: Values) -> Values:
        """Solve for the batch's own statistics, given the old values and the weights."""
        values: Values = {}
        for name, factor in self._factors.items():
            values[name] = (new[name] - (1 - factor) * self._start[name]) / factor
        return values

    def _pool(self, arguments: Arguments, values: Values) -> Moments:
        """Build moments from a batch's mean and variance, with the number of values found."""
        mean, variance = (values[name] for name in self._names)
        counts = self._count_values(arguments, values)
        # The number of values could not be measured: guess by the largest argument's size.
        if counts is None:
            self.estimates = True
            numel = max((t.numel() for t in tensors_of(arguments)), default=1)
            count = max(2, numel // mean.numel())
            counts = count, count - 1
        return Moments(counts[0], mean, variance * counts[1])

    def _count_values(self, arguments: Arguments, values: Values) -> tuple[int, int] | None:
        """Find the number of values in a mean and the divisor of the variance.

        Returns:
            The two counts; None if no value that was tried gives them.
        """
        for which, tensor in enumerate(_movable_tensors(arguments)):
            # So large a distance moves the mean well beyond the noise of float32.
            distance = tensor.numel() * tensor.abs().max().double().item()
            for index in _indices_to_try(tensor):
                push = distance
                if tensor[index] <= 0:
                    push = -distance
                near = self._solve(self._run(arguments, moved=(which, index, push)))
                far = self._solve(self._run(arguments, moved=(which, index, 2 * push)))
                mean, variance = self._names
                moved = near[mean] - values[mean]
                at = int(moved.abs().argmax())
                share = moved[at].item() / push
                # The value has no part in the mean: it is padding or masked.
                if abs(share) * tensor.numel() < _CLOSE:
                    continue
                bend = (far[variance] - 2 * near[variance] + values[variance])[at].item() / 2
                return _counts_from_shifts(share, bend / push**2)
        return None

    def _run(
        self,
        arguments: Arguments,
        inputs: list[tuple[torch.Tensor, bool]] | None = None,
        start: Mapping[str, float] | None = None,
        moved: tuple[int, tuple[int, ...], float] | None = None,
    ) -> Values:
        """Run the copy and return the new statistics in the buffers.

        Args:
            arguments: The arguments.
            inputs: Receives the inputs of torch's kernel, each with a flag that is True for the
                call's only argument.
            start: Values of the statistics before the run.
            moved: One value to change: number of the floating tensor, index, distance.
        """
        args, kwargs = converted = map_tensors(arguments, self._convert)
        if moved is not None:
            which, index, distance = moved
            # The conversion has copied the tensors, so the caller's values stay.
            _movable_tensors(converted)[which][index] += distance
        self._prepare(start or self._start)
        only = only_tensor(args, kwargs)

        def take(value: torch.Tensor) -> None:
            """Record an input of torch's kernel."""
            if inputs is not None:
                inputs.append((value.clone(), value is only))

        with KernelCalls(self._copy, take):
            self._copy.forward(*args, **kwargs)
        return {name: _flatten(self._copy._buffers[name]) for name in self._names}

    def _prepare(self, start: Mapping[str, float]) -> None:
        """Reset the copy's buffers: statistics to start values, counters to 0."""
        for name, value in self._buffers.items():
            if value is None:
                continue
            if name in start:
                self._copy._buffers[name] = torch.full_like(value, start[name])
                if value.is_complex():
                    self._copy._buffers[name] = torch.full_like(value, start[name] * (1 + 1j))
            elif value.numel() == 1 and (not value.is_floating_point() or _COUNTER.search(name)):
                self._copy._buffers[name] = torch.zeros_like(value)
            else:
                self._copy._buffers[name] = value.clone()


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Arguments]:
    """Yield a call's arguments: a part of a single large argument first, then all.

    The part consists of the first rows along the first axis.
    """
    only = only_tensor(args, kwargs)
    if only is not None and only.dim() > 1:
        rows = max(2, _SAMPLE // max(1, only[0].numel()))
        if len(only) > rows:
            part = only[:rows]
            if args:
                yield (part,), {}
            else:
                yield (), dict.fromkeys(kwargs, part)
    yield args, kwargs


def _count_samples(arguments: Arguments) -> int:
    """Count the samples in a call's arguments: the rows of the first tensor with axes."""
    for tensor in tensors_of(arguments):
        if tensor.dim():
            return len(tensor)
    return 1


def _movable_tensors(arguments: Arguments) -> list[torch.Tensor]:
    """List the floating-point tensors of a call's arguments that have several values."""
    return [t for t in tensors_of(arguments) if t.is_floating_point() and t.numel() > 1]


def only_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return a call's only argument if the argument is a tensor, otherwise None."""
    values = [*args, *kwargs.values()]
    if len(values) == 1 and isinstance(values[0], torch.Tensor):
        return values[0]
    return None


def _copy_wide(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor; floats become float64 where the device supports float64."""
    dtype = tensor.dtype
    if tensor.is_floating_point() and merging_device(tensor.device) == tensor.device:
        dtype = torch.float64
    return tensor.detach().to(dtype, copy=True)


def _copy_as_is(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor in the same dtype."""
    return tensor.detach().clone()


@contextmanager
def _plain_precision() -> Iterator[None]:
    """Turn off gradients and autocast, which would narrow float64 values."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _without_cuda_autocast():
        yield


def _without_cuda_autocast() -> AbstractContextManager[Any]:
    """Turn off autocast on CUDA, where CUDA is available."""
    if torch.cuda.is_available():
        return torch.autocast("cuda", enabled=False)
    return nullcontext()


def _flatten(value: torch.Tensor | None) -> torch.Tensor:
    """Flatten a statistic to float64; a complex value becomes two."""
    if value is None:
        raise TypeError("a layer has no statistics any more")
    if value.is_complex():
        value = torch.view_as_real(value)
    return value.detach().to(merging_device(value.device)).double().reshape(-1)


def _is_close(value: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return True if values are as expected up to float32's precision, and finite."""
    room = _CLOSE * (1 + expected.abs().max())
    return bool(((value - expected).abs() <= room).all())


def _are_all_close(values: Values, expected: Values) -> bool:
    """Return True if all statistics are as expected."""
    return all(_is_close(values[name], expected[name]) for name in expected)


def _without_noise(factor: float) -> float:
    """Remove the noise of rounding from a factor of 0 or 1."""
    if abs(factor - round(factor)) < 1e-6:
        return float(round(factor))
    return factor


def _indices_to_try(tensor: torch.Tensor) -> Iterator[tuple[int, ...]]:
    """Yield the indices of some values that are not 0: first, last, several between."""
    # Multiples of the golden ratio spread the indices evenly and avoid periods in the data.
    last = tensor.numel() - 1
    steps = [0, last]
    for i in range(1, _CANDIDATES - 1):
        steps.append(int(last * (i * 0.6180339887 % 1)))
    for step in steps:
        index = tuple(map(int, torch.unravel_index(torch.tensor(step), tensor.shape)))
        if tensor[index] != 0:
            yield index


def _counts_from_shifts(share: float, bend: float) -> tuple[int, int] | None:
    """Find the number of values in a mean and the degrees of freedom of the variance.

    Args:
        share: Change of the mean per change of one value.
        bend: Change of the variance per squared change of that value.

    Returns:
        The two counts; None if the statistics are not a plain mean and variance.
    """
    ratio = bend / share**2
    rounded = round(ratio)
    if rounded < 1 or abs(ratio - rounded) > _CLOSE * rounded + 0.01:
        return None
    # If the layer does not scale its inputs, the mean alone gives n. For a biased variance, n is
    # one more than the ratio.
    if abs(1 / share - (rounded + 1)) < 0.25 and abs(1 / share - rounded) > 0.25:
        return rounded + 1, rounded + 1
    # A variance that combines parts, such as instances, has another bend. Then the mean gives n.
    plain = round(1 / share)
    if rounded != plain > 1 and abs(1 / share - plain) < _CLOSE and 0.75 < rounded / plain < 1.33:
        return plain, plain
    return rounded, rounded - 1
