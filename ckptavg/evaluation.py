"""Candidates × one pass over the data → metrics.

A candidate is a checkpoint, an average or an ensemble. What an ensemble needs of its members, their
outputs, is computed once and shared with the members that are candidates themselves.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg import averaging, lora
from ckptavg.averaging import Average
from ckptavg.batches import (
    Batches,
    Forward,
    Runtime,
    call_on_inputs,
    inputs_of,
    length_of,
    split_labels,
    to_device,
)
from ckptavg.batchnorm import recompute, tracked_layers
from ckptavg.errors import EvaluationError, UsageError
from ckptavg.formats import Checkpoint, open_checkpoint
from ckptavg.loading import fit, load_into
from ckptavg.metrics import ClassificationMetrics, LogMean, log_softmax
from ckptavg.outputs import StateDict
from ckptavg.run import Run

log = logging.getLogger("ckptavg")
Progress = Callable[[str, int, int], None]
"""Called as ``progress(phase, done, total)`` in batches; total is 0 where it is not known."""

FIRST_METRIC = "top1"  # what --fail-if-worse looks at


@dataclass(frozen=True)
class Candidate:
    """What is scored. Made by ``of_checkpoint``, ``of_average`` or ``of_ensemble``.

    Attributes:
        name: Stands in the table.
        kind: ``checkpoint``, ``average`` or ``ensemble``.
        checkpoints: What it is made of.
        coefficients: One a checkpoint.
        recompute: Whether its BatchNorm statistics are recomputed before it is scored.
        average: How it comes about, for an average.
        last: Whether it is the last checkpoint of the run, which an average is measured against.
    """

    name: str
    kind: str
    checkpoints: tuple[Checkpoint, ...] = field(repr=False)
    coefficients: tuple[float, ...]
    recompute: bool = False
    average: Average | None = field(default=None, repr=False)
    last: bool = False

    @classmethod
    def of_checkpoint(
        cls,
        checkpoint: Checkpoint | str | os.PathLike[str],
        name: str | None = None,
        *,
        last: bool = False,
    ) -> Candidate:
        """A checkpoint as it is; ``last`` if it is what an average is measured against."""
        opened = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
        return cls(name or opened.path.name, "checkpoint", (opened,), (1.0,), last=last)

    @classmethod
    def of_average(cls, planned: Average, name: str, *, recompute: bool) -> Candidate:
        """A planned average, with its statistics as averaged or recomputed."""
        plan = planned.plan
        return cls(name, "average", plan.checkpoints, plan.coefficients, recompute, planned)

    @classmethod
    def of_ensemble(
        cls, checkpoints: Run | Iterable[Checkpoint], name: str = "FGE ensemble"
    ) -> Candidate:
        """The mean of the checkpoints' softmax outputs, each with its own statistics."""
        members = tuple(checkpoints)
        if not members:
            raise UsageError("an ensemble needs at least one checkpoint")
        return cls(name, "ensemble", members, tuple(1 / len(members) for _ in members))


@dataclass(frozen=True)
class Result:
    """A candidate's score.

    Attributes:
        candidate: What was scored.
        metrics: ``top1`` and ``top5`` in %, ``nll`` in nats, ``ece`` as a fraction, ``n`` samples.
        bn: Its statistics: ``own``, ``recomputed``, ``stale`` or ``none``.
    """

    candidate: Candidate
    metrics: Mapping[str, float]
    bn: str

    @property
    def forwards(self) -> int:
        """Forward passes that one sample costs."""
        return len(self.candidate.checkpoints) if self.candidate.kind == "ensemble" else 1

    def as_json(self) -> dict[str, Any]:
        """The result as plain values."""
        return {
            "name": self.candidate.name,
            "kind": self.candidate.kind,
            "checkpoints": [str(c.path) for c in self.candidate.checkpoints],
            "coefficients": list(self.candidate.coefficients),
            "metrics": dict(self.metrics),
            "bn": self.bn,
            "forwards": self.forwards,
        }


