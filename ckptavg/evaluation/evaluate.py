"""Evaluation of candidates on the same data, as Python calls it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.data.argument_checks import check_forward, check_model
from ckptavg.data.loaders import Subset, as_subset, open_loader
from ckptavg.display.progress import PhaseProgress, ProgressLike, open_progress
from ckptavg.distributed.peers import find_peers
from ckptavg.errors.notes import collect_notes
from ckptavg.evaluation.candidates import Candidate, CandidateLike, as_candidates
from ckptavg.evaluation.identity import EvaluationCall
from ckptavg.evaluation.results import Result, Results
from ckptavg.evaluation.results_file import ResultsFile, open_results
from ckptavg.evaluation.resume import ResultStore
from ckptavg.evaluation.session import score
from ckptavg.models.batches import Batches, Forward
from ckptavg.models.runtime import Runtime
from ckptavg.tasks import Task
from ckptavg.tasks.named import as_task

log = logging.getLogger("ckptavg")


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
    results: str | os.PathLike[str] | None = None,
    resume: bool = False,
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
        results: ``.json`` or ``.csv`` file to which the results are added after each pass. Other
            results in the file stay.
        resume: True to score only what ``results``, a JSON file, does not hold for the same
            weights, model, data and options; see ``ckptavg.evaluation.identity``.
        progress: True for a bar, a bar of tqdm, or a function of (phase, done, total) in samples;
            see ``ckptavg.display.progress``.

    Returns:
        One result per candidate, in order; printed as a table.

    Raises:
        UsageError: The model is not a module, or ``data`` is neither a Dataset nor a loader.
        OutputError: The file of results has other content, or cannot be written.
        ModelError: Weights do not fit the model.
        EvaluationError: The data and the outputs do not fit, or an output is NaN.
    """
    check_model(model)
    check_forward(forward)
    task = as_task(task)
    size = task.batch_size if batch_size is None else batch_size
    runtime = Runtime.on(device, model, amp=amp, batch_size=size, workers=workers, seed=seed)
    call = EvaluationCall(
        model, data, train_loader, task, forward, runtime, exclude, as_subset(bn_samples),
        keep_nonfinite,
    )  # fmt: skip
    file = open_results(results, resume=resume)
    with collect_notes() as notes, open_progress(progress, "samples") as reporter:
        every = as_candidates(candidates, has_training=train_loader is not None)
        if file is None:
            scored = _score(call, every, reporter)
        else:
            scored = _score_into(file, call, every, reporter, resume=resume)
    return Results(scored, task, notes)


def _score_into(
    file: ResultsFile,
    call: EvaluationCall,
    candidates: Sequence[Candidate],
    progress: PhaseProgress | None,
    *,
    resume: bool,
) -> list[Result]:
    """Score candidates, and store the results; with ``resume``, score only what the file lacks.

    If the results cannot be stored in the end, a warning says so and the results are returned,
    since scoring again would take long.
    """
    peers = find_peers()
    # Only the first process writes the file, which other hosts may not see.
    if peers.rank == 0:
        file.check(resume=resume)
    store = ResultStore(candidates, call.identify, file, resume=resume, peers=peers)
    scored = []
    if store.missing:
        scored = _score(call, store.missing, progress, store.save_so_far)
    results = store.merge(scored)
    failure = store.save_all(results)
    if failure is not None:
        log.warning("%s", failure)
    return results


def _score(
    call: EvaluationCall,
    candidates: Sequence[Candidate],
    progress: PhaseProgress | None,
    on_results: Callable[[Sequence[Result]], None] | None = None,
) -> list[Result]:
    """Open the loaders that candidates need, and score."""
    peers = find_peers()
    training = None
    if call.training is not None and any(candidate.recompute for candidate in candidates):
        training = open_loader(
            call.training, call.runtime, shuffle=True, subset=call.subset, peers=peers
        )
    elif call.training is not None:
        note_idle_training(candidates)
    return score(
        candidates,
        call.model,
        open_loader(call.data, call.runtime, shuffle=False, peers=peers),
        call.runtime,
        training,
        task=call.task,
        forward=call.forward,
        exclude=call.excluded,
        keep_nonfinite=call.keep_nonfinite,
        progress=progress,
        peers=peers,
        on_results=on_results,
    )


def note_idle_training(candidates: Sequence[Candidate]) -> None:
    """Note that training data serves no candidate."""
    log.info(
        "nothing is recomputed from the training data: of %d candidates none has statistics that "
        "are known to be stale", len(candidates),
    )  # fmt: skip
