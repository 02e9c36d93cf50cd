"""What becomes of each tensor: averaged, taken from the last checkpoint, or refused."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from ckptavg.averaging.planning import spectral_norm
from ckptavg.averaging.planning.buffers import find_buffers
from ckptavg.averaging.planning.checks import (
    check_alike,
    check_copied,
    check_names,
    check_supported,
)
from ckptavg.averaging.planning.frozen_layers import find_frozen_layers
from ckptavg.averaging.planning.modules import Modules
from ckptavg.averaging.planning.rules import Rules
from ckptavg.averaging.planning.spectral_norm import SpectralNorm
from ckptavg.averaging.schemes import normalized
from ckptavg.errors import UsageError, first_few
from ckptavg.errors.spelling import close_patterns, did_you_mean
from ckptavg.formats import Checkpoint, Tensor
from ckptavg.formats.checkpoint import DTYPES, DType
from ckptavg.formats.file_layout import OutputTensor
from ckptavg.formats.names import batchnorm_layers, layer_statistics
from ckptavg.runs.metric_columns import momentary_numbers


@dataclass(frozen=True)
class TensorPlan:
    """How one output tensor comes about.

    Attributes:
        name: Under which it is stored.
        shape: Extent.
        dtype: Element type of the output.
        sources: The same tensor in each checkpoint that contributes, in the run's order.
        owners: The checkpoints that the sources belong to.
        coefficients: One a source.
        averaged: False where the bytes of the only source are taken as they are.
        compared: The tensors of the other checkpoints where only the last is taken: integers and
            buffers that are no weights. A difference is noted.
        tied_to: Name of an earlier tensor that has the same bytes in every checkpoint.
        divisor: What the weighted sum is divided by; the sum of the coefficients where None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: DType
    sources: tuple[Tensor, ...]
    owners: tuple[Checkpoint, ...]
    coefficients: tuple[float, ...]
    averaged: bool
    compared: tuple[Tensor, ...] = ()
    tied_to: str | None = None
    divisor: float | None = None

    @property
    def output(self) -> OutputTensor:
        """What is written."""
        return OutputTensor(self.name, self.dtype, self.shape, self.tied_to)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What is read for it, in the run's order: what is compared comes before what is taken."""
        return (*self.compared, *self.sources)


@dataclass(frozen=True)
class Plan:
    """A whole average before any tensor is read.

    Attributes:
        checkpoints: What was selected, in order.
        coefficients: One a checkpoint, normalized.
        tensors: How each output tensor comes about.
        notes: What a person should know.
        companions: Contents of the files that must stand beside the weights, by name; where there
            are any, the output has to be a directory.
        missing: Tensors that no output can hold, and why: they are left out of this one.
        metadata: Entries of a safetensors header that are not as in the last checkpoint's.
        spectral_norms: Layers whose vectors are iterated on the averaged weight.
        frozen: Layers whose running statistics were frozen in training: they are kept.
    """

    checkpoints: tuple[Checkpoint, ...]
    coefficients: tuple[float, ...]
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...] = ()
    companions: Mapping[str, bytes] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    spectral_norms: tuple[SpectralNorm, ...] = ()
    frozen: tuple[str, ...] = ()

    @property
    def outputs(self) -> list[OutputTensor]:
        """What is written."""
        return [tensor.output for tensor in self.tensors]

    @property
    def template(self) -> Checkpoint:
        """The checkpoint that outputs are laid out like."""
        last = self.checkpoints[-1]
        metadata = {**last.metadata, **self.metadata}
        return replace(last, metadata=metadata, momentary=momentary_numbers(self.checkpoints))

    @property
    def ties(self) -> list[list[str]]:
        """Groups of output names that share their contents."""
        groups: dict[str, list[str]] = {}
        for tensor in self.tensors:
            groups.setdefault(tensor.tied_to or tensor.name, []).append(tensor.name)
        return [names for names in groups.values() if len(names) > 1]

    @property
    def files(self) -> list[Checkpoint]:
        """Every checkpoint that is read, each once."""
        owners = (owner for tensor in self.tensors for owner in tensor.owners)
        return list({id(c): c for c in (*self.checkpoints, *owners)}.values())

    @property
    def base(self) -> Checkpoint | None:
        """The checkpoint that gives the rest, if it is none of those selected."""
        selected = {(c.path, c.key) for c in self.checkpoints}
        return next((c for c in self.files if (c.path, c.key) not in selected), None)

    @property
    def inputs(self) -> list[Checkpoint]:
        """The checkpoints as the provenance lists them: the selected ones, and the base."""
        return [*self.checkpoints, *([] if self.base is None else [self.base])]


