"""Averages from end to end: their values, the account of how they were made, and failures."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from helpers import average_by_hand, names, same_bits, save, save_states
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from selecting import first_only
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ckptavg
from ckptavg import average, average_many, open_run
from ckptavg.averaging.compute import read_state_dict
from ckptavg.averaging.plan import plan_average
from ckptavg.averaging.weights import provenance_of
from ckptavg.batchnorm.checkpoints import prepare_copy
from ckptavg.cli import main
from ckptavg.errors import (
    CheckpointError,
    CkptavgError,
    MismatchError,
    NonFiniteError,
    OutputError,
    RunError,
    StaleStatisticsWarning,
    UnsupportedTensorError,
    UsageError,
)
from ckptavg.formats import open_checkpoint
from ckptavg.formats.provenance import Provenance
from ckptavg.outputs.writing import open_targets

OUTPUTS = ["swa.safetensors", "swa.pt", "swa"]


def states(count=3):
    """A small network's weights, an integer and a 0-d tensor among them."""
    generator = torch.Generator().manual_seed(count)
    return [
        {
            "a": torch.randn(4, 3, generator=generator),
            "b": torch.randn(5, generator=generator).bfloat16(),
            "scale": torch.randn((), generator=generator, dtype=torch.float64),
            "empty": torch.ones(0, 3),
            "n": torch.tensor(i),
        }
        for i in range(count)
    ]


def read(out):
    """The tensors of an output, by the libraries that users load it with."""
    if out.is_dir():
        return load_file(out / "model.safetensors")
    if out.suffix == ".safetensors":
        return load_file(out)
    return torch.load(out, weights_only=True)["state_dict"]


def account(out):
    """How an output says it was made."""
    if out.suffix == ".pt":
        return json.loads(torch.load(out, weights_only=True)["ckptavg"])
    with safe_open(out / "model.safetensors" if out.is_dir() else out, "pt") as file:
        return json.loads(file.metadata()["ckptavg"])


def contents(directory):
    """Every file below a directory, hidden ones too, and its bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


@pytest.fixture
def run_dir(tmp_path):
    save_states(tmp_path / "run", states())
    return tmp_path / "run"


# Values


def trained(directory):
    """A run of a small network, and torch's own averages of it."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    swa = AveragedModel(net)
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9)
    x, y = torch.randn(64, 6), torch.randint(0, 3, (64,))
    saved = []
    for i in range(8):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        swa.update_parameters(net)
        ema.update_parameters(net)
        saved.append({name: t.clone() for name, t in net.state_dict().items()})
        save(directory / f"epoch_{i}.pt", saved[-1])
    return saved, swa.module.state_dict(), ema.module.state_dict()


@pytest.mark.parametrize("scheme", ["uniform", "ema:decay=0.9"])
def test_average_is_at_least_as_exact_as_torch(tmp_path, scheme):
    saved, swa, ema = trained(tmp_path)
    found = average(open_run(tmp_path), scheme)
    torchs = swa if scheme == "uniform" else ema
    exact = {name: saved[0][name].double() for name in saved[0]}
    for i, state in enumerate(saved[1:], 2):
        share = 1 / i if scheme == "uniform" else 0.1
        exact = {name: t + share * (state[name].double() - t) for name, t in exact.items()}
    for name, tensor in found.items():
        largest = max(state[name].abs().max().item() for state in saved)
        tolerance = len(saved) * torch.finfo(torch.float32).eps * largest
        torch.testing.assert_close(tensor, torchs[name], rtol=0, atol=tolerance)
        ours = (tensor.double() - exact[name]).abs().max()
        assert ours <= (torchs[name].double() - exact[name]).abs().max()


def test_average_takes_averaged_models_of_torch(tmp_path):
    model = AveragedModel(torch.nn.Linear(2, 2))
    plain = torch.nn.Linear(2, 2).state_dict()
    save_states(tmp_path, [model.state_dict(), plain])
    found = average(open_run(tmp_path))
    assert list(found) == ["weight", "bias"]
    for name, tensor in found.items():
        mean = (model.module.state_dict()[name].double() + plain[name].double()) / 2
        assert same_bits(tensor, mean.float())


