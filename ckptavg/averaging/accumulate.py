"""What is computed for one block of a tensor: sums in float64, one rounding, copies.

Every value is widened to float64, multiplied by its coefficient and added up in the run's order;
each product and each sum is rounded on its own. One division by the sum of the coefficients and one
conversion to the output's type follow.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import torch

from ckptavg.averaging.planning.tensor_plan import TensorPlan
from ckptavg.averaging.read_groups import Group, Job, Member, Share
from ckptavg.errors import NonFiniteError
from ckptavg.formats.checkpoint import DType, Tensor
from ckptavg.formats.reader import Reader

_MOST_VIEWS = 256

Watcher = Callable[[Tensor, int, memoryview], None]
"""Called as ``watcher(source, start, data)`` with the bytes of every block that is read, from the
element ``start`` on. One thread takes the blocks of a task in order."""


@dataclass
class StreamResult:
    """What the stream noticed about one output.

    Attributes:
        differing: Tensors that are copied and not the same in every checkpoint.
        nonfinite: Tensors whose average is not finite where the inputs do not agree on that.
    """

    differing: set[str] = field(default_factory=set)
    nonfinite: set[str] = field(default_factory=set)


class Worker:
    """One thread's reader and buffers.

    Args:
        jobs: The stream's outputs.
        results: What is noticed about each of them.
        watcher: Shown the sources that groups have watched.
    """

    def __init__(
        self, jobs: Sequence[Job], results: Sequence[StreamResult], watcher: Watcher | None
    ) -> None:
        self._jobs = jobs
        self._results = results
        self._watcher = watcher
        self._reader = Reader()
        self._buffers = _Buffers()
        self._rows = _NOTHING
        self._gram: torch.Tensor | None = None

    def close(self) -> None:
        """Close the files."""
        self._reader.close()

    def fetch(self, blocks: Iterable[tuple[Group, int, int]]) -> None:
        """Ask for some blocks of remote files at once."""
        self._reader.fetch(
            (source, start, count) for group, start, count in blocks for source in group.sources
        )

    def advise(self, blocks: Sequence[tuple[Group, int, int]]) -> None:
        """Tell the system which blocks of local files are going to be read soon."""
        for _, parts in itertools.groupby(blocks, key=lambda block: id(block[0])):
            run = list(parts)
            (group, first, _), (_, last, count) = run[0], run[-1]
            for source in group.sources:
                if source.contiguous:
                    self._reader.advise(source, first, last + count - first)

    def block(self, group: Group, start: int, count: int) -> None:
        """Compute one block of every tensor of a group and hand it to its output."""
        compute = self._average if group.averaged else self._copy
        for member, raw in compute(group, start, count):
            offset = start * member.plan.dtype.size
            self._jobs[member.job].sink.write(member.plan.name, offset, raw)

    def take_gram(self) -> torch.Tensor | None:
        """Products since the last call, of the first source and of the others minus the first.

        Returns:
            float64, (sources, sources); None where none were asked for.
        """
        gram, self._gram = self._gram, None
        return gram

    def _average(self, group: Group, start: int, count: int) -> Iterator[tuple[Member, memoryview]]:
        floats = count * (2 if group.sources[0].dtype.kind == "complex" else 1)
        rows = self._empty_rows(len(group.products), floats)
        for place, source in enumerate(group.sources):
            values = _view(self._read(group, place, start, count), source.dtype)
            own = [rows[i] for i in group.rows.get(place, ())]
            self._add(group.shares[place], values, own)
        if group.products:
            self._multiply(rows)
        for number, member in enumerate(group.members):
            total = self._buffers.doubles(number, floats)
            if member.divisor != 1.0:
                total.div_(member.divisor)
            raw = self._buffers.raw("out", count * member.plan.dtype.size)
            out = _view(raw, member.plan.dtype)
            out.copy_(total)
            if not _is_finite(out):
                self._handle_nonfinite(member, start, count, out)
            yield member, raw

    def _add(
        self, shares: Sequence[Share], values: torch.Tensor, rows: Sequence[torch.Tensor]
    ) -> None:
        """Add a block of one source to every sum that it goes into, and keep it in its rows."""
        floats = values.numel()
        alone = len(shares) == 1 and shares[0].first and not rows
        name = shares[0].member if alone else "wide"
        wide = rows[0] if rows else self._buffers.doubles(name, floats)
        self._widen(values, wide)
        for row in rows[1:]:
            row.copy_(wide)
        last = len(shares) == 1 and not rows  # to need the values
        for member, coefficient, first in shares:
            product = wide
            if coefficient != 1.0:
                product = wide if last else self._buffers.doubles("product", floats)
                torch.mul(wide, coefficient, out=product)
            total = self._buffers.doubles(member, floats)
            if not first:
                total.add_(product)
            elif not alone:
                total.copy_(product)

    def _widen(self, values: torch.Tensor, wide: torch.Tensor) -> None:
        """Convert to float64; by way of float32 where torch has no fast conversion of its own."""
        if values.dtype == torch.float16:
            middle = self._buffers.singles(values.numel())
            values = middle.copy_(values)
        wide.copy_(values)

    def _empty_rows(self, count: int, floats: int) -> torch.Tensor:
        """Room for the sources that are multiplied.

        Torch's memory is aligned the same way in every process; a product's bits may depend on it.
        """
        if self._rows.numel() < count * floats:
            self._rows = torch.empty(count * floats, dtype=torch.float64)
        return self._rows[: count * floats].view(count, floats)

    def _multiply(self, rows: torch.Tensor) -> None:
        """Add up the products of the first source and the others' differences from it."""
        if not _is_finite(rows[0]):
            _drop_masks(rows)
        rows[1:].sub_(rows[0])
        product = rows @ rows.T
        self._gram = product if self._gram is None else self._gram.add_(product)

    def _copy(self, group: Group, start: int, count: int) -> Iterator[tuple[Member, memoryview]]:
        """The bytes of each output's last source; notes whether those before it differ."""
        for place, source in enumerate(group.sources):
            raw = self._read(group, place, start, count)
            for number, _, first in group.shares[place]:
                member = group.members[number]
                if not first and self._differs(group, number, place, raw):
                    self._results[member.job].differing.add(member.plan.name)
                if place == member.places[-1]:
                    yield member, raw
                else:
                    self._buffers.raw(number, count * source.dtype.size)[:] = raw

    def _differs(self, group: Group, number: int, place: int, raw: memoryview) -> bool:
        """Whether what is copied differs from what comes before it in an output's order."""
        places = group.members[number].places
        before, dtype = (group.sources[p].dtype for p in (places[places.index(place) - 1], place))
        count = len(raw) // dtype.size
        kept = _view(self._buffers.raw(number, count * before.size), before)
        wide = torch.int64 if dtype.kind == "int" else torch.float64
        return not torch.equal(_view(raw, dtype).to(wide), kept.to(wide))

    def _handle_nonfinite(self, member: Member, start: int, count: int, out: torch.Tensor) -> None:
        """Accept what is not finite and the same everywhere; say where the rest is from."""
        suspect = ~torch.isfinite(out)
        agreed = suspect.clone()
        first: torch.Tensor | None = None
        for source in member.plan.sources:
            values = self._values(source, start, count).to(torch.float64, copy=True)
            first = values if first is None else first
            agreed &= ~torch.isfinite(values)
            agreed &= (values == first) | (values.isnan() & first.isnan())
        if first is not None:
            out[agreed] = first[agreed].to(out.dtype)
        wrong = suspect & ~agreed
        if not bool(wrong.any()):
            return
        if not self._jobs[member.job].keep_nonfinite:
            self._refuse(member.plan, start, count, wrong)
        self._results[member.job].nonfinite.add(member.plan.name)

    def _refuse(self, plan: TensorPlan, start: int, count: int, wrong: torch.Tensor) -> NoReturn:
        for source, owner in zip(plan.sources, plan.owners, strict=True):
            values = self._values(source, start, count)
            if bool((wrong & ~torch.isfinite(values)).any()):
                kind = "NaN" if bool((wrong & values.isnan()).any()) else "infinite"
                raise NonFiniteError(
                    f"{plan.name} is {kind} in {owner.path}",
                    "Leave the checkpoint out, or pass --on-nonfinite keep.",
                )
        what = "the average of" if len(plan.sources) > 1 else ""
        raise NonFiniteError(
            f"{what} {plan.name} is too large for {plan.dtype.name}".lstrip(),
            "Write a wider type with --dtype float32 or float64.",
        )

    def _values(self, source: Tensor, start: int, count: int) -> torch.Tensor:
        """A block of a source once more; not to be kept."""
        raw = self._buffers.raw("in", count * source.dtype.size)
        self._reader.read(source, start, count, raw)
        return _view(raw, source.dtype)

    def _read(self, group: Group, place: int, start: int, count: int) -> memoryview:
        """The bytes of a block of a group's source, valid until the next one."""
        source = group.sources[place]
        raw = self._buffers.raw("in", count * source.dtype.size)
        self._reader.read(source, start, count, raw)
        if self._watcher is not None and place in group.watched:
            self._watcher(source, start, raw)
        return raw


