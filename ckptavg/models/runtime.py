"""Device, precision and memory that models run with."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ckptavg.distributed.peers import is_distributed, local_rank
from ckptavg.errors import EvaluationError, UsageError

_AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
# Share of the free memory for copies of a model; activations need the rest.
_SHARE_OF_MEMORY = 0.6
# Parts of the messages of RuntimeErrors of torch and its libraries.
# The first is of CUDA and mps, the next two are of torch's CPU allocator, the last is of cuBLAS.
_EXHAUSTED = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Runtime:
    """Device, precision and data loading of models that run.

    Attributes:
        device: Device of the models.
        amp: ``off``, or the reduced precision of autocast: ``bf16``, ``fp16``.
        batch_size: Samples per batch, for a Dataset.
        workers: Number of processes that load a Dataset.
        seed: Seed of the order in which a Dataset of training data is read.
    """

    device: torch.device
    amp: str = "off"
    batch_size: int = 128
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the precision and the numbers."""
        if self.amp != "off" and self.amp not in _AMP:
            raise UsageError(f"amp is expected to be one of off, bf16, fp16 but got {self.amp!r}")
        _check_count("batch_size", self.batch_size, 1)
        _check_count("workers", self.workers, 0)

    @classmethod
    def on(cls, device: str | torch.device | None, model: nn.Module, **options: Any) -> Runtime:
        """Make a runtime on a device, or on the model's own device where None."""
        if device is None:
            for tensor in (*model.parameters(), *model.buffers()):
                return cls(tensor.device, **options)
            return cls(torch.device("cpu"), **options)
        return cls(find_device(device), **options)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the autocast context of a forward pass."""
        if self.amp == "off":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, _AMP[self.amp])


def _check_count(name: str, value: object, least: int) -> None:
    """Make sure that an argument is a whole number, and not too small.

    Raises:
        UsageError: The argument is something else.
    """
    # A bool is an int too.
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UsageError(
            f"{name} is expected to be a whole number from {least} on but got {value!r}"
        )


def find_device(name: str | torch.device) -> torch.device:
    """Find a device by name.

    Args:
        name: A device of torch, or ``auto``: CUDA where available, else mps, else the CPU.

    Raises:
        EvaluationError: The device is not available.
        UsageError: There is no such kind of device.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return _choose_cuda_device(_best_device(cuda=cuda, mps=mps))
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(
            f"device is expected to be one of auto, cpu, cuda[:N], mps but got {name!r}"
        ) from error
    available = {"cpu": True, "cuda": cuda, "mps": mps}.get(device.type, True)
    if device.type == "cuda" and cuda and (device.index or 0) >= torch.cuda.device_count():
        available = False
    if not available:
        raise EvaluationError(
            f"the device {device} is not available", "Use `device='auto'` or `device='cpu'`."
        )
    return _choose_cuda_device(device)


def _best_device(*, cuda: bool, mps: bool) -> torch.device:
    """Return the fastest kind of device, given which are available."""
    if cuda:
        return torch.device("cuda")
    if mps:
        return torch.device("mps")
    return torch.device("cpu")


def _choose_cuda_device(device: torch.device) -> torch.device:
    """Choose this process's CUDA device if several processes share the host."""
    if device.type == "cuda" and device.index is None and is_distributed():
        return torch.device("cuda", local_rank() % torch.cuda.device_count())
    return device


def count_models_that_fit(model: nn.Module, device: torch.device) -> int:
    """Compute the number of copies of a model that fit in the free memory of a device.

    A share of the memory is left for activations. Averages are computed on the host before they
    move to the device, so the host's memory counts too. Processes on the same host share its
    memory.
    """
    tensors = (*model.parameters(), *model.buffers())
    size = sum(t.numel() * t.element_size() for t in tensors if not is_lazy(t))
    processes = 1
    if is_distributed():
        # torchrun sets it to the number of processes on this host.
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    free = free_on_host() // processes
    if device.type == "cuda":
        # Processes per device, rounded up.
        per_device = -(-processes // torch.cuda.device_count())
        free = min(free, torch.cuda.mem_get_info(device)[0] // per_device)
    return int(_SHARE_OF_MEMORY * free / max(size, 1))


def free_on_host(root: Path = Path("/")) -> int:
    """Compute the bytes that this process may still allocate on the host and in a container.

    Memory that caches files counts as free, since the kernel gives up the cache.

    Args:
        root: Directory that contains ``proc`` and ``sys``.
    """
    free_bytes = [_available(root / "proc" / "meminfo")]
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, controllers, group = line.split(":", 2)
        # Version 2 of control groups lists no controllers here.
        if not controllers:
            free_bytes += _left_in(root / "sys/fs/cgroup", group, "memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            names = "memory.limit_in_bytes", "memory.usage_in_bytes"
            free_bytes += _left_in(root / "sys/fs/cgroup/memory", group, *names)
    return min(free_bytes)


def _available(meminfo: Path) -> int:
    """Return the available bytes on Linux, the free bytes elsewhere; 4 GiB where unknown."""
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 4 << 30


def _left_in(mount: Path, place: str, limit: str, used: str) -> list[int]:
    """List the bytes left under the limits of a control group and the parent groups.

    Args:
        mount: Directory where the control groups are mounted.
        place: Path of the process's group below ``mount``.
        limit: Name of the file with the limit.
        used: Name of the file with the usage.
    """
    # A container may see its own group as the root, whatever the group's name outside.
    innermost = mount / place.strip("/")
    free_bytes = []
    for group in (innermost, *innermost.parents):
        if not group.is_relative_to(mount):
            break
        most, now = _number(group / limit), _number(group / used)
        if most is not None and now is not None:
            free_bytes.append(max(0, most - now + _cache_in(group)))
    return free_bytes


def _cache_in(group: Path) -> int:
    """Return the bytes of a control group that cache files and are not in use."""
    for line in _lines(group / "memory.stat"):
        name, size = line.split()
        if name == "inactive_file":
            return int(size)
    return 0


def _number(path: Path) -> int | None:
    """Read the number in a file; None if there is no file or the text is ``max``."""
    lines = _lines(path)
    if lines and lines[0].isdecimal():
        return int(lines[0])
    return None


def _lines(path: Path) -> list[str]:
    """Read the lines of a file; none if the file cannot be read."""
    try:
        return path.read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an error reports that the device or the host is out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _EXHAUSTED)
