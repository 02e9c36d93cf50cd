"""Runs as their trainers leave them, each written once; and the table of what holds of them."""

from __future__ import annotations

import pytest
import torch
from layouts import Layout, Written, others_at_work

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--write-readme",
        action="store_true",
        help="write the table of layouts into examples/README.md",
    )


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """Have a layout's run written, once."""
    runs: dict[str, Written] = {}

    def write(layout: Layout) -> Written:
        for module in layout.needs:
            pytest.importorskip(module)
        if layout.name not in runs:
            torch.manual_seed(0)
            with others_at_work():
                runs[layout.name] = layout.write(tmp_path_factory.mktemp("runs") / "run")
        return runs[layout.name]

    return write


@pytest.fixture(scope="session")
def cells() -> dict[tuple[str, str], str]:
    """What the checks of this session found: (layout, column) → the table's cell."""
    return {}
