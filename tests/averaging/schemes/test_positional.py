"""Schemes by position: worked values, recursions and the published forms."""

import itertools
import math
from fractions import Fraction

import pytest

from ckptavg.averaging import schemes
from ckptavg.averaging.schemes import RunRecord
from ckptavg.errors import UsageError

THETA = [1.0, 2.0, 4.0, 8.0]
STEPS = [1.0, 2.0, 3.0, 4.0]


def coefficients(text, run):
    return schemes.normalize(schemes.parse(text).coefficients(run))


def weighted(text, run=STEPS):
    return math.fsum(c * v for c, v in zip(coefficients(text, run), THETA, strict=True))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wsm:decay=linear", 3.75),
        ("wsm:decay=cosine", 3.439340),
        ("wsm:decay=sqrt", 2.621685),
        ("polynomial:eta=0", 3.75),
        ("polynomial:eta=1", 4.9),
        # Γ(i + 3)/Γ(i) = i (i + 1) (i + 2): 6, 24, 60, 120.
        ("polynomial:eta=3", 1254 / 210),
        ("lawa:k=50%", 6.0),
    ],
)
def test_positional_scheme_has_worked_value(text, expected):
    assert weighted(text) == pytest.approx(expected, abs=5e-7)


@pytest.mark.parametrize("eta", ["0.5", "3", "8", "16.25"])
def test_polynomial_is_its_recursion(eta):
    value, mean = Fraction(eta), Fraction(0)
    for t, theta in enumerate(THETA, 1):
        factor = (value + 1) / (t + value)
        mean = (1 - factor) * mean + factor * Fraction(theta)
    assert weighted(f"polynomial:eta={eta}") == pytest.approx(float(mean), rel=1e-14)


def test_polynomial_takes_large_eta():
    assert coefficients("polynomial:eta=1e300", STEPS) == pytest.approx([0, 0, 0, 1])


@pytest.mark.parametrize(
    ("name", "decay"),
    [
        ("linear", lambda x: 1 - x),
        ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2),
        ("sqrt", lambda x: 1 - math.sqrt(x)),
    ],
)
def test_wsm_gives_each_update_the_decayed_weight(name, decay):
    # Merging θ₀ + g₁ + ... with the coefficients gives the update gᵢ the weight f(i/n).
    merged = coefficients(f"wsm:decay={name}", STEPS * 2)
    suffixes = list(itertools.accumulate(reversed(merged)))[::-1]
    assert suffixes == pytest.approx([decay(i / 8) for i in range(8)], abs=1e-15)


def test_wsm_of_one_checkpoint_is_the_checkpoint():
    assert coefficients("wsm:decay=cosine", [None]) == [1.0]


@pytest.mark.parametrize(
    ("share", "steps", "taken"),
    [
        ("10%", range(1, 101), 10),
        ("10%", range(0, 1000, 10), 10),
        ("12.5%", range(1, 9), 1),
        ("30%", [0, 500, 699, 700, 701, 1000], 2),
        ("1%", range(1, 11), 1),
        ("100%", range(5), 5),
        ("100%", [0], 1),
        ("50%", [0.25, 0.5, 0.75, 1.0], 2),
    ],
)
def test_lawa_takes_a_share_of_training(share, steps, taken):
    marks = schemes.parse(f"lawa:k={share}").coefficients(list(steps))
    assert marks == [0.0] * (len(marks) - taken) + [1.0] * taken


@pytest.mark.parametrize(("share", "taken"), [("10%", 1), ("25%", 3), ("24%", 2), ("1%", 1)])
def test_lawa_share_counts_checkpoints_without_steps(share, taken):
    scheme = schemes.parse(f"lawa:k={share}")
    record = RunRecord((None, *range(1, 10)), paths=tuple("abcdefghij"))
    marks = scheme.coefficients(record)
    assert sum(marks) == taken
    told = f"lawa of {share} counts checkpoints, {taken} of 10"
    assert scheme.note(marks, record) == f"not every checkpoint has a step: {told}"


def test_lawa_share_is_of_each_training():
    record = RunRecord((1, 2, 3, 4, 10, 20, 30, 40), lengths=(4, 4))
    assert schemes.parse("lawa:k=25%").coefficients(record) == [0, 0, 0, 1, 0, 0, 0, 1]


@pytest.mark.parametrize(
    "text",
    [
        "wsm",
        "wsm:decay=exp",
        "wsm:decay=",
        "polynomial",
        "polynomial:eta=-1",
        "polynomial:eta=inf",
        "polynomial:eta=three",
        "lawa:k=0%",
        "lawa:k=101%",
        "lawa:k=-5%",
        "lawa:k=%",
        "lawa:k=1e1%",
        "lawa:k=" + "9" * 50 + "%",
    ],
)
def test_positional_error_says_what_is_expected(text):
    with pytest.raises(UsageError, match="expected") as caught:
        schemes.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("wsm", "wsm:decay=cosine"),
        ("wsm:cosine", "wsm:decay=cosine"),
        ("wsm:decay=cos", "wsm:decay=cosine"),
        ("lawa:10%", "lawa:k=10%"),
        ("polynomal:3", "polynomial:eta=3"),
        ("polynomial-decay:3", "polynomial:eta=3"),
    ],
)
def test_positional_error_suggests_a_correction(text, meant):
    with pytest.raises(UsageError) as caught:
        schemes.parse(text)
    assert caught.value.remedy == f"Did you mean {meant}?"


def test_polynomial_note_tells_a_single_checkpoint():
    scheme = schemes.parse("polynomial:eta=100")
    record = RunRecord((1, 2, 3), paths=("a.pt", "b.pt", "c.pt"))
    note = scheme.note(scheme.coefficients(record), record)
    assert note.startswith("polynomial gives 0.9806 of the weight to c.pt")
    assert scheme.note(scheme.coefficients([1]), [1]) == ""


def test_lawa_note_tells_a_share_of_one_checkpoint():
    scheme = schemes.parse("lawa:k=10%")
    record = RunRecord((1, 2, 3), paths=("a.pt", "b.pt", "c.pt"))
    note = scheme.note(scheme.coefficients(record), record)
    assert note.startswith("lawa gives all of the weight to c.pt")
