"""Devices, precision, and how many models memory holds."""

import pytest
import torch
from torch import nn

from ckptavg.errors import EvaluationError, UsageError
from ckptavg.runtime import Runtime, find_device, fit, is_out_of_memory

CPU, META = torch.device("cpu"), torch.device("meta")


def without_accelerators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_auto_is_the_cpu_where_there_is_no_accelerator(monkeypatch):
    without_accelerators(monkeypatch)
    assert find_device("auto") == CPU


def test_auto_prefers_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("auto").type == "cuda"


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps"])
def test_an_absent_device_is_an_error_that_names_it(monkeypatch, name):
    without_accelerators(monkeypatch)
    with pytest.raises(EvaluationError, match=f"{name} is not available.*--device"):
        find_device(name)


def test_a_cuda_device_beyond_the_last_is_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(EvaluationError, match="cuda:2 is not available"):
        find_device("cuda:2")


def test_an_unknown_kind_of_device_is_wrong_usage():
    with pytest.raises(UsageError, match=r"auto, cpu, cuda.*'gpu'"):
        find_device("gpu")


def test_the_device_is_the_models_own_where_none_is_named():
    assert Runtime.on(None, nn.Linear(2, 2, device="meta")).device == META
    assert Runtime.on(None, nn.BatchNorm1d(2, affine=False, device="meta")).device == META
    assert Runtime.on(None, nn.ReLU()).device == CPU
    assert Runtime.on("cpu", nn.Linear(2, 2, device="meta")).device == CPU


@pytest.mark.parametrize(
    ("amp", "expected"), [("off", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.half)]
)
def test_amp_is_the_precision_of_the_forward_pass(amp, expected):
    with Runtime(CPU, amp=amp).autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == expected


def test_an_unknown_amp_is_wrong_usage():
    with pytest.raises(UsageError, match="off, bf16, fp16 but got 'int8'"):
        Runtime(CPU, amp="int8").autocast()


def test_fit_counts_the_copies_that_free_memory_holds():
    small, large = nn.Linear(1000, 100), nn.Linear(1000, 1000)
    assert fit(small, CPU) > fit(large, CPU) > 10
    assert fit(nn.ReLU(), CPU) > 1


def test_running_out_of_memory_is_known_by_its_kinds():
    huge = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4611686018427387904"
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError(huge))
    assert not is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError) as told:
        torch.empty(1 << 62, dtype=torch.uint8)
    assert is_out_of_memory(told.value)
