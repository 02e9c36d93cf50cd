"""Division of evaluation samples into a part that chooses and a part that judges."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ckptavg.errors import EvaluationError, UsageError

# Fewer samples in a part tell no candidates apart: a sign test of six pairs is the first that can
# reach p < 0.05.
FEWEST = 6


@dataclass(frozen=True)
class Split:
    """Positions of samples in two parts without a common sample.

    Attributes:
        selection: Positions of the samples that choose, ascending, (S,) int64.
        report: Positions of the samples that judge the choice, ascending, (R,) int64.
    """

    selection: torch.Tensor
    report: torch.Tensor


def split_samples(
    count: int, classes: torch.Tensor | None = None, *, fraction: float = 0.5, seed: int = 0
) -> Split:
    """Divide samples at random, class by class where classes are known.

    Each class gives its share of the selection part, rounded so that the sizes add up (largest
    remainders). Classes of one sample go wherever that rounding sends them.

    Args:
        count: Number of samples.
        classes: Class of each sample, (N,); None to draw from all samples alike.
        fraction: Share of the selection part, between 0 and 1.
        seed: Seed of the draw.

    Raises:
        UsageError: The fraction is not between 0 and 1.
        EvaluationError: A part would have too few samples.
    """
    if not 0 < fraction < 1:
        raise UsageError(
            f"the share of samples that choose is expected between 0 and 1 but is {fraction}"
        )
    # The sizes are exact for all samples; classes follow them within one sample.
    selected_count = round(fraction * count)
    if min(selected_count, count - selected_count) < FEWEST:
        raise EvaluationError(
            f"{count} samples are too few to choose on {selected_count} and to judge on the others",
            f"Each part needs {FEWEST} samples: give more evaluation data, or `report_data`.",
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(count, generator=generator)
    if classes is not None:
        order = _interleave_classes(order, classes)
    return Split(order[:selected_count].sort().values, order[selected_count:].sort().values)


def _interleave_classes(order: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Reorder samples so that every prefix has each class by its share, within one sample.

    The j-th of a class's n samples goes to the place (j − u) / n of the whole, 0 ≤ u < 1, as
    systematic sampling does. The u of each class is drawn by the order itself.

    Args:
        order: A random order of the samples, (N,).
        classes: Class of each sample, (N,).
    """
    # In the random order, so that which members of a class come first is random, too.
    labels = torch.unique(classes, return_inverse=True)[1][order]
    sizes = torch.bincount(labels)
    places = torch.empty(len(order), dtype=torch.float64)
    for label, size in enumerate(sizes.tolist()):
        members = (labels == label).nonzero()[:, 0]
        # The place of the first member in the random order is uniform, and independent of the rest.
        offset = float(members[0]) / len(order) % (1 / size) * size
        places[members] = (torch.arange(size, dtype=torch.float64) + offset) / size
    return order[places.argsort(stable=True)]
