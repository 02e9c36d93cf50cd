"""Passes in groups, and in smaller ones where memory is exhausted."""

import pytest
import torch
from fellows import together
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.distributed.peers import SingleProcess
from ckptavg.errors import EvaluationError
from ckptavg.models.oom_retry import OomSynchronizedPeers, log_pass_count, run_in_groups_that_fit
from ckptavg.models.runtime import Runtime

CPU = Runtime(torch.device("cpu"), batch_size=32)
ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "python": MemoryError,
    "cpu": lambda: torch.empty(1 << 62, dtype=torch.uint8),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublas"),
}
EXHAUSTED = pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)


class Memory:
    """Runs passes of at most so many; notes what was run, and what was tried."""

    def __init__(self, most, error=MemoryError):
        self.most = most
        self.error = error
        self.run: list[list[int]] = []
        self.tried: list[int] = []
        self.told: list[tuple[int, int]] = []

    def __call__(self, group, number, of):
        self.tried.append(len(group))
        if len(group) > self.most:
            raise self.error()
        self.run.append([*group])
        self.told.append((number, of))


def parted(count, size):
    return [range(count)[at : at + size] for at in range(0, count, size)]


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 50), st.integers(1, 50), st.integers(1, 50))
def test_run_in_groups_that_fit_runs_all_once_in_order(count, size, most):
    memory = Memory(most)
    run_in_groups_that_fit(parted(count, size), memory, CPU, OomSynchronizedPeers(SingleProcess()))
    assert [one for group in memory.run for one in group] == [*range(count)]
    assert all(len(group) <= most for group in memory.run)
    numbers = [number for number, _ in memory.told]
    assert numbers == [*range(1, len(numbers) + 1)]
    assert not memory.told or memory.told[-1][1] == len(numbers)


def test_run_in_groups_that_fit_tries_each_size_once():
    memory = Memory(12)
    run_in_groups_that_fit(parted(96, 24), memory, CPU, OomSynchronizedPeers(SingleProcess()))
    assert memory.tried == [24] + [12] * 8


@EXHAUSTED
def test_run_in_groups_that_fit_logs_and_halves_group(caplog, error):
    caplog.set_level("INFO", "ckptavg")
    memory = Memory(2, lambda: raised(error))
    run_in_groups_that_fit(parted(6, 6), memory, CPU, OomSynchronizedPeers(SingleProcess()))
    assert memory.run == [[0, 1], [2], [3, 4], [5]]
    assert "memory is too small for 6 models at a time: trying fewer" in caplog.text


def raised(error):
    made = error()
    raise made


@EXHAUSTED
def test_run_in_groups_that_fit_refuses_below_one_model(error):
    with pytest.raises(EvaluationError) as told:
        run_in_groups_that_fit(
            parted(3, 3),
            Memory(0, lambda: raised(error)),
            CPU,
            OomSynchronizedPeers(SingleProcess()),
        )
    assert str(told.value) == (
        "the memory of cpu is too small for a single model. "
        "Lower `batch_size` (now 32), or name another `device`."
    )
    assert told.value.__cause__ is not None


def shared(memories, count):
    """Passes of several processes, each with its own memory."""

    def work(fellow):
        peers, memory = OomSynchronizedPeers(fellow), memories[fellow.rank]

        def run(group, number, of):
            peers.gather(number)
            memory(group, number, of)
            peers.agree()

        run_in_groups_that_fit(parted(count, count), run, CPU, peers)

    together(len(memories), work)
    return memories


@pytest.mark.parametrize("most", [(9, 2, 9), (2, 9, 9), (2, 2, 9), (3, 2, 1)])
def test_oom_synchronized_peers_try_fewer_together(most):
    tried = [memory.tried for memory in shared([Memory(each) for each in most], 8)]
    assert tried[0] == tried[1] == tried[2]
    assert sum(size for size in tried[0] if size <= min(most)) == 8


def test_oom_synchronized_peers_fail_together():
    memories = [Memory(9), Memory(0)]
    with pytest.raises(EvaluationError, match="too small for a single model"):
        shared(memories, 4)
    assert [memory.tried for memory in memories] == [[4, 2, 1]] * 2


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes cannot be multiplied"), OSError("gone"), KeyboardInterrupt()]
)
def test_run_in_groups_that_fit_passes_other_errors_on(error):
    memory = Memory(0, lambda: raised(lambda: error))
    with pytest.raises(type(error)) as told:
        run_in_groups_that_fit(parted(4, 4), memory, CPU, OomSynchronizedPeers(SingleProcess()))
    assert told.value is error
    assert memory.tried == [4]


@pytest.mark.parametrize(
    ("count", "passes", "said"),
    [(24, 2, ["24 candidates, 2 passes"]), (24, 1, ["24 candidates, 1 pass"]), (1, 1, [])],
)
def test_log_pass_count_is_silent_for_one_candidate(caplog, count, passes, said):
    caplog.set_level("INFO", "ckptavg")
    log_pass_count(count, passes)
    assert caplog.messages == said
