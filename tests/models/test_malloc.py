"""Memory that models on a CPU run in, as a process of its own sees it.

Of its own, since a process whose memory was once exhausted gets large blocks in another way.
"""

import json
import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ckptavg import evaluate, update_bn
from ckptavg.models import malloc

CPU = torch.device("cpu")
ELEMENTS = 1 << 24  # 64 MB: more than malloc ever keeps by itself
PAGES = ELEMENTS * 4 // mmap.PAGESIZE
LARGER = 4  # times as much: more than what was kept can hold
BATCHES = 12
# A freed block may be parted by whatever else is allocated, more often on a busy machine, so that
# the next one takes new pages once more. Where nothing is kept, every one does.
FEWEST_IN_KEPT_MEMORY = 3


def faults_of(work, times):
    """New pages that each of several calls took."""
    import resource

    found = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        work()
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return found


def layer(times=1):
    torch.empty(times * ELEMENTS).fill_(1.0)


def in_kept_memory(found):
    """How many calls took hardly any new page."""
    return sum(faults < PAGES / 100 for faults in found)


def larger():
    layer(LARGER)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1])


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


def kept_and_given_back():
    before = resident()
    with malloc.kept(CPU):
        parts = [torch.ones(ELEMENTS // 4) for _ in range(4)]
        del parts
        kept = resident() - before
    return [kept, resident() - before]


def batches_of(stage, directory):
    model = Wide(taken := [])
    batches = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))] * BATCHES
    if stage == "evaluate":
        path = Path(directory, "one.pt")
        torch.save(model.state_dict(), path)
        evaluate([path], model, batches, device="cpu")
    else:
        update_bn(model, batches, device="cpu")
    return taken


def measure(directory):
    """What this process sees, in order."""
    found = {"before": faults_of(layer, 3)}
    with malloc.kept(CPU):
        found["kept"] = faults_of(layer, BATCHES)
    found["after"] = faults_of(larger, 3)
    with malloc.kept(torch.device("cuda")):
        found["cuda"] = faults_of(larger, 3)
    try:
        with malloc.kept(CPU):
            raise ValueError
    except ValueError:
        found["error"] = faults_of(larger, 3)
    found["resident"] = kept_and_given_back()
    for stage in ("evaluate", "update_bn"):
        found[stage] = batches_of(stage, directory)
    return found


def measured(directory, **environment):
    done = subprocess.run(
        [sys.executable, __file__, str(directory)],
        check=False, capture_output=True, text=True, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def huge_pages():
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return mode.exists() and "[always]" in mode.read_text()


pytestmark = [
    pytest.mark.skipif(malloc._glibc() is None, reason="only glibc's malloc is told what to keep"),
    pytest.mark.skipif(huge_pages(), reason="with huge pages a new block takes hardly any faults"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("heap"))


def test_what_is_freed_is_used_again_until_the_end(found):
    assert min(found["before"]) >= PAGES / 2
    assert in_kept_memory(found["before"]) == 0
    assert in_kept_memory(found["kept"]) >= FEWEST_IN_KEPT_MEMORY
    assert min(found["after"]) >= LARGER * PAGES / 2


def test_another_device_and_an_error_change_nothing(found):
    assert min(found["cuda"]) >= LARGER * PAGES / 2
    assert min(found["error"]) >= LARGER * PAGES / 2


def test_what_was_kept_is_given_back_at_the_end(found):
    kept, left = found["resident"]
    assert kept > PAGES / 2
    assert left < PAGES / 4


@pytest.mark.parametrize("stage", ["evaluate", "update_bn"])
def test_batches_run_in_the_memory_of_those_before(found, stage):
    assert len(found[stage]) == BATCHES
    assert in_kept_memory(found[stage]) >= FEWEST_IN_KEPT_MEMORY


def test_what_the_environment_asks_of_malloc_stays(tmp_path):
    asked = measured(tmp_path, MALLOC_MMAP_THRESHOLD_="1048576")
    assert min(asked["kept"]) >= PAGES / 2


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
