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


def test_metric_columns_omit_copies_of_clock_and_rate(tmp_path):
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


def test_metric_columns_keep_best_known_of_equals(tmp_path):
    found = columns(
        tmp_path, x=[0.5, 0.6], acc=[0.5, 0.6], best_acc=[0.5, 0.6], train_loss=[2.0, 1.0]
    )
    assert found.names == ("acc", "train_loss")
    assert found.repeats == {"x": "acc", "best_acc": "acc"}


def test_metric_columns_put_constants_last(tmp_path):
    found = columns(tmp_path, width=[8, 8], noise=[0.1, 0.2], val_acc=[0.5, 0.5], epoch=[5, 6])
    assert found.names == ("noise", "val_acc")
    assert found.constants == {"width": 8}


def test_metric_columns_omit_multiples_of_clock(tmp_path):
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


def test_find_momentary_numbers_omits_counts(tmp_path):
    for i in (1, 2, 3):
        beside = {"va": i / 7, "top1": 70 + i, "n": 40 * i, "tau": 0.5, "kl_weight": i / 10}
        save_weight(tmp_path / f"epoch_{i}.pt", i, epoch=i, **beside)
    run = open_run(tmp_path)
    assert find_momentary_numbers(run.checkpoints) == {"va"}
    assert find_momentary_numbers(run.last(1).checkpoints) == frozenset()


def test_metric_columns_keep_accuracy_equal_to_epoch(tmp_path):
    found = columns(tmp_path, epoch=[1, 1], step=[10, 20], acc=[1.0, 1.0])
    assert found.names == ("acc",)


def test_metric_columns_of_one_checkpoint_are_all(tmp_path):
    assert columns(tmp_path, epoch=[1], acc=[1.0], loss=[1.0]).names == ("acc", "loss")


values = st.lists(st.none() | st.floats(), min_size=3, max_size=3)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(["acc", "loss", "a", "b", "c"]), values))
def test_metric_columns_account_for_each_metric(tmp_path_factory, recorded):
    checkpoint = open_checkpoint(save_weight(tmp_path_factory.mktemp("run") / "x.pt"))
    recorded = {name: v for name, v in recorded.items() if v != [None] * 3}
    rows = [
        Record(step=i, metrics={n: v[i] for n, v in recorded.items() if v[i] is not None})
        for i in range(3)
    ]
    found = choose_metric_columns([replace(checkpoint, record=row) for row in rows])
    assert sorted([*found.names, *found.repeats, *found.constants]) == sorted(recorded)
