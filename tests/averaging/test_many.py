"""Many averages from one read: each has the bits that it would have alone."""

import collections
import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import counted_reads, listing, same_bits, save_states
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import runs
from safetensors.torch import load_file

import ckptavg
from ckptavg import average, average_many, open_run
from ckptavg.averaging import stream as stream_module
from ckptavg.cli import main
from ckptavg.errors import MismatchError, NonFiniteError, OutputError, RunError, UsageError
from ckptavg.io.atomic import Publication


def states(count, numel=5000):
    generator = torch.Generator().manual_seed(count)
    return [
        {
            "weight": torch.randn(numel, generator=generator),
            "strided": torch.randn(40, 30, generator=generator).t(),
            "half": torch.randn(33, generator=generator).half(),
            "steps": torch.tensor(i),
        }
        for i in range(count)
    ]


@pytest.fixture
def run(tmp_path):
    save_states(tmp_path / "run", states(6))
    return open_run(tmp_path / "run")


def the_same(one, other):
    return one.keys() == other.keys() and all(same_bits(one[name], other[name]) for name in other)


@st.composite
def requests(draw, run):
    """Names of averages and what is asked for: windows, strides, schemes, weights."""
    asked = {}
    for i in range(draw(st.integers(1, 5))):
        selection = run
        if draw(st.booleans()):
            selection = selection.last(draw(st.integers(1, len(run))))
        if draw(st.booleans()):
            selection = selection.every(draw(st.integers(1, 3)))
        count = len(selection)
        weights = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=count, max_size=count)
        asked[f"a{i}"] = draw(
            st.sampled_from([selection, (selection, "ema:decay=0.7"), (selection, "linear")])
            | weights.filter(any).map(lambda w, s=selection: (s, w))
        )
    return asked


def alone(run, asked, **options):
    """The same average by itself."""
    if isinstance(asked, str):
        return average(run, asked, **options)
    selection, how = asked if isinstance(asked, tuple) else (asked, "uniform")
    given_as = {"scheme": how} if isinstance(how, str) else {"weights": how}
    return average(selection, **given_as, on_nonfinite="keep", **options)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(runs(), st.data())
def test_average_many_equals_average_in_every_bit(drawn, data):
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        save_states(directory, drawn[0])
        run = open_run(directory)
        asked = data.draw(requests(run))
        expected = {name: alone(run, value) for name, value in asked.items()}
        for name in ("TASK", "STRIDED_BLOCK", "_HELD"):
            size = data.draw(st.integers(1, 100))
            stack.enter_context(mock.patch.object(stream_module, name, size))
        found = average_many(run, asked, on_nonfinite="keep")
    assert list(found) == list(asked)
    for name, state in found.items():
        assert list(state) == list(expected[name])
        assert the_same(state, expected[name]), name


def test_average_many_reads_each_byte_once(run, tmp_path, monkeypatch):
    """Of each file as many bytes as its tensors have, whatever number of averages they go into."""
    read = counted_reads(monkeypatch)
    windows = {f"last{k}": run.last(k) for k in range(1, 7)}
    average_many(run, windows | {"ema": "ema:decay=0.9"}, out_dir=tmp_path / "out")
    assert read == {str(checkpoint.path): checkpoint.nbytes for checkpoint in run}


def test_average_many_writes_files_of_average(run, tmp_path):
    asked = {"last2": run.last(2), "ema.pt": "ema:decay=0.5", "mix.pth": (run.every(2), [1, 2, 3])}
    paths = average_many(run, asked, out_dir=tmp_path / "out")
    assert {name: path.name for name, path in paths.items()} == {
        "last2": "last2.safetensors", "ema.pt": "ema.pt", "mix.pth": "mix.pth",
    }  # fmt: skip
    for name, path in paths.items():
        by_itself = alone(run, asked[name], out=tmp_path / path.name)
        assert path.read_bytes() == by_itself.read_bytes()
    assert listing(tmp_path / "out") == ["ema.pt", "last2.safetensors", "mix.pth"]


