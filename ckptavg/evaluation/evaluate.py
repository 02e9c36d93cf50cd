"""Evaluation of candidates in as few passes over the data as memory allows.

A network is a set of weights that candidates need. As many networks as fit in memory share a pass:
weights are read (averages from the stream), statistics recomputed over the training data where
needed, and outputs scored. The models stay on the device throughout. Outputs of an ensemble's
members are computed once and shared with members that are candidates themselves.
"""

from __future__ import annotations

import functools
import logging
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.averaging.lora import exact_mean
from ckptavg.batchnorm.statistics_pass import recompute_statistics
from ckptavg.data.argument_checks import check_model
from ckptavg.data.loaders import Subset, as_subset, open_loader, require_reiterable
from ckptavg.data.prefetch import prefetch_to_device, with_progress
from ckptavg.display.progress import PhaseProgress, ProgressLike, open_progress
from ckptavg.distributed.peers import Peers, SingleProcess, find_peers
from ckptavg.errors import EvaluationError, UsageError
from ckptavg.errors.notes import collect_notes
from ckptavg.evaluation import weight_sets
from ckptavg.evaluation.candidates import (
    Candidate,
    CandidateLike,
    as_candidates,
    layers_of,
    reference_of,
)
from ckptavg.evaluation.results import Result, Results, Versus
from ckptavg.evaluation.scoreboard import Board, Soundness, joined
from ckptavg.evaluation.significance import compare
from ckptavg.evaluation.weight_sets import Network, Networks
from ckptavg.formats.running_statistics import LAYERS, match_layers
from ckptavg.models import malloc
from ckptavg.models.batches import Batches, Forward, bytes_of, map_tensors, tensors_of
from ckptavg.models.device import Runtime, count_models_that_fit
from ckptavg.models.load import unwrap_distributed
from ckptavg.models.memory_format import MemoryFormat
from ckptavg.models.oom_retry import OomSynchronizedPeers, log_pass_count, run_in_groups_that_fit
from ckptavg.tasks import Task
from ckptavg.tasks.classification import Classification
from ckptavg.tasks.named import as_task

log = logging.getLogger("ckptavg")
Progress = PhaseProgress
"""Called as ``progress(phase, done, total)`` in samples; total is 0 where unknown."""


def evaluate(
    candidates: Iterable[CandidateLike] | Mapping[str, CandidateLike],
    model: nn.Module,
    data: Batches | Dataset[Any],
    *,
    train_loader: Batches | Dataset[Any] | None = None,
    task: Task | str | None = None,
    device: str | torch.device | None = None,
    forward: Forward | None = None,
    exclude: str | Sequence[str] = (),
    amp: str = "off",
    batch_size: int | None = None,
    workers: int = 0,
    seed: int = 0,
    bn_samples: int | Subset | None = None,
    keep_nonfinite: bool = False,
    progress: ProgressLike = None,
) -> Results:
    """Score candidates on the same data, with as many candidates per pass as fit in memory.

    Passes over the training data are shared in the same way. The model is copied and not changed.
    In an initialized ``torch.distributed`` group all processes must call this and get the same
    results. Processes share a Dataset batch by batch; a loader is the calling process's own part.

    Args:
        candidates: Candidates, checkpoints, paths, modules, state dicts; or a dict by name.
        model: A module that the weights fit.
        data: A Dataset, or a loader that yields (inputs, labels) or a dict with labels.
        train_loader: Training data, a Dataset or a loader, for recomputing BatchNorm statistics: of
            candidates with ``recompute``, and of weights whose statistics are recorded as stale.
        task: A Task, or a name such as ``causal-lm``; image classification where None.
        device: ``auto``, ``cpu``, ``cuda[:N]``, ``mps``; the model's own where None.
        forward: ``forward(model, batch)`` runs a model on a batch of either data as the loader
            yields it; the task decides where None.
        exclude: Shell patterns of BatchNorm layers that keep their statistics.
        amp: ``off``, ``bf16`` or ``fp16``.
        batch_size: Samples per batch of a Dataset; the task's default where None, 128 for images.
        workers: Processes that load a Dataset.
        seed: Seed of the training data's order and of random augmentation.
        bn_samples: Number of training samples, drawn at random, to recompute statistics from, or a
            ``ckptavg.data.loaders.Subset``; all samples where None.
        keep_nonfinite: True to allow averages that are not finite.
        progress: True for a bar, a bar of tqdm, or a function of (phase, done, total) in samples;
            see ``ckptavg.display.progress``.

    Returns:
        One result per candidate, in order; printed as a table.

    Raises:
        UsageError: The model is not a module, or the data is no data.
        ModelError: Weights do not fit the model.
        EvaluationError: The data and the outputs do not fit, or an output is NaN.
    """
    check_model(model)
    task = as_task(task)
    size = batch_size or task.batch_size
    runtime = Runtime.on(device, model, amp=amp, batch_size=size, workers=workers, seed=seed)
    peers = find_peers()
    subset = as_subset(bn_samples)
    with collect_notes() as notes, open_progress(progress, "samples") as reporter:
        scored = as_candidates(candidates, has_training=train_loader is not None)
        training = None
        if train_loader is not None and any(candidate.recompute for candidate in scored):
            training = open_loader(train_loader, runtime, shuffle=True, subset=subset, peers=peers)
        elif train_loader is not None:
            note_idle_training(scored)
        results = score(
            scored,
            model,
            open_loader(data, runtime, shuffle=False, peers=peers),
            runtime,
            training,
            task=task,
            forward=forward,
            exclude=exclude,
            keep_nonfinite=keep_nonfinite,
            progress=reporter,
            peers=peers,
        )
    return Results(results, task, notes)


