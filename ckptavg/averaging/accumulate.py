"""Arithmetic for one block of a tensor: sums in float64, one rounding, copies.

Every value is converted to float64, multiplied by the checkpoint's coefficient, and added up in the
run's order. Each product and each sum is rounded separately. Then follow one division by the sum of
the coefficients and one conversion to the output's type.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from ckptavg.averaging.planning.tensor_plan import TensorPlan
from ckptavg.averaging.read_groups import Group, Job, OutputTerm, Term
from ckptavg.averaging.swag.block_noise import add_noise, compute_deviations
from ckptavg.errors import NonFiniteError
from ckptavg.formats.checkpoint import DType, Tensor
from ckptavg.formats.reader import Reader

# Cached float64 views per thread. Blocks of ever new sizes would collect views without end.
_MOST_VIEWS = 256

Observer = Callable[[Tensor, int, memoryview], None]
"""Function that receives the bytes of blocks as ``observer(source, start, data)``.

``start`` is the index of the block's first element in the tensor ``source``. Threads call the
function at the same time. The blocks of one task come from one thread, in order."""


@dataclass
class StreamResult:
    """Names of an output's tensors that the user should know about after the stream.

    Attributes:
        differing: Tensors that are copied although they differ between checkpoints.
        nonfinite: Tensors whose average is not finite at elements where the inputs do not all have
            the same value.
    """

    differing: set[str] = field(default_factory=set)
    nonfinite: set[str] = field(default_factory=set)


class Worker:
    """Reader and buffers of a single thread, which computes blocks.

    Args:
        jobs: The stream's outputs.
        results: Result of each output, to which the worker adds names.
        observer: Receives the blocks of the sources that a group lists as ``observed``.
    """

    def __init__(
        self, jobs: Sequence[Job], results: Sequence[StreamResult], observer: Observer | None
    ) -> None:
        self._jobs = jobs
        self._results = results
        self._observer = observer
        self._reader = Reader()
        self._buffers = _Buffers()
        # float64, flat: memory of the rows that are multiplied with each other.
        self._rows = _NOTHING
        self._gram: torch.Tensor | None = None

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def fetch(self, blocks: Iterable[tuple[Group, int, int]]) -> None:
        """Request several blocks of remote files at once."""
        self._reader.fetch(
            (source, start, count) for group, start, count in blocks for source in group.sources
        )

    def advise(self, blocks: Sequence[tuple[Group, int, int]]) -> None:
        """Advise the operating system of blocks of local files that will be read soon."""
        for _, blocks_of_group in itertools.groupby(blocks, key=lambda block: id(block[0])):
            run = list(blocks_of_group)
            (group, first, _), (_, last, count) = run[0], run[-1]
            for source in group.sources:
                # A block of any other tensor is not one range of a file, as the advice needs.
                if source.contiguous:
                    self._reader.advise(source, first, last + count - first)

    def block(self, group: Group, start: int, count: int) -> None:
        """Compute one block of every tensor of a group, and write the block to the tensor's sink.

        Args:
            group: The tensors.
            start: Index of the block's first element in each tensor.
            count: Number of elements in the block.

        Raises:
            NonFiniteError: An average is not finite, and the job does not keep such averages.
            CheckpointError: A file cannot be read.
        """
        compute = self._average if group.averaged else self._copy
        for output, raw in compute(group, start, count):
            offset = start * output.plan.dtype.size
            self._jobs[output.job].sink.write(output.plan.name, offset, raw)

    def take_gram(self) -> torch.Tensor | None:
        """Return the Gram matrix of the blocks since the last call, and start a new matrix.

        The rows are the first source, and each further source minus the first.

        Returns:
            float64, (sources, sources); None where no products were requested.
        """
        gram, self._gram = self._gram, None
        return gram

    def _average(
        self, group: Group, start: int, count: int
    ) -> Iterator[tuple[OutputTerm, memoryview]]:
        """Yield each output of a group with the bytes of its averaged block."""
        floats = count
        if group.sources[0].dtype.kind == "complex":
            # A complex number is averaged as two floats.
            floats = 2 * count
        rows = self._empty_rows(len(group.products) + len(group.spread), floats)
        for position, source in enumerate(group.sources):
            values = _view(self._read(group, position, start, count), source.dtype)
            product_rows = [rows[i] for i in group.rows.get(position, ())]
            self._add(group.terms[position], values, product_rows)
        if group.products:
            self._multiply(rows[: len(group.products)])
        deviations = compute_deviations(group, rows[len(group.products) :])
        for number, output in enumerate(group.outputs):
            total = self._buffers.doubles(number, floats)
            # Division by 1 changes no bits, and would be one more pass over the block.
            if output.divisor != 1.0:
                total.div_(output.divisor)
            if output.plan.noise is not None:
                add_noise(total, output, deviations[output.source_indices], start, count)
            raw = self._buffers.raw("out", count * output.plan.dtype.size)
            average = _view(raw, output.plan.dtype)
            average.copy_(total)
            if not _is_finite(average):
                self._handle_nonfinite(output, start, count, average)
            yield output, raw

    def _add(
        self, terms: Sequence[Term], values: torch.Tensor, rows: Sequence[torch.Tensor]
    ) -> None:
        """Add a block of one source to the sums of the averages that the source contributes to.

        Args:
            terms: The source's term in each sum.
            values: The block.
            rows: float64, (floats,) each: rows of the matrix for products, which get the block's
                values.
        """
        floats = values.numel()
        is_single = len(terms) == 1 and not rows
        # The first source of a single average is converted straight into the sum, without a copy.
        in_place = is_single and terms[0].first
        if in_place:
            wide = self._buffers.doubles(terms[0].output, floats)
        elif rows:
            wide = rows[0]
        else:
            wide = self._buffers.doubles("wide", floats)
        self._widen(values, wide)
        for row in rows[1:]:
            row.copy_(wide)
        # Nothing else needs the values of a single term, so that the product overwrites them.
        product = wide
        for output, coefficient, first in terms:
            term = wide
            if coefficient != 1.0:
                if not is_single:
                    product = self._buffers.doubles("product", floats)
                term = torch.mul(wide, coefficient, out=product)
            total = self._buffers.doubles(output, floats)
            if not first:
                total.add_(term)
            elif not in_place:
                total.copy_(term)

    def _widen(self, values: torch.Tensor, wide: torch.Tensor) -> None:
        """Convert values to float64.

        float16 is converted by way of float32, since torch has no fast direct conversion. No value
        changes by that: float32 holds every float16.
        """
        if values.dtype == torch.float16:
            middle = self._buffers.singles(values.numel())
            values = middle.copy_(values)
        wide.copy_(values)

    def _empty_rows(self, count: int, floats: int) -> torch.Tensor:
        """Return memory for the sources that are multiplied with each other.

        The memory is torch's own, which has the same alignment in every process. The bits of a
        matrix product may depend on the alignment.

        Args:
            count: Number of rows.
            floats: Length of a row.

        Returns:
            float64, (count, floats), not initialized.
        """
        if self._rows.numel() < count * floats:
            self._rows = torch.empty(count * floats, dtype=torch.float64)
        return self._rows[: count * floats].view(count, floats)

    def _multiply(self, rows: torch.Tensor) -> None:
        """Add a block's products to the Gram matrix.

        Args:
            rows: float64, (sources, floats): the values of each source. Each row but the first is
                overwritten by its difference from the first.
        """
        # A mask has the same values in every row, so that the first row tells.
        if not _is_finite(rows[0]):
            _drop_masks(rows)
        rows[1:].sub_(rows[0])
        product = rows @ rows.T
        if self._gram is None:
            self._gram = product
        else:
            self._gram.add_(product)

    def _copy(
        self, group: Group, start: int, count: int
    ) -> Iterator[tuple[OutputTerm, memoryview]]:
        """Yield the bytes of each output's last source, and note outputs whose sources differ."""
        for position, source in enumerate(group.sources):
            raw = self._read(group, position, start, count)
            for number, _, first in group.terms[position]:
                output = group.outputs[number]
                if not first and self._differs(group, number, position, raw):
                    self._results[output.job].differing.add(output.plan.name)
                if position == output.source_indices[-1]:
                    yield output, raw
                else:
                    # Kept for the comparison with the output's next source.
                    self._buffers.raw(number, count * source.dtype.size)[:] = raw

    def _differs(self, group: Group, number: int, position: int, raw: memoryview) -> bool:
        """Return True if a block differs from the same block of the output's previous source.

        Args:
            group: The tensors that are read.
            number: Position of the output in the group.
            position: Position of the source in the group.
            raw: Bytes of the source's block.
        """
        indices = group.outputs[number].source_indices
        previous = indices[indices.index(position) - 1]
        dtype, previous_dtype = group.sources[position].dtype, group.sources[previous].dtype
        count = len(raw) // dtype.size
        previous_raw = self._buffers.raw(number, count * previous_dtype.size)
        # The types may have different widths, so that bytes cannot be compared.
        wide = torch.float64
        if dtype.kind == "int":
            wide = torch.int64
        values, previous_values = _view(raw, dtype), _view(previous_raw, previous_dtype)
        return not torch.equal(values.to(wide), previous_values.to(wide))

    def _handle_nonfinite(
        self, output: OutputTerm, start: int, count: int, average: torch.Tensor
    ) -> None:
        """Handle a block of an average that is not finite everywhere.

        An element that has the same infinite or NaN value in every source keeps that value, as in
        attention masks. Other elements that are not finite are refused, or noted where the job
        keeps such averages.

        Args:
            output: The tensor.
            start: Index of the block's first element.
            count: Number of elements in the block.
            average: The averaged block, which is changed in place.

        Raises:
            NonFiniteError: Other elements are not finite, and the job does not keep such averages.
        """
        suspect = ~torch.isfinite(average)
        agreed = suspect.clone()
        first: torch.Tensor | None = None
        for source in output.plan.sources:
            # A copy also of float64, since the next read overwrites the memory.
            values = self._values(source, start, count).to(torch.float64, copy=True)
            if first is None:
                first = values
            agreed &= ~torch.isfinite(values)
            agreed &= (values == first) | (values.isnan() & first.isnan())
        if first is not None:
            average[agreed] = first[agreed].to(average.dtype)
        wrong = suspect & ~agreed
        if not bool(wrong.any()):
            return
        if not self._jobs[output.job].keep_nonfinite:
            self._refuse(output.plan, start, count, wrong)
        self._results[output.job].nonfinite.add(output.plan.name)

    def _refuse(self, plan: TensorPlan, start: int, count: int, wrong: torch.Tensor) -> NoReturn:
        """Raise an error that names the first checkpoint in which elements are not finite.

        Args:
            plan: Plan of the tensor.
            start: Index of the block's first element.
            count: Number of elements in the block.
            wrong: bool: the elements of the average that are not finite.

        Raises:
            NonFiniteError: Always.
        """
        for source, owner in zip(plan.sources, plan.owners, strict=True):
            values = self._values(source, start, count)[wrong]
            kind = ""
            if bool(values.isnan().any()):
                kind = "NaN"
            elif bool(values.isinf().any()):
                kind = "infinite"
            if kind:
                raise NonFiniteError(
                    f"{plan.name} is {kind} in {owner.path}",
                    "Leave the checkpoint out, or pass `on_nonfinite='keep'`.",
                )
        # All inputs are finite, so the sum or its rounding to the output's type has overflowed.
        subject = plan.name
        if len(plan.sources) > 1:
            subject = f"the average of {plan.name}"
        raise NonFiniteError(
            f"{subject} is too large for {plan.dtype.name}",
            "Write a wider type: `dtype='float32'` or `dtype='float64'`.",
        )

    def _values(self, source: Tensor, start: int, count: int) -> torch.Tensor:
        """Read a block of a source again. The next read overwrites the values."""
        raw = self._buffers.raw("in", count * source.dtype.size)
        self._reader.read(source, start, count, raw)
        return _view(raw, source.dtype)

    def _read(self, group: Group, position: int, start: int, count: int) -> memoryview:
        """Read a block of a group's source. The next read overwrites the bytes."""
        source = group.sources[position]
        raw = self._buffers.raw("in", count * source.dtype.size)
        self._reader.read(source, start, count, raw)
        if self._observer is not None and position in group.observed:
            self._observer(source, start, raw)
        return raw