def test_weights_follow_the_order_of_the_run(tmp_path):
    for i in (2, 10, 1):
        save(tmp_path / f"epoch_{i}.pt", {"w": torch.tensor([float(i)])})
    found = average(open_run(tmp_path), weights=[2, 3, 5])
    assert found["w"].item() == pytest.approx((2 * 1 + 3 * 2 + 5 * 10) / 10)


def test_ema_per_step_takes_recorded_steps(tmp_path):
    for step in (1, 2, 4, 8):
        save(tmp_path / f"e{9 - step}.pt", {"w": torch.tensor([step + 0.0])}, global_step=step)
    found = average(open_run(tmp_path), "ema:decay=0.9,per=step")
    assert found["w"].item() == pytest.approx(3.834421, abs=1e-6)


def test_average_takes_last_checkpoints_of_several_runs(tmp_path):
    """SWAP: each worker's last checkpoint."""
    for worker, final in (("a", 1.0), ("b", 5.0)):
        save_states(tmp_path / worker, [{"w": torch.tensor([v])} for v in (99.0, final)])
    found = average(open_run(tmp_path / "a", tmp_path / "b").last(1))
    assert found["w"].item() == 3.0


def test_average_takes_an_iterable_of_checkpoints(run_dir):
    paths = sorted(run_dir.iterdir())
    found = average(open_checkpoint(path) for path in paths)
    assert all(same_bits(found[name], t) for name, t in average(open_run(run_dir)).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_rounds_float64_sum_once(tmp_path, dtype):
    saved = states(4)
    save_states(tmp_path, saved)
    for name, tensor in average(open_run(tmp_path), dtype=dtype).items():
        expected = average_by_hand([s[name] for s in saved], [1.0] * 4, getattr(torch, dtype))
        assert same_bits(tensor, expected), name


def test_output_has_bare_names_of_wrapped_models(tmp_path):
    bare = {"a.w": torch.ones(2), "b.w": torch.ones(2)}
    wrapped = {"module._orig_mod." + name: 3 * t for name, t in bare.items()}
    save_states(tmp_path / "run", [bare, wrapped])
    for out in ("swa.safetensors", "swa.pt"):
        found = read(average(open_run(tmp_path / "run"), out=tmp_path / out))
        assert {name: t.tolist() for name, t in found.items()} == {"a.w": [2, 2], "b.w": [2, 2]}


# include, exclude, base


def heads(directory):
    for i, classes in ((1, 3), (2, 4), (3, 5)):
        state = {"body": torch.tensor([float(i)]), "head": torch.full((classes,), float(i))}
        save(directory / f"epoch_{i}.pt", state)
    return directory


@pytest.mark.parametrize("choice", [{"include": ["body"]}, {"exclude": ["head*"]}])
def test_exclude_takes_tensors_from_the_last_checkpoint(tmp_path, choice):
    found = average(open_run(heads(tmp_path)), **choice)
    assert found["body"].tolist() == [2.0]
    assert found["head"].tolist() == [3.0] * 5


@pytest.mark.parametrize("as_path", [True, False])
def test_base_gives_tensors_not_included(tmp_path, as_path):
    run = open_run(heads(tmp_path))
    base = tmp_path / "epoch_1.pt" if as_path else run.checkpoints[0]
    found = average(run, base=base, include=["body"])
    assert found["body"].tolist() == [2.0]
    assert found["head"].tolist() == [1.0] * 3


def test_base_is_opened_with_key_of_the_run(tmp_path):
    for i in (1.0, 3.0):
        entries = {"body": torch.tensor([i]), "head": torch.tensor([i])}
        ema = {name: 10 * t for name, t in entries.items()}
        torch.save({"state_dict": entries, "ema": ema}, tmp_path / f"epoch_{i:g}.pt")
    run = open_run(tmp_path, key="ema")
    found = average(run, base=tmp_path / "epoch_1.pt", exclude=["head"])
    assert (found["body"].item(), found["head"].item()) == (20.0, 10.0)


def test_base_may_have_another_entry_than_the_run(tmp_path):
    for i in (1.0, 3.0):
        weights = {"body": torch.tensor([i]), "head": torch.tensor([i])}
        save(tmp_path / "run" / f"epoch_{i:g}.pt", weights, epoch=i)
    base = save(tmp_path / "pretrained.pt", {"body": torch.zeros(1), "head": torch.zeros(5)})
    found = average(open_run(tmp_path / "run"), base=base, exclude=["head"])
    assert (found["body"].tolist(), found["head"].tolist()) == ([2.0], [0.0] * 5)


def test_include_takes_one_pattern(tmp_path):
    both = [{"body": torch.tensor([x]), "head": torch.tensor([x])} for x in (0.0, 1.0)]
    save_states(tmp_path, both)
    found = average(open_run(tmp_path), include="bod*")
    assert (found["body"].item(), found["head"].item()) == (0.5, 1.0)


# Outputs


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_equals_average_in_memory(run_dir, tmp_path, name):
    expected = average(open_run(run_dir))
    out = average(open_run(run_dir), out=tmp_path / name)
    assert out == tmp_path / name
    found = read(out)
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_opens_as_a_checkpoint(run_dir, tmp_path, name):
    out = open_checkpoint(average(open_run(run_dir), out=tmp_path / name))
    expected = average(open_run(run_dir))
    assert all(same_bits(t, expected[name]) for name, t in read_state_dict(out).items())


@pytest.mark.parametrize("suffix", [".pth", ".ckpt", ".bin", ".pt.tar"])
def test_output_suffixes_of_torch_give_torch_files(run_dir, tmp_path, suffix):
    out = average(open_run(run_dir), out=tmp_path / f"swa{suffix}")
    assert torch.load(out, weights_only=True)["n"].item() == 2


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_records_provenance(run_dir, tmp_path, name):
    scheme = "ema:decay=0.5"
    run = open_run(run_dir)
    made = account(average(run, scheme, out=tmp_path / name))
    assert made["version"] == ckptavg.__version__
    assert made["scheme"] == scheme
    assert made["bn"] == "none"
    assert [c["coefficient"] for c in made["checkpoints"]] == [0.25, 0.25, 0.5]
    assert [c["step"] for c in made["checkpoints"]] == [1, 2, 3]
    for entry, path in zip(made["checkpoints"], sorted(run_dir.iterdir()), strict=True):
        assert entry["path"] == str(path)
        assert entry["size"] == path.stat().st_size
        assert entry["mtime"] == pytest.approx(path.stat().st_mtime)


def test_output_keeps_ties_and_loads_strictly(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = torch.nn.Embedding(4, 3)
            self.head = torch.nn.Linear(3, 4, bias=False)
            self.head.weight = self.emb.weight

    saved = [Tied().state_dict() for _ in range(2)]
    save_states(tmp_path / "run", saved)
    mean = (saved[0]["emb.weight"].double() + saved[1]["emb.weight"].double()) / 2
    in_memory = average(open_run(tmp_path / "run"))
    assert in_memory["emb.weight"].data_ptr() == in_memory["head.weight"].data_ptr()
    for name in OUTPUTS:
        out = average(open_run(tmp_path / "run"), out=tmp_path / name)
        found = read(out)
        assert account(out)["tied"] == [["emb.weight", "head.weight"]]
        Tied().load_state_dict(found, strict=True)
        assert all(torch.equal(t, mean.float()) for t in found.values())
    kept = read(tmp_path / "swa.pt")
    assert kept["emb.weight"].data_ptr() == kept["head.weight"].data_ptr()


def test_output_may_lie_in_the_run_directory(run_dir):
    out = average(open_run(run_dir), out=run_dir / "swa.pt")
    again = average(open_run(run_dir), out=run_dir / "swa.pt", overwrite=True)
    assert out == again
    assert names(open_run(run_dir)) == ["epoch_1.pt", "epoch_2.pt", "epoch_3.pt"]


def hugging_face(directory, tensors, prefix=""):
    """A directory with two shards and a configuration."""
    directory.mkdir(parents=True)
    mapping = {}
    for i, (name, tensor) in enumerate(tensors.items(), 1):
        shard = f"model-{i:05d}-of-{len(tensors):05d}.safetensors"
        save_file({prefix + name: tensor}, directory / shard)
        mapping[prefix + name] = shard
    index = {"metadata": {}, "weight_map": mapping}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text('{"hidden_size": 3}')


@pytest.mark.parametrize("prefix", ["", "module."])
def test_output_directory_follows_layout_of_input(tmp_path, prefix):
    for i in (1, 3):
        tensors = {"a": torch.full((2,), float(i)), "b": torch.full((3,), float(i))}
        hugging_face(tmp_path / "run" / f"checkpoint-{i}", tensors, prefix)
    out = average(open_run(tmp_path / "run"), out=tmp_path / "swa")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {prefix + "a", prefix + "b"}
    for name, shard in index["weight_map"].items():
        assert set(load_file(out / shard)[name].tolist()) == {2.0}
    assert json.loads((out / "config.json").read_text()) == {"hidden_size": 3}
    assert names(open_run(out)) == ["swa"]


def test_output_directory_has_bare_names_from_another_layout(tmp_path):
    save_states(tmp_path / "run", [{"module.w": torch.ones(2)}] * 2)
    assert list(read(average(open_run(tmp_path / "run"), out=tmp_path / "swa"))) == ["w"]


def test_write_state_dict_keeps_ties(tmp_path):
    weight = torch.randn(3, 3)
    state = {"a": weight, "b": weight, "t": torch.randn(3, 2).t(), "e": torch.ones(0)}
    checkpoint = open_checkpoint(save(tmp_path / "in.pt", state))
    target = prepare_copy(
        checkpoint, tmp_path / "out.pt", Provenance({"checkpoints": []}), overwrite=False
    )
    with open_targets([target]) as outputs:
        outputs.writers[0].write_state_dict(state)
    assert outputs.provenances[0].entries == {"checkpoints": []}
    found = read(tmp_path / "out.pt")
    assert all(same_bits(found[name], t) for name, t in state.items())
    assert found["a"].data_ptr() == found["b"].data_ptr()


# Notes


@pytest.fixture
def notes(caplog):
    caplog.set_level(logging.INFO, logger="ckptavg")
    return lambda: [r.getMessage() for r in caplog.records if r.name.startswith("ckptavg")]


def test_integers_that_differ_are_noted_by_name(tmp_path, notes):
    for i in (1, 2, 3):
        state = {
            "w": torch.tensor([float(i)]),
            "count": torch.tensor(i),
            "mask": torch.tensor([True, i == 3]),
            "ids": torch.arange(4),
        }
        save(tmp_path / f"epoch_{i}.pt", state)
    found = average(open_run(tmp_path))
    assert found["count"].item() == 3
    assert found["mask"].tolist() == [True, True]
    assert found["ids"].tolist() == [0, 1, 2, 3]
    (note,) = notes()
    assert "count" in note
    assert "mask" in note
    assert "ids" not in note


def test_output_leaves_out_sparse_tensors_with_a_warning(tmp_path, caplog):
    states = [{"adj": torch.eye(4).to_sparse(), "w": torch.full((3,), float(i))} for i in (1, 3)]
    save_states(tmp_path / "run", states)
    with pytest.raises(UnsupportedTensorError, match=r"adj \(a sparse tensor\).*`exclude`"):
        average(open_run(tmp_path / "run"))
    out = average(open_run(tmp_path / "run"), exclude="adj", out=tmp_path / "swa.pt")
    assert read(out).keys() == {"w"}
    assert read(out)["w"].tolist() == [2.0] * 3
    (record,) = [r for r in caplog.records if r.levelname == "WARNING"]
    assert record.getMessage().endswith("which cannot hold them: adj (a sparse tensor)")


def test_notes_are_empty_without_need(tmp_path, notes):
    save_states(tmp_path, [{"w": torch.ones(2), "n": torch.tensor(1)}] * 2)
    average(open_run(tmp_path))
    assert notes() == []


def test_mixed_widths_are_noted_with_output_dtype(tmp_path, notes):
    save_states(tmp_path, [{"w": torch.ones(2).half()}, {"w": torch.ones(2)}])
    assert average(open_run(tmp_path))["w"].dtype == torch.float32
    (note,) = notes()
    assert "w (float32)" in note


def normalized_net(directory):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    for i in (1, 2):
        net(torch.randn(8, 2))
        save(directory / f"epoch_{i}.pt", net.state_dict())
    return directory


@pytest.mark.parametrize("name", OUTPUTS)
def test_stale_statistics_are_marked_in_output(tmp_path, name):
    run = open_run(normalized_net(tmp_path / "run"))
    statistics = [read_state_dict(c)["1.running_var"].double() for c in run]
    with pytest.warns(StaleStatisticsWarning, match="stale"):
        out = average(run, out=tmp_path / name)
    assert account(out)["bn"] == "stale"
    assert same_bits(read(out)["1.running_var"], ((statistics[0] + statistics[1]) / 2).float())


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"weights": [0, 1]}, "own"),
        ({"weights": [0, 1], "dtype": "float64"}, "own"),
        ({"exclude": ["*running_*"]}, "stale"),  # one checkpoint's, under averaged weights
        ({"exclude": ["*running_*"], "dtype": "float64"}, "stale"),
    ],
)
def test_batchnorm_is_own_only_if_all_from_one_checkpoint(tmp_path, choice, expected):
    run = open_run(normalized_net(tmp_path))
    assert plan_average(run, **choice).batchnorm == expected
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        average(run, **choice)
    assert [w.category for w in caught] == [StaleStatisticsWarning] * (expected == "stale")


