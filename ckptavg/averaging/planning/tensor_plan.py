"""Plans of output tensors: averaged, copied from a checkpoint, or refused."""

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
    """Plan of an output tensor.

    Attributes:
        name: Name of the tensor in the output.
        shape: Shape of the tensor.
        dtype: Element type in the output.
        sources: The same tensor in each checkpoint that contributes, in the run's order.
        owners: The checkpoint of each source.
        coefficients: One per source.
        averaged: False where the bytes of the only source are copied unchanged.
        compared: The same tensor in the other checkpoints, where only the last checkpoint's is
            copied: integers, and buffers that are not weights. Differences are noted.
        tied_to: Name of an earlier tensor that has the same bytes in every checkpoint.
        divisor: Divisor of the weighted sum; the sum of the coefficients where None.
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
        """Description of the tensor in the output."""
        return OutputTensor(self.name, self.dtype, self.shape, self.tied_to)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All tensors to read, in the run's order: compared tensors come before the sources."""
        return (*self.compared, *self.sources)


@dataclass(frozen=True)
class Plan:
    """Plan of a whole average, made before the tensors are read.

    Attributes:
        checkpoints: The selected checkpoints, in order.
        coefficients: One per checkpoint, normalized.
        tensors: Plan of each output tensor.
        notes: Messages for the user.
        companions: Contents of the files that must stand beside the weights, by name. Where there
            are any, the output has to be a directory.
        missing: Names of tensors that no output can hold, and the reasons. The output lacks them.
        metadata: Entries of a safetensors header that differ from the last checkpoint's header.
        spectral_norms: Layers whose singular vectors are computed from the averaged weight.
        frozen: Layers whose running statistics were frozen in training and are kept.
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
        """Descriptions of the tensors in the output."""
        return [tensor.output for tensor in self.tensors]

    @property
    def template(self) -> Checkpoint:
        """The checkpoint whose layout outputs follow: the last one, with the plan's metadata."""
        last = self.checkpoints[-1]
        metadata = {**last.metadata, **self.metadata}
        return replace(last, metadata=metadata, momentary=momentary_numbers(self.checkpoints))

    @property
    def ties(self) -> list[list[str]]:
        """Groups of output names with shared contents."""
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
        """The checkpoint of copied tensors; None where only selected checkpoints are read."""
        selected = {(c.path, c.key) for c in self.checkpoints}
        return next((c for c in self.files if (c.path, c.key) not in selected), None)

    @property
    def inputs(self) -> list[Checkpoint]:
        """The checkpoints in the provenance's order: the selected ones, then the base."""
        return [*self.checkpoints, *([] if self.base is None else [self.base])]


