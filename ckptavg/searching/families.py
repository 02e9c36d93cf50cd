"""Families of candidates: each lists its members coarse first, so that any budget sees it whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from ckptavg.averaging import schemes
from ckptavg.averaging.schemes import RunRecord
from ckptavg.errors import RunError, UsageError
from ckptavg.errors.spelling import close_names, did_you_mean

Family = Literal[
    "last", "checkpoint", "window", "sliding", "ema", "linear", "wsm", "power", "pair", "soup",
    "without-one",
]  # fmt: skip
SearchedFamily = Literal[
    "checkpoint", "window", "sliding", "ema", "linear", "wsm", "power", "pair", "soup",
    "without-one",
]  # fmt: skip
"""Families that a search can be asked for; the last checkpoint always stands for election."""

T = TypeVar("T")

# Half-lives as fractions of training, and relative widths of power-function averages.
_HALF_LIVES = (0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.0625, 0.045, 0.03, 0.02)
_WIDTHS = (0.28, 0.25, 0.2, 0.15, 0.1, 0.075, 0.05, 0.025)
_DECAYS = ("linear", "cosine", "sqrt")


@dataclass(frozen=True)
class Recipe:
    """Selection and scheme by which ``average`` makes a candidate.

    Attributes:
        positions: Positions of the checkpoints in the run, ascending.
        scheme: The scheme, applied to these checkpoints.
        weights: Weights of these checkpoints instead of a scheme.
    """

    positions: tuple[int, ...]
    scheme: str = "uniform"
    weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Proposal:
    """A candidate of the search.

    Attributes:
        name: Name in the ranking.
        family: Name of the family.
        coefficients: One per checkpoint of the run, with sum 1.
        parameters: Numbers that were tuned: 0 for the last checkpoint and the mean of all.
        place: Position among the family's members; neighbours are similar.
        recipe: How ``average`` makes it.
    """

    name: str
    family: Family
    coefficients: tuple[float, ...]
    parameters: int
    place: tuple[int, ...]
    recipe: Recipe

    @property
    def size(self) -> int:
        """Number of checkpoints that take part."""
        return sum(coefficient != 0 for coefficient in self.coefficients)

    @property
    def complexity(self) -> tuple[int, int]:
        """Order of simplicity: tuned numbers, then checkpoints."""
        return (self.parameters, self.size)


def check_families(names: Iterable[str]) -> tuple[SearchedFamily, ...]:
    """Return the families with the given names, each once.

    Raises:
        UsageError: A family is unknown, or there is none.
    """
    known: tuple[SearchedFamily, ...] = get_args(SearchedFamily)
    chosen: dict[SearchedFamily, None] = {}
    for name in names:
        if name not in known:
            raise UsageError(
                f"families are expected among {', '.join(known)} but got {name!r}",
                did_you_mean(close_names(name, known)),
            )
        chosen[name] = None
    if not chosen:
        raise UsageError(f"no family to search: name some of {', '.join(known)}")
    return tuple(chosen)


def propose_last(count: int, name: str) -> Proposal:
    """Propose the last of a run's checkpoints as it is."""
    position = count - 1
    return Proposal(
        name, "last", _unit(count, position), 0, (position,), Recipe((position,))
    )  # fmt: skip


def propose_checkpoints(count: int, names: Sequence[str]) -> list[Proposal]:
    """Propose each checkpoint but the last, coarse first."""
    proposals: list[Proposal] = []
    for position in coarse_first(range(count - 1)):
        proposals.append(
            Proposal(
                names[position], "checkpoint", _unit(count, position), 1, (position,),
                Recipe((position,)),
            )
        )  # fmt: skip
    return proposals


def propose_windows(count: int) -> list[Proposal]:
    """Propose the means of the last k checkpoints, coarse first; all of them come first.

    Kaddour 2022 (LAWA) averages the last k; with all from the start of averaging on, it is the SWA
    of Izmailov et al. 2018.
    """
    if count < 2:
        return []
    everything = tuple(range(count))
    proposals = [
        Proposal(
            f"mean of all {count}", "window", _uniform(count, everything), 0, (count,),
            Recipe(everything),
        )
    ]  # fmt: skip
    for size in coarse_first(range(2, count)):
        positions = everything[count - size :]
        proposals.append(
            Proposal(
                f"mean of the last {size}", "window", _uniform(count, positions), 1, (size,),
                Recipe(positions),
            )
        )  # fmt: skip
    return proposals