@pytest.mark.parametrize(
    ("compute", "whose"),
    [
        (average, "statistics are"),
        (
            lambda run: average_many(run, {"one": run[1:], "all": "uniform"}),
            "statistics of all are",
        ),
    ],
)
def test_stale_statistics_warning_names_python_calls(tmp_path, notes, compute, whose):
    run = open_run(normalized_net(tmp_path))
    with pytest.warns(StaleStatisticsWarning) as caught:
        compute(run)
    (warning,) = caught
    assert warning.filename == __file__
    assert "ckptavg.update_bn(model, train_loader)" in str(warning.message)
    assert whose in str(warning.message)
    assert "--" not in str(warning.message)
    assert [note for note in notes() if "stale" in note] == []


def test_stale_statistics_are_noted_once_by_the_command(tmp_path):
    normalized_net(tmp_path / "run")
    arguments = ["average", str(tmp_path / "run"), "-o", str(tmp_path / "swa.pt")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.stderr.count("(stale)") == 1
    assert "--train-data" in result.stderr


def test_provenance_is_kept_by_average_in_memory(tmp_path):
    run = open_run(normalized_net(tmp_path / "run"))
    state = average(run)
    assert provenance_of(state).bn == "stale"
    assert provenance_of(dict(state)) is None
    torch.save(state, tmp_path / "kept.pth")
    loaded = torch.load(tmp_path / "kept.pth", weights_only=True)
    assert provenance_of(loaded) == provenance_of(state)
    assert all(same_bits(loaded[name], state[name]) for name in state)
    torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).load_state_dict(state)


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("key", ["", "model"])
def test_provenance_is_kept_by_torch_save(tmp_path, key, as_zip):
    run = open_run(normalized_net(tmp_path / "run"))
    state = average(run)
    saved = {"model": state, "ema": state.copy()} if key else state
    torch.save(saved, tmp_path / "kept.pth", _use_new_zipfile_serialization=as_zip)
    kept = open_checkpoint(tmp_path / "kept.pth")
    assert (kept.key, kept.is_average) == (key, True)
    assert kept.provenance == provenance_of(state)
    if key:
        assert open_checkpoint(tmp_path / "kept.pth", "ema").provenance is None
    shutil.copy(tmp_path / "kept.pth", tmp_path / "run" / "epoch_9.pth")
    assert names(open_run(tmp_path / "run")) == names(run)


