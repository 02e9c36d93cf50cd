"""Weights in memory that tell how they were made."""

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
    """Weights in memory.

    Attributes:
        tensors: Under bare names.
        made: The account of how they were made, if they carry one.
    """

    tensors: Mapping[str, torch.Tensor]
    made: Mapping[str, Any] | None = None

    @property
    def provenance(self) -> Mapping[str, Any] | None:
        """The account, as a checkpoint has it."""
        return self.made

    @property
    def is_average(self) -> bool:
        """True if the account says so."""
        return self.made is not None


def with_account(
    state_dict: Mapping[str, torch.Tensor], made: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    """Copy a state dict, the tensors shared, and attach an account of how it was made.

    The account is text, as outputs have it. ``torch.save`` keeps the attribute, ``torch.load``
    restores it by its safe default, ``open_checkpoint`` reads it, and all else that takes a state
    dict passes over it.

    Args:
        state_dict: The weights.
        made: Provenance, as plain values.
    """
    told: OrderedDict[str, torch.Tensor] = OrderedDict(state_dict)
    vars(told)[PROVENANCE] = json.dumps(dict(made))
    return told


def account_of(state_dict: Mapping[str, torch.Tensor]) -> Mapping[str, Any] | None:
    """Return the account that a state dict carries of how it was made, if it has one."""
    return parse_provenance(getattr(state_dict, PROVENANCE, None))
