"""Plans of output tensors: averaged, copied from a checkpoint, or refused."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
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
from ckptavg.averaging.planning.rules import Rules, note_idle_patterns, select_names
from ckptavg.averaging.planning.spectral_norm import SpectralNorm
from ckptavg.averaging.schemes import normalize
from ckptavg.averaging.swag.gaussian_noise import GaussianNoise
from ckptavg.errors import first_few
from ckptavg.formats import Checkpoint, Tensor
from ckptavg.formats.checkpoint import DTYPES, DType
from ckptavg.formats.file_layout import OutputTensor
from ckptavg.formats.statistics_names import batchnorm_layers, layer_statistics
from ckptavg.runs.metric_columns import find_momentary_numbers


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
        noise: Noise that is added to the average; None for none.
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
    noise: GaussianNoise | None = None

    @property
    def output(self) -> OutputTensor:
        """Description of the tensor in the output."""
        return OutputTensor(self.name, self.dtype, self.shape, self.tied_to)

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """All tensors to read, in the run's order: compared tensors come before the sources."""
        return (*self.compared, *self.sources)


@dataclass(frozen=True)
class LayerCoefficients:
    """Coefficients of the tensors of one layer.

    Attributes:
        name: Name of the layer's tensor that was measured.
        information: Measured information per checkpoint of the plan; None where not measured.
        coefficients: One per checkpoint of the plan.
    """

    name: str
    information: tuple[float | None, ...]
    coefficients: tuple[float, ...]


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
        layers: Coefficients per layer, where the layers do not share the plan's coefficients.
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
    layers: tuple[LayerCoefficients, ...] = ()

    @property
    def outputs(self) -> list[OutputTensor]:
        """Descriptions of the tensors in the output."""
        return [tensor.output for tensor in self.tensors]

    @property
    def template(self) -> Checkpoint:
        """The checkpoint whose layout outputs have: the last, with the plan's metadata."""
        last = self.checkpoints[-1]
        metadata = {**last.metadata, **self.metadata}
        return replace(last, metadata=metadata, momentary=find_momentary_numbers(self.checkpoints))

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
        files = {id(checkpoint): checkpoint for checkpoint in self.checkpoints}
        for tensor in self.tensors:
            for owner in tensor.owners:
                files.setdefault(id(owner), owner)
        return list(files.values())

    @property
    def base(self) -> Checkpoint | None:
        """The checkpoint of copied tensors; None where only selected checkpoints are read."""
        selected = {(checkpoint.path, checkpoint.key) for checkpoint in self.checkpoints}
        for checkpoint in self.files:
            if (checkpoint.path, checkpoint.key) not in selected:
                return checkpoint
        return None

    @property
    def inputs(self) -> list[Checkpoint]:
        """Checkpoints in the provenance's order: the selected checkpoints, then the base."""
        base = self.base
        if base is None:
            return list(self.checkpoints)
        return [*self.checkpoints, base]