def test_base_adds_tensors_that_the_run_lacks(tmp_path):
    save_states(tmp_path / "run", [{"a": torch.tensor([x])} for x in (0.0, 2.0)])
    base = save(tmp_path / "base.pt", {"a": torch.tensor([9.0]), "extra": torch.tensor([5.0])})
    found = average(open_run(tmp_path / "run"), base=base)
    assert {name: tensor.item() for name, tensor in found.items()} == {"a": 1.0, "extra": 5.0}


def test_mismatch_names_checkpoint_without_included_tensors(tmp_path):
    save_states(tmp_path, [{"b": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}])
    with pytest.raises(MismatchError, match=r"epoch_1\.pt lacks 1 tensors \(a\)"):
        average(open_run(tmp_path), include="a")


def test_weights_of_huge_size_do_not_overflow(tmp_path):
    save_states(tmp_path, [{"a": torch.tensor([x])} for x in (100.0, 300.0)])
    assert average(open_run(tmp_path), weights=[5e307, 5e307])["a"].item() == 200.0


def test_on_nonfinite_keep_warns(tmp_path, caplog):
    save_states(tmp_path, [{"w": torch.tensor([x, 1.0])} for x in (1.0, float("nan"))])
    found = average(open_run(tmp_path), on_nonfinite="keep")
    assert found["w"].isnan().tolist() == [True, False]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "w" in record.getMessage()


