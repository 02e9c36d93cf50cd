"""What becomes of each tensor: averaged, taken from the last checkpoint, or refused."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptavg.errors import (
    CheckpointError,
    MismatchError,
    UnsupportedTensorError,
    UsageError,
    first_few,
    short,
)
from ckptavg.formats import Checkpoint, Tensor
from ckptavg.formats.output import OutputTensor
from ckptavg.formats.table import DTYPES, DType
from ckptavg.schemes import normalized

OUTPUT_DTYPES = ("keep", "float32", "bfloat16", "float16", "float64")

# An integer tensor with one of these beside it is packed weights, which have no mean of their own.
_SCALE_NAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("", ("_scale", "_scale_inv", ".absmax", ".quant_map", "_scales", ".scales")),
    (".weight", (".SCB", ".weight_format")),
    (".qweight", (".scales", ".qzeros")),
    (".weight_packed", (".weight_scale",)),
    ("_blocks", ("_scales",)),
)


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
        compared: Integer tensors of the other checkpoints, which should be equal to the source.
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
    """

    checkpoints: tuple[Checkpoint, ...]
    coefficients: tuple[float, ...]
    tensors: tuple[TensorPlan, ...]
    notes: tuple[str, ...] = ()
    companions: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def outputs(self) -> list[OutputTensor]:
        """What is written."""
        return [tensor.output for tensor in self.tensors]

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


@dataclass(frozen=True)
class Rules:
    """Which tensors are averaged, and what the output's floats are.

    Attributes:
        include: Shell patterns of the names to average; all where empty.
        exclude: Shell patterns of the names not to.
        base: The checkpoint that the rest comes from; the last one where None.
        dtype: One of ``OUTPUT_DTYPES``.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    base: Checkpoint | None = None
    dtype: str = "keep"

    def __post_init__(self) -> None:
        if self.dtype not in OUTPUT_DTYPES:
            expected = ", ".join(OUTPUT_DTYPES)
            raise UsageError(f"dtype is expected to be one of {expected} but got {self.dtype!r}")

    def averages(self, name: str) -> bool:
        """Whether a tensor is averaged."""
        included = not self.include or _matches(name, self.include)
        return included and not _matches(name, self.exclude)


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
        raise UsageError(f"no tensor of {last.path} matches the include and exclude patterns")
    _check_names(checkpoints, names, rules)
    _check_supported(checkpoints, names)
    for name in names:
        _check_alike(name, checkpoints)
    builder = _Builder(tuple(checkpoints), tuple(coefficients), rules)
    averaged = set(names)
    rest = [name for name in base.tensors if name not in averaged]
    _check_copied(base, averaged)
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
    )


def _unmatched(rules: Rules, names: set[str]) -> list[str]:
    """Notes about patterns that do nothing: a word mistyped, or one meant for files."""
    patterns = (*rules.include, *rules.exclude)
    idle = [p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in names)]
    return [f"the pattern {p!r} matches no tensor (--glob selects files)" for p in idle]


@dataclass
class _Builder:
    checkpoints: tuple[Checkpoint, ...]
    coefficients: tuple[float, ...]
    rules: Rules
    mixed: dict[str, str] = field(default_factory=dict)

    def averaged(self, name: str) -> TensorPlan:
        tensors = [c.tensors[name] for c in self.checkpoints]
        last = tensors[-1]
        if last.dtype.kind == "int":
            owner = self.checkpoints[-1:]
            others = tuple(t for t in tensors[:-1] if t is not last)
            return TensorPlan(name, last.shape, last.dtype, (last,), owner, (1.0,), False, others)
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
        if not self.mixed:
            return []
        shown = [f"{name} ({dtype})" for name, dtype in self.mixed.items()]
        return [f"floats of different width meet; written as the widest: {first_few(shown)}"]

    def _output_dtype(self, name: str, dtypes: Sequence[DType]) -> DType:
        widest = dtypes[0]
        for dtype in dtypes[1:]:
            widest = _wider(widest, dtype)
        if widest.kind == "float" and self.rules.dtype != "keep":
            return DTYPES[self.rules.dtype]
        if len(set(dtypes)) > 1:
            self.mixed[name] = widest.name
        return widest


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _wider(one: DType, other: DType) -> DType:
    """The narrowest type that holds the values of both."""
    if one == other:
        return one
    if one.bits == other.bits:  # bfloat16 and float16
        return DTYPES["float32"]
    return one if one.bits > other.bits else other


def _check_names(checkpoints: Sequence[Checkpoint], names: Sequence[str], rules: Rules) -> None:
    last, expected = checkpoints[-1], set(names)
    for checkpoint in checkpoints[:-1]:
        held = {n for n in (*checkpoint.tensors, *checkpoint.refused) if rules.averages(n)}
        lost, extra = sorted(expected - held), sorted(held - expected)
        if not lost and not extra:
            continue
        if set(checkpoint.networks) != set(last.networks):
            raise CheckpointError(
                f"{checkpoint.path} and {last.path} hold different networks: "
                f"{_networks_text(checkpoint)} against {_networks_text(last)}",
                "Name the entry that holds the weights of both with --key.",
            )
        if held and not held & expected:
            raise MismatchError(
                f"{checkpoint.path} and {last.path} hold different networks: no tensor name in "
                f"common ({extra[0]!r} against {lost[0]!r})",
                _one_network(checkpoint, last) or "Select one network's checkpoints with --glob.",
            )
        parts = []
        if lost:
            parts.append(f"lacks {len(lost)} tensors ({first_few(lost)})")
        if extra:
            parts.append(f"has {len(extra)} more ({first_few(extra)})")
        raise MismatchError(
            f"{checkpoint.path} {' and '.join(parts)}, compared with {last.path}",
            _one_network(checkpoint, last)
            or "Leave the checkpoint out, or the tensors with --exclude.",
        )


def _networks_text(checkpoint: Checkpoint) -> str:
    entries = [short(entry) or "the file itself" for entry in checkpoint.entries]
    return f"those under {first_few(entries)}" if checkpoint.networks else f"one, {entries[0]}"


def _one_network(one: Checkpoint, other: Checkpoint) -> str:
    """How to select one of two networks, where the files' names tell them apart."""
    if one.pattern == other.pattern:
        return ""
    patterns = " or ".join(
        f"--glob '{pattern}'" for pattern in sorted({one.pattern, other.pattern})
    )
    return f"If these are different networks, select one with {patterns}."


