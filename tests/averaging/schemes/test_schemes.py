"""Coefficients against the worked values of their papers."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.averaging import schemes
from ckptavg.errors import RunError, UsageError

THETA = [1.0, 2.0, 4.0, 8.0]
CONSECUTIVE = [1.0, 2.0, 3.0, 4.0]
UNEVEN = [1.0, 2.0, 4.0, 8.0]


def weighted(coefficients, values):
    return math.fsum(c * v for c, v in zip(coefficients, values, strict=True))


def coefficients(text, steps):
    return schemes.normalize(schemes.parse(text).coefficients(steps))


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("uniform", CONSECUTIVE, 3.75),
        ("lawa:k=2", CONSECUTIVE, 6.0),
        ("lawa:k=3", CONSECUTIVE, 4.666667),
        ("ema:decay=0.5", CONSECUTIVE, 5.375),
        ("ema:decay=0.9", CONSECUTIVE, 2.051),
        ("ema:decay=0.5,debias=true", CONSECUTIVE, 5.666667),
        ("ema:decay=0.9,debias=true", CONSECUTIVE, 4.056121),
        ("ema:decay=0.9,per=step", UNEVEN, 3.834421),
        ("ema:decay=0.8", CONSECUTIVE, 3.008),  # PMA with α = 0.2
        ("linear", CONSECUTIVE, 4.9),
    ],
)
def test_scheme_has_worked_value(text, steps, expected):
    assert weighted(coefficients(text, steps), THETA) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("uniform", [0.25, 0.25, 0.25, 0.25]),
        ("linear", [0.1, 0.2, 0.3, 0.4]),
        ("lawa:k=3", [0, 1 / 3, 1 / 3, 1 / 3]),
        ("lawa:k=9", [0.25, 0.25, 0.25, 0.25]),
        ("ema:decay=0.5", [0.125, 0.125, 0.25, 0.5]),
        ("ema:decay=0.5,debias=true", [1 / 15, 2 / 15, 4 / 15, 8 / 15]),
        ("ema:decay=0.9,per=step", [0.4782969, 0.0531441, 0.124659, 0.3439]),
        ("ema:decay=0", [0, 0, 0, 1]),
    ],
)
def test_scheme_has_worked_coefficients(text, expected):
    assert coefficients(text, UNEVEN) == pytest.approx(expected, abs=1e-12)


def test_ema_is_its_recursion():
    mean = THETA[0]
    for value in THETA[1:]:
        mean = 0.7 * mean + 0.3 * value
    assert weighted(coefficients("ema:decay=0.7", CONSECUTIVE), THETA) == pytest.approx(mean)


def test_ema_per_step_holds_model_between_checkpoints():
    mean = THETA[0]
    for before, step, value in zip(UNEVEN, UNEVEN[1:], THETA[1:], strict=False):
        for _ in range(int(step - before)):
            mean = 0.9 * mean + 0.1 * value
    assert weighted(coefficients("ema:decay=0.9,per=step", UNEVEN), THETA) == pytest.approx(mean)


def test_ema_per_step_equals_ema_at_gaps_of_1():
    per_step = coefficients("ema:decay=0.9,per=step", CONSECUTIVE)
    assert per_step == pytest.approx(coefficients("ema:decay=0.9", CONSECUTIVE))


def test_ema_per_step_counts_gaps():
    late = [step + 1e6 for step in UNEVEN]
    assert coefficients("ema:decay=0.9,per=step", late) == pytest.approx(
        coefficients("ema:decay=0.9,per=step", UNEVEN)
    )


@pytest.mark.parametrize("steps", [[1, 2, None], [1, 2, 2], [1, 3, 2], [None]])
def test_ema_per_step_refuses_steps_not_increasing(steps):
    with pytest.raises(RunError, match="leave per=step out") as caught:
        coefficients("ema:decay=0.9,per=step", steps)
    assert caught.value.exit_code == 1


def test_ema_per_checkpoint_needs_no_steps():
    assert coefficients("ema:decay=0.5", [None] * 4) == [0.125, 0.125, 0.25, 0.5]


decays = st.floats(0, 1, exclude_max=True).map(lambda d: f"ema:decay={d!r}")
texts = st.one_of(
    st.sampled_from(["uniform", "linear"]),
    st.integers(1, 50).map(lambda k: f"lawa:k={k}"),
    st.tuples(
        decays, st.sampled_from(["", ",debias=true", ",per=step", ",debias=true,per=step"])
    ).map("".join),
)


@settings(derandomize=True, deadline=None)
@given(texts, st.lists(st.integers(0, 10**6), min_size=1, max_size=40, unique=True).map(sorted))
def test_coefficients_are_convex(text, steps):
    found = coefficients(text, steps)
    assert len(found) == len(steps)
    assert math.fsum(found) == pytest.approx(1, abs=1e-12)
    assert all(0 <= c <= 1 for c in found)


@settings(derandomize=True, deadline=None)
@given(texts)
def test_coefficient_of_one_checkpoint_is_1(text):
    assert coefficients(text, [7]) == [1.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "mean",
        "Uniform",
        "uniform:k=2",
        "linear:decay=0.5",
        "lawa",
        "lawa:k=0",
        "lawa:k=-1",
        "lawa:k=1.5",
        "lawa:k=two",
        "lawa:k=²",
        "ema",
        "ema:decay",
        "ema:decay=",
        "ema:decay=1",
        "ema:decay=-0.1",
        "ema:decay=1.5",
        "ema:decay=nan",
        "ema:decay=0.9,decay=0.8",
        "ema:decay=0.9,debias=yes",
        "ema:decay=0.9,per=epoch",
        "ema:decay=0.9,k=2",
        "ema:0.9",
    ],
)
def test_scheme_error_says_what_is_expected(text):
    with pytest.raises(UsageError, match="expected") as caught:
        schemes.parse(text)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("ema=0.9", "ema:decay=0.9"),
        ("ema:0.99", "ema:decay=0.99"),
        ("ema(.5)", "ema:decay=.5"),
        ("ema0.9", "ema:decay=0.9"),
        ("ema_0.9", "ema:decay=0.9"),
        ("ema, 0.9", "ema:decay=0.9"),
        ("EMA:decay=0.9", "ema:decay=0.9"),
        ("emma:decay=0.9", "ema:decay=0.9"),
        ("ema:decy=0.8", "ema:decay=0.8"),
        ("ema:decay:0.9", "ema:decay=0.9"),
        ("ema:decay=0.9;per=steps", "ema:decay=0.9,per=step"),
        ("ema:0.9,debias", "ema:decay=0.9,debias=true"),
        ("ema:decay=0.9,debias=no", "ema:decay=0.9,debias=false"),
        ("ema", "ema:decay=0.9"),
        ("Polyak:0.99", "ema:decay=0.99"),
        ("lawa:7", "lawa:k=7"),
        ("lawa:window=7", "lawa:k=7"),
        ("last3", "lawa:k=3"),
        ("swa", "uniform"),
        ("mean", "uniform"),
        ("unifrom", "uniform"),
        ("liner", "linear"),
    ],
)
def test_scheme_error_suggests_a_correction(text, meant):
    schemes.parse(meant)
    with pytest.raises(UsageError) as caught:
        schemes.parse(text)
    assert caught.value.remedy == f"Did you mean {meant}?"


@pytest.mark.parametrize(
    "text",
    ["", "swag", "greedy", "uniform:k=2", "ema:decay=1.5", "ema:decay=0.9,k=2", "lawa:k=two"],
)
def test_scheme_error_makes_no_unsure_suggestion(text):
    with pytest.raises(UsageError) as caught:
        schemes.parse(text)
    assert caught.value.remedy == ""


def note(text, steps):
    scheme = schemes.parse(text)
    return scheme.note(scheme.coefficients(steps))


def test_ema_note_says_that_the_oldest_weighs_most():
    told = note("ema:decay=0.9", [1, 2, 3])
    assert told.startswith("the oldest of 3 checkpoints weighs most (0.81)")
    assert "debias=true" in told
    assert "weighs most (0.51)" in note("ema:decay=0.8", CONSECUTIVE)
    assert "weighs most (0.9)" in note("ema:decay=0.9,per=step", [5, 6])


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("ema:decay=0.9,debias=true", [1, 2, 3]),
        ("ema:decay=0.5", [1, 2]),  # both alike
        ("ema:decay=0.5", CONSECUTIVE),
        ("ema:decay=0.9,per=step", [0, 100]),
        ("ema:decay=0.9", [1]),
        ("uniform", CONSECUTIVE),
        ("linear", CONSECUTIVE),
        ("lawa:k=4", CONSECUTIVE),
    ],
)
def test_scheme_note_is_empty_without_need(text, steps):
    assert note(text, steps) == ""


def test_lawa_note_says_that_the_run_is_shorter():
    assert note("lawa:k=10", [1, 2, 3]) == "lawa takes the last 10, and there are only 3"


def test_scheme_may_have_spaces():
    spaced = schemes.parse(" ema:decay=0.5, debias=true ")
    assert spaced.coefficients(CONSECUTIVE) == [0.125, 0.25, 0.5, 1.0]


def test_weights_are_normalized():
    scheme = schemes.from_weights([2, 3, 5])
    assert schemes.normalize(scheme.coefficients([None] * 3)) == [0.2, 0.3, 0.5]


def test_weights_may_be_negative():
    assert schemes.normalize(schemes.from_weights([-1, 3]).coefficients([1, 2])) == [-0.5, 1.5]


@pytest.mark.parametrize(
    "weights",
    [[], [0, 0], [1, -1], [1, -2], [math.nan, 1], [math.inf, 1], [-math.inf, 1], [1e308, 1e308]],
)
def test_weights_without_a_usable_sum_are_refused(weights):
    with pytest.raises(UsageError, match="weights are expected"):
        schemes.from_weights(weights)


@pytest.mark.parametrize("count", [2, 4])
def test_weights_must_match_checkpoints(count):
    with pytest.raises(RunError, match=f"3 weights are given for {count} checkpoints"):
        schemes.from_weights([1, 1, 1]).coefficients([1.0] * count)


@pytest.mark.parametrize("scheme", [schemes.parse("uniform"), schemes.from_weights([1])])
def test_scheme_refuses_an_empty_run(scheme):
    with pytest.raises(RunError, match="no checkpoint"):
        scheme.coefficients([])
