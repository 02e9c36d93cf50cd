"""Log messages and warnings about averages, before and after the computation."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

from ckptavg.averaging.accumulate import StreamResult
from ckptavg.averaging.planning.tensor_plan import Plan
from ckptavg.errors import StaleStatisticsWarning, first_few
from ckptavg.errors.notes import log
from ckptavg.formats.provenance import Provenance
from ckptavg.formats.running_statistics import Statistics


def warn_of_stale(
    states: Mapping[str, Statistics], provenances: Mapping[str, Provenance | None]
) -> None:
    """Warn of averages whose running statistics are stale, at the line of the caller's caller.

    The warning names functions of Python, not options of the command line.

    Args:
        states: Name of each average → its statistics as averaged. The name is empty where there is
            only one.
        provenances: Name of each average → its provenance, after a recomputation if there was one.
    """
    stale = [name for name, record in provenances.items() if record and record.bn == "stale"]
    if not stale:
        return
    of = f" of {first_few(stale)}" if stale[0] else ""
    frozen: dict[str, None] = {}
    for name in stale:
        frozen |= dict.fromkeys(states[name].frozen)
    exclude = explanation = ""
    if frozen:
        exclude = f", exclude=[{first_few([repr(layer) for layer in frozen])}]"
        explanation = ", which leaves out what was frozen in training"
    warnings.warn(
        f"the BatchNorm statistics{of} are not those of the averaged weights (stale): once a "
        "model has the weights, recompute them with "
        f"ckptavg.update_bn(model, train_loader{exclude}){explanation}",
        StaleStatisticsWarning,
        stacklevel=3,
    )


def log_plans(plans: Sequence[Plan]) -> None:
    """Log the notes of plans, and the tensors that outputs cannot hold."""
    # Averages of one run mostly have the same notes. Each note is logged once, in order.
    notes: dict[str, None] = {}
    missing: dict[str, str] = {}
    for plan in plans:
        notes |= dict.fromkeys(plan.notes)
        missing |= plan.missing
    for note in notes:
        log.info(note)
    if missing:
        lost = first_few([f"{name} ({why})" for name, why in missing.items()])
        log.warning("left out of the output, which cannot hold them: %s", lost)


def log_results(plans: Sequence[Plan], results: Sequence[StreamResult]) -> None:
    """Log the notes of plans, and the results of the stream that computed the averages.

    Args:
        plans: The averages.
        results: The stream's result for each average.
    """
    log_plans(plans)
    floats: set[str] = set()
    for plan in plans:
        floats.update(tensor.name for tensor in plan.tensors if tensor.dtype.kind != "int")
    differing: set[str] = set()
    nonfinite: set[str] = set()
    for result in results:
        differing |= result.differing
        nonfinite |= result.nonfinite
    for kind, names in (("integers", differing - floats), ("buffers", differing & floats)):
        if names:
            which = first_few(sorted(names))
            log.info("%s are not averaged but taken from the last checkpoint: %s", kind, which)
    if nonfinite:
        log.warning("not finite and kept: %s", first_few(sorted(nonfinite)))
