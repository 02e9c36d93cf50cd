"""Geometry of a run: distances and angles of checkpoints in weight space."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise
from typing import NamedTuple

import torch

from ckptavg.averaging.plan import plan_average
from ckptavg.averaging.planning.rules import Rules
from ckptavg.averaging.planning.tensor_plan import TensorPlan, make_plan
from ckptavg.averaging.stream import StreamRequests, stream
from ckptavg.display.progress import ProgressLike, open_phase
from ckptavg.errors import CheckpointError, NonFiniteError, UsageError, first_few
from ckptavg.formats import Checkpoint
from ckptavg.formats.statistics_names import running_statistics
from ckptavg.io.stamp import FileStamp
from ckptavg.runs.run import Run, RunLike, as_run

# A link this many times as long as the next longest one separates two groups.
_GAP = 2.5
# A squared distance is a difference of squares; below this fraction of them only rounding is left.
_RESOLVED = 1e-14
# Fewer checkpoints always form one group.
_FEWEST_TO_SPLIT = 4


class _Link(NamedTuple):
    """Link of a spanning tree between two checkpoints, given by positions in the run."""

    length: float
    first: int
    second: int


@dataclass(frozen=True)
class Outliers:
    """Outlying checkpoints of a run.

    Attributes:
        checkpoints: The outliers, at most a quarter of the run.
        distance: Shortest link that separates groups of the run.
        typical: Longest of the other links; see ``Geometry.groups``.
    """

    checkpoints: tuple[Checkpoint, ...]
    distance: float
    typical: float

    @property
    def usual(self) -> float:
        """Former name of ``typical``."""
        return self.typical


@dataclass(frozen=True)
class Groups:
    """Groups of close checkpoints.

    Attributes:
        members: The checkpoints of each group in the order of the run, the largest group first.
        distance: Shortest link between two groups; infinite for a single group.
        typical: Longest link within a group; see ``Geometry.groups``.
        positions: Positions of the members in the run.
    """

    members: tuple[tuple[Checkpoint, ...], ...]
    distance: float
    typical: float
    positions: tuple[tuple[int, ...], ...]

    @property
    def usual(self) -> float:
        """Former name of ``typical``."""
        return self.typical


@dataclass(frozen=True)
class Geometry:
    """Geometry of a run, computed from inner products of the weights.

    All tensors are float64 on the CPU. n is the number of checkpoints. Lengths are Euclidean over
    all weights together. Distances come from the differences to the first checkpoint, so small
    distances do not vanish in rounding beside large norms.

    Attributes:
        run: The checkpoints.
        products: (n, n). With r the first checkpoint and dᵢ = wᵢ − r: ⟨r, r⟩ at 0, 0, ⟨r, dᵢ⟩ at
            0, i and ⟨dᵢ, dⱼ⟩ at i, j.
    """

    run: Run
    products: torch.Tensor

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Checkpoints in the order of rows and columns."""
        return self.run.checkpoints

    @cached_property
    def gram(self) -> torch.Tensor:
        """Inner products ⟨wᵢ, wⱼ⟩, (n, n)."""
        along = self.products[0].clone()
        along[0] = 0
        return self.products[0, 0] + along + along[:, None] + self.differences

    @property
    def norms(self) -> torch.Tensor:
        """Norms ‖wᵢ‖, (n,)."""
        return self.gram.diagonal().clamp(min=0).sqrt()

    @cached_property
    def distances(self) -> torch.Tensor:
        """Distances ‖wᵢ − wⱼ‖, (n, n); 0 where below the rounding of distances to the first."""
        inner = self.differences
        norm_sums = inner.diagonal() + inner.diagonal()[:, None]
        squares = norm_sums - 2 * inner
        squares[squares <= _RESOLVED * norm_sums] = 0
        return squares.sqrt()

    @property
    def cosines(self) -> torch.Tensor:
        """Cosines of the angles between wᵢ and wⱼ from the origin, (n, n); NaN for weights of 0."""
        # Rounding may leave a cosine a little beyond 1.
        return (self.gram / self.norms / self.norms[:, None]).clamp(-1, 1)

    @property
    def steps(self) -> torch.Tensor:
        """Step lengths ‖wᵢ₊₁ − wᵢ‖ within each training, (n − number of trainings,)."""
        lengths: list[torch.Tensor] = []
        for training in self._trainings:
            lengths += [self.distances[a, b] for a, b in pairwise(training)]
        return torch.tensor(lengths, dtype=torch.float64)

    @property
    def step_cosines(self) -> torch.Tensor:
        """Cosines between successive steps; NaN beside a step of length 0.

        The mean describes the motion of a run: 1 for one direction, 0 for a random walk, −0.5 for
        points scattered around a centre.
        """
        # The law of cosines gives the angles from the distances alone.
        lengths = self.distances
        squares = lengths.square()
        cosines: list[torch.Tensor] = []
        for training in self._trainings:
            for a, b, c in zip(training, training[1:], training[2:], strict=False):
                numerator = squares[a, c] - squares[a, b] - squares[b, c]
                cosines.append(numerator / (2 * lengths[a, b] * lengths[b, c]))
        return torch.tensor(cosines, dtype=torch.float64).clamp(-1, 1)

    @property
    def turns(self) -> torch.Tensor:
        """Former name of ``step_cosines``."""
        return self.step_cosines

    @property
    def to_mean(self) -> torch.Tensor:
        """Distances ‖wᵢ − w̄‖ to the uniform mean of all checkpoints, (n,)."""
        # The mean squared distance to all points, less half the mean over all pairs, is the squared
        # distance to their centroid.
        squares = self.distances.square()
        return (squares.mean(1) - squares.mean() / 2).clamp(min=0).sqrt()

    @cached_property
    def groups(self) -> Groups:
        """Groups of close checkpoints; a single group in most runs.

        The links are a minimum spanning tree of all checkpoints. If the longest links are more than
        2.5 times as long as the next longest one, cutting them leaves the groups. The ends of a
        steady drift are far from the mean, but their links are as short as the others, so they are
        not separated. Fewer than 4 checkpoints form one group.
        """
        links = sorted(_shortest_links(self.distances.tolist()), reverse=True)
        lengths = [link.length for link in links]
        if len(self.run) >= _FEWEST_TO_SPLIT:
            for cut, (shortest, typical) in enumerate(pairwise(lengths), 1):
                # Cutting the ``cut`` longest links leaves cut + 1 groups.
                if shortest > _GAP * typical:
                    parts = _split_connected(links[cut:], len(self.run))
                    parts.sort(key=len, reverse=True)
                    return self._groups(parts, shortest, typical)
        positions = range(len(self.run))
        return self._groups([positions], math.inf, max(lengths, default=0.0))

    def _groups(self, parts: Sequence[Sequence[int]], distance: float, typical: float) -> Groups:
        """Make the groups with the checkpoints at some positions."""
        checkpoints = self.checkpoints
        members: list[tuple[Checkpoint, ...]] = []
        for part in parts:
            members.append(tuple(checkpoints[position] for position in part))
        return Groups(tuple(members), distance, typical, tuple(map(tuple, parts)))

    @property
    def outliers(self) -> Outliers | None:
        """Outliers: checkpoints of another training, diverged, or from before a restart.

        These are the checkpoints outside the largest group. None if there are no such checkpoints,
        as in most runs, or if they are more than a quarter of the run.
        """
        groups = self.groups
        outside = sorted(chain.from_iterable(groups.positions[1:]))
        if not 0 < len(outside) <= len(self.run) // 4:
            return None
        checkpoints = tuple(self.checkpoints[position] for position in outside)
        return Outliers(checkpoints, groups.distance, groups.typical)

    @property
    def odd(self) -> Outliers | None:
        """Former name of ``outliers``."""
        return self.outliers

    @property
    def differences(self) -> torch.Tensor:
        """Inner products ⟨dᵢ, dⱼ⟩ of the differences to the first checkpoint, (n, n)."""
        inner = self.products.clone()
        inner[0] = inner[:, 0] = 0
        return inner

    @property
    def _trainings(self) -> list[range]:
        """Positions of the checkpoints of each training."""
        positions: list[range] = []
        start = 0
        for training in self.run.trainings:
            positions.append(range(start, start + len(training)))
            start += len(training)
        return positions


