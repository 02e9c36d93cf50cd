"""Weights by a recorded metric, against exponentials by hand."""

import math

import pytest

from ckptavg.averaging import schemes
from ckptavg.averaging.schemes import RunRecord
from ckptavg.errors import RunError, UsageError


def record_of(values, name="val_acc"):
    paths = tuple(f"{i}.pt" for i in range(len(values)))
    return RunRecord((None,) * len(values), tuple({name: v} for v in values), paths=paths)


def coefficients(text, record):
    return schemes.normalize(schemes.parse(text).coefficients(record))


@pytest.mark.parametrize(
    ("name", "mode", "sign"),
    [
        ("val_acc", "", 1),
        ("val_loss", "", -1),
        ("val_acc", ",mode=min", -1),
        ("sharpness", ",mode=max", 1),
    ],
)
def test_softmax_weighs_the_better_more(name, mode, sign):
    values = [90.0, 92.0, 91.0]
    powers = [math.exp(sign * value / 2) for value in values]
    found = coefficients(f"softmax:metric={name},temperature=2{mode}", record_of(values, name))
    assert found == pytest.approx([power / sum(powers) for power in powers], rel=1e-12)


def test_softmax_does_not_overflow():
    record = record_of([-1e308, 1e308, 1e308])
    assert coefficients("softmax:metric=val_acc,temperature=1e-300", record) == [0, 0.5, 0.5]


def test_softmax_gives_no_weight_to_values_not_finite():
    scheme = schemes.parse("softmax:metric=val_acc,temperature=1e3")
    record = record_of([1.0, math.nan, math.inf, 1.0])
    found = scheme.coefficients(record)
    assert found == [1, 0, 0, 1]
    told = "val_acc is not finite in 1.pt, 2.pt: their weight is 0"
    assert scheme.note(found, record) == told


def test_softmax_note_tells_a_single_checkpoint():
    scheme = schemes.parse("softmax:metric=val_acc,temperature=0.1")
    record = record_of([1.0, 2.0])
    words = "softmax gives 0.9999 of the weight to 1.pt, so that the average is nearly that check"
    assert scheme.note(scheme.coefficients(record), record).startswith(words)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (record_of([1.0], "val_loss"), "0.pt records no metric 'val_acc'.*It records val_loss"),
        (record_of([1.0], "val_accu"), "Did you mean val_accu?"),
        (RunRecord((1,), ({},), paths=("a.pt",)), "It records none at all"),
        ([1, 2], "only steps are given"),
        (record_of([math.nan, math.inf]), "finite in no checkpoint"),
    ],
)
def test_softmax_error_says_what_is_recorded(record, words):
    with pytest.raises(RunError, match=words) as caught:
        coefficients("softmax:metric=val_acc,temperature=1", record)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("softmax", "expected to have its metric"),
        ("softmax:metric=val_acc", "expected to have its temperature"),
        ("softmax:metric=val_acc,temperature=0", "expected to have T > 0"),
        ("softmax:metric=val_acc,temperature=inf", "expected to have T > 0"),
        (
            "softmax:metric=val_acc,temperature=1,mode=high",
            "mode is expected to be one of max, min",
        ),
    ],
)
def test_softmax_refuses_wrong_options(text, words):
    with pytest.raises(UsageError, match=words) as caught:
        schemes.parse(text)
    assert caught.value.exit_code == 2


def test_softmax_asks_for_the_mode_of_an_unknown_metric():
    with pytest.raises(UsageError, match=r"does not tell which.*mode=max or mode=min") as caught:
        coefficients("softmax:metric=sharpness,temperature=1", record_of([1.0], "sharpness"))
    assert caught.value.exit_code == 2


def test_softmax_corrects_a_metric_before_asking_for_the_mode():
    with pytest.raises(RunError, match="Did you mean val_loss"):
        coefficients("softmax:metric=val_los,temperature=1", record_of([1.0], "val_loss"))
