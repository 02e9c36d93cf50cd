"""Averages with other weights of the same checkpoints, against those that are planned anew."""

from dataclasses import replace

import pytest
import torch
from helpers import same_bits, save_states
from landscapes import save_run

from ckptavg import open_run
from ckptavg.averaging.compute import compute_state_dicts
from ckptavg.averaging.plan import plan_average, reweigh

FIRST = (0.5, -0.25, 0.0, 0.75, 0.0)
SECOND = (1.5, 0.1, 0.0, -0.6, 0.0)


def mixed_run(directory):
    """Floats of two widths, tied names, integers, and a layer that was frozen."""
    states = []
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        weight = torch.randn(3, 2, generator=generator)
        states.append(
            {"a.weight": weight, "b.weight": weight, "half": torch.randn(4).bfloat16(),
             "count": torch.tensor(seed), "norm.weight": torch.ones(2) * seed,
             "norm.running_mean": torch.ones(2), "norm.running_var": torch.ones(2),
             "norm.num_batches_tracked": torch.tensor(7)}
        )  # fmt: skip
    save_states(directory, states)
    return open_run(directory)


@pytest.mark.parametrize("make_run", [save_run, mixed_run])
def test_reweigh_plans_what_planning_anew_plans(tmp_path, make_run):
    run = make_run(tmp_path / "run")
    wanted = plan_average(run, weights=SECOND)
    reweighed = reweigh(plan_average(run, weights=FIRST), SECOND)
    assert reweighed.plan == replace(wanted.plan, notes=())
    assert reweighed.statistics == wanted.statistics
    (given,), (expected,) = compute_state_dicts([reweighed]), compute_state_dicts([wanted])
    assert given.keys() == expected.keys()
    assert all(same_bits(given[name], expected[name]) for name in expected)
    assert reweighed.scheme.text == wanted.scheme.text