def candidates_of(
    run: Run,
    selection: Run,
    planned: Average,
    *,
    each: bool = False,
    ensemble: bool = False,
    recompute: bool = False,
) -> list[Candidate]:
    """The candidates that tell what averaging a run is worth.

    Args:
        run: All of the run, whose last checkpoint is what one would use otherwise.
        selection: What is averaged.
        planned: The selection's average.
        each: Add every selected checkpoint.
        ensemble: Add the output ensemble of the selection.
        recompute: Add the average with recomputed statistics.
    """
    last = run.checkpoints[-1]
    singles = [c for c in selection if each and c.path != last.path]
    found = [Candidate.of_checkpoint(c, c.path.name) for c in singles]
    found.append(Candidate.of_checkpoint(last, f"{last.path.name} (last)", last=True))
    text = f"average of {len(selection)} ({planned.scheme.text})"
    found.append(Candidate.of_average(planned, text, recompute=False))
    if recompute and planned.batchnorm != "none":
        found.append(Candidate.of_average(planned, text, recompute=True))
    if ensemble:
        found.append(Candidate.of_ensemble(selection, f"FGE ensemble of {len(selection)}"))
    return found


def evaluate(
    candidates: Sequence[Candidate | Checkpoint | str | os.PathLike[str]],
    model: nn.Module,
    data: Batches | Dataset[Any],
    *,
    train_loader: Batches | Dataset[Any] | None = None,
    device: str | torch.device | None = None,
    forward: Forward | None = None,
    amp: str = "off",
    batch_size: int = 128,
    workers: int = 0,
    seed: int = 0,
    keep_nonfinite: bool = False,
    progress: Progress | None = None,
) -> list[Result]:
    """Score candidates on the same data, as many as fit in memory in one pass.

    The statistics of all averages that are to be recomputed share passes over the training data
    likewise. The model given is only a template: it is copied, not changed.

    Args:
        candidates: Candidates, or checkpoints that are scored as they are.
        model: A module that the weights fit.
        data: A Dataset, or a loader that gives (inputs, labels) or a dict with labels.
        train_loader: Training data, as a Dataset or a loader, for averages with ``recompute``.
        device: ``auto``, ``cpu``, ``cuda[:N]``, ``mps``; the model's own where None.
        forward: ``forward(model, inputs)``, for inputs that are neither a tensor nor a dict.
        amp: ``off``, ``bf16`` or ``fp16``.
        batch_size: Of a Dataset.
        workers: Processes that load a Dataset.
        seed: Of the training data's order.
        keep_nonfinite: Let averages that are not finite reach the model.
        progress: Told about each phase.

    Returns:
        One result a candidate, in their order.

    Raises:
        ModelError: Weights do not fit the model.
        EvaluationError: The data and the outputs do not fit, or an output is NaN.
    """
    wanted = [c if isinstance(c, Candidate) else Candidate.of_checkpoint(c) for c in candidates]
    if not wanted:
        raise UsageError("there is nothing to evaluate")
    lora.require_models(checkpoint for candidate in wanted for checkpoint in candidate.checkpoints)
    runtime = Runtime.on(device, model, amp=amp, batch_size=batch_size, workers=workers, seed=seed)
    quiet = progress or (lambda *_: None)
    run = forward or call_on_inputs
    session = _Session(wanted, model, runtime, run, quiet, keep_nonfinite)
    if any(c.recompute for c in wanted):
        if train_loader is None:
            raise UsageError("recomputing statistics needs training data (train_loader)")
        session.recompute_statistics(train_loader)
    return session.score(runtime.loader(data, shuffle=False))


def is_worse(results: Sequence[Result]) -> bool:
    """Whether the average does worse than the last checkpoint on the task's first metric.

    The average is the recomputed one where there is one. Expects what ``candidates_of`` made.
    """
    averages = [r for r in results if r.candidate.kind == "average"]
    last = [r for r in results if r.candidate.last]
    if not averages or not last:
        raise UsageError("an average and a last checkpoint are needed, as candidates_of gives")
    chosen = next((r for r in averages if r.bn == "recomputed"), averages[0])
    return chosen.metrics[FIRST_METRIC] < last[0].metrics[FIRST_METRIC]


@dataclass(eq=False)
class _Network:
    """One set of weights that outputs are computed with.

    Attributes:
        name: For messages.
        weights: Reads or computes them.
        statistics: Recomputed BatchNorm buffers, once there are any.
    """

    name: str
    weights: Callable[[], StateDict]
    recompute: bool
    statistics: StateDict = field(default_factory=dict)


