"""Process-wide settings under several threads at once."""

import threading
from contextlib import contextmanager

import pytest
import torch

from ckptavg.batchnorm.collect import _uncompiled
from ckptavg.data import hub
from ckptavg.models.shared_context import SharedContext


class Switch:
    """A setting, as a context that notes how often it is entered."""

    def __init__(self):
        self.on, self.times = False, 0

    @contextmanager
    def turned_on(self):
        before, self.on = self.on, True
        self.times += 1
        try:
            yield
        finally:
            self.on = before


def run_overlapping(make_context, read):
    """Read a setting while the second of two threads is alone in a context, and afterwards.

    The first thread enters first and leaves first.
    """
    seen, second_in, first_out = [], threading.Event(), threading.Event()

    def second():
        with make_context():
            second_in.set()
            assert first_out.wait(60)
            seen.append(read())

    thread = threading.Thread(target=second)
    with make_context():
        thread.start()
        assert second_in.wait(60)
    first_out.set()
    thread.join()
    return [*seen, read()]


def test_shared_context_is_restored_by_last_thread():
    switch = Switch()
    shared = SharedContext(switch.turned_on)
    assert run_overlapping(shared.in_use, lambda: switch.on) == [True, False]
    assert switch.times == 1


def test_shared_context_survives_nesting_and_error():
    switch = Switch()
    shared = SharedContext(switch.turned_on)
    with shared.in_use():
        with pytest.raises(ValueError, match="inner"), shared.in_use():
            raise ValueError("inner")
        assert switch.on
    assert not switch.on
    with shared.in_use():
        assert switch.on
    assert switch.times == 2


def test_hub_offline_restores_mode_after_two_threads():
    huggingface_hub = pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")

    def mode():
        return constants.HF_HUB_OFFLINE, huggingface_hub.HfApi.repo_exists

    before = mode()
    assert run_overlapping(hub.offline, mode) == [(True, hub._answer_by_cache), before]


def test_uncompiled_restores_stance_after_two_threads():
    def stance():
        return torch._dynamo.eval_frame._stance.stance

    model = torch.compile(torch.nn.Linear(2, 2), backend="eager")
    before = stance()
    assert run_overlapping(lambda: _uncompiled(model), stance) == ["force_eager", before]
