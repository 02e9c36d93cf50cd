"""Evaluation of candidates on the same data, as Python calls it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.data.argument_checks import check_model
from ckptavg.data.loaders import Subset, as_subset, open_loader
from ckptavg.display.progress import ProgressLike, open_progress
from ckptavg.distributed.peers import find_peers
from ckptavg.errors.notes import collect_notes
from ckptavg.evaluation.candidates import Candidate, CandidateLike, as_candidates
from ckptavg.evaluation.results import Results
from ckptavg.evaluation.session import score
from ckptavg.models.batches import Batches, Forward
from ckptavg.models.device import Runtime
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
