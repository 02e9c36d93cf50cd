"""Every layout opens, is put in order, is averaged exactly, and goes back into its own tool."""

from __future__ import annotations

import re
from contextlib import contextmanager
from pathlib import Path

import directory_layouts  # noqa: F401 - registers more
import file_layouts  # noqa: F401
import model_layouts  # noqa: F401
import pytest
import torch
from layouts import LAYOUTS, others_at_work

from ckptavg import average, open_run
from ckptavg.errors import CheckpointError

README = Path(__file__).parents[2] / "examples" / "README.md"
BEGIN, END = "<!-- layouts -->\n", "<!-- /layouts -->"
COLUMNS = ("opens", "ordered and de-duplicated", "exact average", "output loads back")

AVERAGED = [layout for layout in LAYOUTS if not layout.refused]
REFUSED = [layout for layout in LAYOUTS if layout.refused]

every_layout = pytest.mark.parametrize("layout", AVERAGED, ids=lambda layout: layout.name)


@contextmanager
def cell(cells, layout, column, well="✓"):
    """A cell of the table says how the block ends."""
    cells[layout.name, column] = "no"
    try:
        yield
    except pytest.skip.Exception:
        del cells[layout.name, column]
        raise
    cells[layout.name, column] = well


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@every_layout
def test_layout_opens(layout, written, cells):
    with cell(cells, layout, COLUMNS[0]):
        run = written(layout)
        for name, state in zip(layout.checkpoints, run.states, strict=True):
            (checkpoint,) = open_run(run.path / name)
            assert checkpoint.key == layout.key
            assert {n: t.shape for n, t in checkpoint.tensors.items()} == {
                n.removeprefix("module."): tuple(v.shape) for n, v in state.items()
            }


@every_layout
def test_layout_is_ordered_without_repeats(layout, written, cells):
    with cell(cells, layout, COLUMNS[1]):
        root = written(layout).path
        run = open_run(root)
        steps = {str(c.path.relative_to(root)): c.step for c in run}
        assert steps == layout.checkpoints
        assert list(steps) == list(layout.checkpoints)
        left_out = sorted(str(path.relative_to(root.parent)) for path, _ in run.left_out)
        assert left_out == sorted(
            f"{root.name}/{name}".removesuffix("/.") for name in layout.left_out
        )


@every_layout
def test_layout_average_is_exact(layout, written, cells):
    with cell(cells, layout, COLUMNS[2]):
        run = written(layout)
        expected = layout.averaged(run.states)
        bare = {name.removeprefix("module."): value for name, value in expected.items()}
        assert_same(average(open_run(run.path)), bare)


@every_layout
def test_layout_output_loads_in_its_tool(layout, written, cells, tmp_path):
    with cell(cells, layout, COLUMNS[3], layout.loads_back):
        run = written(layout)
        out = tmp_path / layout.output
        out.parent.mkdir(exist_ok=True)
        average(open_run(run.path), out=out)
        with others_at_work():
            assert_same(layout.load_back(out), layout.averaged(run.states))


@pytest.mark.parametrize("layout", REFUSED, ids=lambda layout: layout.name)
def test_layout_refused_has_a_remedy(layout, written, cells):
    with cell(cells, layout, COLUMNS[0], layout.refused):
        remedy = re.search("`(.*)`", layout.refused)[1]
        with pytest.raises(CheckpointError, match=re.escape(remedy)):
            open_run(written(layout).path)
    cells.update(((layout.name, column), "–") for column in COLUMNS[1:])


def test_layout_table_of_readme_is_current(cells, request):
    missing = [x.name for x in LAYOUTS if any((x.name, c) not in cells for c in COLUMNS)]
    if missing:
        pytest.skip(f"not checked in this environment: {', '.join(missing)}")
    rows = [("", *COLUMNS), ("---",) * (1 + len(COLUMNS))]
    rows += [(x.name, *(cells[x.name, column] for column in COLUMNS)) for x in LAYOUTS]
    table = "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows)
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    shown, after = rest.split(END)
    if request.config.getoption("--write-readme", default=False):
        README.write_text(before + BEGIN + table + END + after, encoding="utf-8")
    else:
        assert shown == table, "pytest tests/interop --write-readme writes it anew"