class _Buffers:
    """Memory that is used again and again; what a name stood for is gone when it is asked again."""

    def __init__(self) -> None:
        self._memory: dict[object, bytearray] = {}
        self._doubles: dict[tuple[object, int], torch.Tensor] = {}

    def raw(self, name: object, size: int) -> memoryview:
        """As many bytes."""
        memory = self._memory.get(name)
        if memory is None or len(memory) < size:
            memory = self._memory[name] = bytearray(size)
            self._doubles.clear()  # which may be views of what was there before
        return memoryview(memory)[:size]

    def doubles(self, name: object, count: int) -> torch.Tensor:
        """As many float64."""
        found = self._doubles.get((name, count))
        if found is None:
            raw = self.raw(("float64", name), count * 8)
            if len(self._doubles) > _MOST_VIEWS:
                self._doubles.clear()
            found = torch.frombuffer(raw, dtype=torch.float64) if count else _NOTHING
            self._doubles[name, count] = found
        return found

    def singles(self, count: int) -> torch.Tensor:
        """As many float32."""
        return torch.frombuffer(self.raw("float32", count * 4), dtype=torch.float32)


_NOTHING = torch.empty(0, dtype=torch.float64)
_REAL = {"complex128": "float64", "complex64": "float32", "complex32": "float16"}


def _view(raw: memoryview, dtype: DType) -> torch.Tensor:
    """Bytes as values, a complex number as two."""
    return torch.frombuffer(raw, dtype=getattr(torch, _REAL.get(dtype.name, dtype.name)))


def _drop_masks(rows: torch.Tensor) -> None:
    """Put zeros where what is not finite is the same in every row."""
    first = rows[0]
    same = ((rows == first) | (rows.isnan() & first.isnan())).all(0)
    rows[:, same & ~first.isfinite()] = 0


def _is_finite(values: torch.Tensor) -> bool:
    low, high = torch.aminmax(values)  # NaN shows in both
    return math.isfinite(low) and math.isfinite(high)
