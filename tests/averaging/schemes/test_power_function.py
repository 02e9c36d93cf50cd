"""Power-function and post-hoc EMA against worked values and values of the published code."""

import math

import numpy as np
import pytest

from ckptavg.averaging import schemes
from ckptavg.averaging.schemes import RunRecord
from ckptavg.averaging.schemes.power_function import exponent_of
from ckptavg.errors import RunError, UsageError

# Computed by training/phema.py of NVlabs/edm2 (std_to_exp, solve_posthoc_coefficients), float64.
EDM2_EXPONENTS = {0.05: 16.972198602303447, 0.10: 6.937203937601809, 0.07: 11.244939447857924}
EDM2_SNAPSHOTS = [(4096 * i, sigma) for i in range(1, 9) for sigma in (0.05, 0.10)]
EDM2_AT_007 = [
    3.8923196884360404e-12, -9.5612913162106657e-11, 1.7380077549162091e-08,
    -1.1822569154039657e-07, 2.2239824574642905e-06, -9.1411604368222978e-06,
    6.6088575336683495e-05, -2.1443138302308976e-04, 8.8659745140010418e-04,
    -2.5444840586677279e-03, 7.2521780242067900e-03, -1.9405441994355861e-02,
    4.2397913310664982e-02, -1.0864094698057378e-01, 3.8708213040015665e-01,
    6.9312741477016915e-01,
]  # fmt: skip
EDM2_ONE_SIGMA = [
    -5.4318017037919378e-25, -3.1130114879646682e-17, -4.1687520707014240e-11,
    -2.1418421161640175e-04, 1.0002141842533039e+00,
]  # fmt: skip


def coefficients(text, run):
    return schemes.normalize(schemes.parse(text).coefficients(run))


def record_of(snapshots, **fields):
    return RunRecord(
        tuple(step for step, _ in snapshots), widths=tuple(w for _, w in snapshots), **fields
    )


@pytest.mark.parametrize(("sigma", "exponent"), EDM2_EXPONENTS.items())
def test_exponent_is_that_of_published_code(sigma, exponent):
    assert exponent_of(sigma) == pytest.approx(exponent, rel=1e-14)


@pytest.mark.parametrize("sigma", [1e-320, 1e-160, 1e-9, 0.01, 0.1, 0.2, 0.28, 0.288675])
def test_exponent_has_the_width(sigma):
    gamma = exponent_of(sigma)
    assert gamma > 0
    if gamma < math.inf:
        width = math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3)
        assert width == pytest.approx(sigma, rel=1e-7)


def test_power_ema_has_worked_value():
    found = coefficients("power-ema:sigma=0.25", [1, 2, 3, 4])
    assert found == pytest.approx([0.0921643, 0.2114214, 0.3061299, 0.3902843], abs=5e-8)
    assert math.fsum(np.multiply(found, [1, 2, 4, 8])) == pytest.approx(4.861801, abs=5e-7)


def test_power_ema_has_its_width_over_training():
    # Of very many checkpoints, the positions in training have the standard deviation sigma.
    times = np.arange(1, 20001) / 20000
    weights = np.array(coefficients("power-ema:sigma=0.15", times.tolist()))
    mean = (weights * times).sum()
    assert math.sqrt((weights * (times - mean) ** 2).sum()) == pytest.approx(0.15, rel=1e-3)


def test_power_ema_counts_uneven_gaps():
    fine = coefficients("power-ema:sigma=0.2", [1, 2, 3, 4, 5, 6, 7, 8])
    coarse = coefficients("power-ema:sigma=0.2", [1, 2, 4, 8])
    assert coarse == pytest.approx([fine[0], fine[1], sum(fine[2:4]), sum(fine[4:])])


@pytest.mark.parametrize("steps", [[1, None], [1, 1], [0], [-1, 2]])
def test_power_ema_needs_steps(steps):
    with pytest.raises(RunError, match="power-ema needs"):
        coefficients("power-ema:sigma=0.1", steps)


@pytest.mark.parametrize("name", ["power-ema", "posthoc-ema"])
@pytest.mark.parametrize("sigma", ["0", "-0.1", "0.2887", "0.3", "1", "nan", "wide"])
def test_sigma_out_of_range_names_the_bound(name, sigma):
    with pytest.raises(UsageError, match=r"below 0\.2887, which is 1/sqrt\(12\)") as caught:
        schemes.parse(f"{name}:sigma={sigma}")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["power-ema", "posthoc-ema"])
def test_sigma_may_be_just_below_the_bound(name):
    assert schemes.parse(f"{name}:sigma=0.2886")


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("power_ema:0.1", "power-ema:sigma=0.1"),
        ("power-ema", "power-ema:sigma=0.1"),
        ("phema:0.1", "posthoc-ema:sigma=0.1"),
        ("post-hoc-ema:sigma=0.2", "posthoc-ema:sigma=0.2"),
        ("posthoc-ema:sigm=0.2", "posthoc-ema:sigma=0.2"),
    ],
)
def test_sigma_error_suggests_a_correction(text, meant):
    with pytest.raises(UsageError) as caught:
        schemes.parse(text)
    assert caught.value.remedy == f"Did you mean {meant}?"


WORKED = [(500, 0.05), (500, 0.1), (1000, 0.05), (1000, 0.1)]


