"""``average`` and ``average_many`` with recomputed statistics, held against the command line."""

import warnings

import pytest
import torch
from click.testing import CliRunner
from helpers import listing, same_bits, save_states
from norm_network import BATCHES, Net, X, state_of
from torch.utils.data import TensorDataset

import ckptavg
from ckptavg import Recompute
from ckptavg.averaging.weights import provenance_of
from ckptavg.batchnorm import recompute as recompute_module
from ckptavg.cli import main
from ckptavg.errors import OutputError, StaleStatisticsWarning, UsageError

SPECS = """
import torch
from norm_network import Net as model, X
data = lambda: torch.utils.data.TensorDataset(X, torch.zeros(50, dtype=torch.long))
"""
DATA = TensorDataset(X, torch.zeros(50, dtype=torch.long))


@pytest.fixture
def run(tmp_path, monkeypatch):
    save_states(tmp_path / "run", [state_of(seed) for seed in (1, 2, 3)])
    (tmp_path / "specs.py").write_text(SPECS)
    monkeypatch.chdir(tmp_path)
    return ckptavg.open_run("run")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", StaleStatisticsWarning)
        yield


class Read(list):
    """Batches that count the passes over them."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("name", ["swa.pt", "swa.safetensors"])
def test_recompute_writes_same_bytes_as_cli(run, tmp_path, name, digests):
    arguments = ["average", "run", "-o", f"cli-{name}", "--model", "specs.py:model"]
    arguments += ["--train-data", "specs.py:data", "-b", "16", *["--digests"][: int(digests)]]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    recompute = Recompute(Net(), DATA, batch_size=16)
    out = ckptavg.average(run, out=name, digests=digests, recompute=recompute)
    assert out.read_bytes() == (tmp_path / f"cli-{name}").read_bytes()
    assert ckptavg.open_checkpoint(name).provenance.bn == "recomputed"


def test_recompute_returns_values_of_output(run):
    recompute = Recompute(Net(), DATA, batch_size=16)
    out = ckptavg.average(run, "ema:decay=0.5", out="swa.pt", recompute=recompute)
    state_dict = ckptavg.average(run, "ema:decay=0.5", recompute=recompute)
    written = torch.load(out, weights_only=True)["state_dict"]
    assert state_dict.keys() == written.keys()
    assert all(same_bits(state_dict[name], written[name]) for name in written)
    assert provenance_of(state_dict) == ckptavg.open_checkpoint(out).provenance


def test_recompute_leaves_the_model_as_it_was(run):
    model = Net().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ckptavg.average(run, recompute=Recompute(model, DATA, device="cpu"))
    assert all(same_bits(before[name], value) for name, value in model.state_dict().items())
    assert model.training


def test_recompute_result_shares_no_model_memory(run):
    model = Net()
    state_dict = ckptavg.average(run, recompute=Recompute(model, BATCHES))
    before = {name: value.clone() for name, value in state_dict.items()}
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    assert all(same_bits(state_dict[name], value) for name, value in before.items())


@pytest.mark.parametrize("out_dir", [None, "averages"])
@pytest.mark.parametrize("fitting", [1, 1000])
def test_average_many_shares_recompute_passes(run, monkeypatch, out_dir, fitting):
    monkeypatch.setattr(recompute_module, "count_models_that_fit", lambda *_: 2 * fitting)
    data, requested = Read(BATCHES), {"all.pt": "uniform", "last2.pt": run.last(2)}
    results = ckptavg.average_many(
        run, requested, out_dir=out_dir, recompute=Recompute(Net(), data)
    )
    assert data.passes == (1 if fitting > 1 else 2)
    for name, selection in (("all.pt", run), ("last2.pt", run.last(2))):
        expected = ckptavg.average(selection, recompute=Recompute(Net(), BATCHES))
        state_dict = results[name]
        if out_dir is not None:
            state_dict = torch.load(state_dict, weights_only=True)["state_dict"]
        assert all(same_bits(state_dict[n], value) for n, value in expected.items())


def test_recompute_exclude_keeps_averaged_statistics(run):
    everything = Recompute(Net(), BATCHES, exclude="norm")
    with pytest.warns(StaleStatisticsWarning):
        state_dict = ckptavg.average(run, recompute=everything)
    with pytest.warns(StaleStatisticsWarning):
        plain = ckptavg.average(run)
    assert all(same_bits(state_dict[name], value) for name, value in plain.items())
    assert provenance_of(state_dict).bn_layers == {"excluded": ["norm"]}


@pytest.mark.parametrize("digests", [False, True])
def test_recompute_progress_names_both_phases(run, digests):
    calls = []
    ckptavg.average(
        run, out="swa.pt", digests=digests, recompute=Recompute(Net(), BATCHES),
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert list(dict.fromkeys(phase for phase, _, _ in calls)) == ["averaging (bytes)", "BatchNorm"]
    assert calls[-1][1] == 50


@pytest.mark.parametrize(
    ("recompute", "error", "message"),
    [
        (Net(), UsageError, r"expected to be a ckptavg\.Recompute"),
        (Recompute(Net, BATCHES), UsageError, "model is expected"),
        (Recompute(Net(), {"a": 1}), UsageError, "data"),
        (Recompute(Net(), BATCHES, exclude="none.*"), UsageError, "matches no BatchNorm layer"),
    ],
)
def test_recompute_writes_nothing_on_wrong_settings(run, tmp_path, recompute, error, message):
    before = listing(tmp_path)
    with pytest.raises(error, match=message):
        ckptavg.average(run, out="swa.pt", recompute=recompute)
    assert listing(tmp_path) == before


def test_recompute_refuses_existing_output_before_reading(run, tmp_path):
    (tmp_path / "swa.pt").write_text("mine")
    data = Read(BATCHES)
    with pytest.raises(OutputError, match="exists already"):
        ckptavg.average(run, out="swa.pt", recompute=Recompute(Net(), data))
    assert data.passes == 0


def test_recompute_digests_need_output(run):
    with pytest.raises(UsageError, match="recorded in an output"):
        ckptavg.average(run, digests=True, recompute=Recompute(Net(), BATCHES))
