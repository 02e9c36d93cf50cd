"""Recomputation of the running statistics of state dicts, in passes over training data."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from ckptavg.batchnorm.statistics_pass import recompute_statistics
from ckptavg.batchnorm.update import BatchNormResult
from ckptavg.data.argument_checks import check_forward, check_model
from ckptavg.data.loaders import Progress as SampleProgress
from ckptavg.data.loaders import Subset, as_subset, open_loader, require_reiterable
from ckptavg.data.prefetch import with_progress
from ckptavg.display.progress import PhaseProgress
from ckptavg.distributed.peers import Peers, SingleProcess, find_peers
from ckptavg.errors import BatchNormError, NonFiniteError, first_few
from ckptavg.formats.running_statistics import Statistics, match_layers
from ckptavg.formats.wrappers import bare_names
from ckptavg.models import malloc
from ckptavg.models.batches import Batches, Forward
from ckptavg.models.load import load_into, unwrap_distributed
from ckptavg.models.oom_retry import OomSynchronizedPeers, log_pass_count, run_in_groups_that_fit
from ckptavg.models.runtime import Runtime, count_models_that_fit
from ckptavg.outputs.sinks import StateDict


@dataclass(frozen=True)
class Recompute:
    """Model, data and settings by which ``average`` recomputes BatchNorm statistics.

    The statistics are those of ``update_bn``::

        recompute = ckptavg.Recompute(model, train_loader, device="auto")
        ckptavg.average(run, out="swa.pt", recompute=recompute)

    The averages are loaded into copies of the model, which itself does not change. Several averages
    of ``average_many`` share a pass over the data.

    Under an initialized ``torch.distributed`` process group, each process passes its own part of
    the data. The first process writes the outputs.

    Attributes:
        model: A module that the averages fit.
        data: A Dataset, read in seeded random order, or a loader, used as is.
        device: ``auto``, ``cpu``, ``cuda[:N]``, ``mps``; the model's own device where None.
        forward: ``forward(model, batch)``, for batches that cannot be matched to the signature of
            the model's own forward.
        exclude: Shell patterns of layers that keep their statistics, by names in the checkpoints.
        amp: ``off``, ``bf16`` or ``fp16``: autocast of the forward pass.
        batch_size: Samples per batch, for a Dataset.
        workers: Number of processes that load a Dataset.
        seed: Seed of a Dataset's order, and of random draws in the data such as augmentation.
        bn_samples: Number of samples, drawn at random from the data, or a ``ckptavg.Subset``, which
            may be stratified; all samples where None.
    """

    model: nn.Module = field(repr=False)
    data: Batches | Dataset[Any] = field(repr=False)
    device: str | torch.device | None = None
    forward: Forward | None = None
    exclude: str | Sequence[str] = ()
    amp: str = "off"
    batch_size: int = 128
    workers: int = 0
    seed: int = 0
    bn_samples: int | Subset | None = None

    def open_pass(self, progress: PhaseProgress | None) -> StatisticsPass:
        """Check the settings and open the data; ``average`` calls this.

        Args:
            progress: Called with phase, done and total, in samples; None to report none.

        Raises:
            UsageError: ``model`` is not a module, or ``data`` is not data.
        """
        check_model(self.model)
        check_forward(self.forward)
        model = copy.deepcopy(unwrap_distributed(self.model))
        runtime = Runtime.on(
            self.device, model, amp=self.amp, batch_size=self.batch_size,
            workers=self.workers, seed=self.seed,
        )  # fmt: skip
        peers = find_peers()
        subset = as_subset(self.bn_samples)
        training = open_loader(self.data, runtime, shuffle=True, subset=subset, peers=peers)
        opened = StatisticsPass(
            model, training, runtime, self.forward, peers=peers, exclude=self.exclude
        )
        if progress is None:
            return opened
        return replace(opened, progress=functools.partial(progress, "BatchNorm"))


@dataclass(frozen=True)
class StatisticsPass:
    """A pass over training data that recomputes the running statistics of state dicts.

    Attributes:
        model: The module that the weights are loaded into.
        training: This process's batches of the training data.
        runtime: Device, precision and batch size of the pass.
        forward: ``forward(model, batch)`` for unusual batches.
        progress: Called as ``progress(done, total)`` in samples.
        peers: The processes that share the data. The first process writes the outputs.
        exclude: Shell patterns of layers that keep their statistics.
        required: True if a state dict of which no statistics can be recomputed is an error.
    """

    model: nn.Module
    training: Batches
    runtime: Runtime
    forward: Forward | None = None
    progress: SampleProgress = lambda *_: None
    peers: Peers = field(default_factory=SingleProcess)
    exclude: str | Sequence[str] = ()
    required: bool = False

    def check(self, before: Sequence[Statistics]) -> None:
        """Make sure that the pass fits state dicts with such statistics.

        Raises:
            UsageError: A pattern of ``exclude`` matches no layer.
        """
        self._excluded_layers(before)

    def run(
        self,
        before: Sequence[Statistics],
        origins: Sequence[str],
        read: Callable[[Sequence[int]], list[StateDict]],
        store: Callable[[int, StateDict, Statistics], None],
    ) -> list[BatchNormResult]:
        """Recompute statistics, for as many state dicts at a time as memory holds.

        Args:
            before: State of the statistics before the pass, per state dict.
            origins: Description of each state dict, for messages.
            read: Returns the state dicts of some positions.
            store: Takes position, state dict and new state of the statistics. After running out
                of memory, a position may be read and stored once more.

        Returns:
            Per state dict, the result of the pass.

        Raises:
            BatchNormError: As for ``update_bn``; or no statistics can be recomputed, and that is
                required.
            CkptavgError: As for ``recompute_in_group``.
        """
        excluded = self._excluded_layers(before)
        peers = OomSynchronizedPeers(self.peers)
        groups = _groups(len(before), self)
        # Each group needs a pass of its own over the data.
        grouped = replace(
            self, training=require_reiterable(self.training, len(groups)), peers=peers
        )
        results: dict[int, BatchNormResult] = {}

        def run_pass(group: Sequence[int], number: int, of: int) -> None:
            """Read, recompute and store one group of state dicts.

            Args:
                group: Positions of the state dicts.
                number: Number of the pass, from 1.
                of: Number of all passes.
            """
            del number, of
            state_dicts = read(group)
            names = [origins[i] for i in group]
            states = [before[i] for i in group]
            recomputed = grouped.recompute_in_group(state_dicts, names, states, excluded)
            for i, state_dict, (result, after) in zip(group, state_dicts, recomputed, strict=True):
                results[i] = result
                store(i, state_dict, after)
            peers.agree()

        run_in_groups_that_fit(groups, run_pass, self.runtime, peers)
        return [results[i] for i in range(len(before))]

    def recompute_in_group(
        self,
        state_dicts: Sequence[StateDict],
        origins: Sequence[str],
        before: Sequence[Statistics],
        excluded: Collection[str],
    ) -> list[tuple[BatchNormResult, Statistics]]:
        """Replace the running statistics in state dicts that share a pass over the data.

        Args:
            state_dicts: The state dicts, which are changed.
            origins: Description of each state dict, for messages.
            before: State of the statistics before the pass, per state dict.
            excluded: Names of layers that keep their statistics.

        Returns:
            Per state dict, the result of the pass, and the state of the statistics afterwards. The
            result counts the batches and samples of all processes.

        Raises:
            BatchNormError: As for ``run``.
            ModelError: A state dict does not fit the model.
            NonFiniteError: A statistic is too large for the dtype in which it is stored.
        """
        # Each state dict needs a module of its own, since all go through one pass together.
        models = [self.model, *(copy.deepcopy(self.model) for _ in state_dicts[1:])]
        for model, state_dict, origin in zip(models, state_dicts, origins, strict=True):
            load_into(model, state_dict, origin)
        batches = with_progress(self.training, self.progress, self.peers, self.runtime.seed)
        with malloc.keep_freed_memory(self.runtime.device):
            results = recompute_statistics(
                models, before, excluded, batches, self.runtime, self.forward, self.peers
            )
        for model, state_dict, (result, _) in zip(models, state_dicts, results, strict=True):
            for name, value in _statistics(model, result.written).items():
                if name in state_dict:
                    state_dict[name] = _narrowed(name, value, state_dict[name])
        if self.required:
            _require_recomputed(origins, results)
        return self._with_counts_of_peers(results)

    def _excluded_layers(self, before: Sequence[Statistics]) -> set[str]:
        layers: dict[str, None] = {}
        for statistics in before:
            layers |= dict.fromkeys(statistics.layers)
        return match_layers(self.exclude, layers)

    def _with_counts_of_peers(
        self, results: Sequence[tuple[BatchNormResult, Statistics]]
    ) -> list[tuple[BatchNormResult, Statistics]]:
        """Count the batches and samples of all processes."""
        # A model without layers to recompute takes no part in the pass and has counts of 0.
        passed = max((result for result, _ in results), key=lambda result: result.batches)
        batches, samples = 0, 0
        for peer_batches, peer_samples in self.peers.gather([passed.batches, passed.samples]):
            batches, samples = batches + peer_batches, samples + peer_samples
        totals: list[tuple[BatchNormResult, Statistics]] = []
        for result, after in results:
            total = replace(result, batches=batches, samples=samples)
            totals.append((total if result.layers else result, after))
        return totals


def _require_recomputed(
    origins: Sequence[str], results: Sequence[tuple[BatchNormResult, Statistics]]
) -> None:
    """Make sure that statistics of every state dict were recomputed, or need not be.

    Raises:
        BatchNormError: No statistics of a state dict can be recomputed.
    """
    for origin, (result, after) in zip(origins, results, strict=True):
        if after.not_recomputed and not result.layers:
            raise BatchNormError(
                f"no statistics of {origin} can be recomputed (layers "
                f"{first_few(list(after.not_recomputed))})",
                "Recompute them with the model's own code.",
            )


def _groups(count: int, statistics_pass: StatisticsPass) -> list[range]:
    """Divide averages into groups that fit in memory and share a pass over the data."""
    # Each average is in memory twice: as a state dict, and in a copy of the model.
    own_fit = count_models_that_fit(statistics_pass.model, statistics_pass.runtime.device) // 2
    size = max(1, min(statistics_pass.peers.gather(own_fit)))
    groups = [range(i, min(i + size, count)) for i in range(0, count, size)]
    log_pass_count(count, len(groups))
    return groups


def _narrowed(name: str, value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Convert a statistic to the dtype and shape of the checkpoint.

    Raises:
        NonFiniteError: The statistic is too large for that dtype.
    """
    # A copy, since the next pass changes the model's own tensor.
    narrowed = value.to(like.dtype, copy=True).reshape(like.shape)
    if not bool(torch.isfinite(narrowed).all()):
        raise NonFiniteError(
            f"{name} is too large for {str(like.dtype).removeprefix('torch.')}",
            "Write a wider type with `dtype='float32'`.",
        )
    return narrowed


def _statistics(model: nn.Module, written: frozenset[str]) -> Mapping[str, torch.Tensor]:
    """Select the recomputed statistics of a model, with the layers' counts of batches.

    Args:
        model: The model after the pass.
        written: Names of the recomputed statistics in the model's state dict.

    Returns:
        Tensors on the CPU, by bare name.
    """
    states = model.state_dict()
    bare = bare_names(list(states))
    counts = {f"{name.rpartition('.')[0]}.num_batches_tracked".lstrip(".") for name in written}
    statistics: dict[str, torch.Tensor] = {}
    for name in (written | counts) & states.keys():
        statistics[bare.get(name, name)] = states[name].detach().cpu()
    return statistics
