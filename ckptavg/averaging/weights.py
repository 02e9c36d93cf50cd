"""Weights in memory that carry a provenance."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ckptavg.formats.provenance import PROVENANCE, Provenance


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights in memory, with a provenance where one is known.

    Attributes:
        tensors: The tensors, under bare names.
        provenance: The provenance; None where the weights carry none.
    """

    tensors: Mapping[str, torch.Tensor]
    provenance: Provenance | None = None

    @property
    def is_average(self) -> bool:
        """True if the weights carry a provenance: then ckptavg made the weights."""
        return self.provenance is not None


def with_provenance(
    state_dict: Mapping[str, torch.Tensor], provenance: Provenance
) -> dict[str, torch.Tensor]:
    """Copy a state dict without copying the tensors, and attach a provenance.

    The provenance is JSON text in an attribute of the copy, as in outputs. ``torch.save`` keeps
    the attribute, ``torch.load`` restores it also under ``weights_only``, the default, and
    ``open_checkpoint`` reads it. Other code that takes a state dict ignores the attribute.

    Args:
        state_dict: The weights.
        provenance: The provenance.
    """
    # A plain dict takes no attributes. An OrderedDict does, and is what ``state_dict()`` returns.
    average: OrderedDict[str, torch.Tensor] = OrderedDict(state_dict)
    vars(average)[PROVENANCE] = provenance.to_json()
    return average


def provenance_of(state_dict: Mapping[str, torch.Tensor]) -> Provenance | None:
    """Return the provenance that is attached to a state dict; None where there is none."""
    return Provenance.from_json(getattr(state_dict, PROVENANCE, None))