class _Buffers:
    """Reusable memory by name. A request under a name may overwrite the memory of that name."""

    def __init__(self) -> None:
        self._memory: dict[object, bytearray] = {}
        self._doubles: dict[tuple[object, int], torch.Tensor] = {}

    def raw(self, name: object, size: int) -> memoryview:
        """Return a number of bytes."""
        memory = self._memory.get(name)
        if memory is None or len(memory) < size:
            memory = self._memory[name] = bytearray(size)
            # Cached views may be of the memory that was replaced.
            self._doubles.clear()
        return memoryview(memory)[:size]

    def doubles(self, name: object, count: int) -> torch.Tensor:
        """Return a number of float64 elements, as a cached view where one exists."""
        view = self._doubles.get((name, count))
        if view is None:
            raw = self.raw(("float64", name), count * 8)
            if len(self._doubles) > _MOST_VIEWS:
                self._doubles.clear()
            view = _NOTHING
            # torch refuses a buffer of no bytes.
            if count:
                view = torch.frombuffer(raw, dtype=torch.float64)
            self._doubles[name, count] = view
        return view

    def singles(self, count: int) -> torch.Tensor:
        """Return a number of float32 elements."""
        return torch.frombuffer(self.raw("float32", count * 4), dtype=torch.float32)


_NOTHING = torch.empty(0, dtype=torch.float64)
_REAL = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}


def _view(raw: memoryview, dtype: DType) -> torch.Tensor:
    """View bytes as a tensor, a complex number as two floats."""
    return torch.frombuffer(raw, dtype=getattr(torch, _REAL.get(dtype.name, dtype.name)))


def _drop_masks(rows: torch.Tensor) -> None:
    """Replace elements by 0 that have the same infinite or NaN value in every row.

    Attention masks have such elements, which would make all products NaN.

    Args:
        rows: float64, (sources, floats), changed in place.
    """
    first = rows[0]
    # NaN is not equal to itself.
    same = ((rows == first) | (rows.isnan() & first.isnan())).all(0)
    rows[:, same & ~first.isfinite()] = 0


def _is_finite(values: torch.Tensor) -> bool:
    # One pass and no boolean copy. A NaN makes both results NaN.
    low, high = torch.aminmax(values)
    return math.isfinite(low) and math.isfinite(high)
