"""Memory that models on a CPU run in."""

import resource

import pytest
import torch
from torch import nn

from ckptavg import evaluate, heap, update_bn

pytestmark = pytest.mark.skipif(
    heap._glibc() is None, reason="only glibc's malloc is told what to keep"
)
CPU = torch.device("cpu")
ELEMENTS = 1 << 24  # 64 MB: more than malloc ever keeps by itself
PAGES = ELEMENTS * 4 // resource.getpagesize()


def faults():
    """Pages that this process was given so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def faults_of(work, times):
    found = []
    for _ in range(times):
        before = faults()
        work()
        found.append(faults() - before)
    return found


def layer():
    torch.empty(ELEMENTS).fill_(1.0)


def test_what_is_freed_is_used_again_until_the_end():
    assert min(faults_of(layer, 3)) >= PAGES / 2  # huge pages would be fewer
    with heap.kept(CPU):
        assert min(faults_of(layer, 4)[1:]) < PAGES / 100  # a freed block may be parted
    assert min(faults_of(layer, 3)) >= PAGES / 2


def test_what_was_kept_is_given_back_at_the_end():
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1])

    before = resident()
    with heap.kept(CPU):
        parts = [torch.ones(ELEMENTS // 4) for _ in range(4)]
        del parts
        assert resident() - before > PAGES / 2
    assert resident() - before < PAGES / 4


def test_another_device_and_an_error_change_nothing():
    with heap.kept(torch.device("cuda")):
        assert min(faults_of(layer, 3)) >= PAGES / 2
    with pytest.raises(ValueError), heap.kept(CPU):
        raise ValueError
    assert min(faults_of(layer, 3)) >= PAGES / 2


class Wide(nn.Module):
    """Notes how many new pages a batch takes."""

    def __init__(self, taken):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.taken = taken

    def forward(self, x):
        self.taken += faults_of(layer, 1)
        return self.norm(x)

    def __deepcopy__(self, memo):
        return Wide(self.taken)


@pytest.mark.parametrize("stage", ["evaluate", "update_bn"])
def test_batches_run_in_the_memory_of_those_before(tmp_path, stage):
    taken = []
    model = Wide(taken)
    batches = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))] * 4
    if stage == "evaluate":
        torch.save(model.state_dict(), tmp_path / "one.pt")
        evaluate([tmp_path / "one.pt"], model, batches, device="cpu")
    else:
        update_bn(model, batches, device="cpu")
    assert len(taken) == 4
    assert min(taken[1:]) < PAGES / 100  # likewise
