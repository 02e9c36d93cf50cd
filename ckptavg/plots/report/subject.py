"""Subject of a report: a run and the averages to judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ckptavg.averaging.plan import Average
from ckptavg.evaluation.candidates import Candidate, candidates_of
from ckptavg.runs.run import Run


@dataclass(frozen=True)
class Subject:
    """A run that a report is about, and the averages to judge.

    Attributes:
        run: The whole run.
        selection: The averaged checkpoints.
        average: The planned average of the selection.
        further: Further planned averages by name.
        each: True to list every selected checkpoint in the table.
        has_rules: True if some tensors are not averaged, or not in their own type.
        keep_nonfinite: True to allow averages that are not finite.
    """

    run: Run
    selection: Run
    average: Average
    further: Mapping[str, Average]
    each: bool = False
    has_rules: bool = False
    keep_nonfinite: bool = False

    def candidates(self, *, recompute: bool) -> list[Candidate]:
        """List the candidates of the table.

        Args:
            recompute: True to add averages with recomputed BatchNorm statistics.
        """
        listed = candidates_of(
            self.run, self.selection, self.average, each=self.each,
            ensemble=len(self.selection) > 1, recompute=recompute, further=self.further,
        )  # fmt: skip
        if recompute and self.average.batchnorm == "stale":
            last = next(candidate for candidate in listed if candidate.last)
            # What recomputing alone does for the last checkpoint is no merit of the average.
            refreshed = replace(last, recompute=True, last=False)
            listed.insert(listed.index(last) + 1, refreshed)
        return listed
