"""Distances between the outputs of candidates on the same samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ckptavg.distributed.peers import Peers
from ckptavg.evaluation.candidates import Candidate
from ckptavg.tasks import Task

# Bytes of outputs that may wait for a later pass. Outputs beyond are dropped.
_MOST_WAITING = 2**28


class OutputDistances:
    """Mean Euclidean distances between the outputs of pairs of candidates, batch by batch.

    Outputs are what an ensemble takes the mean of: probabilities, or values of a regression. A
    distance needs the outputs of both candidates. If the candidates do not share a pass over the
    data, outputs wait on the host as long as there is room. A repeated batch counts once.

    Args:
        pairs: The pairs.
        task: The task that scores.
    """

    def __init__(self, pairs: Sequence[tuple[Candidate, Candidate]], task: Task) -> None:
        self._pairs = pairs
        self._task = task
        self._wanted = {id(candidate) for pair in pairs for candidate in pair}
        # Outputs by number of the batch and id of the candidate.
        self._waiting: dict[int, dict[int, torch.Tensor]] = {}
        # Sum of distances and number of samples, by position of the pair and number of the batch.
        self._sums: dict[tuple[int, int], tuple[float, int]] = {}
        self._batches: set[int] = set()

    def add(self, candidate: Candidate, number: int, predictions: torch.Tensor) -> None:
        """Add the predictions of a candidate on a batch.

        Args:
            candidate: The candidate; others than those of the pairs are ignored.
            number: Position of the batch in the pass.
            predictions: As from ``Task.predict``.
        """
        if id(candidate) not in self._wanted:
            return
        self._batches.add(number)
        outputs = self._task.averaged_outputs(predictions)
        if outputs is None:
            return
        present = self._waiting.setdefault(number, {})
        # float32, since outputs may have to wait in memory for a later pass.
        present[id(candidate)] = outputs.detach().flatten(1).float().cpu()
        for position, (first, second) in enumerate(self._pairs):
            if candidate is not first and candidate is not second:
                continue
            if id(first) in present and id(second) in present:
                distances = (present[id(first)] - present[id(second)]).norm(dim=1)
                # Assigned and not added, so that a batch of a repeated pass counts once.
                self._sums[position, number] = float(distances.double().sum()), len(distances)
        if present.keys() == self._wanted or self._waiting_bytes() > _MOST_WAITING:
            del self._waiting[number]

    def _waiting_bytes(self) -> int:
        total = 0
        for present in self._waiting.values():
            for outputs in present.values():
                total += outputs.nbytes
        return total

    def read(self, peers: Peers) -> list[float | None]:
        """Return the mean distance of each pair over the samples of all processes.

        Every process must call this. The distance is None for a pair without the outputs of both on
        all batches, and for a task whose ensemble takes no mean of outputs.
        """
        state = []
        for position in range(len(self._pairs)):
            sums = [self._sums.get((position, number)) for number in sorted(self._batches)]
            state.append(sums)
        distances: list[float | None] = []
        of_all = peers.gather(state)
        for position in range(len(self._pairs)):
            parts = [part for of_process in of_all for part in of_process[position]]
            complete = [part for part in parts if part is not None]
            if not complete or len(complete) < len(parts):
                distances.append(None)
                continue
            total = sum(part[0] for part in complete)
            distances.append(total / sum(part[1] for part in complete))
        return distances
