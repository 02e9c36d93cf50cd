"""Options that several commands share, in named groups."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptavg.cli import launcher
from ckptavg.cli import signals as ending
from ckptavg.cli.error_lines import show_in_one_line
from ckptavg.cli.help import EVERYWHERE, GroupedOption
from ckptavg.cli.libraries import silence_libraries
from ckptavg.cli.param_types import numbers, pair, positive, scheme, subset, whole
from ckptavg.errors import UsageError

if TYPE_CHECKING:
    from ckptavg.cli.also import Also

F = TypeVar("F", bound=Callable[..., Any])
log = logging.getLogger("ckptavg")


def option(group: str, *names: str, **settings: Any) -> Callable[[F], F]:
    """Make a ``click.option`` in a group of the help; ``common`` ones are in the short help."""
    return click.option(*names, cls=GroupedOption, group=group, **settings)


def together(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Combine decorators into one, the first outermost, so that help keeps the order."""

    def decorate(function: F) -> F:
        return functools.reduce(lambda f, d: d(f), reversed(decorators), function)

    return decorate


_WHICH = "Which checkpoints (of each run, in this order)"
selection_options = together(
    option(
        _WHICH, "--glob", metavar="PATTERN",
        help="Only names, or ends of paths, that match.  [default: all]",
    ),
    option(
        _WHICH, "--skip", multiple=True, metavar="PATTERN",
        help="No files and directories of such names; may be repeated.",
    ),
    option(_WHICH, "--from", "first", type=float, metavar="STEP", help="From this step on."),
    option(_WHICH, "--to", "final", type=float, metavar="STEP", help="Up to and with this step."),
    option(
        _WHICH, "--every", type=positive, metavar="N", help="Every Nth, counted from the last one."
    ),
    option(
        _WHICH, "--cycle", type=pair, metavar="C[:OFFSET]",
        help="The ends of cycles of C checkpoints: positions OFFSET, OFFSET+C, ... "
        "[default OFFSET: C]",
    ),
    option(
        _WHICH, "--at-lr-min", is_flag=True, common=True,
        help="Only where the recorded learning rate is lowest: the ends of its cycles.",
    ),
    option(
        _WHICH, "--best", type=positive, metavar="N", common=True,
        help="The best N by a recorded metric (--metric).",
    ),
    option(
        _WHICH, "--metric", metavar="NAME",
        help="The metric of --best; `inspect` lists them.  [default: the only one]",
    ),
    option(
        _WHICH, "--mode", type=click.Choice(["max", "min"]),
        help="Which of its values is the best.  [default: by its name: acc max, loss min, ...]",
    ),
    option(
        _WHICH, "--sample", type=pair, metavar="N[:SEED]",
        help="N of them drawn at random, to see how far the choice matters.  [default SEED: 0]",
    ),
    option(
        _WHICH, "--last", type=positive, metavar="N", common=True,
        help="The last N.  [default: all]",
    ),
)  # fmt: skip


_HOW = "How they are weighted"
scheme_options = together(
    option(
        _HOW, "--scheme", metavar="NAME[:k=v,...]", default="uniform", show_default=True,
        type=scheme, common=True,
        help="uniform, ema:decay=0.9[,debias=true][,per=step], linear or lawa:k=5.",
    ),
    option(
        _HOW, "--weights", type=numbers, metavar="A,B,...",
        help="One number per checkpoint, in place of a scheme; they are divided by their sum.",
    ),
)  # fmt: skip

_WHAT = "What is averaged"
_KEY = "The entry that holds the weights, such as ema or state.model"
key_option = option(
    _WHAT, "--key", metavar="KEY", common=True, help=f"{_KEY}.  [default: found]"
)  # fmt: skip
keys_option = option(
    _WHAT, "--key", "keys", multiple=True, metavar="KEY", common=True,
    help=f"{_KEY}; may be repeated, to score several side by side.  [default: found]",
)  # fmt: skip
tensor_options = together(
    option(
        _WHAT, "--include", multiple=True, metavar="PATTERN",
        help="Average only tensors of such names; may be repeated.  [default: all]",
    ),
    option(
        _WHAT, "--exclude", multiple=True, metavar="PATTERN",
        help="Do not average tensors of such names; may be repeated.",
    ),
    option(
        _WHAT, "--base", metavar="CKPT",
        help="The checkpoint that tensors which are not averaged come from.  [default: the last]",
    ),
    option(
        _WHAT, "--dtype", default="keep", show_default=True,
        type=click.Choice(["keep", "float32", "bfloat16", "float16", "float64"]),
        help="Type of the averaged floats.",
    ),
    option(
        _WHAT, "--on-nonfinite", type=click.Choice(["error", "keep"]), default="error",
        show_default=True, help="What to do if an average has NaN or inf.",
    ),
)  # fmt: skip

_RUN = "Running the model"
_IMAGES = "imagefolder:DIR, cifar10:DIR, cifar100:DIR"
_TEXT = ", text:FILE, tokens:FILE"
_OWN = " or file.py:function."


