"""Memory that models on a CPU run in, as malloc of a process of its own accounts for it.

Only malloc's account of the process is read: the load of the machine has no part in it.
"""

import ctypes
import json
import mmap
import os
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ckptavg import evaluate, update_bn
from ckptavg.models import malloc

CPU = torch.device("cpu")
MIB = 1 << 20
BLOCK = 64 * MIB  # more than malloc ever keeps by itself
HIGHEST = 32 * MIB - mmap.PAGESIZE  # of malloc's own mmap thresholds
LARGER = 1024 * MIB  # more than what was kept can hold
BATCHES = 12
FEWEST_IN_KEPT_MEMORY = 3


class Account(ctypes.Structure):
    """malloc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks",
            "fordblks", "keepcost",
        )
    ]  # fmt: skip


def account():
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Account
    return libc.mallinfo2()


def has_mallinfo2():
    return hasattr(ctypes.CDLL(None), "mallinfo2")


def is_mapped(tensor):
    """Tell whether a tensor has pages of its own, which the system takes back at once."""
    size = ctypes.c_size_t.from_address(tensor.data_ptr() - ctypes.sizeof(ctypes.c_size_t))
    return bool(size.value & 2)


def block():
    return torch.empty(BLOCK // 4).fill_(1.0)


def mapped_blocks(times=3, size=BLOCK):
    """Tell of several blocks, each freed before the next, whether they were mapped."""
    return [is_mapped(torch.empty(size // 4)) for _ in range(times)]


def thresholds():
    """Tell which sizes of blocks get a mapping of their own."""
    sizes = [HIGHEST - 1 * MIB, HIGHEST - mmap.PAGESIZE, HIGHEST + 1, 33 * MIB, BLOCK]
    return [is_size_mapped(size) for size in sizes]


def is_size_mapped(size):
    """Tell whether a block of a size is mapped, in a copy of this process.

    A block that another one has left in the heap would serve any size that fits.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).malloc_trim(0)
        os.write(writer, b"1" if is_mapped(torch.empty(size // 4)) else b"0")
        os._exit(0)
    os.waitpid(child, 0)
    answer = os.read(reader, 1)
    os.close(reader)
    os.close(writer)
    return answer == b"1"


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


class Wide(nn.Module):
    """Notes of each batch whether its block was mapped, and the size of the heap."""

    def __init__(self, seen):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.seen = seen

    def forward(self, x):
        self.seen.append([is_mapped(block()), account().arena])
        return self.norm(x)

    def __deepcopy__(self, memo):
        return Wide(self.seen)


def kept_and_given_back():
    before = resident()
    with malloc.keep_freed_memory(CPU):
        parts = [torch.ones(BLOCK // 16) for _ in range(4)]
        del parts
        kept = account().fordblks
    return [kept, resident() - before]


def batches_of(stage, directory):
    model = Wide(seen := [])
    batches = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64))] * BATCHES
    if stage == "evaluate":
        path = Path(directory, "one.pt")
        torch.save(model.state_dict(), path)
        evaluate([path], model, batches, device="cpu")
    else:
        update_bn(model, batches, device="cpu")
    return seen


def in_two_threads():
    """Blocks while two threads keep memory, while only the second does, and afterwards.

    The heap of a thread beside the first holds blocks of less than 64 MiB.
    """
    seen, second_in, first_out = [], threading.Event(), threading.Event()

    def second():
        with malloc.keep_freed_memory(CPU):
            second_in.set()
            first_out.wait(60)
            seen.append(mapped_blocks(1, 40 * MIB)[0])

    thread = threading.Thread(target=second)
    with malloc.keep_freed_memory(CPU):
        thread.start()
        second_in.wait(60)
        seen.append(mapped_blocks(1)[0])
    first_out.set()
    thread.join()
    return [*seen, mapped_blocks(1, LARGER)[0]]


def measure(directory):
    """What this process sees, in order."""
    mapped_blocks(1, 32 * MIB - 2 * mmap.PAGESIZE)  # malloc's own thresholds are the highest now
    seen = {"before": mapped_blocks(), "thresholds before": thresholds()}
    with malloc.keep_freed_memory(CPU):
        pass
    seen["thresholds after"] = thresholds()
    with malloc.keep_freed_memory(CPU):
        seen["short"] = mapped_blocks(1)
    if directory is None:
        return seen
    with malloc.keep_freed_memory(CPU):
        seen["kept"] = mapped_blocks(BATCHES)
        with malloc.keep_freed_memory(CPU):
            seen["kept twice"] = mapped_blocks()
        seen["kept once"] = mapped_blocks()
    seen["after"] = mapped_blocks(size=LARGER)
    with malloc.keep_freed_memory(torch.device("cuda")):
        seen["cuda"] = mapped_blocks(size=LARGER)
    try:
        with malloc.keep_freed_memory(CPU):
            raise ValueError
    except ValueError:
        seen["error"] = mapped_blocks(size=LARGER)
    seen["threads"] = in_two_threads()
    seen["resident"] = kept_and_given_back()
    for stage in ("evaluate", "update_bn"):
        seen[stage] = batches_of(stage, directory)
    return seen


def measured(*arguments, **environment):
    """Run ``measure`` in a process of its own, for a directory or after a call of mallopt."""
    done = subprocess.run(
        [sys.executable, __file__, *map(str, arguments)],
        check=False, capture_output=True, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


pytestmark = pytest.mark.skipif(
    malloc._adjustable_glibc() is None or not has_mallinfo2(),
    reason="only glibc's malloc is told what to keep, and accounts for it",
)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    return measured(tmp_path_factory.mktemp("heap"))


def test_keep_freed_memory_uses_heap_until_end(seen):
    assert all(seen["before"])
    assert not any(seen["kept"])
    assert all(seen["after"])


def test_keep_freed_memory_nests(seen):
    assert not any(seen["kept twice"])
    assert not any(seen["kept once"])


def test_keep_freed_memory_lasts_for_two_threads(seen):
    assert seen["threads"] == [False, False, True]


def test_keep_freed_memory_ignores_cuda_and_ends_on_error(seen):
    assert all(seen["cuda"])
    assert all(seen["error"])


def test_keep_freed_memory_restores_thresholds(seen):
    assert seen["thresholds after"] == seen["thresholds before"]


def test_malloc_thresholds_are_restored_by_last_user():
    calls = []
    library = SimpleNamespace(
        mallopt=lambda option, value: calls.append((option, value)),
        malloc_trim=lambda _: calls.append("trim"),
    )
    shared = malloc._Thresholds()
    shared._libc = library
    assert shared.acquire()
    assert shared.acquire()
    first = len(calls)
    shared.release()
    assert len(calls) == first
    shared.release()
    restored = dict(calls[first:-1])
    assert restored.keys() == dict(calls[:first]).keys() | {malloc._MMAP_THRESHOLD}
    assert restored[malloc._TRIM_THRESHOLD] == 2 * restored[malloc._MMAP_THRESHOLD] == 2 * HIGHEST
    assert calls[-1] == "trim"


def test_keep_freed_memory_gives_memory_back(seen):
    kept, left = seen["resident"]
    assert kept > BLOCK / 2
    assert left < BLOCK / 4


@pytest.mark.parametrize("stage", ["evaluate", "update_bn"])
def test_keep_freed_memory_serves_batches(seen, stage):
    mapped, heap_sizes = zip(*seen[stage], strict=True)
    assert len(mapped) == BATCHES
    assert not any(mapped)
    grown = sum(after > before for before, after in pairwise(heap_sizes))
    assert BATCHES - 1 - grown >= FEWEST_IN_KEPT_MEMORY


@pytest.mark.slow
def test_keep_freed_memory_respects_environment():
    asked = measured(MALLOC_MMAP_THRESHOLD_="1048576")
    assert all(asked["short"])
    assert asked["thresholds after"] == asked["thresholds before"]


@pytest.mark.parametrize(
    ("option", "value", "mapped"),
    [
        (malloc._MMAP_THRESHOLD, MIB, True),
        pytest.param(malloc._MMAP_THRESHOLD, 1 << 30, False, marks=pytest.mark.slow),
        pytest.param(malloc._MMAP_MAX, 0, False, marks=pytest.mark.slow),
    ],
)
def test_keep_freed_memory_respects_mallopt(option, value, mapped):
    asked = measured(option, value)
    assert asked["before"] == [mapped] * 3
    assert asked["short"] == [mapped]
    assert asked["thresholds after"] == asked["thresholds before"]


if __name__ == "__main__":
    if sys.argv[2:]:
        ctypes.CDLL(None).mallopt(*map(int, sys.argv[1:]))
    print(json.dumps(measure(sys.argv[1] if len(sys.argv) == 2 else None)))