def make_plan(
    checkpoints: Sequence[Checkpoint], coefficients: Sequence[float], rules: Rules
) -> Plan:
    """Check that the checkpoints fit each other, and say what becomes of each tensor.

    Args:
        checkpoints: What was selected, in order.
        coefficients: One a checkpoint; their sum is positive. Those with 0 are not read.
        rules: What is averaged.

    Raises:
        MismatchError: Names, shapes or kinds differ.
        UnsupportedTensorError: A tensor has no meaningful average.
        UsageError: The patterns leave nothing to average.
    """
    last, base = checkpoints[-1], rules.base or checkpoints[-1]
    names = [name for name in (*last.tensors, *last.refused) if rules.averages(name)]
    if not names:
        raise UsageError(
            f"no tensor of {last.path} matches the include and exclude patterns",
            did_you_mean(_meant_patterns(rules, {*last.tensors, *last.refused})),
        )
    check_names(checkpoints, names, rules.averages)
    check_supported(checkpoints, names, rules.averages)
    for name in names:
        check_alike(name, checkpoints)
    modules, averaged = Modules(last.tensors), set(names)
    layers = _averaged_layers(modules, averaged)
    vectors = {vector for layer in layers for vector in (layer.u, layer.v) if vector}
    used = [c for c, coefficient in zip(checkpoints, coefficients, strict=True) if coefficient]
    frozen = _find_frozen(used, rules)
    buffers = find_buffers(modules, averaged)
    builder = _Builder(
        tuple(checkpoints), tuple(coefficients), rules, vectors, buffers, frozen, used[-1]
    )
    rest = [name for name in base.tensors if name not in averaged]
    check_copied(base, set(rest))
    order = {name: i for i, name in enumerate(base.tensors)}
    tensors = [builder.averaged(name) for name in names] + [
        builder.copied(name, base) for name in rest
    ]
    tensors.sort(key=lambda t: order.get(t.name, len(order)))
    return Plan(
        checkpoints=tuple(checkpoints),
        coefficients=tuple(normalized(coefficients)),
        tensors=tuple(_with_ties(tensors)),
        notes=(*builder.notes(), *_unmatched(rules, {*last.tensors, *last.refused})),
        missing={name: why for name, why in base.refused.items() if name not in averaged},
        spectral_norms=layers if len(used) > 1 else (),
        frozen=tuple(frozen),
    )


def _averaged_layers(modules: Modules, averaged: Collection[str]) -> tuple[SpectralNorm, ...]:
    """Layers under spectral norm all of whose tensors are to be averaged."""
    layers = spectral_norm.find_layers(modules)
    return tuple(
        layer
        for layer in layers
        if layer.weight in averaged and layer.u in averaged and (layer.v or layer.u) in averaged
    )


def _find_frozen(used: Sequence[Checkpoint], rules: Rules) -> dict[str, tuple[str, ...]]:
    """Find the layers that were frozen in training, whose statistics the output has.

    Args:
        used: The checkpoints that contribute.
        rules: What is averaged.

    Returns:
        Layer → names of its statistics.
    """
    statistics = layer_statistics(used[-1].tensors)
    frozen = {layer: statistics[layer] for layer in find_frozen_layers(used)}
    if rules.base is None:
        return frozen
    return {
        layer: names for layer, names in frozen.items() if all(rules.averages(n) for n in names)
    }


def _unmatched(rules: Rules, names: set[str]) -> list[str]:
    """Notes about patterns that do nothing: a word mistyped, or one meant for files."""
    notes: list[str] = []
    for pattern in _idle_patterns(rules, names):
        meant = did_you_mean(close_patterns(pattern, sorted(names)))
        remedy = f". {meant}" if meant else " (--glob selects files)"
        notes.append(f"the pattern {pattern!r} matches no tensor{remedy}")
    return notes


def _meant_patterns(rules: Rules, names: set[str]) -> list[str]:
    """List patterns that some which match no tensor may have been meant for."""
    idle = _idle_patterns(rules, names)
    return [p for pattern in idle for p in close_patterns(pattern, sorted(names))]


def _idle_patterns(rules: Rules, names: set[str]) -> list[str]:
    """List the patterns that match no name."""
    patterns = (*rules.include, *rules.exclude)
    return [p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in names)]