model_options = together(
    option(
        _RUN, "--model", "model_spec", metavar="SPEC", common=True,
        help="The network: torchvision:NAME, timm:NAME, hf:DIR, lightning:file.py:Class, "
        "package.module:function or file.py:function.  [default: what timm or Hugging Face "
        "recorded in the checkpoint]",
    ),
    option(
        _RUN, "--model-arg", multiple=True, metavar="K=V",
        help="Argument of the model's function, such as num_classes=10; may be repeated.  "
        "[default: what timm or Lightning recorded]",
    ),
)  # fmt: skip


def data_options(name: str, text: str, *, required: bool) -> Callable[[F], F]:
    """A source of data; text is for scoring only."""
    kinds = _IMAGES + ("" if name == "train-data" else _TEXT) + _OWN
    return together(
        option(
            _RUN, f"--{name}", required=required, metavar="SPEC", common=True,
            help=f"{text}: {kinds}",
        ),
        option(
            _RUN, f"--{name}-arg", multiple=True, metavar="K=V",
            help=f"Argument of the function of --{name}; may be repeated.",
        ),
    )  # fmt: skip


loader_options = together(
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
        metavar="N", help="Processes that load data, unless it is a loader.",
    ),
    option(
        _RUN, "--seed", type=int, default=0, show_default=True, metavar="N",
        help="Of the training data's order, its subset and its augmentation.",
    ),
    option(
        _RUN, "--bn-samples", type=subset, metavar="N[:stratified]",
        help="Recompute statistics from N training samples drawn at random.  [default: all]",
    ),
    option(
        _RUN, "--bn-exclude", multiple=True, metavar="PATTERN",
        help="Recompute no statistics of layers of such names, such as 'stem.*'; may be repeated.",
    ),
    option(
        _RUN, "--task", metavar="NAME",
        help="image-classification, causal-lm, multi-label, regression or file.py:Task.  "
        "[default: causal-lm for text, else image-classification]",
    ),
    option(
        _RUN, "--forward", metavar="file.py:fn",
        help="fn(model, batch) runs the model on a batch as the data gives it.  "
        "[default: what of the batch the model's forward names]",
    ),
)  # fmt: skip


def everywhere(function: F) -> F:
    """Add the options of every command, pass a ``report``, and turn errors into one line.

    The command is one process's work: a launcher of several gets an error.
    """

    @functools.wraps(function)
    def run(**values: Any) -> Any:
        launcher.refuse_several(f"ckptavg {click.get_current_context().info_name}")
        return function(**values)

    return _everywhere(run)  # type: ignore[return-value]


def everywhere_by_several(function: F) -> F:
    """As ``everywhere``, and pass the ``processes`` that share the work; None for a single one."""

    @functools.wraps(function)
    def run(**values: Any) -> Any:
        with launcher.join_processes() as processes:
            return function(processes=processes, **values)

    return _everywhere(run)  # type: ignore[return-value]


def _everywhere(function: F) -> F:
    options = together(
        option(EVERYWHERE, "--json", "as_json", is_flag=True, help="Print the result as JSON."),
        option(
            EVERYWHERE, "--threads", type=positive, metavar="N",
            help="Processor threads that compute. On a machine that others use, too, one is often "
            "faster than many that wait for each other.  [default: OMP_NUM_THREADS, else one per "
            "core]",
        ),
        option(
            EVERYWHERE, "-q", "--quiet", is_flag=True,
            help="The result alone: no notes, no progress, and no plan of what is written.",
        ),
        option(
            EVERYWHERE, "-v", "--verbose", count=True,
            help="More notes, and those of transformers and DeepSpeed.",
        ),
        option(EVERYWHERE, "--debug", is_flag=True, help="Show the traceback of an error."),
    )  # fmt: skip

    @functools.wraps(function)
    def run(
        *,
        as_json: bool,
        threads: int | None,
        quiet: bool,
        verbose: int,
        debug: bool,
        **values: Any,
    ) -> Any:
        report = launcher.open_report(as_json=as_json, verbosity=-1 if quiet else verbose)
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # which nobody needs here
        with (
            ending.by_signals() as signals,
            ending.by_interrupts(_outputs(**values), signals),
            show_in_one_line(debug),
            report.notes(),
            silence_libraries(verbose=bool(verbose)),
            _limited(threads),
        ):
            return function(report=report, **values)

    return options(run)  # type: ignore[return-value]


def _limited(threads: int | None) -> AbstractContextManager[None]:
    """Compute by as many threads as were asked for."""
    if threads is None:
        return nullcontext()
    from ckptavg.distributed.threads import (  # noqa: PLC0415 - help is shown without torch
        limit_threads,
    )

    return limit_threads(threads)


def _outputs(
    out: str | None = None,
    results: object = None,
    further: Sequence[Also] = (),
    **_: Any,
) -> list[str]:
    """Return the paths of a command's outputs."""
    further_outputs = [extra.path(out) for extra in further] if out else []
    return [str(path) for path in (out, results) if path] + further_outputs


def check_statistics_options(settings: Mapping[str, Any]) -> None:
    """Make sure that there are data where an option says how statistics are recomputed.

    Raises:
        UsageError: There are none.
    """
    if settings["train_data"]:
        return
    if settings["bn_samples"] is not None:
        raise UsageError("--bn-samples says how much of --train-data is used: name that")
    if settings["bn_exclude"]:
        raise UsageError("--bn-exclude says what --train-data does not recompute: name that")
