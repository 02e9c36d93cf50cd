"""Fixtures that several folders share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes depends on what else the machine does.
settings.register_profile("any load", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any load")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a run of four checkpoints under run/, and factories in net.py."""
    from command_line import write_home

    write_home(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An empty store under ``store://``."""
    from stores import open_store

    return open_store(monkeypatch)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse names of tests that another process would give otherwise, or that fill screens.

    Raises:
        pytest.UsageError: A parameter's values or address stands in a name.
    """
    for item in items:
        if "tensor(" in item.name or " at 0x" in item.name:
            raise pytest.UsageError(f"{item.nodeid[:200]}: give its parameters ids of words")