def note_idle_training(candidates: Sequence[Candidate]) -> None:
    """Note that training data serves no candidate."""
    log.info(
        "nothing is recomputed from the training data: of %d candidates none has statistics that "
        "are known to be stale", len(candidates),
    )  # fmt: skip


def score(
    candidates: Sequence[Candidate],
    model: nn.Module,
    data: Batches,
    runtime: Runtime,
    training: Batches | None = None,
    *,
    task: Task | None = None,
    forward: Forward | None = None,
    exclude: str | Sequence[str] = (),
    keep_nonfinite: bool = False,
    progress: Progress | None = None,
    peers: Peers | None = None,
    on_results: Callable[[Sequence[Result]], None] | None = None,
) -> list[Result]:
    """Score candidates as ``evaluate`` does, in the same order, on loaders that are open already.

    Args:
        candidates: The candidates to score.
        model: As for ``evaluate``.
        data: This process's batches of the evaluation data.
        runtime: Device, precision and batch size of the models.
        training: This process's batches of the training data; None without any.
        task: As for ``evaluate``.
        forward: As for ``evaluate``.
        exclude: As for ``evaluate``.
        keep_nonfinite: As for ``evaluate``.
        progress: As for ``evaluate``.
        peers: The processes that share the data; this process alone where None.
        on_results: Called after each pass with the results so far, once the reference is scored.

    Raises:
        UsageError: There are no candidates, or recomputing lacks training data.
        CkptavgError: As for ``evaluate``.
    """
    if not candidates:
        raise UsageError("there is nothing to evaluate")
    exact_mean.require_models(
        checkpoint for candidate in candidates for checkpoint in candidate.checkpoints
    )
    if training is None and any(c.recompute for c in candidates):
        raise UsageError("recomputing statistics needs training data (train_loader)")
    peers = peers or SingleProcess()
    inner = unwrap_distributed(model)
    session = _Session(candidates, inner, runtime, task or Classification(), peers)
    session.forward = forward
    session.progress = progress or session.progress
    session.keep_nonfinite = keep_nonfinite
    if exclude:
        session.excluded = match_layers(exclude, layers_of(candidates))
    with malloc.keep_freed_memory(runtime.device):
        return session.run(data, training, on_results or (lambda _: None))