def _check_supported(checkpoints: Sequence[Checkpoint], names: Sequence[str]) -> None:
    remedy = "Average the checkpoints before quantization, or leave the tensors out with --exclude."
    for checkpoint in checkpoints:
        refused = [f"{n} ({checkpoint.refused[n]})" for n in names if n in checkpoint.refused]
        if refused:
            raise UnsupportedTensorError(
                f"{checkpoint.path} holds tensors that cannot be averaged: {first_few(refused)}",
                "Leave them out with --exclude.",
            )
        packed = [
            f"{name} ({checkpoint.tensors[name].dtype.name})"
            for name in names
            if checkpoint.tensors[name].dtype.kind == "packed"
        ]
        if packed:
            raise UnsupportedTensorError(
                f"{checkpoint.path}: 8-bit floats have no meaningful mean without their scales: "
                f"{first_few(packed)}",
                remedy,
            )
        quantized = [n for n in names if _is_quantized(n, checkpoint.tensors)]
        if quantized:
            raise UnsupportedTensorError(
                f"{checkpoint.path} holds quantized weights with scales: {first_few(quantized)}",
                remedy,
            )


def _is_quantized(name: str, tensors: Mapping[str, Tensor]) -> bool:
    tensor = tensors[name]
    if tensor.dtype.kind != "int" or not tensor.shape:
        return False
    return any(
        name.removesuffix(ending) + scale in tensors
        for ending, scales in _SCALE_NAMES
        if name.endswith(ending)
        for scale in scales
    )


def _check_alike(name: str, checkpoints: Sequence[Checkpoint]) -> None:
    last = checkpoints[-1]
    model = last.tensors[name]
    for checkpoint in checkpoints[:-1]:
        tensor = checkpoint.tensors[name]
        if tensor.shape != model.shape:
            raise MismatchError(
                f"{name} has the shape {tensor.shape} in {checkpoint.path} "
                f"but {model.shape} in {last.path}",
                _one_network(checkpoint, last)
                or f"Leave the checkpoint out, or the tensor with --exclude '{name}'.",
            )
        if tensor.dtype.kind != model.dtype.kind:
            raise MismatchError(
                f"{name} is {tensor.dtype.name} in {checkpoint.path} "
                f"but {model.dtype.name} in {last.path}",
                f"Leave the checkpoint out, or the tensor with --exclude '{name}'.",
            )


def _check_copied(base: Checkpoint, averaged: set[str]) -> None:
    lost = [f"{n} ({why})" for n, why in base.refused.items() if n not in averaged]
    lost += [
        f"{n} ({t.dtype.name})"
        for n, t in base.tensors.items()
        if t.dtype.size == 0 and n not in averaged
    ]
    if lost:
        raise UnsupportedTensorError(
            f"{base.path} holds tensors without plain bytes: {first_few(lost)}",
            "Take the rest from another checkpoint with --base.",
        )


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
    _check_copied(checkpoint, set())
    tensors = [
        TensorPlan(name, t.shape, t.dtype, (t,), (checkpoint,), (1.0,), averaged=False)
        for name, t in checkpoint.tensors.items()
    ]
    return Plan((checkpoint,), (1.0,), tuple(_with_ties(tensors)))


def batchnorm_layers(names: Iterable[str]) -> tuple[str, ...]:
    """Names of the layers that keep running statistics, by their tensors' names."""
    known = set(names)
    suffix = "running_mean"
    return tuple(
        sorted(
            name[: -len(suffix)].rstrip(".")
            for name in known
            if name.endswith(suffix) and name[: -len(suffix)] + "running_var" in known
        )
    )
