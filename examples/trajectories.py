"""Trajectories of Izmailov et al. 2018: learning rates, batches, and when checkpoints are saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

TRAJECTORIES = ("sgd", "constant", "cyclical", "fge", "swap", "lookahead")


@dataclass(frozen=True)
class Settings:
    """Everything that the trajectories of one training share.

    Attributes:
        budget: Epochs of conventional training.
        start: Share of the budget after which the averaged trajectories begin.
        length: Budgets after which these end.
        lr: Initial learning rate.
        swa_lr: Learning rate of the constant trajectory, and the highest of the cyclical ones.
        low_lr: Lowest learning rate of a cycle.
        cycle: Epochs of a cycle.
        momentum: Momentum of SGD.
        weight_decay: Factor of the L2 term.
        batch_size: Images per step.
        large_batch: Factor by which swap's first phase enlarges batch and learning rate.
        workers: Workers of swap's second phase.
    """

    budget: int
    start: float
    length: float
    lr: float
    swa_lr: float
    low_lr: float
    cycle: int
    momentum: float
    weight_decay: float
    batch_size: int
    large_batch: int
    workers: int

    @property
    def first_epoch(self) -> int:
        """Epochs before the averaged trajectories begin."""
        return round(self.start * self.budget)

    @property
    def last_epoch(self) -> int:
        """Epochs at which the averaged trajectories end."""
        return round(self.length * self.budget)


@dataclass(frozen=True)
class Phase:
    """A part of a trajectory that keeps its batches.

    Attributes:
        batch_size: Images per step.
        worker: Number of the worker; each has an order of images of its own, 0 the common one.
    """

    batch_size: int
    worker: int = 0


@dataclass(frozen=True)
class Trajectory:
    """A schedule, and the times at which checkpoints are saved. Times are in epochs.

    Attributes:
        name: Name of the directory of checkpoints.
        epochs: Length of the trajectory.
        rate: Learning rate of the step that ends at a time.
        saves: Times at which a checkpoint is saved.
        phases: The phases, each with the epoch that it begins with.
        slow: True to train with Lookahead.
    """

    name: str
    epochs: int
    rate: Callable[[float], float]
    saves: tuple[float, ...]
    phases: tuple[tuple[int, Phase], ...]
    slow: bool = False

    def phase(self, epoch: int) -> Phase:
        """Return the phase that an epoch belongs to."""
        return [phase for first, phase in self.phases if first <= epoch][-1]


def decay(time: float, epochs: float, high: float, low: float) -> float:
    """Return the budget's learning rate: constant for half, down until 0.9, then constant.

    Args:
        time: Epochs trained.
        epochs: Epochs of the schedule.
        high: Learning rate at the beginning.
        low: Learning rate at the end.
    """
    part = min(max((time / epochs - 0.5) / 0.4, 0.0), 1.0)
    return high + (low - high) * part


def cycle_part(time: float, cycle: float) -> float:
    """Return how much of a cycle has passed: above 0, and 1 at the cycle's end."""
    cycles = round(time / cycle, 9)
    return cycles - (math.ceil(cycles) - 1)


def conventional(settings: Settings, name: str) -> Trajectory:
    """Return the baseline: the budget's schedule, saved at its end."""

    def rate(time: float) -> float:
        return decay(time, settings.budget, settings.lr, 0.01 * settings.lr)

    phases = ((0, Phase(settings.batch_size)),)
    end = (float(settings.budget),)
    return Trajectory(name, settings.budget, rate, end, phases, slow=name == "lookahead")


def averaged(settings: Settings, name: str) -> Trajectory:
    """Return a trajectory whose checkpoints are made to be averaged: constant, cyclical or fge.

    Sources: Izmailov et al. 2018, section 3.2, and Garipov et al. 2018, section 4.
    """
    first, cycle = settings.first_epoch, settings.cycle
    high, low = settings.swa_lr, settings.low_lr

    def rate(time: float) -> float:
        if time <= first:
            return decay(time, first, settings.lr, high)
        if name == "constant":
            return high
        part = cycle_part(time - first, cycle)
        if name == "fge":
            part = 1 - abs(2 * part - 1)  # 0 at both ends of the cycle, 1 in its middle
        return (1 - part) * high + part * low

    interval = {"constant": 1.0, "cyclical": float(cycle), "fge": cycle / 2}[name]
    count = int((settings.last_epoch - first) / interval)
    saves = tuple(first + interval * (i + 1) for i in range(count))
    phases = ((0, Phase(settings.batch_size)),)
    return Trajectory(name, settings.last_epoch, rate, saves, phases)


def swap(settings: Settings, worker: int) -> Trajectory:
    """Return the trajectory of one SWAP worker: large batches with the others, then small ones.

    The large batches' learning rate grows with the batch, after a warm-up (Goyal et al. 2017).
    Source: Gupta et al. 2020, algorithm 1.
    """
    first, epochs = settings.first_epoch, settings.budget
    large = settings.large_batch

    def rate(time: float) -> float:
        if time <= first:
            warm_up = min(10 * time / first, 1.0)
            return warm_up * decay(time, first, large * settings.lr, settings.swa_lr)
        part = (time - first) / (epochs - first)
        return (1 - part) * settings.swa_lr + part * settings.low_lr

    phases = (
        (0, Phase(large * settings.batch_size)),
        (first, Phase(settings.batch_size, worker)),
    )
    return Trajectory(f"swap/worker_{worker}", epochs, rate, (float(epochs),), phases)


def make_trajectories(names: Sequence[str], settings: Settings) -> list[Trajectory]:
    """Return the trajectories with the given names."""
    trajectories: list[Trajectory] = []
    for name in names:
        if name == "swap":
            workers = range(1, settings.workers + 1)
            trajectories += [swap(settings, worker) for worker in workers]
        elif name in ("sgd", "lookahead"):
            trajectories.append(conventional(settings, name))
        else:
            trajectories.append(averaged(settings, name))
    return trajectories


def file_name(epoch: float) -> str:
    """Return the name of a checkpoint after a number of epochs: ``epoch_007.pt``."""
    digits = f"{epoch:06.2f}" if epoch % 1 else f"{int(epoch):03d}"
    return f"epoch_{digits}.pt"