def make_plan(
    checkpoints: Sequence[Checkpoint], coefficients: Sequence[float], rules: Rules
) -> Plan:
    """Plan the average of checkpoints, after checks that the checkpoints fit each other.

    Args:
        checkpoints: The selected checkpoints, in order.
        coefficients: One per checkpoint, with a positive sum. Checkpoints with 0 are not read.
        rules: The selection of the tensors to average, and the type of the output's floats.

    Raises:
        MismatchError: Names, shapes or kinds differ.
        UnsupportedTensorError: A tensor has no meaningful average.
        UsageError: The patterns leave nothing to average.
        CheckpointError: A file cannot be read.
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
    copied = [name for name in base.tensors if name not in averaged]
    check_copied(base, set(copied))
    order = {name: i for i, name in enumerate(base.tensors)}
    tensors = [builder.averaged(name) for name in names] + [
        builder.copied(name, base) for name in copied
    ]
    # The output keeps the base's order of tensors, copied and averaged ones mixed.
    tensors.sort(key=lambda t: order.get(t.name, len(order)))
    return Plan(
        checkpoints=tuple(checkpoints),
        coefficients=tuple(normalized(coefficients)),
        tensors=tuple(_with_ties(tensors)),
        notes=(*builder.notes(), *_unmatched(rules, {*last.tensors, *last.refused})),
        missing={name: why for name, why in base.refused.items() if name not in averaged},
        # The vectors of a single checkpoint already belong to its weights.
        spectral_norms=layers if len(used) > 1 else (),
        frozen=tuple(frozen),
    )


def _averaged_layers(modules: Modules, averaged: Collection[str]) -> tuple[SpectralNorm, ...]:
    """Find the layers under spectral norm whose tensors are all to be averaged."""
    layers = spectral_norm.find_layers(modules)
    return tuple(
        layer
        for layer in layers
        if layer.weight in averaged and layer.u in averaged and (layer.v or layer.u) in averaged
    )


def _find_frozen(used: Sequence[Checkpoint], rules: Rules) -> dict[str, tuple[str, ...]]:
    """Find the layers that were frozen in training and whose statistics the output keeps.

    Args:
        used: The checkpoints that contribute.
        rules: The selection of the tensors to average.

    Returns:
        Layer → names of the layer's statistics.
    """
    statistics = layer_statistics(used[-1].tensors)
    frozen = {layer: statistics[layer] for layer in find_frozen_layers(used)}
    # Tensors outside the selection come from the base, whose statistics may be others.
    if rules.base is None:
        return frozen
    return {
        layer: names for layer, names in frozen.items() if all(rules.averages(n) for n in names)
    }


def _unmatched(rules: Rules, names: set[str]) -> list[str]:
    """Make a note per pattern that matches no tensor: mistyped, or meant for files."""
    notes: list[str] = []
    for pattern in _idle_patterns(rules, names):
        meant = did_you_mean(close_patterns(pattern, sorted(names)))
        remedy = f". {meant}" if meant else " (--glob selects files)"
        notes.append(f"the pattern {pattern!r} matches no tensor{remedy}")
    return notes


def _meant_patterns(rules: Rules, names: set[str]) -> list[str]:
    """List similar patterns that match tensors, for each pattern that matches no tensor."""
    idle = _idle_patterns(rules, names)
    return [p for pattern in idle for p in close_patterns(pattern, sorted(names))]


def _idle_patterns(rules: Rules, names: set[str]) -> list[str]:
    """List the patterns that match no name."""
    patterns = (*rules.include, *rules.exclude)
    return [p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in names)]


@dataclass
class _Builder:
    """Builder of tensor plans, which also collects notes about the tensors.

    Attributes:
        checkpoints: The selected checkpoints, in order.
        coefficients: One per checkpoint.
        rules: The selection of the tensors to average, and the type of the output's floats.
        vectors: Names of the singular vectors of layers under spectral norm.
        buffers: Names of float buffers that are not weights.
        frozen: Layer that was frozen in training → names of the layer's statistics.
        last_used: The last checkpoint that contributes.
        mixed: Tensor whose floats have different widths → name of the output's type.
    """

    checkpoints: tuple[Checkpoint, ...]
    coefficients: tuple[float, ...]
    rules: Rules
    vectors: Collection[str]
    buffers: Collection[str]
    frozen: Mapping[str, Sequence[str]]
    last_used: Checkpoint
    mixed: dict[str, str] = field(default_factory=dict)

    def averaged(self, name: str) -> TensorPlan:
        """Plan a tensor of the selection as an average, or as a copy where there is no mean."""
        tensors = [c.tensors[name] for c in self.checkpoints]
        last = tensors[-1]
        # Copied for now. The vectors are computed once the averaged weights are known.
        if name in self.vectors:
            return self.copied(name, self.checkpoints[-1])
        if name in self._frozen_statistics:
            return self.copied(name, self.last_used)
        if last.dtype.kind == "int" or name in self.buffers:
            plan = self.copied(name, self.checkpoints[-1])
            compared = () if plan.averaged else tuple(t for t in tensors[:-1] if t is not last)
            return replace(plan, compared=compared)
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
        """Plan a tensor that is copied from a checkpoint, converted where a type is requested."""
        tensor = base.tensors[name]
        dtype = tensor.dtype
        if dtype.kind == "float":
            dtype = self._output_dtype(name, [dtype])
        # A conversion is the average of a single source.
        converted = dtype != tensor.dtype
        return TensorPlan(name, tensor.shape, dtype, (tensor,), (base,), (1.0,), converted)

    def notes(self) -> list[str]:
        """Return notes about the planned tensors, once all are planned."""
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
    """Return the narrowest type that holds all values of two types."""
    if one == other:
        return one
    # These are bfloat16 and float16, neither of which holds the other's values.
    if one.bits == other.bits:
        return DTYPES["float32"]
    return one if one.bits > other.bits else other


def _with_ties(tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Tie tensors to the first tensor that has the same bytes in every source."""
    first_names: dict[object, str] = {}
    tied: list[TensorPlan] = []
    for plan in tensors:
        pieces = tuple(source.pieces for source in (*plan.sources, *plan.compared))
        identity = (pieces, plan.dtype.name, plan.coefficients, plan.averaged)
        # Empty tensors have no bytes, so that two of them are not the same tensor.
        first = first_names.setdefault(identity, plan.name) if math.prod(plan.shape) else plan.name
        tied.append(plan if first == plan.name else replace(plan, tied_to=first))
    return tied


def copy_plan(checkpoint: Checkpoint) -> Plan:
    """Plan an unchanged copy of every tensor of a checkpoint.

    Raises:
        UnsupportedTensorError: A tensor has no plain bytes.
    """
    check_copied(checkpoint, {*checkpoint.tensors, *checkpoint.refused})
    tensors = [
        TensorPlan(name, t.shape, t.dtype, (t,), (checkpoint,), (1.0,), averaged=False)
        for name, t in checkpoint.tensors.items()
    ]
    return Plan((checkpoint,), (1.0,), tuple(_with_ties(tensors)))