class _Session:
    """The networks of some candidates, in groups that fit in memory together."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        model: nn.Module,
        runtime: Runtime,
        forward: Forward,
        progress: Progress,
        keep_nonfinite: bool,
    ) -> None:
        self.candidates = candidates
        self.model = model
        self.runtime = runtime
        self.forward = forward
        self.progress = progress
        self.keep_nonfinite = keep_nonfinite
        self.networks: dict[object, _Network] = {}
        self.averages: dict[int, Callable[[], StateDict]] = {}
        self.members = [self._networks_of(candidate) for candidate in candidates]

    def recompute_statistics(self, data: Batches | Dataset[Any]) -> None:
        """Recompute the statistics of the averages that want it."""
        wanting = [n for n in self.networks.values() if n.recompute]
        groups = self._groups(wanting)
        for i, group in enumerate(groups, 1):
            self._recompute_group(group, data, _phase("BatchNorm", i, len(groups)))

    def _recompute_group(
        self, group: Sequence[_Network], data: Batches | Dataset[Any], phase: str
    ) -> None:
        """One pass over the training data; its models are gone before the next one's come."""
        models = [self._load(network) for network in group]
        report = functools.partial(self.progress, phase)
        recompute(models, data, self.runtime, self._forward_on_batch, progress=report)
        for network, model in zip(group, models, strict=True):
            network.statistics = {
                f"{name}.{key}".lstrip("."): value.detach().cpu().clone()
                for name, layer in tracked_layers(model).items()
                for key, value in layer.named_buffers(recurse=False)
            }

    def _forward_on_batch(self, model: nn.Module, batch: Any) -> Any:
        return self.forward(model, inputs_of(batch))

    def score(self, loader: Batches) -> list[Result]:
        """Run every network over the data and score every candidate."""
        groups = self._groups(list(self.networks.values()))
        if len(groups) > 1:
            log.info("%d networks in %d passes, by memory", len(self.networks), len(groups))
        boards = [_Scoreboard(candidate) for candidate in self.candidates]
        labels_seen: list[torch.Tensor] = []
        for i, group in enumerate(groups, 1):
            phase = _phase("evaluation", i, len(groups))
            self._score_group(group, boards, loader, labels_seen, phase)
        return [
            Result(board.candidate, board.metrics.compute(), self._bn(board.candidate))
            for board in boards
        ]

    def _score_group(
        self,
        group: Sequence[_Network],
        boards: Sequence[_Scoreboard],
        loader: Batches,
        labels_seen: list[torch.Tensor],
        phase: str,
    ) -> None:
        """One pass over the data, which must be the same in every pass."""
        models = [(network, self._load(network)) for network in group]
        first, total, count = not labels_seen, length_of(loader), 0
        for batch in loader:
            inputs, labels = split_labels(batch)
            _check_order(labels_seen, count, labels, first=first)
            moved = to_device(inputs, self.runtime.device)
            self._score_batch(models, boards, count, moved, labels)
            count += 1
            self.progress(phase, count, total)
        if count != len(labels_seen):
            raise _another_order()

    def _score_batch(
        self,
        models: Sequence[tuple[_Network, nn.Module]],
        boards: Sequence[_Scoreboard],
        number: int,
        inputs: Any,
        labels: torch.Tensor,
    ) -> None:
        for network, model in models:
            with torch.inference_mode(), self.runtime.autocast():
                outputs = logits_of(self.forward(model, inputs))
            _check_outputs(network.name, outputs, labels)
            found = log_softmax(outputs, self.runtime.device)
            here = labels.to(found.device, torch.int64)
            for board, members in zip(boards, self.members, strict=True):
                for _ in range(members.count(network)):
                    board.add(number, found, here, members=len(members))

    def _networks_of(self, candidate: Candidate) -> list[_Network]:
        if candidate.average is not None:
            planned = candidate.average
            once = functools.cache(lambda: self._average(planned))
            weights = self.averages.setdefault(id(planned), once)
            made = _Network(candidate.name, weights, candidate.recompute)
            return [self.networks.setdefault((id(planned), candidate.recompute), made)]
        return [
            self.networks.setdefault(
                (c.path.resolve(), c.key),
                _Network(str(c.path), functools.partial(averaging.load, c), recompute=False),
            )
            for c in candidate.checkpoints
        ]

    def _average(self, planned: Average) -> StateDict:
        keep = self.keep_nonfinite
        return averaging.in_memory(planned, keep_nonfinite=keep, stale=False)

    def _load(self, network: _Network) -> nn.Module:
        """A copy of the model with the network's weights, on the device, in evaluation mode."""
        model = copy.deepcopy(self.model)
        load_into(model, network.weights(), network.name)
        if network.statistics:
            model.load_state_dict(network.statistics, strict=False)
        return model.to(self.runtime.device).eval()

    def _groups(self, networks: Sequence[_Network]) -> list[list[_Network]]:
        size = max(1, fit(self.model, self.runtime.device))
        return [list(networks[i : i + size]) for i in range(0, len(networks), size)]

    def _bn(self, candidate: Candidate) -> str:
        if not tracked_layers(self.model):
            return "none"
        if candidate.recompute:
            return "recomputed"
        if candidate.average is not None:
            return candidate.average.batchnorm
        made = candidate.checkpoints[0].provenance if candidate.kind == "checkpoint" else None
        return str(made.get("bn", "own")) if made else "own"