# Failures: the right error in one line, and the disk as it was


def lacks_a_tensor(run_dir, out):
    save(run_dir / "epoch_2.pt", {k: v for k, v in states()[0].items() if k != "a"})


def has_an_extra_tensor(run_dir, out):
    save(run_dir / "epoch_2.pt", states()[0] | {"more": torch.ones(1)})


def has_another_shape(run_dir, out):
    save(run_dir / "epoch_2.pt", states()[0] | {"a": torch.ones(3, 4)})


def has_an_integer_for_a_float(run_dir, out):
    save(run_dir / "epoch_2.pt", states()[0] | {"a": torch.ones(4, 3, dtype=torch.int64)})


def has_a_nan(run_dir, out):
    save(run_dir / "epoch_2.pt", states()[0] | {"a": torch.full((4, 3), float("nan"))})


def holds_float8(run_dir, out):
    save(run_dir / "epoch_2.pt", states()[0] | {"a": torch.ones(4, 3).to(torch.float8_e5m2)})


def is_truncated(run_dir, out):
    os.truncate(run_dir / "epoch_2.pt", 1500)


def is_an_empty_directory(run_dir, out):
    for path in run_dir.iterdir():
        path.unlink()


def keeps_its_weights_under_an_unknown_entry(run_dir, out):
    torch.save({"generator": states()[0], "critic": states()[0]}, run_dir / "epoch_2.pt")


