"""Train along the learning rates of Izmailov et al. 2018, and leave checkpoints for ckptavg.

    python examples/train.py --out runs                      # digits, a minute
    python examples/train.py --out runs --root cifar --network vgg16_bn --budget 200 --device cuda

Each trajectory gets a directory of its own below ``--out``:

    sgd         the budget's schedule: constant, then linearly down to a hundredth; the baseline
    constant    from a part of the budget on, a constant learning rate
    cyclical    as before, but the learning rate falls in each cycle and jumps back
    fge         triangular cycles (Garipov et al. 2018): minima and maxima are saved
    swap        large batches, then workers with small ones, by seed (Gupta et al. 2020)
    lookahead   slow weights that follow the fast ones (Zhang et al. 2019), the budget's schedule

What trajectories have in common is trained once. All of them go on to ``--length`` budgets, except
for sgd, swap and lookahead, which end with the first. Nothing is averaged or scored here: that is
ckptavg's work.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time as clock
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import images as image_data
import networks
import torch
from images import Images, normalize
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom
from trajectories import TRAJECTORIES, Phase, Settings, Trajectory, file_name, make_trajectories


@dataclass(frozen=True)
class Options:
    """Where and how the training computes.

    Attributes:
        seed: Seed of the weights, of the order of the images and of their augmentation.
        precision: Type of the forward pass; None for float32.
        compile: Use torch.compile.
    """

    seed: int = 0
    precision: torch.dtype | None = None
    compile: bool = False

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        if self.precision is None:
            return nullcontext()
        return torch.autocast(device.type, self.precision)


class CheckpointWriter:
    """Writes checkpoints on a thread of its own, so that training does not wait for the disk."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._pending: list[Future[None]] = []

    def save(self, path: Path, checkpoint: dict[str, Any]) -> None:
        """Copy a checkpoint to the processor's memory, and write it in the background."""
        for pending in [p for p in self._pending if p.done()]:
            pending.result()  # a full disk ends the training here
            self._pending.remove(pending)
        copied = _copy_to_cpu(checkpoint)
        self._pending.append(self._thread.submit(_write, path, copied))

    def close(self) -> None:
        """Wait until everything is written."""
        for pending in self._pending:
            pending.result()
        self._thread.shutdown()


def _copy_to_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy_to_cpu(item) for key, item in value.items()}
    return value