class _Scoreboard:
    """The metrics of one candidate, and an ensemble's outputs until all its members are in."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate
        self.metrics = ClassificationMetrics()
        self._waiting: dict[int, LogMean] = {}

    def add(self, number: int, found: torch.Tensor, labels: torch.Tensor, *, members: int) -> None:
        """Take in the log-probabilities of one of so many members on a batch."""
        if self.candidate.kind != "ensemble":
            self.metrics.update(found, labels)
            return
        mean = self._waiting.setdefault(number, LogMean())
        mean.add(found)
        if mean.members == members:
            self.metrics.update(self._waiting.pop(number).value(), labels)


def logits_of(outputs: Any) -> torch.Tensor:
    """The logits among what a model returned: itself, ``.logits``, ``["logits"]`` or the first.

    Raises:
        EvaluationError: There are none.
    """
    if isinstance(outputs, torch.Tensor):
        return outputs
    if isinstance(outputs, Mapping) and "logits" in outputs:
        return logits_of(outputs["logits"])
    if hasattr(outputs, "logits"):
        return logits_of(outputs.logits)
    if isinstance(outputs, (list, tuple)) and outputs:
        return logits_of(outputs[0])
    raise EvaluationError(
        f"the model is expected to return logits but returned a {type(outputs).__name__}",
        "Wrap it in a factory whose forward returns a tensor of shape (N, classes).",
    )


def _check_outputs(name: str, outputs: torch.Tensor, labels: torch.Tensor) -> None:
    if outputs.dim() != 2 or labels.dim() != 1 or len(outputs) != len(labels):
        raise EvaluationError(
            f"outputs of shape (N, classes) and labels of shape (N,) are expected, but got "
            f"{tuple(outputs.shape)} and {tuple(labels.shape)}"
        )
    if labels.is_floating_point() and not torch.equal(labels, labels.round()):
        raise EvaluationError("the data has labels that are no whole numbers", "Check --data.")
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if low < 0 or high >= outputs.shape[1]:
        raise EvaluationError(
            f"the data has the label {low if low < 0 else high}, "
            f"but the model has {outputs.shape[1]} classes",
            "Check that the model and the data belong together.",
        )
    if not bool(torch.isfinite(outputs).all()):
        raise EvaluationError(
            f"{name}: the outputs are not finite",
            "Recompute its BatchNorm statistics, look at the weights, or pass --amp off.",
        )


def _check_order(
    seen: list[torch.Tensor], number: int, labels: torch.Tensor, *, first: bool
) -> None:
    """Make sure that every pass sees the same samples in the same order."""
    if first:
        seen.append(labels.clone())
    elif number >= len(seen) or not torch.equal(seen[number], labels):
        raise _another_order()


def _another_order() -> EvaluationError:
    return EvaluationError(
        "the data loader gives other samples, or another order, in each pass",
        "Use shuffle=False to evaluate.",
    )


def _phase(name: str, number: int, of: int) -> str:
    return name if of == 1 else f"{name}, pass {number} of {of}"