def output_exists(run_dir, out):
    out.mkdir()
    (out / "mine.txt").write_text("keep")


def output_has_no_directory(run_dir, out):
    out.parent.rmdir()


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize(
    ("spoil", "kind", "match"),
    [
        (lacks_a_tensor, MismatchError, r"epoch_2\.pt lacks .*\(a\)"),
        (has_an_extra_tensor, MismatchError, r"epoch_2\.pt has 1 more \(more\)"),
        (has_another_shape, MismatchError, r"a has the shape \(3, 4\) in .*epoch_2\.pt"),
        (has_an_integer_for_a_float, MismatchError, r"a is int64 in .*epoch_2\.pt"),
        (has_a_nan, NonFiniteError, r"a is NaN in .*epoch_2\.pt"),
        (holds_float8, UnsupportedTensorError, r"epoch_2\.pt.*a \(float8_e5m2\)"),
        (is_truncated, CheckpointError, r"epoch_2\.pt .*truncated"),
        (is_an_empty_directory, RunError, "run holds no checkpoint"),
        (keeps_its_weights_under_an_unknown_entry, CheckpointError, r"epoch_2\.pt.*`key`"),
        (output_exists, OutputError, "exists already.*`overwrite=True`"),
        (output_has_no_directory, OutputError, "does not exist"),
    ],
)
def test_error_is_one_line_with_remedy_and_leaves_nothing(
    run_dir, tmp_path, spoil, kind, match, name
):
    out = tmp_path / "out" / name
    out.parent.mkdir()
    spoil(run_dir, out)
    before = contents(tmp_path)
    with pytest.raises(kind, match=match) as caught:
        average(open_run(run_dir), out=out)
    assert_reported(caught.value)
    assert contents(tmp_path) == before


