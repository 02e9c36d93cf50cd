"""What a layer itself makes of its inputs, found by running a copy of it.

A subclass of BatchNorm, or a normalization layer that is none, may turn its argument round, mask
it, or take its moments by itself. Its statistics are of what it writes into its buffers: in
training mode a step of a moving average, ``(1 - a) · old + a · batch``. A copy of the layer in
float64, given old values at will, tells ``a`` and what the layer found in the batch.

From how many values n a mean and a variance are is told by one of them, moved by d. The mean moves
by s · d / n, and an unbiased variance has the second difference 2 · s² · d² / n, whatever factor s
the layer scales its inputs by: so n is a ratio of the two. Padding moves nothing.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.overrides import TorchFunctionMode

from ckptavg.batchnorm.moments import Moments, batch_moments, home_of
from ckptavg.batchnorm.norm_layers import is_pair
from ckptavg.models.batches import map_tensors, tensors_of
from ckptavg.models.device import is_out_of_memory

Rule = Literal["argument", "kernel", "own", "frozen", "unknown"]
"""``argument``: torch's kernel takes the moments of the layer's only argument, and the buffers keep
them. ``kernel``: it takes those of something else. ``own``: the layer takes them by itself.
``frozen``: they stay in training mode, too. ``unknown``: the layer keeps no moving average."""

_CLOSE = 1e-4  # a layer may work in float32 whatever it is given
_CANDIDATES = 16  # values whose influence is tried
_SAMPLE = 1 << 20  # values of an argument that tell the rule
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
Convert = Callable[[torch.Tensor], torch.Tensor]
Values = dict[str, torch.Tensor]
"""Per statistic, its values in float64, flat; a complex one has two each."""


class KernelCalls(TorchFunctionMode):
    """Calls of torch's batch normalization that update a layer's statistics.

    Args:
        layer: It.
        take: Called with the input, (N, C, ...), before the kernel is.
    """

    def __init__(self, layer: nn.Module, take: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self._layer, self._take = layer, take

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Do what is asked for."""
        kwargs = kwargs or {}
        if func in _KERNELS:
            bound = dict(zip(_KERNELS[func], args, strict=False)) | kwargs
            mean = bound.get("running_mean")
            if bound.get("training") and isinstance(mean, torch.Tensor) and self._is_own(mean):
                self._take(bound["input"])
        return func(*args, **kwargs)

    def _is_own(self, tensor: torch.Tensor) -> bool:
        own = (value for value in self._layer._buffers.values() if value is not None)
        return any(tensor.data_ptr() == value.data_ptr() for value in own)


