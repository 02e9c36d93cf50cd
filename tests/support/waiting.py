"""What makes a program wait for its device: reading a tensor's values on the host."""

from __future__ import annotations

from torch.utils._python_dispatch import TorchDispatchMode

_READS = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique")


class NoWaiting(TorchDispatchMode):
    """Fails on operations that would wait for a GPU, on any device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not name.startswith(_READS), f"{name} waits for the device"
        return func(*args, **(kwargs or {}))