def make_plan(
    checkpoints: Sequence[Checkpoint], coefficients: Sequence[float], rules: Rules
) -> Plan:
    """Check that checkpoints fit each other, and plan their average.

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
    names = select_names(last, rules)
    check_names(checkpoints, names, rules.averages)
    check_supported(checkpoints, names, rules.averages)
    for name in names:
        check_alike(name, checkpoints)
    averaged = set(names)
    builder = _make_builder(checkpoints, coefficients, rules, averaged)
    check_copied(base, base.tensors.keys() - averaged)
    tensors = [builder.average(name) for name in names]
    for name in base.tensors:
        if name not in averaged:
            tensors.append(builder.copy(name, base))
    # The output keeps the base's order of tensors, copied and averaged ones mixed.
    order = {name: position for position, name in enumerate(base.tensors)}
    tensors.sort(key=lambda tensor: order.get(tensor.name, len(order)))
    return Plan(
        checkpoints=tuple(checkpoints),
        coefficients=tuple(normalize(coefficients)),
        tensors=tuple(_with_ties(tensors)),
        notes=(*builder.notes(), *note_idle_patterns(last, rules)),
        missing={name: why for name, why in base.refused.items() if name not in averaged},
        spectral_norms=builder.iterated_layers,
        frozen=tuple(builder.frozen),
    )


def _make_builder(
    checkpoints: Sequence[Checkpoint],
    coefficients: Sequence[float],
    rules: Rules,
    averaged: Set[str],
) -> _Builder:
    """Find the tensors of an average that have no mean, and make a builder that knows them.

    Args:
        checkpoints: The selected checkpoints, in order.
        coefficients: One per checkpoint.
        rules: The selection of the tensors to average.
        averaged: Names of the tensors to average.

    Raises:
        CheckpointError: A file cannot be read.
    """
    modules = Modules(checkpoints[-1].tensors)
    owners: list[Checkpoint] = []
    owner_coefficients: list[float] = []
    for checkpoint, coefficient in zip(checkpoints, coefficients, strict=True):
        if coefficient:
            owners.append(checkpoint)
            owner_coefficients.append(coefficient)
    return _Builder(
        checkpoints=tuple(checkpoints),
        owners=tuple(owners),
        coefficients=tuple(owner_coefficients),
        rules=rules,
        layers=_averaged_layers(modules, averaged),
        frozen=_find_frozen(owners, rules),
        buffers=find_buffers(modules, averaged),
    )


def _averaged_layers(modules: Modules, averaged: Set[str]) -> tuple[SpectralNorm, ...]:
    """Find the layers under spectral norm whose tensors are all to be averaged."""
    layers = spectral_norm.find_layers(modules)
    return tuple(layer for layer in layers if averaged >= {layer.weight, *layer.vectors})


def _find_frozen(contributing: Sequence[Checkpoint], rules: Rules) -> dict[str, tuple[str, ...]]:
    """Find the layers that were frozen in training and whose statistics the output keeps.

    Args:
        contributing: The checkpoints with a coefficient other than 0.
        rules: The selection of the tensors to average.

    Returns:
        Layer → names of the layer's statistics.
    """
    statistics = layer_statistics(contributing[-1].tensors)
    frozen: dict[str, tuple[str, ...]] = {}
    for layer in find_frozen_layers(contributing):
        names = statistics[layer]
        # Tensors outside the selection come from the base, whose statistics may be others.
        if rules.base is None or all(map(rules.averages, names)):
            frozen[layer] = names
    return frozen


@dataclass
class _Builder:
    """Builder of tensor plans, which also collects notes about the tensors.

    Attributes:
        checkpoints: The selected checkpoints, in order.
        owners: The checkpoints with a coefficient other than 0.
        coefficients: One per owner.
        rules: The selection of the tensors to average, and the type of the output's floats.
        layers: Layers under spectral norm.
        frozen: Layer that was frozen in training → names of the layer's statistics.
        buffers: Names of float buffers that are not weights.
        mixed: Tensor whose floats have different widths → name of the output's type.
    """

    checkpoints: tuple[Checkpoint, ...]
    owners: tuple[Checkpoint, ...]
    coefficients: tuple[float, ...]
    rules: Rules
    layers: tuple[SpectralNorm, ...]
    frozen: Mapping[str, Sequence[str]]
    buffers: Collection[str]
    mixed: dict[str, str] = field(default_factory=dict)

    def average(self, name: str) -> TensorPlan:
        """Plan a tensor of the selection as an average, or as a copy where there is no mean."""
        last = self.checkpoints[-1]
        # Copied for now. The vectors are computed once the averaged weights are known.
        if name in self._vectors:
            return self.copy(name, last)
        if name in self._frozen_statistics:
            # A last checkpoint of coefficient 0 may have other statistics than those that count.
            return self.copy(name, self.owners[-1])
        if last.tensors[name].dtype.kind == "int" or name in self.buffers:
            plan = self.copy(name, last)
            # A buffer in a requested type is computed, and only copied bytes can be compared.
            if plan.averaged:
                return plan
            return replace(plan, compared=self._other_tensors(name))
        sources = tuple(checkpoint.tensors[name] for checkpoint in self.owners)
        return TensorPlan(
            name,
            last.tensors[name].shape,
            self._choose_dtype(name, [source.dtype for source in sources]),
            sources,
            self.owners,
            self.coefficients,
            averaged=True,
        )

    def copy(self, name: str, base: Checkpoint) -> TensorPlan:
        """Plan a tensor that is copied from a checkpoint, converted where a type is requested."""
        tensor = base.tensors[name]
        dtype = tensor.dtype
        # Complex tensors keep their type: the types that can be requested are real.
        if dtype.kind == "float":
            dtype = self._choose_dtype(name, [dtype])
        # A conversion is the average of a single source.
        is_converted = dtype != tensor.dtype
        return TensorPlan(name, tensor.shape, dtype, (tensor,), (base,), (1.0,), is_converted)

    def notes(self) -> list[str]:
        """Return notes about the planned tensors, once all are planned."""
        notes = []
        if self.frozen:
            of_all = len(batchnorm_layers(self.owners[-1].tensors))
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
        if self._vectors and len(self.checkpoints) > 1:
            notes.append(
                "the vectors of layers under spectral norm are not averaged but iterated on the "
                f"averaged weights: {first_few(sorted(self._vectors))}"
            )
        return notes

    @property
    def iterated_layers(self) -> tuple[SpectralNorm, ...]:
        """Layers whose singular vectors are computed from the averaged weight."""
        # The vectors of a single checkpoint already belong to its weights.
        if len(self.owners) == 1:
            return ()
        return self.layers

    @cached_property
    def _vectors(self) -> set[str]:
        vectors: set[str] = set()
        for layer in self.layers:
            vectors.update(layer.vectors)
        return vectors

    @cached_property
    def _frozen_statistics(self) -> set[str]:
        return set().union(*self.frozen.values())

    def _other_tensors(self, name: str) -> tuple[Tensor, ...]:
        """Return a tensor in the earlier checkpoints, where it is not the last one's own object."""
        last = self.checkpoints[-1].tensors[name]
        others: list[Tensor] = []
        for checkpoint in self.checkpoints[:-1]:
            tensor = checkpoint.tensors[name]
            if tensor is not last:
                others.append(tensor)
        return tuple(others)

    def _choose_dtype(self, name: str, dtypes: Sequence[DType]) -> DType:
        """Choose the type of a tensor in the output, and note where widths are mixed."""
        widest = dtypes[0]
        for dtype in dtypes[1:]:
            widest = _wider(widest, dtype)
        if widest.kind == "float" and self.rules.dtype != "keep":
            return DTYPES[self.rules.dtype]
        if len(set(dtypes)) > 1:
            self.mixed[name] = widest.name
        return widest


