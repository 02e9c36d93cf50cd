"""Moving averages by a half-life or an α, against their recursions."""

import math

import pytest

from ckptavg.averaging import schemes
from ckptavg.averaging.schemes import RunRecord
from ckptavg.errors import RunError, UsageError

THETA = [1.0, 2.0, 4.0, 8.0]
UNEVEN = [10.0, 20.0, 40.0, 80.0]


def coefficients(text, run):
    return schemes.normalize(schemes.parse(text).coefficients(run))


def weighted(text, run):
    return math.fsum(c * v for c, v in zip(coefficients(text, run), THETA, strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("pma:alpha=0.2", 3.008), ("lookahead:alpha=0.5", 5.375), ("pma:alpha=1", 8.0)],
)
def test_alpha_has_worked_value(text, expected):
    assert weighted(text, [None] * 4) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("name", ["pma", "lookahead"])
def test_alpha_is_its_recursion(name):
    mean = THETA[0]
    for value in THETA[1:]:
        mean += 0.3 * (value - mean)
    assert weighted(f"{name}:alpha=0.3", UNEVEN) == pytest.approx(mean, rel=1e-14)


@pytest.mark.parametrize("fraction", ["0.1", "10%", "1e-1"])
def test_halflife_is_a_fraction_of_training(fraction):
    # A half-life of 8 of the 80 steps: each step keeps 2^(-1/8), from the seed at step 10 on.
    mean = THETA[0]
    for before, step, value in zip(UNEVEN, UNEVEN[1:], THETA[1:], strict=False):
        for _ in range(int(step - before)):
            mean = 2 ** (-1 / 8) * mean + (1 - 2 ** (-1 / 8)) * value
    assert weighted(f"ema:halflife={fraction}", UNEVEN) == pytest.approx(mean, rel=1e-13)


def test_halflife_halves_weights():
    assert coefficients("ema:halflife=25%,debias=true", [1, 2, 3, 4]) == pytest.approx(
        [1 / 15, 2 / 15, 4 / 15, 8 / 15], rel=1e-14
    )


def test_halflife_does_not_depend_on_the_unit_of_steps():
    epochs = coefficients("ema:halflife=5%", [1, 2, 3, 4])
    assert coefficients("ema:halflife=5%,per=step", [391, 782, 1173, 1564]) == pytest.approx(epochs)


def test_halflife_keeps_digits_of_short_gaps():
    # 1 - 2^(-1e-16) would be 0 if computed as written.
    last = coefficients("ema:halflife=100%", [1e12, 1e12 + 2**-12])[1]
    assert last == pytest.approx(math.log(2) * 2**-12 / 1e12, rel=1e-6)


@pytest.mark.parametrize("steps", [[1, None], [2, 2], [2, 1], [0], [None]])
def test_halflife_needs_steps(steps):
    with pytest.raises(RunError, match="ema:halflife needs a") as caught:
        coefficients("ema:halflife=10%", steps)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    "text",
    [
        "ema:halflife=0",
        "ema:halflife=10",
        "ema:halflife=nan",
        "ema:halflife=0%",
        "ema:halflife=200%",
        "ema:halflife=10%,decay=0.9",
        "ema:halflife=10%,per=checkpoint",
        "pma",
        "pma:alpha=0",
        "pma:alpha=1.1",
        "pma:alpha=x",
        "lookahead:alpha=-1",
    ],
)
def test_exponential_error_says_what_is_expected(text):
    with pytest.raises(UsageError, match="expected") as caught:
        schemes.parse(text)
    assert "\n" not in str(caught.value)


def test_alpha_error_names_its_scheme():
    with pytest.raises(UsageError, match="lookahead:alpha=A is expected"):
        schemes.parse("lookahead:alpha=2")


@pytest.mark.parametrize(
    ("text", "steps", "words"),
    [
        ("pma:alpha=0.2", [1, 2, 3, 4], "oldest of 4 checkpoints weighs most (0.51), as pma is"),
        ("lookahead:alpha=0.99", [1, 2, 3], "lookahead gives 0.99 of the weight to c.pt"),
        ("ema:halflife=1%", [1, 2, 3], "ema gives 0.9999 of the weight to c.pt"),
        ("ema:halflife=100%", [8, 9, 10], "oldest of 3 checkpoints weighs most (0.87), as ema"),
    ],
)
def test_exponential_note_tells_a_dominant_checkpoint(text, steps, words):
    scheme = schemes.parse(text)
    record = RunRecord(tuple(steps), paths=("a.pt", "b.pt", "c.pt", "d.pt")[: len(steps)])
    assert words in scheme.note(scheme.coefficients(record), record)
