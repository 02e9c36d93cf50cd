"""``ckptavg update-bn``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckptavg.cli.command import command
from ckptavg.cli.console import Report, count_text
from ckptavg.cli.options.declare import option
from ckptavg.cli.options.param_types import output
from ckptavg.cli.options.running import RunningOptions, running_options
from ckptavg.distributed.torchrun import TorchrunGroup

if TYPE_CHECKING:
    from ckptavg.batchnorm.update import BatchNormResult
    from ckptavg.formats.provenance import Provenance

_OUT = "Output"


@command("update-bn", shared=True)
@click.argument("checkpoint", metavar="CKPT")
@option(
    _OUT, "-o", "--out", required=True, metavar="OUT", type=output, common=True,
    help="Where the copy goes.",
)  # fmt: skip
@option(_OUT, "--overwrite", is_flag=True, common=True, help="Replace an existing output.")
@option(
    _OUT, "--key", metavar="KEY", common=True,
    help="The entry that holds the weights.  [default: found]",
)  # fmt: skip
@running_options("Training data", required=True)
def update_bn(
    report: Report,
    processes: TorchrunGroup | None,
    checkpoint: str,
    out: str,
    overwrite: bool,
    key: str | None,
    running: RunningOptions,
) -> None:
    """Recompute a checkpoint's BatchNorm statistics with a pass over training data.

    \b
      ckptavg update-bn swa.safetensors --model torchvision:resnet50 \\
          --train-data imagefolder:train -o swa_bn.safetensors
    """
    from ckptavg.batchnorm import checkpoints  # noqa: PLC0415 - help is shown without torch
    from ckptavg.cli.build import build_statistics_pass  # noqa: PLC0415
    from ckptavg.formats import open_checkpoint  # noqa: PLC0415

    # Opened first: a wrong path is told before the model is made.
    opened = open_checkpoint(checkpoint, key)
    with report.samples_progress() as progress:
        how = build_statistics_pass(
            running, [opened], processes, lambda *done: progress("BatchNorm", *done)
        )
        result, provenance = checkpoints.update_checkpoint(opened, out, how, overwrite=overwrite)
    report.line(f"wrote {out} ({_describe(result, provenance.bn)})")
    report.result(
        {
            "output": out,
            **_recorded_statistics(provenance),
            "layers": result.layers,
            "samples": result.samples,
            "batches": result.batches,
            "unreached": list(result.unreached),
        }
    )


def _recorded_statistics(provenance: Provenance) -> dict[str, Any]:
    layers = provenance.bn_layers
    return {"bn": provenance.bn} | ({"bn_layers": layers} if layers else {})


def _describe(result: BatchNormResult, state: str | None) -> str:
    """Describe the state of the statistics."""
    if state == "none":
        return "no BatchNorm statistics"
    # Layers exist, but all of them were excluded or frozen.
    if not result.layers:
        return f"its statistics unchanged: {state}"
    layers, samples = count_text(result.layers, "layer"), count_text(result.samples, "sample")
    state_suffix = "" if state == "recomputed" else f", {state}"
    return f"statistics of {layers} from {samples}{state_suffix}"