def _wider(dtype: DType, other: DType) -> DType:
    """Return the narrowest type that holds all values of two types."""
    if dtype == other:
        return dtype
    # These are bfloat16 and float16, neither of which holds the other's values.
    if dtype.bits == other.bits:
        return DTYPES["float32"]
    return max(dtype, other, key=lambda candidate: candidate.bits)


def _with_ties(tensors: Sequence[TensorPlan]) -> list[TensorPlan]:
    """Tie tensors to the first tensor that has the same bytes in every source."""
    first_names: dict[object, str] = {}
    tied: list[TensorPlan] = []
    for plan in tensors:
        pieces = tuple(source.pieces for source in (*plan.sources, *plan.compared))
        identity = (pieces, plan.dtype.name, plan.coefficients, plan.averaged)
        first = plan.name
        # Empty tensors have no bytes, so that two of them are not the same tensor.
        if 0 not in plan.shape:
            first = first_names.setdefault(identity, plan.name)
        if first == plan.name:
            tied.append(plan)
        else:
            tied.append(replace(plan, tied_to=first))
    return tied


def plan_copy(checkpoint: Checkpoint) -> Plan:
    """Plan an unchanged copy of every tensor of a checkpoint.

    Raises:
        UnsupportedTensorError: A tensor has no plain bytes.
    """
    check_copied(checkpoint, {*checkpoint.tensors, *checkpoint.refused})
    tensors: list[TensorPlan] = []
    for name, tensor in checkpoint.tensors.items():
        tensors.append(
            TensorPlan(
                name, tensor.shape, tensor.dtype, (tensor,), (checkpoint,), (1.0,), averaged=False
            )
        )
    return Plan((checkpoint,), (1.0,), tuple(_with_ties(tensors)))