def test_average_many_takes_integers_of_each_selection(run):
    asked = {"early": run.steps(1, 3), "late": run.last(2)}
    found = average_many(run, asked)
    assert (int(found["early"]["steps"]), int(found["late"]["steps"])) == (2, 5)


def test_average_adds_repeated_checkpoints_in_order(tmp_path):
    values = (1e16, 1.0, -1e16)  # whose sum depends on the order
    made = [{"w": torch.tensor([v], dtype=torch.float64), "n": torch.tensor(0)} for v in values]
    save_states(tmp_path, made)
    one, two, three = open_run(tmp_path)
    assert average([two, one, three, two])["w"].item() == 0.25
    assert average([two, two, one, three])["w"].item() == 0.5


def test_average_many_applies_options_to_all(run, tmp_path):
    base = save_states(tmp_path / "base", states(1))[0]
    options = {"exclude": "half", "base": base, "dtype": "float64"}
    found = average_many(run, {"a": run.last(2), "b": "linear"}, **options)
    assert the_same(found["a"], average(run.last(2), **options))
    assert the_same(found["b"], average(run, "linear", **options))


def test_average_many_writes_huggingface_directories(tmp_path):
    for step in (1, 2, 3):
        directory = tmp_path / "run" / f"checkpoint-{step}"
        save_states(directory, [{"w": torch.full((4,), float(step))}], ".safetensors")
        (directory / "epoch_1.safetensors").rename(directory / "model.safetensors")
        (directory / "config.json").write_text("{}")
    run = open_run(tmp_path / "run")
    paths = average_many(run, {"last2": run.last(2), "all.pt": run}, out_dir=tmp_path / "out")
    assert load_file(paths["last2"] / "model.safetensors")["w"].tolist() == [2.5] * 4
    assert paths["all.pt"].is_file()


def test_average_many_averages_adapters(tmp_path):
    """Adapters are read through stand-ins of their tensors, which no other average shares."""
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "base_model_name_or_path": "x"}
    for step in (1, 2, 3):
        directory = tmp_path / "run" / f"checkpoint-{step}"
        factors = {f"m.lora_{x}.weight": torch.randn(s) for x, s in (("A", (1, 3)), ("B", (2, 1)))}
        save_states(directory, [factors], ".safetensors")
        (directory / "epoch_1.safetensors").rename(directory / "adapter_model.safetensors")
        (directory / "adapter_config.json").write_text(json.dumps(config))
    run = open_run(tmp_path / "run")
    found = average_many(run, {"late": run.last(2), "early": run.steps(1, 2), "all": "linear"})
    assert the_same(found["late"], average(run.last(2)))
    assert the_same(found["early"], average(run.steps(1, 2)))
    assert the_same(found["all"], average(run, "linear"))