def assert_reported(error):
    assert error.exit_code == 1
    assert error.remedy
    assert str(error).endswith(error.remedy)
    assert len(str(error).splitlines()) == 1


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_needs_free_space_before_writing(run_dir, tmp_path, monkeypatch, name):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100))
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"where 100 B are free.*Make room") as caught:
        average(open_run(run_dir), out=tmp_path / name)
    assert_reported(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_leaves_nothing_on_a_full_disk(run_dir, tmp_path, monkeypatch, name):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"the disk ran full.*Make room") as caught:
        average(open_run(run_dir), out=tmp_path / name)
    assert_reported(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("target", ["run/epoch_2.pt", "run/../run/epoch_1.pt", "link.pt", "run"])
def test_output_refuses_to_replace_an_input(run_dir, tmp_path, target, overwrite):
    (tmp_path / "link.pt").symlink_to(run_dir / "epoch_3.pt")
    before = contents(tmp_path)
    with pytest.raises(OutputError, match="is an input") as caught:
        average(open_run(run_dir), out=tmp_path / target, overwrite=overwrite)
    assert_reported(caught.value)
    assert contents(tmp_path) == before


def test_output_refuses_to_replace_the_base(run_dir, tmp_path):
    base = save(tmp_path / "base.pt", states()[0])
    before = contents(tmp_path)
    with pytest.raises(OutputError, match=r"is an input \(.*base\.pt\)"):
        average(open_run(run_dir), out=base, base=base, exclude=["a"], overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", OUTPUTS)
def test_overwrite_replaces_an_output(run_dir, tmp_path, name):
    average(open_run(run_dir).last(1), out=tmp_path / name)
    out = average(open_run(run_dir), out=tmp_path / name, overwrite=True)
    assert same_bits(read(out)["a"], average(open_run(run_dir))["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", name])


@pytest.mark.parametrize("name", OUTPUTS)
def test_overwrite_keeps_old_output_on_failure(run_dir, tmp_path, name):
    average(open_run(run_dir), out=tmp_path / name)
    has_a_nan(run_dir, None)
    before = contents(tmp_path)
    with pytest.raises(NonFiniteError):
        average(open_run(run_dir), out=tmp_path / name, overwrite=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", OUTPUTS)
def test_output_that_appears_meanwhile_is_kept(run_dir, tmp_path, name):
    def somebody_writes(*_):
        (tmp_path / name).write_text("theirs")

    with pytest.raises(OutputError, match="has appeared") as caught:
        average(open_run(run_dir), out=tmp_path / name, progress=somebody_writes)
    assert_reported(caught.value)
    assert (tmp_path / name).read_text() == "theirs"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", name])


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_output_leaves_nothing_on_interruption(run_dir, tmp_path, name, error):
    def interrupt(*_):
        raise error

    before, threads = contents(tmp_path), threading.active_count()
    with pytest.raises(error):
        average(open_run(run_dir), out=tmp_path / name, progress=interrupt)
    assert contents(tmp_path) == before
    assert threading.active_count() == threads


@first_only("name", ["swa.pt", "swa"])
def test_output_clears_temporary_of_a_dead_process(run_dir, tmp_path, name):
    script = (
        "import os, sys, ckptavg; ckptavg.average(ckptavg.open_run(sys.argv[1]), out=sys.argv[2],"
        " progress=lambda *_: os._exit(9))"
    )
    dead = subprocess.run([sys.executable, "-c", script, run_dir, tmp_path / name], check=False)
    assert dead.returncode == 9
    assert len(list(tmp_path.iterdir())) == 2
    assert not (tmp_path / name).exists()
    average(open_run(run_dir), out=tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["run", name])


def test_safetensors_output_refuses_complex128(tmp_path):
    save_states(tmp_path / "run", [{"z": torch.ones(2, dtype=torch.complex128)}] * 2)
    before = contents(tmp_path)
    with pytest.raises(UnsupportedTensorError, match=r"z \(complex128\).*\.pt") as caught:
        average(open_run(tmp_path / "run"), out=tmp_path / "swa.safetensors")
    assert_reported(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "options",
    [
        {"scheme": "median"},
        {"weights": [1, -1, 0]},
        {"dtype": "int8"},
        {"on_nonfinite": "ignore"},
        {"include": ["nothing.*"]},
        {"out": "swa.onnx"},
    ],
)
def test_usage_errors_exit_with_2(run_dir, tmp_path, options):
    if "out" in options:
        options = {"out": tmp_path / options["out"]}
    before = contents(tmp_path)
    with pytest.raises(UsageError) as caught:
        average(open_run(run_dir), **options)
    assert caught.value.exit_code == 2
    assert contents(tmp_path) == before


def test_average_refuses_an_empty_run():
    with pytest.raises(CkptavgError, match="no checkpoint"):
        average([])


# Inputs that change while they are read


def touched(path):
    os.utime(path, ns=(1, 1))


def rewritten(path):
    content = path.read_bytes()
    os.utime(path, ns=(1, 1))
    path.write_bytes(content)


def grown(path):
    with open(path, "ab") as file:
        file.write(b"more")


def replaced(path):
    info = path.stat()
    copy = path.with_suffix(".copy")
    shutil.copy(path, copy)
    os.utime(copy, ns=(info.st_atime_ns, info.st_mtime_ns))
    copy.rename(path)


def removed(path):
    path.unlink()


@pytest.mark.parametrize("name", [None, *OUTPUTS])
@pytest.mark.parametrize("change", [touched, rewritten, grown, replaced, removed])
def test_input_changed_while_read_is_an_error(run_dir, tmp_path, change, name):
    def progress(done, total):
        if done == total:
            change(run_dir / "epoch_2.pt")

    out = None if name is None else tmp_path / name
    with pytest.raises(CheckpointError, match=r"epoch_2\.pt (changed|cannot be read)"):
        average(open_run(run_dir), out=out, progress=progress)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("change", [touched, removed])
def test_base_changed_while_read_is_an_error(run_dir, tmp_path, change):
    base = save(tmp_path / "base.pt", states()[0])

    def progress(done, total):
        if done == total:
            change(base)

    with pytest.raises(CheckpointError, match=r"base\.pt"):
        average(open_run(run_dir), base=base, exclude=["a"], progress=progress)


def test_input_changed_since_opened_is_an_error(run_dir):
    run = open_run(run_dir)
    save(run_dir / "epoch_2.pt", states(4)[3])
    with pytest.raises(CheckpointError, match=r"epoch_2\.pt changed"):
        average(run)


# Memory

PEAK = """
import os, sys, torch, ckptavg
from ckptavg.averaging import api as averaging
from ckptavg.runs import run

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024

with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
os.fsync = lambda handle: None  # takes time, not memory
before = peak()
for run in sys.argv[1:]:
    ckptavg.average(ckptavg.open_run(run), out=run + ".safetensors")
    print(peak() - before)
"""


def sparse_checkpoint(path, megabytes):
    """A safetensors file of zeros that takes no room on the disk."""
    size = megabytes * 1_000_000
    header = {"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + size)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="measured through Linux's /proc")
def test_memory_does_not_grow_with_checkpoints(tmp_path):
    """Peaks in MiB above `import torch`, of 4 and of 16 checkpoints of 200 MB."""
    runs = [tmp_path / "few", tmp_path / "many"]
    for run, count in zip(runs, (4, 16), strict=True):
        run.mkdir()
        for i in range(count):
            sparse_checkpoint(run / f"epoch_{i}.safetensors", 200)
    command = [sys.executable, "-c", PEAK, *runs]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    for run in runs:
        run.with_suffix(".safetensors").unlink()
    few, many = map(float, done.stdout.split())
    assert 0 < few < 160
    assert many == pytest.approx(few, rel=0.1, abs=2)