def propose_sliding(count: int, names: Sequence[str]) -> list[Proposal]:
    """Propose the means of neighbouring checkpoints that end before the last, coarse first."""
    proposals: list[Proposal] = []
    # Windows that end with the last checkpoint are a family of their own.
    for size in coarse_first(range(2, count)):
        for stop in coarse_first(range(size, count)):
            positions = tuple(range(stop - size, stop))
            first, last = names[positions[0]], names[positions[-1]]
            proposals.append(
                Proposal(
                    f"mean of {size}, {first} to {last}", "sliding", _uniform(count, positions), 2,
                    (size, stop), Recipe(positions),
                )
            )  # fmt: skip
    return proposals


def propose_pairs(count: int, names: Sequence[str]) -> list[Proposal]:
    """Propose the means of the last checkpoint and each other one, coarse first."""
    proposals: list[Proposal] = []
    for position in coarse_first(range(count - 1)):
        positions = (position, count - 1)
        proposals.append(
            Proposal(
                f"mean of {names[position]} and {names[-1]}", "pair",
                _uniform(count, positions), 1, (position,), Recipe(positions),
            )
        )  # fmt: skip
    return proposals


def propose_without_one(count: int, names: Sequence[str]) -> list[Proposal]:
    """Propose the means of all checkpoints but one, which tell what that one contributes."""
    if count < 3:
        return []
    proposals: list[Proposal] = []
    for position in coarse_first(range(count)):
        positions = tuple(other for other in range(count) if other != position)
        proposals.append(
            Proposal(
                f"mean of all but {names[position]}", "without-one", _uniform(count, positions), 1,
                (position,), Recipe(positions),
            )
        )  # fmt: skip
    return proposals


def propose_schemes(family: Family, record: RunRecord) -> list[Proposal]:
    """Propose a scheme with several values of its option, for all checkpoints.

    Args:
        family: ``ema``, ``linear``, ``wsm`` or ``power``.
        record: Records of the run's checkpoints.

    Raises:
        RunError: The run lacks the steps that the scheme needs.
    """
    texts, parameters = _SCHEMES[family]
    everything = tuple(range(len(record)))
    proposals: list[Proposal] = []
    for place in coarse_first(range(len(texts))):
        text = texts[place]
        weights = schemes.normalize(schemes.parse(text).coefficients(record))
        proposals.append(
            Proposal(
                f"{text} of {len(record)}", family, tuple(weights), parameters, (place,),
                Recipe(everything, text),
            )
        )  # fmt: skip
    return proposals


_SCHEMES: dict[Family, tuple[tuple[str, ...], int]] = {
    "ema": (tuple(f"ema:halflife={fraction:g}" for fraction in _HALF_LIVES), 1),
    "linear": (("linear",), 0),
    "wsm": (tuple(f"wsm:decay={decay}" for decay in _DECAYS), 1),
    "power": (tuple(f"power-ema:sigma={width:g}" for width in _WIDTHS), 1),
}