def geometry(run: RunLike, *, progress: ProgressLike = None) -> Geometry:
    """Measure distances and angles of a run's checkpoints, in one read of every checkpoint.

    All weights count that an average would include: floating-point and complex tensors (a complex
    number as two numbers), tied tensors once. Running statistics of BatchNorm layers are not
    weights and do not count. For LoRA adapters the matrices A and B count separately, as trained.

    Args:
        run: The return value of ``open_run``, or a selection of it; at least two checkpoints.
        progress: True for a bar, a bar of tqdm, or a function of (phase, done, total) in bytes
            read; see ``ckptavg.display.progress``.

    Raises:
        UsageError: There is only one checkpoint.
        MismatchError: The checkpoints do not hold the same tensors.
        NonFiniteError: A checkpoint's weights are not finite, except masks that are the same in
            all checkpoints.
        CkptavgError: Any other error.
    """
    run = as_run(run)
    check_several(run)
    # Planning an average raises the errors for checkpoints that do not fit together.
    plan_average(run)
    tensors = list_weights(run)
    with open_phase(progress, "measuring", "bytes") as report:
        products = stream([], StreamRequests(gram=tensors), progress=report).gram
    # A file that changed while being read makes the products meaningless. Shared files count once.
    stamps: dict[str, FileStamp] = {}
    for checkpoint in run:
        for stamp in checkpoint.files:
            stamps[stamp.path] = stamp
    for stamp in stamps.values():
        stamp.verify()
    return geometry_of(run, products)


