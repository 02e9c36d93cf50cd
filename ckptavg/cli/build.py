"""Models, tasks, runtimes and data built from the options of a command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ckptavg.batchnorm.recompute import StatisticsPass
from ckptavg.cli.options.running import RunningOptions, Source
from ckptavg.data.loaders import Progress, Subset, open_loader, shard_loader
from ckptavg.data.seeding import seed_all
from ckptavg.data.streams import is_dataset
from ckptavg.distributed.peers import Peers, SingleProcess
from ckptavg.distributed.torchrun import TorchrunGroup
from ckptavg.errors import UsageError
from ckptavg.formats import Checkpoint
from ckptavg.models.batches import Batches, Forward
from ckptavg.models.runtime import Runtime
from ckptavg.specs import sources
from ckptavg.specs.importing import find_forward
from ckptavg.specs.prefixes import MODEL_HELP
from ckptavg.specs.recorded import ModelSource, complete_source, records_hyperparameters
from ckptavg.specs.tasks import default_task, make_task
from ckptavg.tasks import Task


def find_model(model: Source, checkpoints: Iterable[Checkpoint]) -> ModelSource:
    """Return the given or recorded model, with the arguments that checkpoints record.

    Raises:
        UsageError: No model is given, and none is recorded.
    """
    checkpoints = list(checkpoints)
    source = complete_source(model.spec, model.arguments, checkpoints)
    if source is not None:
        return source
    if any(map(records_hyperparameters, checkpoints)):
        raise UsageError(
            "Missing option '--model': Lightning records a model's arguments but not its class",
            "Name that: lightning:path/file.py:Class.",
        )
    raise UsageError(
        "Missing option '--model': the checkpoints do not record which model they are of",
        f"Name it: {MODEL_HELP}.",
    )


def build_model(
    running: RunningOptions, source: ModelSource, task: Task
) -> tuple[nn.Module, Runtime]:
    """Build the model, and the runtime with device, precision and loader options.

    Args:
        running: Options of the command.
        source: The model.
        task: The task, which has a default batch size.
    """
    loader = running.loader
    # Before the model is made: factories and forward passes draw random numbers, too.
    seed_all(loader.seed)
    model = sources.make_model(source.spec, source.arguments)
    runtime = Runtime.on(
        loader.device,
        model,
        amp=loader.amp,
        workers=loader.workers,
        seed=loader.seed,
        batch_size=loader.batch_size or task.batch_size,
    )
    return model, runtime


def build_forward(running: RunningOptions) -> Forward | None:
    """Import the function of ``--forward``; None where the option is not given."""
    if not running.forward:
        return None
    return find_forward(running.forward)


def build_task(running: RunningOptions) -> Task:
    """Make the task of ``--task``, or the default task of the data."""
    is_scoring = running.data.spec is not None
    data = running.data.spec or running.training.spec or ""
    return make_task(running.task or default_task(data), scoring=is_scoring)


def open_training_data(
    running: RunningOptions,
    source: ModelSource,
    runtime: Runtime,
    peers: Peers | None = None,
) -> Batches:
    """Open this process's batches of ``--train-data``.

    Args:
        running: Options of the command.
        source: The model, whose preset prepares images.
        runtime: Options of the loader.
        peers: Processes that share the data; this process alone where None.
    """
    samples = running.statistics.samples
    subset = None
    if samples is not None:
        subset = Subset(*samples)
    peers = peers or SingleProcess()
    return _open_batches(running.training, source, runtime, peers, subset, train=True)


def open_evaluation_data(
    running: RunningOptions,
    source: ModelSource,
    runtime: Runtime,
    peers: Peers | None = None,
) -> Batches:
    """Open this process's batches of ``--data``.

    Args:
        running: Options of the command.
        source: The model, whose preset prepares images.
        runtime: Options of the loader.
        peers: Processes that share the data; this process alone where None.
    """
    peers = peers or SingleProcess()
    return _open_batches(running.data, source, runtime, peers, None, train=False)


def build_statistics_pass(
    running: RunningOptions,
    checkpoints: Iterable[Checkpoint],
    processes: TorchrunGroup | None,
    progress: Progress = lambda *_: None,
) -> StatisticsPass:
    """Prepare the pass over ``--train-data`` that recomputes statistics.

    Args:
        running: Options of the command.
        checkpoints: Checkpoints that may record the model.
        processes: Processes that share the data; None for this process alone.
        progress: Function that receives the progress of the pass.
    """
    source = find_model(running.model, checkpoints)
    task = build_task(running)
    forward = build_forward(running)
    model, runtime = build_model(running, source, task)
    training = open_training_data(running, source, runtime, processes)
    return StatisticsPass(
        model,
        training,
        runtime,
        forward or task.run,
        progress,
        processes or SingleProcess(),
        running.statistics.exclude,
    )


def _open_batches(
    data_source: Source,
    source: ModelSource,
    runtime: Runtime,
    peers: Peers,
    subset: Subset | None,
    *,
    train: bool,
) -> Batches:
    data = _make_data(data_source, source, train=train)
    # Every process has the same loader; a Dataset is divided by sample.
    if peers.world_size > 1 and not is_dataset(data):
        return shard_loader(data, peers, runtime.seed, subset)
    return open_loader(data, runtime, shuffle=train, subset=subset, peers=peers)


def _make_data(data_source: Source, source: ModelSource, *, train: bool) -> Any:
    """Build the Dataset or loader of an option."""
    return sources.make_data(
        data_source.spec or "",
        data_source.arguments,
        train=train,
        model_spec=source.spec,
        image_settings=source.image_settings,
    )


@dataclass(frozen=True)
class ScoringCall:
    """Arguments of a function of the library that scores, from the options of a command.

    Attributes:
        model: The model.
        data: Evaluation data: a Dataset, or this process's batches.
        keywords: The keywords that ``evaluate`` has, too, and ``train_data``.
    """

    model: nn.Module
    data: Any
    keywords: Mapping[str, Any]


def build_scoring(
    running: RunningOptions, checkpoints: Iterable[Checkpoint], processes: TorchrunGroup | None
) -> ScoringCall:
    """Build model, data, task and all that a function of the library scores with.

    Args:
        running: Options of the command.
        checkpoints: Checkpoints that may record the model.
        processes: Processes that share the data; None for this process alone.

    Raises:
        CkptavgError: The model, the data or the task cannot be built.
    """
    source = find_model(running.model, checkpoints)
    task = build_task(running)
    forward = build_forward(running)
    model, runtime = build_model(running, source, task)
    peers = processes or SingleProcess()
    data = []
    for data_source, train in ((running.data, False), (running.training, True)):
        data.append(_make_share(data_source, source, peers, runtime.seed, train=train))
    subset = None
    if running.statistics.samples is not None:
        subset = Subset(*running.statistics.samples)
    keywords = {
        "train_data": data[1], "task": task, "device": runtime.device, "forward": forward,
        "exclude": running.statistics.exclude, "amp": runtime.amp,
        "batch_size": runtime.batch_size, "workers": runtime.workers, "seed": runtime.seed,
        "bn_samples": subset,
    }  # fmt: skip
    return ScoringCall(model, data[0], keywords)


def build_data(
    data: Source,
    running: RunningOptions,
    checkpoints: Iterable[Checkpoint],
    processes: TorchrunGroup | None,
) -> Any:
    """Build further evaluation data for ``build_scoring``: a Dataset, or this process's batches.

    Args:
        data: The data.
        running: Options of the command.
        checkpoints: Checkpoints that may record the model, whose preset prepares images.
        processes: Processes that share the data; None for this process alone.
    """
    source = find_model(running.model, checkpoints)
    peers = processes or SingleProcess()
    return _make_share(data, source, peers, running.loader.seed, train=False)


def _make_share(data: Source, source: ModelSource, peers: Peers, seed: int, *, train: bool) -> Any:
    """Build the Dataset of an option, or this process's share of a loader; None without a name."""
    if not data.spec:
        return None
    opened = _make_data(data, source, train=train)
    if peers.world_size > 1 and not is_dataset(opened):
        return shard_loader(opened, peers, seed)
    return opened
