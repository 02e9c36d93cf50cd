"""Names of metrics, told from those of clocks, rates and settings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptavg.formats.metric_names import METRIC_WORDS, is_bookkeeping, is_metric, prominence

words = st.sampled_from(sorted(METRIC_WORDS))


@given(
    st.sampled_from(["", "val_", "train/", "m."]), words, st.sampled_from(["", "_epoch", "_step"])
)
def test_is_metric_accepts_any_split_and_period(split, word, period):
    assert is_metric(f"{split}{word}{period}")
    assert not is_bookkeeping(f"{word}{period}")


@given(st.sampled_from(["lr", "ep", "seed", "epoch", "timestamp", "updates"]), words)
def test_is_bookkeeping_accepts_clock_of_best(clock, word):
    assert is_bookkeeping(f"best_{word}_{clock}")
    assert is_bookkeeping(clock)


@pytest.mark.parametrize(
    "names",
    [
        ["val_acc", "val_loss", "train_acc", "train_loss", "f1", "norm", "best_val_acc"],
        ["eval_accuracy", "eval_loss", "loss", "eval_f1", "train_f1", "grad_norm"],
        ["val/top1", "test_acc", "acc1", "accuracy_train", "mIoU", "n", "best.acc"],
        ["metrics.val.acc", "metrics.train.acc", "metrics.val.n", "fitness_best"],
    ],
)
def test_prominence_orders_metrics(names):
    assert sorted(sorted(names), key=prominence) == names