class LayerUpdate:
    """How a layer updates its running statistics.

    Args:
        layer: A layer, which is not run itself.
        statistics: Names of these buffers, the mean first.
        forward: The forward pass that the layer has in place of its class's.

    Attributes:
        estimates: Whether the numbers of values had to be guessed by the arguments' sizes.
    """

    def __init__(self, layer: nn.Module, statistics: tuple[str, ...], forward: Any = None) -> None:
        self._layer, self._forward = layer, forward
        self._names = statistics
        self._pair = is_pair(layer, statistics)
        self._widen(_wide)
        self._start = dict.fromkeys(statistics, 1.0) | {statistics[0]: 0.0}
        self._factors: dict[str, float] = {}
        self.estimates = False

    def rule(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Rule:
        """Find out by a call's arguments, which stay as they are, what the layer does."""
        # float32 at worst: compiled kernels may take nothing else
        for convert in (_wide, _as_it_is):
            self._widen(convert)
            for given in _samples(args, kwargs):
                try:
                    with _undisturbed():
                        return self._rule(given)
                except Exception as error:  # whatever a layer says to a copy
                    if is_out_of_memory(error):
                        raise
        return "unknown"

    def moments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[tuple[str, ...], Moments]:
        """Find what the layer makes of a call's arguments, which stay as they are.

        Returns:
            Moments by the names of the statistics that they are for: of all values for a mean and
            a variance; else each statistic by itself, the mean over batches by their samples.
        """
        given = args, kwargs
        with _undisturbed():
            self._widen(self._convert)  # a model may give its layer a mask by an attribute
            values = self._found(self._run(given))
            if isinstance(self._copy, _InstanceNorm):
                count = next(tensors_of(given)).shape[0]
                mean, variance = (values[name] for name in self._names)
                return {self._names: Moments(count, mean, variance * count, instances=True)}
            if self._pair:
                return {self._names: self._pooled(given, values)}
        samples = next((len(t) for t in tensors_of(given) if t.dim()), 1)
        zero = torch.zeros_like
        return {(n,): Moments(samples, v, zero(v), instances=True) for n, v in values.items()}

    def _widen(self, convert: Convert) -> None:
        """Make the copy, whose tensors and arguments are converted."""
        self._convert = convert
        self._copy = _copy_of(self._layer, convert, self._forward)
        self._buffers = dict(self._copy._buffers)

    def _rule(self, given: Arguments) -> Rule:
        inputs: list[tuple[torch.Tensor, bool]] = []
        base = self._run(given, inputs)
        self._factors = self._measure_factors(given, base)
        if not self._factors:
            return "unknown"
        if not any(self._factors.values()):
            return "frozen"
        if not all(self._factors.values()):
            return "unknown"
        values = self._found(base)
        if not self._pair or len(inputs) != 1:
            return "own"
        kernel, is_argument = inputs[0]
        moments = batch_moments(kernel)
        for value, expected in zip(
            (values[name] for name in self._names), (moments.mean, moments.variance), strict=True
        ):
            if value.shape != expected.shape or not _close(value, expected.to(value)):
                return "own"
        honoured = all(factor == 1 for factor in self._factors.values())
        return "argument" if is_argument and honoured else "kernel"

    def _measure_factors(self, given: Arguments, base: Values) -> dict[str, float]:
        """The weight of a batch in each statistic; none if that is not what happens."""
        start, factors = self._start, {}
        shifts = {name: 1.0 + base[name].abs().max().item() for name in base}
        for name, shift in shifts.items():
            moved = self._run(given, start=start | {name: start[name] + shift})
            kept = (moved[name] - base[name]) / shift
            factors[name] = _rounded(1 - kept.mean().item())
            if not -_CLOSE < factors[name] < 1 + _CLOSE:
                return {}
            expected = base | {name: base[name] + (1 - factors[name]) * shift}
            if not _all_close(moved, expected):
                return {}
        # twice as far in all of them at once: the step is linear, and each heeds its own old value
        moved = self._run(given, start={n: start[n] + 2 * shift for n, shift in shifts.items()})
        expected = {n: base[n] + (1 - factors[n]) * 2 * shift for n, shift in shifts.items()}
        return factors if _all_close(moved, expected) else {}

    def _found(self, new: Values) -> Values:
        """What a batch itself has put into new statistics."""
        return {
            name: (new[name] - (1 - factor) * self._start[name]) / factor
            for name, factor in self._factors.items()
        }

    def _pooled(self, given: Arguments, values: Values) -> Moments:
        mean, variance = (values[name] for name in self._names)
        counts = self._count(given, values)
        if counts is None:
            self.estimates = True
            numel = max((t.numel() for t in tensors_of(given)), default=1)
            count = max(2, numel // mean.numel())
            counts = count, count - 1
        return Moments(counts[0], mean, variance * counts[1])

    def _count(self, given: Arguments, values: Values) -> tuple[int, int] | None:
        """From how many values a mean is, and the divisor of its variance."""
        floats = [t for t in tensors_of(given) if t.is_floating_point() and t.numel() > 1]
        for which, tensor in enumerate(floats):
            distance = tensor.numel() * tensor.abs().max().double().item()
            for index in _spread_indices(tensor):
                push = distance if tensor[index] > 0 else -distance
                near, far = (
                    self._found(self._run(given, moved=(which, index, times * push)))
                    for times in (1, 2)
                )
                mean, variance = self._names
                moved = near[mean] - values[mean]
                at = int(moved.abs().argmax())
                share = moved[at].item() / push
                if abs(share) * tensor.numel() < _CLOSE:
                    continue
                bend = (far[variance] - 2 * near[variance] + values[variance])[at].item() / 2
                return _counts(share, bend / push**2)
        return None

    def _run(
        self,
        given: Arguments,
        inputs: list[tuple[torch.Tensor, bool]] | None = None,
        start: Mapping[str, float] | None = None,
        moved: tuple[int, tuple[int, ...], float] | None = None,
    ) -> Values:
        """Run the copy; what it has in its buffers afterwards.

        Args:
            given: The arguments.
            inputs: Takes the inputs of torch's kernel, and whether each is the only argument.
            start: What the statistics are before.
            moved: Which of the floating tensors has which value changed by how much.
        """
        args, kwargs = given = map_tensors(given, self._convert)
        if moved is not None:
            which, index, distance = moved
            floats = [t for t in tensors_of(given) if t.is_floating_point() and t.numel() > 1]
            floats[which][index] += distance
        self._prepare(start or self._start)
        only = only_tensor(args, kwargs)

        def take(value: torch.Tensor) -> None:
            if inputs is not None:
                inputs.append((value.clone(), value is only))

        with KernelCalls(self._copy, take):
            self._copy.forward(*args, **kwargs)
        return {name: _flat(self._copy._buffers[name]) for name in self._names}

    def _prepare(self, start: Mapping[str, float]) -> None:
        """Give the copy its buffers anew: the statistics as said, counters at 0."""
        for name, value in self._buffers.items():
            if value is None:
                continue
            if name in start:
                both = complex(start[name], start[name]) if value.is_complex() else start[name]
                self._copy._buffers[name] = torch.full_like(value, both)
            elif value.numel() == 1 and (not value.is_floating_point() or _COUNTER.search(name)):
                self._copy._buffers[name] = torch.zeros_like(value)
            else:
                self._copy._buffers[name] = value.clone()


def _samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Arguments]:
    """A part of a single argument, which is told apart from others by its first axis; then all."""
    only = only_tensor(args, kwargs)
    if only is not None and only.dim() > 1:
        rows = max(2, _SAMPLE // max(1, only[0].numel()))
        if len(only) > rows:
            part = only[:rows]
            yield ((part,), {}) if args else ((), dict.fromkeys(kwargs, part))
    yield args, kwargs


def only_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """A call's only argument, if it is a tensor."""
    values = [*args, *kwargs.values()]
    return values[0] if len(values) == 1 and isinstance(values[0], torch.Tensor) else None


def _copy_of(layer: nn.Module, convert: Convert, forward: Any = None) -> nn.Module:
    """A copy of a layer with converted tensors, in training mode, without hooks.

    What else it refers to is shared: a layer may know of its model, or of a trainer.
    """
    copy: nn.Module = layer.__new__(type(layer))
    state = vars(copy)
    state.update(vars(nn.Module()) | {"training": True})
    for name, value in vars(layer).items():
        if name not in state and name != "forward":
            state[name] = convert(value) if isinstance(value, torch.Tensor) else value
    for name, parameter in layer._parameters.items():
        wide = None if parameter is None else nn.Parameter(convert(parameter), requires_grad=False)
        copy._parameters[name] = wide
    for name, buffer in layer._buffers.items():
        copy._buffers[name] = None if buffer is None else convert(buffer)
    for name, part in layer._modules.items():
        copy._modules[name] = None if part is None else _copy_of(part, convert)
    for part in copy.modules():
        vars(part)["training"] = part is copy
    if isinstance(forward, types.MethodType) and forward.__self__ is layer:
        forward = types.MethodType(forward.__func__, copy)
    if forward is not None:
        state["forward"] = forward
    if isinstance(copy, _NormBase):
        copy.momentum = 1.0
    return copy


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in float64, where the device has it, if it holds floats."""
    real = tensor.is_floating_point() and home_of(tensor.device) == tensor.device
    return tensor.detach().to(torch.float64 if real else tensor.dtype, copy=True)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in the same type."""
    return tensor.detach().clone()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """No gradients, and no autocast, which would narrow what is float64."""
    kinds = {"cpu", "cuda"} if torch.cuda.is_available() else {"cpu"}
    with torch.no_grad():
        yield from _without_autocast(sorted(kinds))


def _without_autocast(kinds: list[str]) -> Iterator[None]:
    if not kinds:
        yield
        return
    with torch.autocast(kinds[0], enabled=False):
        yield from _without_autocast(kinds[1:])


def _flat(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise TypeError("a layer has no statistics any more")
    real = torch.view_as_real(value) if value.is_complex() else value
    return real.detach().to(home_of(real.device)).double().reshape(-1)


def _close(value: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether values are as expected up to float32's precision; never if they are not finite."""
    room = _CLOSE * (1 + expected.abs().max())
    return bool(((value - expected).abs() <= room).all())


def _all_close(values: Values, expected: Values) -> bool:
    return all(_close(values[name], expected[name]) for name in expected)


def _rounded(factor: float) -> float:
    """A factor, 0 and 1 without the noise of rounding."""
    return float(round(factor)) if abs(factor - round(factor)) < 1e-6 else factor


def _spread_indices(tensor: torch.Tensor) -> Iterator[tuple[int, ...]]:
    """Where some values are that are not 0: the first, the last, some between."""
    last = tensor.numel() - 1
    steps = [0, last, *(int(last * (i * 0.6180339887 % 1)) for i in range(1, _CANDIDATES - 1))]
    for step in steps:
        index = tuple(int(i) for i in torch.unravel_index(torch.tensor(step), tensor.shape))
        if tensor[index] != 0:
            yield index


def _counts(share: float, bend: float) -> tuple[int, int] | None:
    """Numbers of values and degrees of freedom; None if it is no plain mean and variance.

    Args:
        share: How much a mean moves with one of its values.
        bend: How much the variance does with the square of that.
    """
    ratio = bend / share**2
    whole = round(ratio)
    if whole < 1 or abs(ratio - whole) > _CLOSE * whole + 0.01:
        return None
    # without a factor the mean tells n as well, which is one more than the ratio of a biased one
    if abs(1 / share - (whole + 1)) < 0.25 and abs(1 / share - whole) > 0.25:
        return whole + 1, whole + 1
    # a variance made up of parts, such as those of instances, has a bend of its own
    plain = round(1 / share)
    if whole != plain > 1 and abs(1 / share - plain) < _CLOSE and 0.75 < whole / plain < 1.33:
        return plain, plain
    return whole, whole - 1
