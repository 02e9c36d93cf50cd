"""Models, tasks, runtimes and data built from the options of a command."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ckptavg.batchnorm.checkpoints import Pass
from ckptavg.data.loaders import Progress, Subset, open_loader, share
from ckptavg.data.seeding import seed_all
from ckptavg.data.streams import is_dataset
from ckptavg.distributed.peers import Peers, SingleProcess
from ckptavg.errors import UsageError
from ckptavg.formats import Checkpoint
from ckptavg.models.batches import Batches, Forward
from ckptavg.models.device import Runtime
from ckptavg.specs import sources
from ckptavg.specs.importing import find_forward
from ckptavg.specs.recorded import ModelSource, complete_source, records_hyperparameters
from ckptavg.specs.tasks import default_task, make_task
from ckptavg.tasks import Task


def model_source(settings: Mapping[str, Any], checkpoints: Iterable[Checkpoint]) -> ModelSource:
    """Return the model that is named or recorded, with the arguments that checkpoints record.

    Raises:
        UsageError: None is named, and none is recorded.
    """
    checkpoints = list(checkpoints)
    arguments = sources.parse_arguments(settings["model_arg"])
    source = complete_source(settings["model_spec"], arguments, checkpoints)
    if source is not None:
        return source
    if any(map(records_hyperparameters, checkpoints)):
        raise UsageError(
            "Missing option '--model': Lightning records a model's arguments but not its class",
            "Name that: lightning:path/file.py:Class.",
        )
    raise UsageError(
        "Missing option '--model': the checkpoints do not record which model they are of",
        f"Name it: {sources.MODEL_HELP}.",
    )


def model_and_runtime(
    settings: Mapping[str, Any], source: ModelSource, kind: Task
) -> tuple[nn.Module, Runtime]:
    """Build the model, and the runtime with its device, precision and loader options."""
    seed_all(settings["seed"])  # of what a forward pass draws, and what factories do
    model = sources.make_model(source.spec, source.arguments)
    options = {name: settings[name] for name in ("amp", "workers", "seed")}
    options["batch_size"] = settings["batch_size"] or kind.batch_size
    return model, Runtime.on(settings["device"], model, **options)


def forward(settings: Mapping[str, Any]) -> Forward | None:
    """Find the function that ``--forward`` names."""
    return find_forward(settings["forward"]) if settings["forward"] else None


def task(settings: Mapping[str, Any]) -> Task:
    """Make the task that ``--task`` names, or the default task of the data."""
    scored = settings.get("data")
    data = scored or settings["train_data"]
    return make_task(settings["task"] or default_task(data), scoring=scored is not None)


def training_data(
    settings: Mapping[str, Any],
    source: ModelSource,
    runtime: Runtime,
    peers: Peers | None = None,
) -> Batches:
    """Open this process's batches of ``--train-data``."""
    wanted: tuple[int, bool] | None = settings["bn_samples"]
    subset = None if wanted is None else Subset(*wanted)
    return _batches(
        settings, "train_data", source, runtime, peers or SingleProcess(), subset, train=True
    )


def statistics_pass(
    settings: Mapping[str, Any],
    checkpoints: Iterable[Checkpoint],
    processes: Peers | None,
    progress: Progress = lambda *_: None,
) -> Pass:
    """Prepare the pass over ``--train-data`` that recomputes statistics."""
    source = model_source(settings, checkpoints)
    kind = task(settings)
    custom_forward = forward(settings)
    model, runtime = model_and_runtime(settings, source, kind)
    training = training_data(settings, source, runtime, processes)
    return Pass(
        model,
        training,
        runtime,
        custom_forward or kind.run,
        progress,
        processes or SingleProcess(),
        settings["bn_exclude"],
    )


def evaluation_data(
    settings: Mapping[str, Any],
    source: ModelSource,
    runtime: Runtime,
    peers: Peers | None = None,
) -> Batches:
    """Open this process's batches of ``--data``."""
    return _batches(settings, "data", source, runtime, peers or SingleProcess(), None, train=False)


def _batches(
    settings: Mapping[str, Any],
    name: str,
    source: ModelSource,
    runtime: Runtime,
    peers: Peers,
    subset: Subset | None,
    *,
    train: bool,
) -> Batches:
    arguments = sources.parse_arguments(settings[f"{name}_arg"])
    data = sources.make_data(
        settings[name],
        arguments,
        train=train,
        model_spec=source.spec,
        image_settings=source.image_settings,
    )
    if peers.world_size > 1 and not is_dataset(data):  # a loader that all of them have alike
        return share(data, peers, runtime.seed, subset)
    return open_loader(data, runtime, shuffle=train, subset=subset, peers=peers)