@dataclass(frozen=True)
class Catalogue:
    """Members of all families of a search, coarse first, without those that are equal.

    Attributes:
        last: The last checkpoint.
        families: Members by family.
        left_out: Why a family has no members, by family.
    """

    last: Proposal
    families: dict[Family, list[Proposal]]
    left_out: dict[Family, str]

    @classmethod
    def of_run(
        cls, record: RunRecord, names: Sequence[str], families: Sequence[SearchedFamily]
    ) -> Catalogue:
        """List the members of families for a run.

        Args:
            record: Records of the run's checkpoints.
            names: Short names of the checkpoints.
            families: The families; ``soup`` has no members before others are scored.
        """
        count = len(record)
        makers: dict[str, Callable[[], list[Proposal]]] = {
            "checkpoint": lambda: propose_checkpoints(count, names),
            "window": lambda: propose_windows(count),
            "sliding": lambda: propose_sliding(count, names),
            "pair": lambda: propose_pairs(count, names),
            "without-one": lambda: propose_without_one(count, names),
        }
        last = propose_last(count, f"{names[-1]} (last)")
        # The mean of all but the first is the mean of the last n − 1: it is scored once.
        seen = {_rounded(last.coefficients)}
        members: dict[Family, list[Proposal]] = {}
        left_out: dict[Family, str] = {}
        for family in families:
            if family == "soup":
                continue
            try:
                if family in _SCHEMES:
                    proposals = propose_schemes(family, record)
                else:
                    proposals = makers[family]()
            # A run without recorded steps still has windows: one family is lost, not the search.
            except RunError as error:
                left_out[family] = str(error)
                continue
            members[family] = []
            for proposal in proposals:
                key = _rounded(proposal.coefficients)
                if key not in seen:
                    seen.add(key)
                    members[family].append(proposal)
        return cls(last, members, left_out)

    def first_round(self, budget: int) -> list[Proposal]:
        """Return the coarsest members of all families, in turn, up to a number."""
        chosen: list[Proposal] = []
        for proposal in take_in_turn(list(self.families.values())):
            if len(chosen) == budget:
                break
            chosen.append(proposal)
        return chosen

    def next_round(
        self, scored: Sequence[Proposal], scores: Sequence[float], budget: int
    ) -> list[Proposal]:
        """Return the members nearest to the best of their family, up to a number.

        Args:
            scored: Proposals that have scores.
            scores: Their scores; more is better.
            budget: Largest number of members.
        """
        taken = set(scored)
        nearest: list[tuple[float, list[Proposal]]] = []
        for family, proposals in self.families.items():
            best_score, best = -float("inf"), None
            for proposal, score in zip(scored, scores, strict=True):
                if proposal.family == family and score > best_score:
                    best_score, best = score, proposal
            # Members that were scored in the coarse round are not proposed again.
            open_ones = [proposal for proposal in proposals if proposal not in taken]
            if best is not None:
                center = best.place
                open_ones.sort(key=lambda proposal: _distance(proposal.place, center))
            nearest.append((best_score, open_ones))
        # The family of the best member goes first: a small budget ends with it.
        nearest.sort(key=lambda entry: -entry[0])
        chosen: list[Proposal] = []
        for proposal in take_in_turn([proposals for _, proposals in nearest]):
            if len(chosen) == budget:
                break
            chosen.append(proposal)
        return chosen


def coarse_first(values: Sequence[T]) -> list[T]:
    """Reorder values so that every beginning of the list covers the whole range.

    The last comes first, then the first, then the middles of ever finer parts.
    """
    count = len(values)
    if count == 0:
        return []
    # The whole and the smallest member tell most of a family.
    order = dict.fromkeys((count - 1, 0))
    parts = [(0, count - 1)]
    while parts:
        # Breadth first, so that each level covers the whole range before the next begins.
        finer: list[tuple[int, int]] = []
        for low, high in parts:
            if high - low < 2:
                continue
            middle = (low + high) // 2
            order[middle] = None
            finer += [(low, middle), (middle, high)]
        parts = finer
    return [values[index] for index in order]


def take_in_turn(lists: Sequence[Sequence[T]]) -> Iterator[T]:
    """Yield the first of each list, then the second of each, and so on."""
    longest = max(map(len, lists), default=0)
    for index in range(longest):
        for values in lists:
            if index < len(values):
                yield values[index]


def _distance(a: Sequence[int], b: Sequence[int]) -> int:
    return sum(abs(x - y) for x, y in zip(a, b, strict=True))


def _unit(count: int, position: int) -> tuple[float, ...]:
    return _uniform(count, (position,))


def _uniform(count: int, positions: Sequence[int]) -> tuple[float, ...]:
    """Return equal coefficients with sum 1 at positions, 0 elsewhere."""
    coefficients = [0.0] * count
    for position in positions:
        coefficients[position] = 1 / len(positions)
    return tuple(coefficients)


def _rounded(coefficients: Sequence[float]) -> tuple[float, ...]:
    """Round coefficients, so that equal averages of different families are recognized."""
    return tuple(round(coefficient, 9) for coefficient in coefficients)