class _Session:
    """One evaluation: candidates, their networks and the passes over the data."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        model: nn.Module,
        runtime: Runtime,
        task: Task,
        peers: Peers,
    ) -> None:
        self.candidates = candidates
        self.model = model
        self.runtime = runtime
        self.task = task
        self.peers = OomSynchronizedPeers(peers)
        self.forward: Forward | None = None
        self.progress: Progress = lambda *_: None
        self.keep_nonfinite = False
        self.excluded: Collection[str] = ()
        self.networks = Networks(candidates)
        self.boards = [
            Board(candidate, members, task)
            for candidate, members in zip(candidates, self.networks.members, strict=True)
        ]
        self.memory_format = MemoryFormat(model, runtime.device, scoring=True)
        # One checksum per batch of the first pass, to recognize other data in later passes.
        self.fingerprints: list[int] = []
        self.known: dict[Board, Result] = {}

    def run(
        self,
        data: Batches,
        training: Batches | None,
        on_results: Callable[[Sequence[Result]], None],
    ) -> list[Result]:
        """Run one pass per group of networks.

        Args:
            data: This process's batches of the evaluation data.
            training: This process's batches of the training data; None without any.
            on_results: Called with the results so far, once the reference is scored.
        """
        if self.peers.world_size > 1:
            _require_state(self.task)
        # All processes must form the same groups, so the smallest device decides.
        size = min(self.peers.gather(count_models_that_fit(self.model, self.runtime.device)))
        chosen = reference_of(self.candidates)
        wanted = next({*b.members} for b in self.boards if b.candidate is chosen)
        # The reference is scored first, since the other results include a comparison with it.
        groups = sorted(self.networks.groups(size), key=wanted.isdisjoint)
        log_pass_count(len(self.candidates), len(groups))
        data = require_reiterable(data, len(groups))
        if training is not None:
            wanting = sum(any(network.recompute for network in group) for group in groups)
            training = require_reiterable(training, wanting)
        results: list[Result] = []

        def run_pass(group: Sequence[Network], number: int, of: int) -> None:
            """Score one group and publish the results so far."""
            phase = functools.partial(_phase, number=number, of=of)
            try:
                self._pass(group, data, training, phase)
            finally:
                # Also after an out-of-memory error: the repeated pass needs the memory.
                weight_sets.release(group, self.runtime.device)
            results[:] = self._results(group)
            if any(result.candidate is chosen for result in results):
                on_results([*results])

        run_in_groups_that_fit(groups, run_pass, self.runtime, self.peers)
        return results

    def _pass(
        self,
        group: Sequence[Network],
        data: Batches,
        training: Batches | None,
        phase: Callable[[str], str],
    ) -> None:
        """Load the weights of a group, recompute statistics where needed, and score."""
        weight_sets.load(group, self.model, self.runtime, keep_nonfinite=self.keep_nonfinite)
        wanting = [network for network in group if network.recompute]
        if wanting and training is not None:
            recomputed = recompute_statistics(
                [network.model for network in wanting],
                [network.describe_statistics() for network in wanting],
                self.excluded,
                self._counted(training, phase("BatchNorm")),
                self.runtime,
                self._forward_on_batch,
                self.peers,
            )
            for network, (_, statistics) in zip(wanting, recomputed, strict=True):
                network.statistics = statistics
        # A pass that ran out of memory is repeated; ``begin`` discards its partial scores.
        for board in self.boards:
            board.begin()
        self._score(group, self._counted(data, phase("evaluation")))
        self.peers.agree()
        for board in self.boards:
            board.commit(group)

    def _counted(self, batches: Batches, phase: str) -> Batches:
        return with_progress(
            batches, functools.partial(self.progress, phase), self.peers, self.runtime.seed
        )

    def _forward_on_batch(self, model: nn.Module, batch: Any) -> Any:
        if self.forward is not None:
            return self.forward(model, batch)
        return self.task.run(model, batch)

    def _score(self, group: Sequence[Network], batches: Any) -> None:
        """Score a group over the evaluation data, which must be the same in every pass."""
        for network in group:
            self.memory_format.place(network.model)
        fingerprints: list[int] = []
        soundness = Soundness()
        for number, batch in enumerate(prefetch_to_device(batches, self.runtime.device)):
            # Targets as loaded are on the host, so a checksum does not wait for the device.
            host_targets = self.task.part(self.model, batch.loaded)[1]
            fingerprints.append(_fingerprint(host_targets))
            if self.fingerprints and self.fingerprints[number : number + 1] != fingerprints[-1:]:
                raise _another_order()
            inputs, targets = self.task.part(self.model, batch.on_device)
            wanted = inputs if self.forward is None else batch.on_device
            parts = _Parts(number, self.memory_format.to_device(wanted), targets, host_targets)
            for network in group:
                self._score_batch(network, parts, soundness)
            for board in self.boards:
                board.end_batch(number)
            soundness.end_batch()
        soundness.end()
        if self.fingerprints and len(fingerprints) != len(self.fingerprints):
            raise _another_order()
        self.fingerprints = fingerprints

    def _score_batch(self, network: Network, batch: _Parts, soundness: Soundness) -> None:
        run = self.forward or self.task.forward

        def forward(inputs: Any) -> Any:
            """Run the network on inputs under autocast."""
            with self.runtime.autocast():
                return run(network.model, inputs)

        with torch.inference_mode():
            outputs = self.task.watch(
                lambda: self.memory_format.run(forward, network.model, batch.inputs)
            )
            self.task.check(outputs, batch.given)
            predictions = self.task.predict(outputs, batch.targets)
            # Predictions are on the CPU if the device lacks float64.
            targets = map_tensors(batch.targets, lambda tensor: tensor.to(predictions.device))
            soundness.add(network.name, self.task.is_finite(predictions))
            samples = self.task.samples(predictions, targets)
            for board in self.boards:
                board.add(batch.number, network, predictions, samples, targets)

    def _results(self, group: Sequence[Network]) -> list[Result]:
        """Return the results of all candidates that are complete so far."""
        complete = [board for board in self.boards if board.complete]
        for board in complete:
            if not board.heard.isdisjoint(group):
                board.merge(self.peers)
        chosen = reference_of(self.candidates)
        reference = next((board for board in complete if board.candidate is chosen), None)
        for board in complete:
            result = self.known.get(board)
            # Results from before the reference was scored lack a comparison and are made again.
            if result is None or (result.versus is None and reference is not None):
                self.known[board] = self._result(board, reference)
        return [self.known[board] for board in complete]

    def _result(self, board: Board, reference: Board | None) -> Result:
        metrics, details = board.scores.compute(), board.details()
        lacking = {"n", self.task.metrics[0].key} - metrics.keys()
        if lacking:
            raise EvaluationError(
                f"the scores of {type(self.task).__name__} lack {', '.join(sorted(lacking))}",
                "Let compute() return metrics by their keys, and n, the number of samples.",
            )
        state, layers = board.describe_statistics()
        return Result(
            board.candidate,
            metrics,
            state,
            self._versus(board, reference),
            details | ({LAYERS: layers} if layers else {}),
        )

    def _versus(self, board: Board, reference: Board | None) -> Versus | None:
        if reference is None or board is reference:
            return None
        samples, baseline = joined(board.samples), joined(reference.samples)
        if samples is None or baseline is None:
            return None
        difference = compare(samples, baseline, seed=self.runtime.seed).scaled(samples.scale)
        metric = samples.metric or self.task.metrics[0].key
        return Versus(reference.candidate.name, metric, difference)


@dataclass(frozen=True)
class _Parts:
    """Parts of a batch.

    Attributes:
        number: Position of the batch in the pass.
        inputs: Argument of the forward function, on the device.
        targets: Targets on the device.
        given: Targets as the loader yielded them.
    """

    number: int
    inputs: Any
    targets: Any
    given: Any


def _fingerprint(targets: Any) -> int:
    """Compute a checksum of targets, to recognize passes over different data."""
    checksum = 0
    for tensor in tensors_of(targets):
        checksum = zlib.crc32(bytes_of(tensor), checksum)
    return checksum


def _require_state(task: Task) -> None:
    """Make sure that the scores of a task can be merged across processes."""
    scores = task.scores()
    lacking = [name for name in ("state", "merge") if not hasattr(scores, name)]
    if lacking:
        raise EvaluationError(
            f"the scores of {type(task).__name__} have no {' and no '.join(lacking)}, "
            "by which several processes tell each other what they have seen",
            "Define them, or start one process alone.",
        )


def _another_order() -> EvaluationError:
    return EvaluationError(
        "the data loader gives other samples, or another order, in each pass",
        "Use shuffle=False to evaluate.",
    )


def _phase(name: str, number: int, of: int) -> str:
    return name if of == 1 else f"{name}, pass {number} of {of}"
