"""Widths of EMA snapshots: recorded, in the file's name, in the directory's."""

from pathlib import Path

import pytest

from ckptavg.formats.snapshot_widths import find_width


@pytest.mark.parametrize(
    ("path", "width"),
    [
        ("out/network-snapshot-0000500-0.050.pkl", 0.05),
        ("out/network-snapshot-0000500-0.100.pt", 0.1),
        ("out/step_500_sigma_0.05.safetensors", 0.05),
        ("out/sigma-rel=0.2-step-5.ckpt", 0.2),
        ("out/ema_std0.075_step5.pt", 0.075),
        ("ema_sigma_.05/step_500.pt", 0.05),
        ("ema-0.05/step_500.pt", None),
        ("out/epoch_3-val_acc-0.910.pt", None),
        ("out/network-snapshot-0000500-0.500.pt", None),
        ("out/step_500.pt", None),
        ("out/insigma_0.1.pt", None),
    ],
)
def test_width_is_read_from_names(path, width):
    assert find_width({}, Path(path)) == width


@pytest.mark.parametrize("name", ["sigma_rel", "ema.sigma_rel", "ema_sigma", "meta.ema_std"])
def test_recorded_width_comes_first(name):
    assert find_width({"loss": 0.1, name: 0.07}, Path("run/ema_sigma_0.1.pt")) == 0.07


@pytest.mark.parametrize("value", [0.0, -0.1, 0.3, float("nan")])
def test_recorded_width_out_of_range_is_no_width(value):
    assert find_width({"sigma_rel": value}, Path("run/a.pt")) is None


@pytest.mark.parametrize(
    ("scheme", "width"),
    [
        ("power-ema:sigma=0.05", 0.05),
        ("posthoc-ema:sigmas=0.05/0.1,sigma=0.075", 0.075),
        ("posthoc-ema: sigma=0.075, sigmas=0.05/0.1", 0.075),
        ("power-ema:sigma=x", None),
        ("uniform", 0.1),
    ],
)
def test_width_of_an_average_is_that_of_its_scheme(scheme, width):
    assert find_width({}, Path("run/sigma_0.1.pt"), scheme) == width
