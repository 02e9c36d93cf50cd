"""Runs with a file that cannot be opened: an error, unless the selection leaves it out."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch
from click.testing import CliRunner
from helpers import names, save, save_weight

from ckptavg import average, average_many, open_run
from ckptavg.cli import main
from ckptavg.errors import CheckpointError

COUNT = 8
SELECTIONS = {
    "all": lambda run: run,
    "last 1": lambda run: run.last(1),
    "last 3": lambda run: run.last(3),
    "last share": lambda run: run.last("30%"),
    "last share, last": lambda run: run.last("60%").last(2),
    "from": lambda run: run.steps(first=400),
    "to": lambda run: run.steps(last=500),
    "from to": lambda run: run.steps(400, 500),
    "from, last": lambda run: run.steps(first=200).last(2),
    "last, last": lambda run: run.last(4).last(2),
    "every": lambda run: run.every(3),
    "every, last": lambda run: run.every(2).last(2),
    "cycle": lambda run: run.cycle(2),
    "cycle, last": lambda run: run.cycle(2).last(1),
    "best": lambda run: run.best(2, "acc", "max"),
    "sample": lambda run: run.sample(2, 1),
    "lowest rates": lambda run: run.at_lr_min(),
}
# Those that say for certain what they leave out, if neighbours on both sides can be opened.
CERTAIN = {"last 1", "last 3", "from", "to", "from to", "from, last", "last, last"}


@pytest.fixture(scope="module")
def intact(tmp_path_factory):
    """A run whose names and records count differently."""
    directory = tmp_path_factory.mktemp("intact")
    for i in range(1, COUNT + 1):
        rate = 0.1 if i % 2 else 0.01
        save_weight(
            directory / f"epoch_{i}.pt", float(i), global_step=100 * i, acc=i % 3 + i / 100, lr=rate
        )
    return directory


def damage(directory, *numbers):
    for i in numbers:
        (directory / f"epoch_{i}.pt").write_bytes(b"PK\x03\x04 torn")


@pytest.mark.parametrize("count", [1, 2])
def test_selection_of_damaged_run_is_intact_or_error(intact, tmp_path, count):
    expected = {name: names(select(open_run(intact))) for name, select in SELECTIONS.items()}
    for numbers in itertools.combinations(range(1, COUNT + 1), count):
        directory = tmp_path / "-".join(map(str, numbers))
        shutil.copytree(intact, directory)
        damage(directory, *numbers)
        run = open_run(directory)
        for name, select in SELECTIONS.items():
            outside = not {f"epoch_{i}.pt" for i in numbers} & set(expected[name])
            try:
                selected = names(select(run))
            except CheckpointError:
                assert not outside or count > 1 or name not in CERTAIN, (numbers, name)
            else:
                assert outside, (numbers, name)
                assert selected == expected[name]


@pytest.mark.parametrize(
    ("number", "select"), [*itertools.product((1, 4, 5), ("last 3", "last 1"))]
)
def test_damaged_file_before_selection_is_left_out(intact, tmp_path, number, select):
    directory = tmp_path / "run"
    shutil.copytree(intact, directory)
    damage(directory, number)
    run = SELECTIONS[select](open_run(directory))
    told = "cannot be opened, and is outside the selection"
    assert run.left_out == ((directory / f"epoch_{number}.pt", told),)
    assert any(f"epoch_{number}.pt is left out: {told}" in note for note in run.notes)
    whole = average(SELECTIONS[select](open_run(intact)))
    assert torch.equal(average(run)["w"], whole["w"])


@pytest.mark.parametrize("use", [list, len, average, lambda run: run.checkpoints])
def test_damaged_file_fails_uses_of_whole_run(intact, tmp_path, use):
    directory = tmp_path / "run"
    shutil.copytree(intact, directory)
    damage(directory, 2, 3)
    with pytest.raises(
        CheckpointError, match=r"epoch_2\.pt.*\(epoch_3\.pt cannot be opened either\)"
    ):
        use(open_run(directory))


def test_average_many_ignores_damage_outside_selections(intact, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(intact, directory)
    damage(directory, 1)
    run = open_run(directory)
    made = average_many(run, {"a": run.last(2), "b": run.last(4)})
    assert made["a"]["w"].item() == 7.5
    assert made["b"]["w"].item() == 6.5
    with pytest.raises(CheckpointError, match="epoch_1"):
        average_many(run, {"all": "uniform"})


@pytest.mark.parametrize("name", ["last.pt", "model.pt", "best_3.pt", "step_3.pt", "epoch_4b.pt"])
def test_damaged_file_without_certain_place_is_refused(tmp_path, name):
    for i in (1, 2, 3, 4, 5):
        save_weight(tmp_path / f"epoch_{i}.pt", i)
    (tmp_path / name).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=f"{name}.*leaves it out"):
        open_run(tmp_path)


def test_damaged_file_among_misordered_names_is_refused(tmp_path):
    for i, step in ((1, 300), (2, 200), (3, 100)):
        save_weight(tmp_path / f"epoch_{i}.pt", i, global_step=step)
    (tmp_path / "epoch_0.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="epoch_0"):
        open_run(tmp_path)


def test_damaged_directory_may_lie_outside_selection(tmp_path):
    for step in (500, 1000, 1500):
        save(tmp_path / f"checkpoint-{step}" / "model.safetensors", {"w": torch.ones(400) * step})
        (tmp_path / f"checkpoint-{step}" / "config.json").write_text("{}")
    with open(tmp_path / "checkpoint-500" / "model.safetensors", "r+b") as file:
        file.truncate(700)
    run = open_run(tmp_path)
    assert names(run.last(2)) == ["checkpoint-1000", "checkpoint-1500"]
    assert names(run.steps(first=501)) == ["checkpoint-1000", "checkpoint-1500"]
    with pytest.raises(CheckpointError, match=r"`skip=.checkpoint-500.` leaves it out"):
        len(run.last(3))


def test_average_command_leaves_damaged_file_out(intact, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(intact, directory)
    damage(directory, 1)
    out = tmp_path / "out.pt"
    args = ["average", str(directory), "-o", str(out), "--also", "two=uniform@last=2"]
    failed = CliRunner().invoke(main, args)
    assert failed.exit_code == 1
    assert "epoch_1.pt" in failed.stderr
    assert not out.exists()
    done = CliRunner().invoke(main, [*args, "--last", "3"])
    assert done.exit_code == 0, done.output
    assert "epoch_1.pt is left out: cannot be opened" in done.stderr


def test_damaged_file_beside_unnumbered_one_is_refused(tmp_path):
    for i in (1, 2, 3):
        save_weight(tmp_path / f"epoch_{i}.pt", float(i), global_step=100 * i)
    save_weight(tmp_path / "last.pt", 9.0, global_step=350)
    (tmp_path / "epoch_4.pt").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="epoch_4"):
        open_run(tmp_path)
