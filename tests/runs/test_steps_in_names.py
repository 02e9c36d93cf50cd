"""Which number of a checkpoint's name is its step, and which is none."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.runs.discovery.steps_in_names import NamedStep, read_steps


def values(*stems: str) -> list[int | None]:
    return [step.value for step in read_steps(stems)]


@pytest.mark.parametrize(
    "stem",
    ["model-0.9731", "ckpt_acc_0.87", "model_top1_76", "model_top5-93", "net_acc@1_71",
     "acc87", "val_loss=2", "valLoss_12", "psnr32.5", "f1_80", "best_score_7", "epoch_2.5",
     "model.0.95"],
)  # fmt: skip
def test_read_steps_takes_no_score(stem):
    assert values(stem) == [None]


@pytest.mark.parametrize(
    ("stem", "step"),
    [
        ("epoch=3-val_loss=0.25", 3),
        ("epoch=3-val_acc=71", 3),
        ("model_top1_76_epoch_12", 12),
        ("resnet50-0.9731-12", 12),
        ("acc_87_3", 3),
        ("top1_76_12", 12),
        ("ema_0.9999_010000", 10_000),
        ("score_checkpoint_5", 5),
        ("3epoch", 3),
        ("12-steps", 12),
        ("epoch_3_step_100", 100),
        ("epoch=1-step=500-v2", 500),
        ("v1.2.3_ep7", 7),
    ],
)
def test_read_steps_takes_whole_number_beside_score(stem, step):
    assert values(stem) == [step]


@pytest.mark.parametrize(
    ("stem", "step"),
    [("step-10k", 10_000), ("ckpt_1M", 1_000_000), ("1.5M_steps", 1_500_000),
     ("iter_160k", 160_000), ("model-2.5k", 2_500), ("ckpt_10kb", 10), ("step_3m2", 3)],
)  # fmt: skip
def test_read_steps_multiplies_thousands_and_millions(stem, step):
    assert values(stem) == [step]


def test_read_steps_chooses_among_several_words():
    assert values("batch32_step100_epoch1", "batch32_step100_epoch2") == [1, 2]
    assert values("seed0_epoch1", "seed1_epoch1") == [1, 1]


def test_read_steps_splits_dotted_numbers():
    assert values("model.5.100", "model.6.200") == [5, 6]
    assert values("v1.2.3", "v1.2.4") == [3, 4]


def test_read_steps_takes_unit_of_word():
    assert read_steps(["epoch-3", "checkpoint-8000", "iter_9"]) == [
        NamedStep(3, "epoch"), NamedStep(8000, None), NamedStep(9, "step"),
    ]  # fmt: skip


@settings(deadline=None)
@given(
    step=st.integers(0, 10**9),
    score=st.decimals(0, 100, places=4),
    metric=st.sampled_from(["val_loss", "acc", "top1", "mIoU", "psnr", ""]),
    first=st.booleans(),
)
def test_read_steps_finds_step_on_either_side_of_score(step, score, metric, first):
    parts = [f"epoch={step}", f"{metric}={score}"]
    assert values("-".join(parts if first else parts[::-1])) == [step]


@settings(deadline=None)
@given(st.text(max_size=60))
def test_read_steps_takes_any_name(stem):
    (step,) = read_steps([stem])
    assert step.value is None or step.value >= 0


@pytest.mark.parametrize("part", ["9", "top", "1.", "step_", "epoch1k", "loss0.5", "ab@", "1 step"])
def test_read_steps_takes_linear_time(part):
    begin = time.process_time()
    read_steps([part * (100_000 // len(part)), "x"])
    assert time.process_time() - begin < 5


def test_read_steps_reads_indices_before_steps():
    # ema-pytorch's snapshots of two EMAs.
    assert values("0.500", "1.500", "0.1000", "1.1000") == [500, 500, 1000, 1000]


@pytest.mark.parametrize(
    "stems",
    [
        ["0.25", "0.5"],
        ["0.500", "1.500", "1.1000"],
        ["1.500", "2.500"],
        ["0.05", "1.05"],
        ["0.500", "1.500", "last"],
    ],
)
def test_read_steps_takes_no_decimal_for_an_index(stems):
    assert set(values(*stems)) == {None}
