"""Devices, precision, and how many models memory holds."""

import pytest
import torch
from torch import nn

from ckptavg.errors import EvaluationError, UsageError
from ckptavg.models import runtime
from ckptavg.models.runtime import (
    Runtime,
    count_models_that_fit,
    find_device,
    free_on_host,
    is_out_of_memory,
)

CPU, META = torch.device("cpu"), torch.device("meta")


def without_accelerators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_find_device_auto_falls_back_to_cpu(monkeypatch):
    without_accelerators(monkeypatch)
    assert find_device("auto") == CPU


def test_find_device_auto_prefers_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto").type == "cuda"


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_find_device_names_absent_device(monkeypatch, name):
    without_accelerators(monkeypatch)
    with pytest.raises(EvaluationError, match=f"{name} is not available.*`device='auto'`"):
        find_device(name)


def test_find_device_refuses_cuda_index_beyond_last(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(EvaluationError, match="cuda:2 is not available"):
        find_device("cuda:2")


def test_find_device_refuses_unknown_kind():
    with pytest.raises(UsageError, match=r"auto, cpu, cuda.*'gpu'"):
        find_device("gpu")


def test_runtime_defaults_to_device_of_model():
    assert Runtime.on(None, nn.Linear(2, 2, device="meta")).device == META
    assert Runtime.on(None, nn.BatchNorm1d(2, affine=False, device="meta")).device == META
    assert Runtime.on(None, nn.ReLU()).device == CPU
    assert Runtime.on("cpu", nn.Linear(2, 2, device="meta")).device == CPU


@pytest.mark.parametrize(
    ("amp", "expected"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.half)]
)
def test_runtime_amp_sets_forward_precision(amp, expected):
    with Runtime(CPU, amp=amp).autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


def test_runtime_refuses_unknown_amp():
    with pytest.raises(UsageError, match="off, bf16, fp16 but got 'int8'"):
        Runtime(CPU, amp="int8")


def test_count_models_that_fit_depends_on_model_size():
    small, large = nn.Linear(1000, 100), nn.Linear(1000, 1000)
    assert count_models_that_fit(small, CPU) > count_models_that_fit(large, CPU) > 10
    assert count_models_that_fit(nn.ReLU(), CPU) > 1


def test_count_models_that_fit_shares_host_memory(monkeypatch):
    monkeypatch.setattr(runtime, "free_on_host", lambda: 8 * 10**6)
    model = nn.Linear(100, 100, bias=False)
    alone = count_models_that_fit(model, CPU)
    assert alone == int(0.6 * 8 * 10**6 / 40_000)
    for name, value in {"RANK": 0, "WORLD_SIZE": 8, "MASTER_ADDR": "a", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert count_models_that_fit(model, CPU) == alone // 4


GIB = 2**30
MEMINFO = f"MemTotal: 99999 kB\nMemFree: 1 kB\nMemAvailable: {8 * 2**20} kB\n"


def kernel(root, **files):
    """A host that has 8 GiB available, and what else its kernel says: ``/`` is ``__`` in names."""
    for name, text in {"proc__meminfo": MEMINFO, **files}.items():
        path = root.joinpath(*name.split("__"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))
    return root


def group(place, limit, used, cached=0, names=("memory.max", "memory.current")):
    stat = f"anon 5\ninactive_file {cached}\nactive_file 7\n"
    values = {names[0]: limit, names[1]: used, "memory.stat": stat}
    return {f"sys__fs__cgroup__{place}{name}": f"{value}\n" for name, value in values.items()}


def test_free_on_host_counts_file_cache_as_free(tmp_path):
    assert free_on_host(kernel(tmp_path)) == 8 * GIB


OLD = ("memory.limit_in_bytes", "memory.usage_in_bytes")


@pytest.mark.parametrize(
    ("listed", "files", "expected"),
    [
        ("0::/", group("", 4 * GIB, GIB), 3 * GIB),
        ("0::/", group("", 4 * GIB, 4 * GIB, cached=GIB), GIB),
        ("0::/", group("", "max", GIB), 8 * GIB),
        ("0::/", group("", GIB, 2 * GIB), 0),
        ("0::/a/b", group("a__b__", "max", GIB) | group("a__", 3 * GIB, GIB), 2 * GIB),
        ("0::/gone/outside", group("", 4 * GIB, GIB), 3 * GIB),
        ("9:name=systemd:/\n4:memory:/job\n0::/", group("memory__job__", 5 * GIB, GIB, names=OLD),
         4 * GIB),
        ("4:memory:/", group("memory__", 2**63 - 4096, GIB, names=OLD), 8 * GIB),
    ],
    ids=["limit", "cache", "none", "over", "above", "namespace", "version 1", "version 1, none"],
)  # fmt: skip
def test_free_on_host_respects_container_limit(tmp_path, listed, files, expected):
    files["proc__self__cgroup"] = listed + "\n"
    assert free_on_host(kernel(tmp_path, **files)) == expected


def test_free_on_host_works_without_meminfo(tmp_path):
    assert free_on_host(tmp_path) > 0


def test_is_out_of_memory_knows_every_kind():
    huge = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4611686018427387904"
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError(huge))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError) as told:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert is_out_of_memory(told.value)


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [("batch_size", 0, 1), ("batch_size", -1, 1), ("batch_size", "8", 1), ("workers", -1, 0)],
)
def test_runtime_refuses_numbers_that_are_none(name, value, least):
    expected = f"{name} is expected to be a whole number from {least} on but got {value!r}"
    with pytest.raises(UsageError, match=expected):
        Runtime(CPU, **{name: value})