def _write(path: Path, checkpoint: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    torch.save(checkpoint, temporary)
    temporary.replace(path)


class Lookahead:
    """Slow weights φ ← φ + α (θ - φ) every few steps, from which the fast ones θ go on."""

    ALPHA = 0.5
    STEPS = 5

    def __init__(self, model: nn.Module) -> None:
        self.slow = [parameter.detach().clone() for parameter in model.parameters()]
        self.step_count = 0

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        """Count a step of the fast weights; every fifth joins both."""
        self.step_count += 1
        if self.step_count % self.STEPS:
            return
        for slow, fast in zip(self.slow, model.parameters(), strict=True):
            slow.lerp_(fast, self.ALPHA)
            fast.copy_(slow)


class Training:
    """A network, its optimizer, and the epoch that both have come to.

    Args:
        model: The network, on the device.
        data: Training images, on the device.
        settings: Settings of the training.
        options: Seed, precision and compilation.
    """

    def __init__(
        self, model: nn.Module, data: Images, settings: Settings, options: Options
    ) -> None:
        self.model = model
        self.data = data
        self.settings = settings
        self.options = options
        self.forward = torch.compile(model) if options.compile else model
        self.generator = torch.Generator().manual_seed(options.seed)
        self.optimizer = torch.optim.SGD(
            model.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )
        self.epoch = 0
        self.phase: Phase | None = None
        self.lookahead: Lookahead | None = None

    def branch(self) -> Training:
        """Return a copy that goes on from here by itself."""
        twin = Training(copy.deepcopy(self.model), self.data, self.settings, self.options)
        twin.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        twin.generator.set_state(self.generator.get_state())
        twin.epoch, twin.phase = self.epoch, self.phase
        twin.lookahead = copy.deepcopy(self.lookahead)
        return twin

    def train_epoch(
        self, trajectory: Trajectory, save: Callable[[float, float, Tensor], None]
    ) -> None:
        """Train one epoch.

        Args:
            trajectory: Gives the batches and the learning rate of each step.
            save: Called after each step with the time in epochs, the step's learning rate and the
                epoch's mean loss so far.
        """
        self._begin(trajectory)
        count = len(self.data.labels)
        order = torch.randperm(count, generator=self.generator)
        batches = torch.split(order, trajectory.phase(self.epoch).batch_size)
        total = torch.zeros((), device=self.data.labels.device)
        seen = 0
        for index, batch in enumerate(batches, start=1):
            time = self.epoch + index / len(batches)
            rate = trajectory.rate(time)
            total += self._step(batch, rate) * len(batch)
            seen += len(batch)
            save(time, rate, total / seen)
        self.epoch += 1

    def _begin(self, trajectory: Trajectory) -> None:
        """Take up the trajectory's phase."""
        self.model.train()
        phase = trajectory.phase(self.epoch)
        if self.phase is not None and phase.worker != self.phase.worker:
            self.generator.manual_seed(self.options.seed + 1000 * phase.worker)
        self.phase = phase
        if trajectory.slow and self.lookahead is None:
            self.lookahead = Lookahead(self.model)

    def _step(self, batch: Tensor, rate: float) -> Tensor:
        labels = self.data.labels
        chosen = batch.to(labels.device)
        pixels = normalize(self.data.augment(chosen, self.generator))
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with self.options.autocast(labels.device):
            loss = F.cross_entropy(self.forward(pixels), labels[chosen])
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.lookahead is not None:
            self.lookahead.step(self.model)
        return loss.detach()

    def checkpoint(self, time: float, rate: float, loss: Tensor) -> dict[str, Any]:
        """Return what is saved: the weights under ``state_dict``, and what is known about them."""
        state = dict(self.model.state_dict())
        if self.lookahead is not None:
            names = [name for name, _ in self.model.named_parameters()]
            state |= dict(zip(names, self.lookahead.slow, strict=True))
        return {
            "state_dict": state,
            "epoch": int(time) if time == int(time) else time,
            "lr": rate,
            "train_loss": float(loss),
        }


class Trainer:
    """Follows trajectories, training once what several have in common.

    Args:
        out: Directory below which each trajectory has its directory.
        writer: Writes the checkpoints.
    """

    def __init__(self, out: Path, writer: CheckpointWriter) -> None:
        self.out = out
        self.writer = writer

    def follow(self, training: Training, trajectories: Sequence[Trajectory]) -> None:
        """Train all trajectories from here to their ends."""
        while trajectories := [t for t in trajectories if t.epochs > training.epoch]:
            first, *others = _group(trajectories, training)
            for group in others:
                self.follow(training.branch(), group)
            trajectories = first
            self._train_epoch(training, first)

    def _train_epoch(self, training: Training, trajectories: Sequence[Trajectory]) -> None:
        started, epoch = clock.perf_counter(), training.epoch

        saved_until = float(epoch)

        def save(time: float, rate: float, loss: Tensor) -> None:
            nonlocal saved_until
            for trajectory in trajectories:
                # A save in the middle of an epoch may fall between two steps: the later one saves.
                for due in trajectory.saves:
                    if saved_until + 1e-9 < due <= time + 1e-9:
                        path = self.out / trajectory.name / file_name(due)
                        self.writer.save(path, training.checkpoint(due, rate, loss))
            saved_until = time

        training.train_epoch(trajectories[0], save)
        names = ", ".join(t.name for t in trajectories)
        seconds = clock.perf_counter() - started
        print(f"epoch {epoch + 1} of {names}: {seconds:.1f} s", file=sys.stderr)


def _group(trajectories: Sequence[Trajectory], training: Training) -> list[list[Trajectory]]:
    """Group trajectories whose next epoch is the same."""
    groups: dict[tuple[Any, ...], list[Trajectory]] = {}
    epoch = training.epoch
    for trajectory in trajectories:
        phase = trajectory.phase(epoch)
        steps = math.ceil(len(training.data.labels) / phase.batch_size)
        rates = [trajectory.rate(epoch + index / steps) for index in range(1, steps + 1)]
        key = (phase, trajectory.slow, tuple(rates))
        groups.setdefault(key, []).append(trajectory)
    return list(groups.values())


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of every training, whatever its trajectories."""
    add = parser.add_argument
    add("--root", default="", help="CIFAR files or image folders; digits where empty")
    add("--network", default="", help="a function of networks.py (default: by the data)")
    add("--budget", type=int, default=40, help="epochs of conventional training")
    add("--start", type=float, default=0.75, help="part of the budget before averaging begins")
    add("--length", type=float, default=1.5, help="budgets that averaged trajectories last")
    add("--lr", type=float, default=0.05, help="initial learning rate")
    add("--swa-lr", type=float, default=0.02, help="constant, and highest of a cycle")
    add("--low-lr", type=float, default=0.0005, help="lowest of a cycle")
    add("--cycle", type=int, default=2, help="epochs of a cycle")
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=5e-4)
    add("--batch-size", type=int, default=128)
    add("--large-batch", type=int, default=4, help="factor of swap's first phase")
    add("--workers", type=int, default=3, help="of swap's second phase")
    add("--device", default="cpu")
    add("--bf16", action="store_true", help="forward pass in bfloat16")
    add("--compile", action="store_true", help="use torch.compile")


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Train along the learning rates of the SWA paper, and leave checkpoints.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory of the trajectories")
    add("--trajectories", default="sgd,constant,cyclical", help=f"of {', '.join(TRAJECTORIES)}")
    add("--init", type=Path, help="checkpoint of ours to go on from, for fine-tuning")
    add("--seed", type=int, default=0)
    add_options(parser)
    options = parser.parse_args()
    names = options.trajectories.split(",")
    if unknown := sorted(set(names) - set(TRAJECTORIES)):
        parser.error(f"--trajectories: {unknown[0]!r} is none of {', '.join(TRAJECTORIES)}")
    return options


def read_settings(chosen: argparse.Namespace) -> Settings:
    """Return the settings that the options name."""
    return Settings(**{name: getattr(chosen, name) for name in Settings.__dataclass_fields__})


def network_name(chosen: argparse.Namespace) -> str:
    """Return the name of the network's function, by the data where no option names it."""
    return chosen.network or ("preresnet20" if chosen.root else "preresnet8")


def train(
    chosen: argparse.Namespace,
    trajectories: Sequence[Trajectory],
    out: Path,
    *,
    seed: int,
    init: Path | None = None,
) -> None:
    """Train a network along trajectories.

    Args:
        chosen: Values of the options that ``add_options`` adds.
        trajectories: The trajectories.
        out: Directory below which each trajectory gets its directory.
        seed: Seed of the weights, of the order of the images and of their augmentation.
        init: Checkpoint with the weights to begin with; random ones where None.
    """
    device = torch.device(chosen.device)
    options = Options(seed, torch.bfloat16 if chosen.bf16 else None, chosen.compile)
    data = image_data.load(chosen.root, "train").to(device)
    torch.manual_seed(seed)
    model = getattr(networks, network_name(chosen))(data.classes)
    if init:
        model.load_state_dict(torch.load(init, map_location="cpu")["state_dict"])
    model = model.to(device, memory_format=torch.channels_last)
    training = Training(model, data, read_settings(chosen), options)
    writer = CheckpointWriter()
    try:
        Trainer(out, writer).follow(training, trajectories)
    finally:
        writer.close()


def main() -> None:
    """Train all trajectories that the command line names."""
    chosen = parse_options()
    trajectories = make_trajectories(chosen.trajectories.split(","), read_settings(chosen))
    train(chosen, trajectories, chosen.out, seed=chosen.seed, init=chosen.init)


if __name__ == "__main__":
    main()
