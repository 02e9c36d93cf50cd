"""Options of commands that score points of weight space."""

from __future__ import annotations

from ckptavg.cli.options.declare import option
from ckptavg.cli.options.running import running_options

_POINTS = "Points"

weight_decay_option = option(
    _POINTS, "--weight-decay", type=float, metavar="WD", common=True,
    help="Add WD/2 * |w|^2 to the training loss, over all parameters, as training did.",
)  # fmt: skip
"""The L2 term of the training loss, passed as ``weight_decay``."""

point_options = running_options(
    "Recomputes every point's BatchNorm and measures its training loss",
    scoring="Data to score on",
)
"""Model, data and loaders of points, passed as ``running``."""
