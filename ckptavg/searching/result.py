"""Result of a search: ranking, winner, verdict, and the command that makes the winner."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptavg.averaging.api import average
from ckptavg.display.tables import NOTHING, Cell, Column, Row, Table
from ckptavg.errors.printable import without_secrets
from ckptavg.evaluation.significance import Difference
from ckptavg.runs.discovery.numbered import short_names
from ckptavg.searching.election import Ranked
from ckptavg.searching.plan import SearchPlan
from ckptavg.searching.verdict import Verdict, write_code
from ckptavg.tasks import Metric

# Rows of the table per family; the results file has all.
_ROWS_PER_FAMILY = 3


@dataclass(frozen=True)
class Judgement:
    """The winner on the samples that had no say in choosing it.

    Attributes:
        metrics: Metrics by key; the decisive one on these samples.
        against: Name of the last checkpoint.
        difference: The winner minus the last checkpoint, in the metric's unit.
    """

    metrics: Mapping[str, float]
    against: str
    difference: Difference

    def as_json(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        difference = self.difference
        return {
            "metrics": dict(self.metrics),
            "against": without_secrets(self.against),
            "difference": difference.value,
            "low": difference.low,
            "high": difference.high,
            "p": difference.p,
            "n": difference.n,
        }


@dataclass(frozen=True)
class SearchResult:
    """Result of a search. ``print(result)`` shows the ranking and the verdict.

    Attributes:
        plan: The run, the model, the data and the metric that decided.
        ranking: All candidates, the best on the choosing samples first.
        winner: The simplest candidate that cannot be told from the best.
        judgement: The winner against the last checkpoint on the other samples; None if the last
            checkpoint won.
        verdict: The answer in a sentence.
        command: Python call, or command line, that makes the winner; empty to keep the last
            checkpoint.
        contributions: Per checkpoint, the metric of the mean of all less that of the mean without
            it, on the samples that choose; None where not scored, empty where none was.
        stability: How often each family won when the samples were split anew; empty if not asked.
        counts: Word for the samples.
        selection_count: Number of samples that chose.
        notes: Remarks on how the result came about.
    """

    plan: SearchPlan
    ranking: tuple[Ranked, ...]
    winner: Ranked
    judgement: Judgement | None
    verdict: Verdict
    counts: str
    selection_count: int
    command: str = ""
    contributions: tuple[float | None, ...] = ()
    stability: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def metric(self) -> Metric:
        """The metric that decided."""
        return self.plan.metric

    def write_winner(self, out: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the winner, with its BatchNorm statistics recomputed if those won.

        Args:
            out: As for ``average``.
            overwrite: Replace an existing output.

        Raises:
            OutputError: The output exists, or cannot be written.
            CkptavgError: As for ``average``.
        """
        scored = self.winner.scored
        recipe = scored.proposal.recipe
        members = [self.plan.run[position] for position in recipe.positions]
        recompute = None
        if scored.is_recomputed:
            recompute = self.plan.recompute
        return average(
            members, recipe.scheme, weights=recipe.weights, out=out, overwrite=overwrite,
            recompute=recompute,
        )  # fmt: skip

    def write_code(self) -> str:
        """Return the Python call that makes the winner; empty to keep the last checkpoint.

        Statistics that won recomputed are recomputed by ``write_winner`` alone.
        """
        if self.verdict.outcome == "keep-last":
            return ""
        paths = [without_secrets(str(checkpoint.path)) for checkpoint in self.plan.run]
        return write_code(self.winner.scored.proposal.recipe, paths, "average.safetensors")

    def __str__(self) -> str:
        from ckptavg.display.terminal import printed_table  # noqa: PLC0415 - only people need it

        text = printed_table(self.table())
        text += f"\n{self.verdict.text}"
        if self.command:
            text += f"\n{self.command}"
        return text

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        paths = [without_secrets(str(checkpoint.path)) for checkpoint in self.plan.run]
        candidates = [self._candidate_json(ranked, paths) for ranked in self.ranking]
        winner = self._candidate_json(self.winner, paths)
        winner["report"] = None
        if self.judgement is not None:
            winner["report"] = self.judgement.as_json()
        return {
            "candidates": candidates,
            "winner": winner,
            "verdict": self.verdict.outcome,
            "text": self.verdict.text,
            "command": self.command,
            "metric": self.metric.key,
            "selection_n": self.selection_count,
            "contributions": list(self.contributions),
            "stability": dict(self.stability),
            "notes": list(self.notes),
        }

    def _candidate_json(self, ranked: Ranked, paths: Sequence[str]) -> dict[str, Any]:
        proposal = ranked.scored.proposal
        # Checkpoints without a part in it would only hide the others.
        members = [(p, c) for p, c in zip(paths, proposal.coefficients, strict=True) if c]
        return {
            "name": without_secrets(proposal.name),
            "family": proposal.family,
            "checkpoints": [path for path, _ in members],
            "coefficients": [coefficient for _, coefficient in members],
            "bn": ranked.scored.bn,
            "select": {self.metric.key: ranked.select},
            "p": ranked.p,
            "plateau": ranked.plateau,
        }

    def contribution_table(self) -> Table | None:
        """Make the table of what each checkpoint contributes; None where that is not known."""
        if not any(value is not None for value in self.contributions):
            return None
        names = short_names([checkpoint.path for checkpoint in self.plan.run])
        rows: list[Row] = []
        for name, contribution in zip(names, self.contributions, strict=True):
            text = NOTHING
            if contribution is not None:
                text = format(contribution, f"+{self.metric.form}")
            rows.append(Row((Cell(name), Cell(text))))
        columns = (Column("checkpoint", "name"), Column(f"Δ {self.metric.title}", "number"))
        title = "what each checkpoint contributes to the mean of all"
        return Table(title, columns, tuple(rows), ("Δ: the mean with it less the mean without it",))

    def table(self) -> Table:
        """Make the table of the ranking: the best few of each family, and the last checkpoint."""
        shown: list[Ranked] = []
        rows_of: dict[str, int] = {}
        for ranked in self.ranking:
            family = ranked.scored.proposal.family
            rows_of[family] = rows_of.get(family, 0) + 1
            # The simplest of the plateau may stand far down.
            if rows_of[family] <= _ROWS_PER_FAMILY or ranked is self.winner:
                shown.append(ranked)
        rows: list[Row] = []
        for ranked in shown:
            score = NOTHING
            if not math.isnan(ranked.select):
                score = format(ranked.select, self.metric.form)
            mark = "same" if ranked.plateau else ""
            texts = (
                ranked.name, ranked.scored.bn, score, f"{ranked.p:.3f}", mark,
                str(ranked.scored.proposal.size),
            )  # fmt: skip
            cells = tuple(Cell(text) for text in texts)
            rows.append(Row(cells, best=ranked is self.winner))
        columns = (
            Column("candidate", "name"),
            Column("BatchNorm", leaves=2),
            Column(self.metric.title, "number"),
            Column("p", "number", leaves=3),
            Column("as the best"),
            Column("checkpoints", "number", leaves=1),
        )
        legend = [
            f"p: the best candidate is better, corrected for {len(self.ranking)} candidates",
            "same: cannot be told from the best; of these, the simplest wins",
        ]
        hidden = len(self.ranking) - len(shown)
        if hidden:
            legend.append(f"{hidden} more candidates were scored: the results file has all")
        title = f"ranking on {self.selection_count:,} {self.counts} that choose"
        return Table(title, columns, tuple(rows), tuple(legend))
