"""How the checkpoints of a run lie to each other in the space of weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch

from ckptavg.averaging.plan import plan_average
from ckptavg.averaging.planning.rules import Rules
from ckptavg.averaging.planning.tensor_plan import TensorPlan, make_plan
from ckptavg.averaging.stream import Extras, stream
from ckptavg.display.progress import ProgressLike, open_phase
from ckptavg.errors import CheckpointError, NonFiniteError, UsageError, first_few
from ckptavg.formats import Checkpoint
from ckptavg.formats.names import running_statistics
from ckptavg.runs.run import Run, RunLike, as_run

_GAP = 2.5  # times the next longest link, beyond which one holds apart what does not belong
_RESOLVED = 1e-14  # of the squares that a squared distance is the difference of


@dataclass(frozen=True)
class Odd:
    """Checkpoints that do not belong to the others.

    Attributes:
        checkpoints: A quarter of all at most.
        distance: The shortest that leads from them to the others.
        usual: The longest of the other links; see ``Geometry.groups``.
    """

    checkpoints: tuple[Checkpoint, ...]
    distance: float
    usual: float


@dataclass(frozen=True)
class Groups:
    """How checkpoints fall apart.

    Attributes:
        members: The checkpoints of each group in their order, the largest group first.
        distance: The shortest between two of them.
        usual: The longest link within one; see ``Geometry.groups``.
    """

    members: tuple[tuple[Checkpoint, ...], ...]
    distance: float
    usual: float


@dataclass(frozen=True)
class Geometry:
    """Where the checkpoints of a run lie, by the inner products of their weights.

    All tensors are float64 on the CPU; n is the number of checkpoints, and lengths are Euclidean
    over all weights together. Distances come from the differences to the first checkpoint, so those
    of close checkpoints are not lost beside their norms.

    Attributes:
        run: The checkpoints.
        products: (n, n): with r the first checkpoint and dᵢ = wᵢ − r, ⟨r, r⟩ at 0, 0, ⟨r, dᵢ⟩ at
            0, i and ⟨dᵢ, dⱼ⟩ at i, j.
    """

    run: Run
    products: torch.Tensor

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """In the order of all rows and columns."""
        return self.run.checkpoints

    @cached_property
    def gram(self) -> torch.Tensor:
        """⟨wᵢ, wⱼ⟩, (n, n)."""
        along = self.products[0].clone()
        along[0] = 0
        return self.products[0, 0] + along + along[:, None] + self._differences

    @property
    def norms(self) -> torch.Tensor:
        """‖wᵢ‖, (n,)."""
        return self.gram.diagonal().clamp(min=0).sqrt()

    @cached_property
    def distances(self) -> torch.Tensor:
        """‖wᵢ − wⱼ‖, (n, n); 0 where it is lost beside the distance to the first checkpoint."""
        inner = self._differences
        both = inner.diagonal() + inner.diagonal()[:, None]
        squares = both - 2 * inner
        squares[squares <= _RESOLVED * both] = 0
        return squares.sqrt()

    @property
    def cosines(self) -> torch.Tensor:
        """Of the angles between wᵢ and wⱼ, seen from the origin, (n, n); NaN for weights of 0."""
        return (self.gram / self.norms / self.norms[:, None]).clamp(-1, 1)

    @property
    def steps(self) -> torch.Tensor:
        """‖wᵢ₊₁ − wᵢ‖ within each training, (n − number of trainings,)."""
        pairs = [pair for part in self._parts for pair in pairwise(part)]
        return torch.tensor([self.distances[pair] for pair in pairs], dtype=torch.float64)

    @property
    def turns(self) -> torch.Tensor:
        """Cosines between successive steps; NaN where one is 0.

        Their mean tells how a run moves: 1 in one direction, 0 as a random walk, −0.5 scattered
        around one point.
        """
        triples = [part[i : i + 3] for part in self._parts for i in range(len(part) - 2)]
        squares = self.distances.square()
        return torch.tensor(
            [
                (squares[a, c] - squares[a, b] - squares[b, c])
                / (2 * self.distances[a, b] * self.distances[b, c])
                for a, b, c in triples
            ],
            dtype=torch.float64,
        ).clamp(-1, 1)

    @property
    def to_mean(self) -> torch.Tensor:
        """‖wᵢ − w̄‖ to the uniform mean of all, (n,)."""
        squares = self.distances.square()
        return (squares.mean(1) - squares.mean() / 2).clamp(min=0).sqrt()

    @cached_property
    def groups(self) -> Groups:
        """Which checkpoints lie close together; one group of all, mostly.

        The checkpoints are linked over the shortest distances that connect them all. Where the
        longest links are 2.5 times as long as the next one, what they hold apart are groups. The
        ends of a steady drift are far from the mean but linked like the others, so they are none
        of their own. Fewer than 4 checkpoints are one group.
        """
        links = sorted(_shortest_links(self.distances.tolist()), reverse=True)
        for count in range(1, len(links)) if len(self.run) > 3 else ():
            (shortest, *_), (usual, *_) = links[count - 1], links[count]
            if shortest > _GAP * usual:
                parts = _connected(links[count:], len(self.run))
                parts.sort(key=len, reverse=True)
                members = tuple(tuple(self.checkpoints[i] for i in part) for part in parts)
                return Groups(members, shortest, usual)
        return Groups((self.checkpoints,), math.inf, links[0][0] if links else 0.0)

    @property
    def odd(self) -> Odd | None:
        """What does not belong: another training's, diverged, from before a restart; None mostly.

        It is what lies outside the largest group, if that is a quarter of the checkpoints at most.
        """
        apart = {id(c) for group in self.groups.members[1:] for c in group}
        if not 0 < len(apart) <= len(self.run) // 4:
            return None
        odd = tuple(c for c in self.checkpoints if id(c) in apart)
        return Odd(odd, self.groups.distance, self.groups.usual)

    @property
    def _differences(self) -> torch.Tensor:
        """⟨dᵢ, dⱼ⟩, (n, n)."""
        inner = self.products.clone()
        inner[0] = inner[:, 0] = 0
        return inner

    @property
    def _parts(self) -> list[range]:
        """The positions of each training."""
        ends = [0]
        for training in self.run.trainings:
            ends.append(ends[-1] + len(training))
        return [range(*pair) for pair in pairwise(ends)]


def geometry(run: RunLike, *, progress: ProgressLike = None) -> Geometry:
    """Measure how the checkpoints of a run lie to each other, in one read of them.

    What counts is every weight that an average would be taken of: floating-point and complex
    tensors (a complex number as two), tied ones once. The running statistics of BatchNorm layers do
    not count: they are no weights. Of LoRA adapters, A and B count as they were trained.

    Args:
        run: What ``open_run`` returned, or a selection of it; two checkpoints at least.
        progress: True for a bar, a bar of tqdm, or a function of (phase, done, total) in bytes
            read; see ``ckptavg.display.progress``.

    Raises:
        UsageError: There is only one checkpoint.
        MismatchError: The checkpoints do not hold the same tensors.
        NonFiniteError: A checkpoint's weights are not finite, other than masks that all share.
        CkptavgError: Anything else that is wrong.
    """
    run = as_run(run)
    check_several(run)
    plan_average(run)  # refuses what does not fit together
    tensors = weights(run)
    with open_phase(progress, "measuring", "bytes") as told:
        products = stream([], Extras(gram=tensors), progress=told).gram
    for stamp in {stamp.path: stamp for c in run for stamp in c.files}.values():
        stamp.verify()
    return geometry_of(run, products)


def check_several(run: Run) -> None:
    """Make sure that there is more than one checkpoint to lie anywhere.

    Raises:
        UsageError: There is not.
    """
    if len(run) < 2:
        raise UsageError(
            f"the geometry is that of several checkpoints, but {run.checkpoints[0].path} is one"
        )


def weights(run: RunLike, rules: Rules | None = None) -> list[TensorPlan]:
    """The tensors that a run's geometry is made of, for a stream to multiply.

    Args:
        run: The checkpoints.
        rules: Which tensors are averaged, if not all; the others do not count.

    Raises:
        MismatchError: The checkpoints do not hold the same tensors.
        CheckpointError: They hold no weights.
    """
    checkpoints = as_run(run).checkpoints
    plan = make_plan(checkpoints, [1.0] * len(checkpoints), rules or Rules())
    statistics = running_statistics(tensor.name for tensor in plan.tensors)
    found = [
        tensor
        for tensor in plan.tensors
        if tensor.averaged
        and len(tensor.sources) == len(checkpoints)
        and tensor.name not in statistics
    ]
    if not sum(tensor.sources[0].numel for tensor in found):
        raise CheckpointError(f"{checkpoints[-1].path} holds no floating-point weights")
    return found


def geometry_of(run: RunLike, products: torch.Tensor | None) -> Geometry:
    """A run's geometry from what a stream has made of its ``weights``.

    Args:
        run: The checkpoints, in the order of the products.
        products: The stream's ``gram``, float64, (n, n).

    Raises:
        NonFiniteError: A checkpoint's weights are not finite.
    """
    run = as_run(run)
    if products is None or products.shape != (len(run), len(run)):
        shape = None if products is None else tuple(products.shape)
        raise UsageError(f"products of {len(run)} checkpoints are expected but got {shape}")
    _check_finite(run.checkpoints, products)
    return Geometry(run, (products + products.T) / 2)


def _check_finite(checkpoints: Sequence[Checkpoint], products: torch.Tensor) -> None:
    finite = products.diagonal().isfinite().tolist()
    if all(finite):
        return
    if not finite[0]:  # then nothing is known of the others
        wrong = [str(checkpoints[0].path)]
    else:
        wrong = [str(c.path) for c, ok in zip(checkpoints, finite, strict=True) if not ok]
    raise NonFiniteError(
        f"NaN, infinite or huge weights in {first_few(wrong)}", "Leave the checkpoint out (--glob)."
    )


def _shortest_links(distances: Sequence[Sequence[float]]) -> list[tuple[float, int, int]]:
    """The minimum spanning tree as (length, one end, other end): Prim's algorithm."""
    best = {i: (length, 0) for i, length in enumerate(distances[0]) if i}
    links: list[tuple[float, int, int]] = []
    while best:
        new = min(best, key=best.__getitem__)
        length, old = best.pop(new)
        links.append((length, old, new))
        best = {i: min(link, (distances[new][i], new)) for i, link in best.items()}
    return links


def _connected(links: Iterable[tuple[float, int, int]], count: int) -> list[list[int]]:
    """The parts of so many checkpoints that some links connect."""
    part = {i: {i} for i in range(count)}
    for _, one, other in links:
        joined = part[one] | part[other]
        part |= dict.fromkeys(joined, joined)
    return [sorted(joined) for joined in {id(joined): joined for joined in part.values()}.values()]