def check_several(run: Run) -> None:
    """Make sure that a run has at least two checkpoints.

    Raises:
        UsageError: The run has a single checkpoint.
    """
    if len(run) < 2:
        raise UsageError(
            f"the geometry is that of several checkpoints, but {run.checkpoints[0].path} is one"
        )


def list_weights(run: RunLike, rules: Rules | None = None) -> list[TensorPlan]:
    """List the tensors that count in a run's geometry, for ``stream`` to multiply.

    Args:
        run: The checkpoints.
        rules: Selection of the tensors to average; only these count. All tensors where None.

    Raises:
        MismatchError: The checkpoints do not hold the same tensors.
        CheckpointError: The checkpoints hold no floating-point weights.
    """
    checkpoints = as_run(run).checkpoints
    plan = make_plan(checkpoints, [1.0] * len(checkpoints), rules or Rules())
    statistics = running_statistics(tensor.name for tensor in plan.tensors)
    tensors: list[TensorPlan] = []
    numel = 0
    for tensor in plan.tensors:
        # A converted copy counts as averaged, too, but has the values of a single checkpoint.
        is_in_all = len(tensor.sources) == len(checkpoints)
        if tensor.averaged and is_in_all and tensor.name not in statistics:
            tensors.append(tensor)
            numel += tensor.sources[0].numel
    if numel == 0:
        raise CheckpointError(f"{checkpoints[-1].path} holds no floating-point weights")
    return tensors


def geometry_of(run: RunLike, products: torch.Tensor | None) -> Geometry:
    """Build a run's geometry from the inner products that ``stream`` returns.

    Args:
        run: The checkpoints, in the order of the products.
        products: ``gram`` from the stream, float64, (n, n).

    Raises:
        UsageError: The products are of another number of checkpoints.
        NonFiniteError: A checkpoint's weights are not finite.
    """
    run = as_run(run)
    shape = None
    if products is not None:
        shape = tuple(products.shape)
    if products is None or shape != (len(run), len(run)):
        raise UsageError(f"products of {len(run)} checkpoints are expected but got {shape}")
    _check_finite(run.checkpoints, products)
    # A matrix product need not round its two halves alike.
    return Geometry(run, (products + products.T) / 2)


def _check_finite(checkpoints: Sequence[Checkpoint], products: torch.Tensor) -> None:
    """Refuse products of weights that are not finite.

    Raises:
        NonFiniteError: A checkpoint's weights are not finite.
    """
    wrong: list[str] = []
    finite = products.diagonal().isfinite().tolist()
    for checkpoint, is_finite in zip(checkpoints, finite, strict=True):
        if not is_finite:
            wrong.append(str(checkpoint.path))
    if not wrong:
        return
    # All differences are to the first checkpoint; if it is not finite, no product is.
    if not finite[0]:
        wrong = wrong[:1]
    raise NonFiniteError(
        f"NaN, infinite or huge weights in {first_few(wrong)}",
        "Leave the checkpoint out: `skip=NAME`.",
    )


def _shortest_links(distances: Sequence[Sequence[float]]) -> list[_Link]:
    """Compute the minimum spanning tree of some points by Prim's algorithm."""
    links: list[_Link] = []
    # Point outside the tree → length of the shortest link to the tree, and the end in the tree.
    nearest = {point: (length, 0) for point, length in enumerate(distances[0]) if point != 0}
    while nearest:
        new = min(nearest, key=nearest.__getitem__)
        length, end = nearest.pop(new)
        links.append(_Link(length, end, new))
        for point, shortest in nearest.items():
            nearest[point] = min(shortest, (distances[new][point], new))
    return links


def _split_connected(links: Iterable[_Link], count: int) -> list[list[int]]:
    """Split points into connected parts by a list of links.

    Args:
        links: Links between the points.
        count: Number of points.

    Returns:
        The points of each part.
    """
    label = list(range(count))
    for link in links:
        joined, replaced = label[link.first], label[link.second]
        for point in range(count):
            if label[point] == replaced:
                label[point] = joined
    parts: dict[int, list[int]] = defaultdict(list)
    for point in range(count):
        parts[label[point]].append(point)
    return list(parts.values())
