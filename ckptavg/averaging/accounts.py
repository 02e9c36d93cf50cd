"""State dicts in memory that carry a provenance."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ckptavg.formats.checkpoint import PROVENANCE
from ckptavg.formats.parts import parse_provenance


@dataclass(frozen=True, eq=False)
class Weights:
    """Weights in memory, with a provenance where one is known.

    Attributes:
        tensors: The tensors, under bare names.
        made: The provenance; None where the weights carry none.
    """

    tensors: Mapping[str, torch.Tensor]
    made: Mapping[str, Any] | None = None

    @property
    def provenance(self) -> Mapping[str, Any] | None:
        """The provenance, under the name that a checkpoint has for it."""
        return self.made

    @property
    def is_average(self) -> bool:
        """True if the weights carry a provenance: then ckptavg made the weights."""
        return self.made is not None


def with_account(
    state_dict: Mapping[str, torch.Tensor], made: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Copy a state dict without copying the tensors, and attach a provenance.

    The provenance is JSON text in an attribute of the copy, as in outputs. ``torch.save`` keeps
    the attribute, ``torch.load`` restores it also under ``weights_only``, the default, and
    ``open_checkpoint`` reads it. Other code that takes a state dict ignores the attribute.

    Args:
        state_dict: The weights.
        made: Provenance, as plain values.
    """
    # A plain dict takes no attributes. An OrderedDict does, and is what ``state_dict()`` returns.
    average: OrderedDict[str, torch.Tensor] = OrderedDict(state_dict)
    vars(average)[PROVENANCE] = json.dumps(dict(made))
    return average


def account_of(state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, Any] | None:
    """Return the provenance that is attached to a state dict; None where there is none."""
    return parse_provenance(getattr(state_dict, PROVENANCE, None))