def test_average_many_refuses_or_keeps_nonfinite(run, tmp_path):
    bad = states(6)
    bad[1]["weight"][77] = float("nan")
    save_states(tmp_path / "run", bad)
    run = open_run(tmp_path / "run")
    asked = {"all": run, "last4": run.last(4)}
    with pytest.raises(NonFiniteError, match=r"weight is NaN in .*epoch_2"):
        average_many(run, asked, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    found = average_many(run, asked, on_nonfinite="keep")
    assert found["all"]["weight"].isnan().sum() == 1
    assert not found["last4"]["weight"].isnan().any()


@pytest.mark.parametrize(
    ("asked", "error", "message"),
    [
        ({}, UsageError, "no average is asked for"),
        ({"a/b": "uniform"}, UsageError, "file name but got 'a/b'"),
        ({"..": "uniform"}, UsageError, "file name"),
        ({"x": "nonsense"}, UsageError, "scheme is expected"),
        ({"x": "uniform", "x.safetensors": "linear"}, UsageError, "two averages would be written"),
        ({"x": "uniform", "taken": "linear"}, OutputError, "taken.safetensors exists already"),
        ({"x": "lawa:k=2", "y": "ema:decay=2"}, UsageError, "decay"),
    ],
)
def test_average_many_refuses_mistakes_before_writing(run, tmp_path, asked, error, message):
    out = tmp_path / "out"
    out.mkdir()
    (out / "taken.safetensors").touch()
    with pytest.raises(error, match=message):
        average_many(run, asked, out_dir=out)
    assert listing(out) == ["taken.safetensors"]


def test_average_many_refuses_selections_of_another_run(run, tmp_path):
    other = open_run(tmp_path / "run")
    for asked in (other.last(2), ckptavg.Run((run.checkpoints[::-1],))):
        with pytest.raises(UsageError, match="no selection of the run"):
            average_many(run, {"x": asked})


def test_average_many_writes_nothing_if_a_checkpoint_mismatches(tmp_path):
    wrong = states(3)
    del wrong[0]["half"]
    save_states(tmp_path / "run", wrong)
    run = open_run(tmp_path / "run")
    assert set(average_many(run, {"late": run.last(2)})) == {"late"}
    with pytest.raises(MismatchError, match="half"):
        average_many(run, {"late": run.last(2), "all": run}, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_average_many_checks_free_space_for_all(run, tmp_path, monkeypatch):
    size = average(run, out=tmp_path / "one.safetensors").stat().st_size
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(0, 0, int(2.5 * size)))
    asked = dict.fromkeys("abc", "uniform")
    with pytest.raises(OutputError, match="free"):
        average_many(run, asked, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    del asked["c"]
    assert len(average_many(run, asked, out_dir=tmp_path / "out")) == 2


def test_average_many_leaves_nothing_on_a_full_disk(run, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OutputError, match="disk ran full"):
        average_many(run, {"a": "uniform", "b": "linear"}, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_average_many_records_provenance(run, tmp_path):
    paths = average_many(
        run, {"last2": run.last(2), "ema": "ema:decay=0.9"}, out_dir=tmp_path / "out"
    )
    made = {name: ckptavg.open_checkpoint(path).provenance for name, path in paths.items()}
    assert [len(made[name].inputs) for name in ("last2", "ema")] == [2, 6]
    assert made["ema"].scheme == "ema:decay=0.9"


def command(*arguments):
    return CliRunner().invoke(main, ["average", *map(str, arguments)])


def test_also_writes_further_averages(run, tmp_path):
    result = command(
        tmp_path / "run", "-o", tmp_path / "all.pt", "--last", 5, "--json",
        "--also", "last2=@last=2", "--also", "ema.safetensors=ema:decay=0.9,debias=true",
        "--also", "some=linear@from=2,to=6,every=2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert [one["name"] for one in made["also"]] == ["last2", "ema.safetensors", "some"]
    assert [Path(one["output"]).name for one in made["also"]] == [
        "last2.pt", "ema.safetensors", "some.pt",
    ]  # fmt: skip
    expected = {
        "last2.pt": average(run.last(2)),
        "ema.safetensors": average(run.last(5), "ema:decay=0.9,debias=true"),
        "some.pt": average(run.steps(2, 6).every(2), "linear"),
        "all.pt": average(run.last(5)),
    }
    for name, state in expected.items():
        found = ckptavg.open_checkpoint(tmp_path / name)
        assert the_same(ckptavg.average([found]), state), name


def test_also_shows_each_plan_in_a_dry_run(run, tmp_path):
    result = command(tmp_path / "run", "--dry-run", "--also", "last2=linear@last=2")
    assert result.exit_code == 0, result.output
    assert "6 checkpoints, uniform" in result.stdout
    assert "last2: 2 checkpoints, linear" in result.stdout
    assert listing(tmp_path) == ["run", *(f"run/epoch_{i}.pt" for i in range(1, 7))]


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ("last2", "expected NAME=SCHEME[@SELECTION]"),
        ("=uniform", "expected NAME=SCHEME[@SELECTION]"),
        ("../x=uniform", "expected NAME=SCHEME[@SELECTION]"),
        ("x=uniform@lest=2", "expected one of from=..., to=..."),
        ("x=uniform@last=5,last=3", "'last' is given twice"),
        ("x=uniform@last=no", "expected a whole number from 1 on but got 'no'"),
        ("x=uniform@from=no", "expected a number in 'from=no'"),
        ("x=uniform@metric=acc", "--metric needs --best N"),
        ("x=unifrom", "'--also': x: scheme is expected to be one of uniform, ema, linear, lawa"),
    ],
)
def test_also_refuses_mistyped_values(run, tmp_path, further, message):
    result = command(tmp_path / "run", "-o", tmp_path / "x.pt", "--also", further)
    assert result.exit_code == 2
    assert message in result.stderr
    assert listing(tmp_path) == ["run", *(f"run/epoch_{i}.pt" for i in range(1, 7))]


def test_average_many_refuses_outputs_that_are_inputs(run, tmp_path):
    """An output's own average need not read the checkpoint for it to be an input."""
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    asked = {"all.pt": "uniform", "epoch_2.pt": run.last(1)}
    with pytest.raises(OutputError, match="is an input"):
        average_many(run, asked, out_dir=tmp_path / "run", overwrite=True)
    result = command(
        tmp_path / "run", "-o", tmp_path / "run/o.pt", "--overwrite", "--also", "epoch_2=@last=1"
    )
    assert (result.exit_code, "is an input" in result.stderr) == (1, True)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_average_many_error_lists_published_outputs(run, tmp_path, monkeypatch):
    publish = Publication.publish

    def late(self):
        if self.path.name == "b.pt":
            self.path.touch()
        publish(self)

    monkeypatch.setattr(Publication, "publish", late)
    with pytest.raises(OutputError, match=r"b.pt has appeared .*\(.*a.pt had been written\)"):
        average_many(run, {"a.pt": "uniform", "b.pt": "linear"}, out_dir=tmp_path / "out")
    assert listing(tmp_path / "out") == ["a.pt", "b.pt"]


def test_average_many_publishes_none_if_an_output_appears(run, tmp_path):
    def progress(done, total):
        if done:
            (tmp_path / "b.pt").touch()

    with pytest.raises(OutputError, match=r"b.pt has appeared while"):
        average_many(
            run, {"a.pt": "uniform", "b.pt": "linear"}, out_dir=tmp_path, progress=progress
        )
    assert not (tmp_path / "a.pt").exists()


def test_average_many_removes_directories_it_made_on_failure(run, tmp_path):
    with pytest.raises(UsageError):
        average_many(run, {"a": "uniform", "a.safetensors": "linear"}, out_dir=tmp_path / "p/q/r")
    assert not (tmp_path / "p").exists()
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file is no directory"):
        average_many(run, {"a": "uniform"}, out_dir=tmp_path / "file")


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["uniform"], "averages are expected by name but got"),
        ({"": "uniform"}, "file name but got ''"),
        ({3: "uniform"}, "file name but got 3"),
        ({"a\nb": "uniform"}, "file name but got"),
        ({"a": 3}, "'a' is expected to be a scheme, a selection of the run, or both"),
        ({"a": [1, 2, 3]}, "'a' is expected to be"),
    ],
)
def test_average_many_refuses_malformed_requests(run, tmp_path, asked, message):
    with pytest.raises(UsageError, match=message):
        average_many(run, asked, out_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [3, [3], ["runs/swa", 3], None])
def test_average_refuses_other_objects_than_a_run(given):
    with pytest.raises(UsageError, match=r"a run is expected.*ckptavg\.open_run\(PATH\)"):
        average(given)


def test_average_takes_a_path_for_a_run(run, tmp_path):
    path = tmp_path / "run"
    expected = average(run)
    for named in (path, str(path), [str(path)], sorted(path.glob("*.pt"))[::-1]):
        assert the_same(average(named), expected)
    many = average_many(str(path), {"ema": "ema:decay=0.5"})
    assert the_same(many["ema"], average(run, "ema:decay=0.5"))
    with pytest.raises(RunError, match="does not exist"):
        average("runs/swa")


def test_average_takes_weights_of_any_number_type(run):
    expected = average(run, weights=[1, 2, 3, 4, 5, 6])
    for weights in (torch.arange(1, 7), range(1, 7), np.arange(1, 7)):
        assert the_same(average(run, weights=weights), expected)
    with pytest.raises(UsageError, match="weights are expected to be numbers"):
        average(run, weights=["x"] * 6)
