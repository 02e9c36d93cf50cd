"""Snapshots of EMAs that ema-pytorch wrote: combined to the EMA that it synthesizes itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from ckptavg import average, open_run
from ckptavg.averaging import schemes
from ckptavg.averaging.schemes import RunRecord

ema_pytorch = pytest.importorskip("ema_pytorch")
SIGMAS = (0.05, 0.28)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A network with EMAs of two widths, and the directory of the snapshots."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("emas") / "snapshots"
    net = nn.Linear(6, 4)
    emas = ema_pytorch.PostHocEMA(
        net, sigma_rels=SIGMAS, update_every=1, checkpoint_every_num_steps=50,
        checkpoint_folder=str(folder), checkpoint_dtype=torch.float32,
    )  # fmt: skip
    for _ in range(300):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        emas.update()
    return emas, folder


@pytest.mark.parametrize("sigma", [0.1, 0.15, 0.2])
def test_posthoc_ema_is_what_ema_pytorch_synthesizes(trained, sigma):
    emas, folder = trained
    run = open_run(folder)
    assert [c.step for c in run] == [step for step in range(50, 301, 50) for _ in SIGMAS]
    scheme = f"posthoc-ema:sigma={sigma},sigmas=0.05/0.28"
    found = average(run, scheme=scheme)
    expected = emas.synthesize_ema_model(sigma_rel=sigma).state_dict()
    # Unlike EDM2 it leaves the coefficients as solved, whose sum is nearly 1.
    total = math.fsum(schemes.parse(scheme).coefficients(RunRecord.of_run(run)))
    assert total == pytest.approx(1, abs=1e-2)
    for name in ("ema_model.weight", "ema_model.bias"):
        torch.testing.assert_close(found[name] * total, expected[name], rtol=1e-4, atol=1e-4)


def test_posthoc_ema_gives_back_the_last_snapshot(trained):
    _, folder = trained
    found = average(folder, scheme="posthoc-ema:sigma=0.05,sigmas=0.05/0.28")
    last = torch.load(folder / "0.300.pt")
    torch.testing.assert_close(found["ema_model.weight"], last["ema_model.weight"])
