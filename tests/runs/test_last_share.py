"""Windows as shares of training: by step, else by number, for each training of a run."""

import math

import pytest
from click.testing import CliRunner
from helpers import names, save_weight

from ckptavg import open_run
from ckptavg.cli import main
from ckptavg.errors import UsageError


@pytest.fixture
def run(tmp_path):
    for epoch in range(1, 21):
        save_weight(tmp_path / f"epoch_{epoch}.pt", epoch, epoch=epoch)
    return open_run(tmp_path)


@pytest.mark.parametrize(
    ("share", "count"),
    [("10%", 2), ("25%", 5), ("5%", 1), ("1%", 1), ("100%", 20), ("12.5 %", 3), ("14.9%", 3)],
)
def test_last_takes_a_share_of_training(run, share, count):
    assert names(run.last(share)) == names(run.last(count))
    # The steps above (1 - share) of the last one, and no others.
    start = 20 - float(share.rstrip("% ")) / 5
    assert [c.step for c in run.last(share)] == [s for s in range(1, 21) if s > min(start, 19.5)]


def test_last_share_has_no_note_where_steps_are_known(run):
    assert run.last("10%").notes == run.notes


def test_last_share_is_of_what_earlier_selections_left(run):
    assert [c.step for c in run.steps(None, 10).last("20%")] == [9, 10]


def test_last_share_counts_uneven_steps(tmp_path):
    for step in (10, 400, 899, 900, 901, 1000):
        save_weight(tmp_path / f"s_{step}.pt", step, global_step=step)
    assert [c.step for c in open_run(tmp_path).last("10%")] == [901, 1000]


@pytest.mark.parametrize(("share", "count"), [("10%", 1), ("25%", 2), ("30%", 2), ("1%", 1)])
def test_last_share_counts_checkpoints_without_steps(tmp_path, share, count):
    for name in "abcdefgh":
        save_weight(tmp_path / f"w_{name}.pt", ord(name))
    run = open_run(tmp_path).last(share)
    assert names(run) == [f"w_{name}.pt" for name in "abcdefgh"[8 - count :]]
    told = f"not every checkpoint has a step: last {share} counts checkpoints, {count} of 8"
    assert run.notes[-1] == told


def test_last_share_applies_to_each_training(tmp_path):
    for folder, last in (("a", 4), ("b", 40)):
        for step in range(last // 4, last + 1, last // 4):
            save_weight(tmp_path / folder / f"step_{step}.pt", step, step=step)
    run = open_run(tmp_path / "a", tmp_path / "b").last("50%")
    assert [c.step for c in run] == [3, 4, 30, 40]


@pytest.mark.parametrize("share", ["0%", "100.1%", "-1%", "%", "x%", "1e1%", "٣%", "nan%"])
def test_last_refuses_a_wrong_share(run, share):
    with pytest.raises(UsageError, match="expected to be above 0% and at most 100%") as caught:
        run.last(share)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("value", ["ten", 0.1, math.nan, None, 0, -1])
def test_last_refuses_what_is_neither_number_nor_share(run, value):
    with pytest.raises(UsageError, match="last is expected"):
        run.last(value)


@pytest.mark.parametrize(
    ("options", "count"),
    [(["--last", "10%"], 2), (["--also", "x.pt=@last=25%"], 20), (["--scheme", "lawa:k=10%"], 20)],
)
def test_share_is_an_option_wherever_a_number_is(run, tmp_path, options, count):
    result = CliRunner().invoke(
        main, ["average", str(tmp_path), "-o", str(tmp_path / "o.pt"), "--dry-run", *options]
    )
    assert result.exit_code == 0, result.stderr
    assert f"{count} checkpoints" in result.stdout
    if "--also" in options:
        assert "x.pt: 5 checkpoints, uniform" in result.stdout


@pytest.mark.parametrize("options", [["--last", "0%"], ["--last", "x"], ["--also", "x=@last=101%"]])
def test_share_option_is_checked_before_work(tmp_path, options):
    result = CliRunner().invoke(main, ["average", str(tmp_path), "-o", "o.pt", *options])
    assert result.exit_code == 2
    assert "Invalid value for" in result.stderr
