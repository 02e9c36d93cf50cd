"""Columns for the metrics of a run: which, and in which order."""

from __future__ import annotations

from dataclasses import replace

from helpers import save_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg import open_run
from ckptavg.formats import Record, open_checkpoint
from ckptavg.runs.metric_columns import choose_metric_columns, find_momentary_numbers


def columns(tmp_path, **recorded):
    """The columns of a run, given each entry's values in its checkpoints."""
    for i, values in enumerate(zip(*recorded.values(), strict=True), 1):
        save_weight(tmp_path / f"epoch_{i}.pt", i, **dict(zip(recorded, values, strict=True)))
    return choose_metric_columns(open_run(tmp_path).checkpoints)


def test_copies_of_the_clock_and_of_the_rate_are_no_columns(tmp_path):
    found = columns(
        tmp_path,
        epoch=[1, 2],
        lr=[0.1, 0.01],
        tick=[1.0, 2.0],
        rate=[0.1, 0.01],
        val_acc=[0.5, 0.6],
    )
    assert found.names == ("val_acc",)
    assert found.repeats == {"tick": "step", "rate": "LR"}


def test_of_equal_metrics_the_better_known_name_stays(tmp_path):
    found = columns(
        tmp_path, x=[0.5, 0.6], acc=[0.5, 0.6], best_acc=[0.5, 0.6], train_loss=[2.0, 1.0]
    )
    assert found.names == ("acc", "train_loss")
    assert found.repeats == {"x": "acc", "best_acc": "acc"}


def test_what_never_changes_comes_last(tmp_path):
    found = columns(tmp_path, width=[8, 8], noise=[0.1, 0.2], val_acc=[0.5, 0.5], epoch=[5, 6])
    assert found.names == ("noise", "val_acc")
    assert found.constants == {"width": 8}


def test_counts_that_go_with_the_clock_are_no_columns(tmp_path):
    found = columns(
        tmp_path,
        epoch=[1, 2, 3],
        i=[40, 80, 120],
        seen=[1024, 2048, 3072],
        score=[10, 20, 30],
        va=[0.5, 1.0, 1.5],
        n=[7, 9, 12],
    )
    assert found.names == ("score", "n", "va")
    assert found.repeats == {"i": "40 × step", "seen": "1024 × step"}


def test_numbers_that_change_and_count_nothing_are_of_one_checkpoint(tmp_path):
    for i in (1, 2, 3):
        beside = {"va": i / 7, "top1": 70 + i, "n": 40 * i, "tau": 0.5, "kl_weight": i / 10}
        save_weight(tmp_path / f"epoch_{i}.pt", i, epoch=i, **beside)
    run = open_run(tmp_path)
    assert find_momentary_numbers(run.checkpoints) == {"va"}
    assert find_momentary_numbers(run.last(1).checkpoints) == frozenset()


def test_a_perfect_accuracy_in_the_first_epoch_is_a_column(tmp_path):
    found = columns(tmp_path, epoch=[1, 1], step=[10, 20], acc=[1.0, 1.0])
    assert found.names == ("acc",)


def test_a_single_checkpoint_has_all_its_metrics(tmp_path):
    assert columns(tmp_path, epoch=[1], acc=[1.0], loss=[1.0]).names == ("acc", "loss")


values = st.lists(st.none() | st.floats(), min_size=3, max_size=3)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["acc", "loss", "a", "b", "c"]), values))
def test_each_metric_is_a_column_or_repeats_one(tmp_path_factory, recorded):
    checkpoint = open_checkpoint(save_weight(tmp_path_factory.mktemp("run") / "x.pt"))
    recorded = {name: v for name, v in recorded.items() if v != [None] * 3}
    rows = [
        Record(step=i, metrics={n: v[i] for n, v in recorded.items() if v[i] is not None})
        for i in range(3)
    ]
    found = choose_metric_columns([replace(checkpoint, record=row) for row in rows])
    assert sorted([*found.names, *found.repeats, *found.constants]) == sorted(recorded)