@pytest.mark.parametrize(
    ("text", "record"),
    [
        ("posthoc-ema:sigma=0.075", record_of(WORKED)),
        ("posthoc-ema:sigma=0.075,sigmas=0.05/0.1/0.05/0.1", [500, 500, 1000, 1000]),
    ],
)
def test_posthoc_ema_has_worked_value(text, record):
    expected = [0.00013575, -0.00242663, 0.34296904, 0.65932184]
    assert coefficients(text, record) == pytest.approx(expected, abs=5e-9)


def test_posthoc_ema_takes_a_sigma_per_run():
    record = RunRecord((500, 1000, 500, 1000), lengths=(2, 2))
    expected = [0.00013575, 0.34296904, -0.00242663, 0.65932184]
    found = coefficients("posthoc-ema:sigma=0.075,sigmas=0.05/0.1", record)
    assert found == pytest.approx(expected, abs=5e-9)


def test_posthoc_ema_takes_a_sigma_per_snapshot_of_a_step():
    found = coefficients("posthoc-ema:sigma=0.075,sigmas=0.05/0.1", [500, 500, 1000, 1000])
    assert found == coefficients("posthoc-ema:sigma=0.075", record_of(WORKED))


def test_posthoc_ema_gives_values_of_published_code():
    assert coefficients("posthoc-ema:sigma=0.07", record_of(EDM2_SNAPSHOTS)) == pytest.approx(
        EDM2_AT_007, rel=1e-10, abs=1e-15
    )
    one = [(step, 0.05) for step in (1000, 2000, 3000, 5000, 8000)]
    assert coefficients("posthoc-ema:sigma=0.03", record_of(one)) == pytest.approx(
        EDM2_ONE_SIGMA, rel=1e-10, abs=1e-20
    )


def test_posthoc_ema_gives_back_a_snapshot():
    found = coefficients("posthoc-ema:sigma=0.1", record_of(WORKED))
    assert found == pytest.approx([0, 0, 0, 1], abs=1e-15)


@pytest.mark.parametrize("order", [[3, 1, 0, 2], [2, 3, 0, 1]])
def test_posthoc_ema_does_not_depend_on_the_order(order):
    expected = coefficients("posthoc-ema:sigma=0.075", record_of(WORKED))
    shuffled = coefficients("posthoc-ema:sigma=0.075", record_of([WORKED[i] for i in order]))
    assert shuffled == pytest.approx([expected[i] for i in order], rel=1e-12)


@pytest.mark.parametrize(
    ("text", "record", "words"),
    [
        ("sigma=0.1", [1, 2], "sigma of checkpoint 1 of 2 is neither recorded nor in its name"),
        (
            "sigma=0.1,sigmas=0.05/0.1",
            [1, 2, 3],
            "2 sigmas are given for 3 snapshots of 3 steps in 1 run",
        ),
        ("sigma=0.1,sigmas=0.05/0.1", [1, None], "and the last checkpoint has none"),
        ("sigma=0.1,sigmas=0.05/0.1", [0, 1], "and checkpoint 1 of 2 has 0"),
        ("sigma=0.1,sigmas=0.05", [2, 2], "have the same step 2 and the same sigma 0.05"),
    ],
)
def test_posthoc_ema_error_says_what_is_missing(text, record, words):
    with pytest.raises(RunError, match=words) as caught:
        coefficients(f"posthoc-ema:{text}", record)
    assert caught.value.exit_code == 1
    assert caught.value.remedy


def test_posthoc_ema_refuses_a_sum_below_0():
    # Snapshots that hold next to nothing of the target.
    record = record_of([(990, 0.001), (1, 0.01), (999, 0.1), (990, 0.2)])
    with pytest.raises(RunError, match="do not have a positive sum"):
        coefficients("posthoc-ema:sigma=0.01", record)


@pytest.mark.parametrize("sigmas", ["", "0.05,0.1", "0.05/", "0.05/0.5"])
def test_posthoc_ema_refuses_wrong_sigmas(sigmas):
    with pytest.raises(UsageError):
        schemes.parse(f"posthoc-ema:sigma=0.1,sigmas={sigmas}")


def test_posthoc_ema_note_tells_inferred_sigmas_and_a_poor_fit():
    scheme = schemes.parse("posthoc-ema:sigma=0.25")
    record = record_of(WORKED, paths=("a", "b", "c", "d"))
    note = scheme.note(scheme.coefficients(record), record)
    assert "the sigmas of the snapshots, as recorded or named: 0.05, 0.1" in note
    # ‖Σ x p − p_target‖ / ‖p_target‖ by a Riemann sum over training.
    times = (np.arange(200_000) + 0.5) / 200
    target = profile(times, 1000, 0.25)
    combined = sum(
        weight * profile(times, step, sigma)
        for weight, (step, sigma) in zip(
            coefficients("posthoc-ema:sigma=0.25", record), WORKED, strict=True
        )
    )
    misfit = np.linalg.norm(combined - target) / np.linalg.norm(target)
    assert f"only to within {misfit:.0%}" in note


def test_posthoc_ema_note_tells_amplified_rounding():
    scheme = schemes.parse("posthoc-ema:sigma=0.01,sigmas=0.05/0.1/0.05/0.1")
    record = RunRecord((500, 500, 1000, 1000), paths=("a", "b", "c", "d"))
    found = scheme.coefficients(record)
    size = sum(map(abs, schemes.normalize(found)))
    assert f"absolute coefficients add up to {size:.3g}" in scheme.note(found, record)


def profile(times, step, sigma):
    gamma = exponent_of(sigma)
    return np.where(times <= step, (gamma + 1) * times**gamma / step ** (gamma + 1), 0)