@dataclass
class _Builder:
    checkpoints: tuple[Checkpoint, ...]
    coefficients: tuple[float, ...]
    rules: Rules
    vectors: Collection[str]
    buffers: Collection[str]
    frozen: Mapping[str, Sequence[str]]
    last_used: Checkpoint
    mixed: dict[str, str] = field(default_factory=dict)

    def averaged(self, name: str) -> TensorPlan:
        tensors = [c.tensors[name] for c in self.checkpoints]
        last = tensors[-1]
        if name in self.vectors:
            return self.copied(name, self.checkpoints[-1])
        if name in self._frozen_statistics:
            return self.copied(name, self.last_used)
        if last.dtype.kind == "int" or name in self.buffers:
            plan = self.copied(name, self.checkpoints[-1])
            others = () if plan.averaged else tuple(t for t in tensors[:-1] if t is not last)
            return replace(plan, compared=others)
        used = [i for i, c in enumerate(self.coefficients) if c != 0]
        dtype = self._output_dtype(name, [tensors[i].dtype for i in used])
        return TensorPlan(
            name,
            last.shape,
            dtype,
            tuple(tensors[i] for i in used),
            tuple(self.checkpoints[i] for i in used),
            tuple(self.coefficients[i] for i in used),
            True,
        )

    def copied(self, name: str, base: Checkpoint) -> TensorPlan:
        tensor = base.tensors[name]
        dtype = tensor.dtype
        if dtype.kind == "float":
            dtype = self._output_dtype(name, [dtype])
        converted = dtype != tensor.dtype
        return TensorPlan(name, tensor.shape, dtype, (tensor,), (base,), (1.0,), converted)

    def notes(self) -> list[str]:
        notes = []
        if self.frozen:
            of_all = len(batchnorm_layers(self.last_used.tensors))
            notes.append(
                f"{len(self.frozen)} of {of_all} BatchNorm layers were frozen in training (the "
                "same statistics in all checkpoints) and are kept as they are: "
                f"{first_few(list(self.frozen))}"
            )
        if self.mixed:
            shown = [f"{name} ({dtype})" for name, dtype in self.mixed.items()]
            notes.append(
                f"floats of different width meet; written as the widest: {first_few(shown)}"
            )
        if self.vectors and len(self.checkpoints) > 1:
            notes.append(
                "the vectors of layers under spectral norm are not averaged but iterated on the "
                f"averaged weights: {first_few(sorted(self.vectors))}"
            )
        return notes

    @cached_property
    def _frozen_statistics(self) -> set[str]:
        return {name for names in self.frozen.values() for name in names}

    def _output_dtype(self, name: str, dtypes: Sequence[DType]) -> DType:
        widest = dtypes[0]
        for dtype in dtypes[1:]:
            widest = _wider(widest, dtype)
        if widest.kind == "float" and self.rules.dtype != "keep":
            return DTYPES[self.rules.dtype]
        if len(set(dtypes)) > 1:
            self.mixed[name] = widest.name
        return widest


def _wider(one: DType, other: DType) -> DType:
    """The narrowest type that holds the values of both."""
    if one == other:
        return one
    if one.bits == other.bits:  # bfloat16 and float16
        return DTYPES["float32"]
    return one if one.bits > other.bits else other


def _with_ties(tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Mark the tensors that have the same bytes as an earlier one in every source."""
    seen: dict[object, str] = {}
    tied: list[TensorPlan] = []
    for plan in tensors:
        places = tuple(source.pieces for source in (*plan.sources, *plan.compared))
        identity = (places, plan.dtype.name, plan.coefficients, plan.averaged)
        first = seen.setdefault(identity, plan.name) if math.prod(plan.shape) else plan.name
        tied.append(plan if first == plan.name else replace(plan, tied_to=first))
    return tied


def copy_plan(checkpoint: Checkpoint) -> Plan:
    """The plan that takes every tensor of one checkpoint as it is.

    Raises:
        UnsupportedTensorError: A tensor has no plain bytes.
    """
    check_copied(checkpoint, {*checkpoint.tensors, *checkpoint.refused})
    tensors = [
        TensorPlan(name, t.shape, t.dtype, (t,), (checkpoint,), (1.0,), averaged=False)
        for name, t in checkpoint.tensors.items()
    ]
    return Plan((checkpoint,), (1.0,), tuple(_with_ties(tensors)))
