"""Options of commands that run a model: the model, the data, and how batches are run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptavg.cli.options.declare import bundle, option, together
from ckptavg.cli.options.param_types import positive, subset, whole
from ckptavg.errors import UsageError
from ckptavg.specs.prefixes import DATA_FORMS, IMAGE_FORMS, MODEL_FORMS

if TYPE_CHECKING:
    from ckptavg.specs.arguments import Arguments

F = TypeVar("F", bound=Callable[..., Any])
_RUN = "Running the model"
_OWN = " or file.py:function."


@dataclass(frozen=True)
class Source:
    """A model or data, as named on the command line.

    Attributes:
        spec: The specification; None where the option is not given.
        pairs: Arguments of the factory, as ``key=value``.
    """

    spec: str | None = None
    pairs: tuple[str, ...] = ()

    @property
    def arguments(self) -> Arguments:
        """Arguments of the factory.

        Raises:
            UsageError: One of the texts is not ``key=value``.
        """
        from ckptavg.specs.arguments import parse_arguments  # noqa: PLC0415 - slow to import

        return parse_arguments(self.pairs)


@dataclass(frozen=True)
class LoaderOptions:
    """Options of the device and of the loading of data.

    Attributes:
        device: Name of the device, or ``auto``.
        amp: Reduced precision of the forward pass, or ``off``.
        batch_size: Samples per batch; None for the task's default.
        workers: Processes that load data.
        seed: Seed of the training data's order, of subsets and of augmentation.
    """

    device: str
    amp: str
    batch_size: int | None
    workers: int
    seed: int


@dataclass(frozen=True)
class StatisticsOptions:
    """Options of the BatchNorm statistics that are recomputed.

    Attributes:
        samples: Number of training samples, and True if they are stratified; None for all.
        exclude: Patterns of the names of layers that keep their statistics.
    """

    samples: tuple[int, bool] | None
    exclude: tuple[str, ...]


@dataclass(frozen=True)
class RunningOptions:
    """Options of a command that runs a model.

    Attributes:
        model: The model.
        data: Data to score on.
        training: Training data, from which statistics are recomputed.
        loader: Device and loading of data.
        statistics: Statistics that are recomputed.
        task: Name of the task; None for the data's default.
        forward: Specification of a function that calls the model; None for the task's own call.
    """

    model: Source
    data: Source
    training: Source
    loader: LoaderOptions
    statistics: StatisticsOptions
    task: str | None
    forward: str | None

    def check_statistics(self) -> None:
        """Refuse options of recomputed statistics without training data.

        Raises:
            UsageError: There is such an option.
        """
        if self.training.spec:
            return
        if self.statistics.samples is not None:
            raise UsageError("--bn-samples needs --train-data")
        if self.statistics.exclude:
            raise UsageError("--bn-exclude needs --train-data")
        if self.training.pairs:
            raise UsageError("--train-data-arg needs --train-data")

    def check_scoring(self) -> None:
        """Refuse options of scoring without data to score on.

        Raises:
            UsageError: There is such an option.
        """
        self.check_statistics()
        if self.data.spec:
            return
        given = {
            "--model": self.model.spec,
            "--model-arg": self.model.pairs,
            "--train-data": self.training.spec,
            "--data-arg": self.data.pairs,
            "--task": self.task,
            "--forward": self.forward,
        }
        for flag, value in given.items():
            if value:
                raise UsageError(f"{flag} needs --data, which is scored")


def _read_options(
    *,
    model_spec: str | None,
    model_arguments: tuple[str, ...],
    data_spec: str | None = None,
    data_arguments: tuple[str, ...] = (),
    train_data_spec: str | None,
    train_data_arguments: tuple[str, ...],
    device: str,
    amp: str,
    batch_size: int | None,
    workers: int,
    seed: int,
    bn_samples: tuple[int, bool] | None,
    bn_exclude: tuple[str, ...],
    task: str | None,
    forward: str | None,
) -> RunningOptions:
    return RunningOptions(
        model=Source(model_spec, model_arguments),
        data=Source(data_spec, data_arguments),
        training=Source(train_data_spec, train_data_arguments),
        loader=LoaderOptions(device, amp, batch_size, workers, seed),
        statistics=StatisticsOptions(bn_samples, bn_exclude),
        task=task,
        forward=forward,
    )


_model_options = together(
    option(
        _RUN, "--model", "model_spec", metavar="SPEC", common=True,
        help=f"The network: {MODEL_FORMS}, "
        "package.module:function or file.py:function.  [default: what timm or Hugging Face "
        "recorded in the checkpoint]",
    ),
    option(
        _RUN, "--model-arg", "model_arguments", multiple=True, metavar="K=V",
        help="Argument of the model's function, such as num_classes=10; may be repeated.  "
        "[default: what timm or Lightning recorded]",
    ),
)  # fmt: skip


def _data_options(name: str, text: str, kinds: str, *, required: bool) -> Callable[[F], F]:
    """Declare the options of a source of data."""
    argument = name.replace("-", "_")
    return together(
        option(
            _RUN, f"--{name}", f"{argument}_spec", required=required, metavar="SPEC", common=True,
            help=f"{text}: {kinds}{_OWN}",
        ),
        option(
            _RUN, f"--{name}-arg", f"{argument}_arguments", multiple=True, metavar="K=V",
            help=f"Argument of the function of --{name}; may be repeated.",
        ),
    )  # fmt: skip


_loader_options = together(
    option(
        _RUN, "--device", default="auto", show_default=True, metavar="NAME", common=True,
        help="auto, cpu, cuda[:N] or mps; auto takes a GPU if there is one.",
    ),
    option(
        _RUN, "--amp", type=click.Choice(["off", "bf16", "fp16"]), default="off",
        show_default=True, help="Reduced precision of the forward pass.",
    ),
    option(
        _RUN, "-b", "--batch-size", type=positive, metavar="N",
        help="Samples per batch, unless the data is a loader.  [default: 128; 8 windows of text]",
    ),
    option(
        _RUN, "-j", "--workers", type=whole, default="0", show_default=True,
        metavar="N", help="Processes that load data, unless the data is a loader.",
    ),
    option(
        _RUN, "--seed", type=int, default=0, show_default=True, metavar="N",
        help="Seed of the training data's order, subset and augmentation.",
    ),
    option(
        _RUN, "--bn-samples", type=subset, metavar="N[:stratified]",
        help="Recompute statistics from N training samples drawn at random.  [default: all]",
    ),
    option(
        _RUN, "--bn-exclude", multiple=True, metavar="PATTERN",
        help="Keep the statistics of matching layers, such as 'stem.*'; may be repeated.",
    ),
    option(
        _RUN, "--task", metavar="NAME",
        help="image-classification, causal-lm, multi-label, regression or file.py:Task.  "
        "[default: causal-lm for text, else image-classification]",
    ),
    option(
        _RUN, "--forward", metavar="file.py:fn",
        help="fn(model, batch) runs the model on a batch as the data gives it.  "
        "[default: pass the parts that the model's forward names]",
    ),
)  # fmt: skip


def running_options(
    training: str,
    *,
    required: bool = False,
    scoring: str | None = None,
    must_score: bool = True,
) -> Callable[[F], F]:
    """Declare the options of a command that runs a model, passed as ``running``.

    Args:
        training: Help of the training data.
        required: True if the training data are required.
        scoring: Help of the data to score on; None for a command that does not score.
        must_score: True if the data to score on are required.
    """
    data_options = []
    if scoring is not None:
        data_options.append(_data_options("data", scoring, DATA_FORMS, required=must_score))
    data_options.append(_data_options("train-data", training, IMAGE_FORMS, required=required))
    return bundle("running", _read_options, _model_options, *data_options, _loader_options)
