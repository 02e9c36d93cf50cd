"""Checkpoints that are written with recomputed statistics."""

import copy
import weakref

import pytest
import torch
from helpers import average_by_hand, counted_reads, listing, opened, same_bits, save
from norm_network import BATCHES, RUNTIME, Net, X, state_of
from recomputed import write_averages
from torch import nn
from torch.utils.data import TensorDataset

from ckptavg import open_checkpoint
from ckptavg.averaging import pipeline
from ckptavg.averaging.compute import read_state_dict
from ckptavg.averaging.pipeline import WriteOptions, prepare_targets
from ckptavg.averaging.plan import plan_average
from ckptavg.batchnorm import recompute
from ckptavg.batchnorm.checkpoints import update_checkpoint
from ckptavg.batchnorm.recompute import StatisticsPass
from ckptavg.data.loaders import open_loader
from ckptavg.errors import (
    BatchNormError,
    EvaluationError,
    ModelError,
    NonFiniteError,
    OutputError,
)
from ckptavg.outputs.writing import OutputWriter

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class TwoNames(nn.Module):
    """One BatchNorm layer under two names, as detection heads share theirs."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 3)
        self.norm = nn.BatchNorm1d(3)
        self.again = self.norm

    def forward(self, x):
        return self.again(self.body(x))


class Untouchable:
    """Training data that must not be read."""

    def __iter__(self):
        raise AssertionError("the data were read")


def statistics_by_hand(state, x=X):
    """Moments of the norm's inputs over all of x, in float64."""
    inputs = x.double() @ state["body.weight"].double().T + state["body.bias"].double()
    return {
        "norm.running_mean": inputs.mean(0),
        "norm.running_var": inputs.var(0, correction=1),
    }


def is_statistic(name):
    return name.endswith(STATISTICS)


def assert_refreshed(path, state, **tolerance):
    """The file has the weights of the state, to the last bit, and its statistics for X."""
    found = read_state_dict(open_checkpoint(path))
    assert found.keys() == state.keys()
    for name in state:
        if not is_statistic(name):
            assert same_bits(found[name], state[name]), name
    for name, expected in statistics_by_hand(state).items():
        assert found[name].dtype == state[name].dtype
        tolerance = {"rtol": 1e-5, "atol": 1e-5} | tolerance
        torch.testing.assert_close(found[name].double(), expected, **tolerance)
    return found


def average_of(states, dtype=None):
    return {
        name: average_by_hand([s[name] for s in states], [1] * len(states), dtype or tensor.dtype)
        for name, tensor in states[-1].items()
    }


def write_average(planned, out, how, **care):
    (done,) = write_averages([planned], [out], how, **care)
    return done


@pytest.fixture
def states():
    return [state_of(seed) for seed in (1, 2, 3)]


@pytest.fixture
def checkpoints(tmp_path, states):
    return opened(tmp_path / "run", states)


@pytest.fixture
def planned(checkpoints):
    return plan_average(checkpoints)


OUTPUTS = ("out.safetensors", "out.pt")


# A checkpoint


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("source", [".pt", ".safetensors"])
def test_update_checkpoint_recomputes_statistics(tmp_path, name, source):
    state = state_of(1)
    checkpoint = open_checkpoint(save(tmp_path / f"in{source}", state))
    result, _ = update_checkpoint(
        checkpoint, tmp_path / name, StatisticsPass(Net(), BATCHES, RUNTIME)
    )
    found = assert_refreshed(tmp_path / name, state)
    assert found["norm.num_batches_tracked"] == 4
    assert (result.layers, result.batches, result.samples) == (1, 4, 50)


def test_update_checkpoint_leaves_input_unchanged(tmp_path):
    path = save(tmp_path / "in.pt", state_of(1))
    before = path.read_bytes()
    update_checkpoint(
        open_checkpoint(path), tmp_path / "out.pt", StatisticsPass(Net(), BATCHES, RUNTIME)
    )
    assert path.read_bytes() == before
    assert listing(tmp_path) == ["in.pt", "out.pt"]


def test_update_checkpoint_output_loads_into_model(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path / "in.pt", state_of(1)))
    update_checkpoint(checkpoint, tmp_path / "out.pt", StatisticsPass(Net(), BATCHES, RUNTIME))
    model = Net()
    model.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True)["state_dict"])
    expected = statistics_by_hand(state_of(1))["norm.running_mean"]
    torch.testing.assert_close(model.norm.running_mean.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_update_checkpoint_keeps_dtype(tmp_path, dtype):
    state = state_of(1, dtype=dtype)
    checkpoint = open_checkpoint(save(tmp_path / "in.pt", state))
    update_checkpoint(checkpoint, tmp_path / "out.pt", StatisticsPass(Net(), BATCHES, RUNTIME))
    precision = max(torch.finfo(dtype).eps, 1e-5)
    assert_refreshed(tmp_path / "out.pt", state, rtol=precision, atol=precision)


def test_update_checkpoint_adds_no_num_batches_tracked(tmp_path):
    state = state_of(1)
    del state["norm.num_batches_tracked"]
    checkpoint = open_checkpoint(save(tmp_path / "in.pt", state))
    update_checkpoint(checkpoint, tmp_path / "out.pt", StatisticsPass(Net(), BATCHES, RUNTIME))
    assert_refreshed(tmp_path / "out.pt", state)


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_update_checkpoint_writes_bare_names(tmp_path, wrapper):
    wrapped = {wrapper + name: value for name, value in state_of(1).items()}
    checkpoint = open_checkpoint(save(tmp_path / "in.pt", wrapped))
    update_checkpoint(checkpoint, tmp_path / "out.pt", StatisticsPass(Net(), BATCHES, RUNTIME))
    assert_refreshed(tmp_path / "out.pt", state_of(1))


def test_update_checkpoint_takes_wrapped_model(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path / "in.pt", state_of(1)))
    model = nn.DataParallel(Net())
    update_checkpoint(checkpoint, tmp_path / "out.pt", StatisticsPass(model, BATCHES, RUNTIME))
    assert_refreshed(tmp_path / "out.pt", state_of(1))


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("held", [("norm", "again"), ("norm",), ("again",)], ids=str)
def test_update_checkpoint_covers_layer_with_two_names(tmp_path, name, held):
    """Some formats store only one of the names."""
    state = TwoNames().state_dict()
    kept = {k: v for k, v in state.items() if k.startswith((*held, "body"))}
    checkpoint = open_checkpoint(save(tmp_path / "in.pt", kept))
    update_checkpoint(checkpoint, tmp_path / name, StatisticsPass(TwoNames(), BATCHES, RUNTIME))
    found = read_state_dict(open_checkpoint(tmp_path / name))
    for layer in held:
        for statistic in ("running_mean", "running_var"):
            expected = statistics_by_hand(state)[f"norm.{statistic}"].float()
            torch.testing.assert_close(found[f"{layer}.{statistic}"], expected)


def test_update_checkpoint_copies_directory_config(tmp_path):
    save(tmp_path / "in" / "model.safetensors", state_of(1))
    (tmp_path / "in" / "config.json").write_text('{"model_type": "net"}')
    checkpoint = open_checkpoint(tmp_path / "in")
    update_checkpoint(checkpoint, tmp_path / "out", StatisticsPass(Net(), BATCHES, RUNTIME))
    assert_refreshed(tmp_path / "out", state_of(1))
    assert (tmp_path / "out" / "config.json").read_text() == '{"model_type": "net"}'
    assert open_checkpoint(tmp_path / "out").provenance.bn == "recomputed"


def test_update_checkpoint_batches_dataset_by_runtime(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path / "in.pt", state_of(1)))
    told = []
    loader = open_loader(TensorDataset(X), RUNTIME, shuffle=True)
    how = StatisticsPass(Net(), loader, RUNTIME, progress=lambda *at: told.append(at))
    update_checkpoint(checkpoint, tmp_path / "out.pt", how)
    assert_refreshed(tmp_path / "out.pt", state_of(1))
    assert [total for _, total in told] == [len(X)] * 4
    assert told[-1][0] == len(X)


def test_update_checkpoint_uses_custom_forward(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path / "in.pt", state_of(1)))
    batches = [{"image": x} for x in BATCHES]
    how = StatisticsPass(Net(), batches, RUNTIME, lambda model, batch: model(batch["image"]))
    update_checkpoint(checkpoint, tmp_path / "out.pt", how)
    assert_refreshed(tmp_path / "out.pt", state_of(1))


# An average


@pytest.mark.parametrize("name", OUTPUTS)
def test_write_averages_recomputes_statistics(tmp_path, planned, states, name):
    result, _ = write_average(planned, tmp_path / name, StatisticsPass(Net(), BATCHES, RUNTIME))
    assert_refreshed(tmp_path / name, average_of(states))
    assert result.layers == 1


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_write_averages_keeps_requested_dtype(tmp_path, checkpoints, states, dtype):
    planned = plan_average(checkpoints, dtype=dtype)
    write_average(planned, tmp_path / "out.pt", StatisticsPass(Net(), BATCHES, RUNTIME))
    kind = getattr(torch, dtype)
    precision = max(torch.finfo(kind).eps, 1e-5)
    assert_refreshed(tmp_path / "out.pt", average_of(states, kind), rtol=precision, atol=precision)


def test_write_averages_reports_both_phases(tmp_path, planned):
    read, passed = [], []
    write_average(
        planned,
        tmp_path / "out.pt",
        StatisticsPass(Net(), BATCHES, RUNTIME, progress=lambda *at: passed.append(at)),
        progress=lambda *at: read.append(at),
    )
    assert read[-1][0] == read[-1][1] > 0
    assert passed[-1] == (len(X), 0)  # a list of tensors does not tell how many samples it has


# How it was made


def test_write_averages_records_recomputed_statistics(tmp_path, planned, checkpoints):
    write_average(planned, tmp_path / "out.pt", StatisticsPass(Net(), BATCHES, RUNTIME))
    made = open_checkpoint(tmp_path / "out.pt").provenance
    assert made.bn == "recomputed"
    assert made.scheme == "uniform"
    assert [source.path for source in made.inputs] == [str(c.path) for c in checkpoints]
    assert [source.coefficient for source in made.inputs] == pytest.approx([1 / 3] * 3)


def test_update_checkpoint_records_source(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path / "in.pt", state_of(1)))
    update_checkpoint(
        checkpoint, tmp_path / "out.safetensors", StatisticsPass(Net(), BATCHES, RUNTIME)
    )
    made = open_checkpoint(tmp_path / "out.safetensors").provenance
    assert made.bn == "recomputed"
    assert [source.path for source in made.inputs] == [str(tmp_path / "in.pt")]


def test_update_checkpoint_keeps_history_of_average(tmp_path, planned, states):
    options = WriteOptions()
    targets = prepare_targets([(planned, tmp_path / "stale.pt")], options)
    pipeline.write_averages([planned], targets, options)
    stale = open_checkpoint(tmp_path / "stale.pt")
    update_checkpoint(stale, tmp_path / "fresh.pt", StatisticsPass(Net(), BATCHES, RUNTIME))
    assert_refreshed(tmp_path / "fresh.pt", average_of(states))
    made = open_checkpoint(tmp_path / "fresh.pt").provenance
    assert (stale.provenance.bn, made.bn) == ("stale", "recomputed")
    assert made.inputs == stale.provenance.inputs


def test_write_averages_logs_no_stale_statistics(tmp_path, planned, caplog):
    caplog.set_level("INFO", "ckptavg")
    write_average(planned, tmp_path / "out.pt", StatisticsPass(Net(), BATCHES, RUNTIME))
    assert "stale" not in caplog.text


# Care


def refreshed(kind, planned, checkpoint, out, model, data, **keywords):
    write, what = {"average": (write_average, planned), "copy": (update_checkpoint, checkpoint)}[
        kind
    ]
    return write(what, out, StatisticsPass(model, data, RUNTIME), **keywords)


@pytest.fixture(params=["average", "copy"])
def run(request, planned, checkpoints):
    """``write_average`` or ``update_checkpoint``, but for what is theirs."""

    def run(*args, **keywords):
        return refreshed(request.param, planned, checkpoints[0], *args, **keywords)

    return run


def test_statistics_pass_refuses_existing_output(tmp_path, run):
    (tmp_path / "out.pt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        run(tmp_path / "out.pt", Net(), Untouchable())
    assert (tmp_path / "out.pt").read_text() == "mine"


def test_statistics_pass_overwrites_on_request(tmp_path, run):
    (tmp_path / "out.pt").write_text("mine")
    run(tmp_path / "out.pt", Net(), BATCHES, overwrite=True)
    assert open_checkpoint(tmp_path / "out.pt").provenance.bn == "recomputed"


@pytest.mark.parametrize("overwrite", [False, True])
def test_statistics_pass_never_overwrites_input(tmp_path, run, overwrite):
    path = tmp_path / "run" / "epoch_1.pt"
    before = path.read_bytes()
    with pytest.raises(OutputError, match="is an input"):
        run(path, Net(), Untouchable(), overwrite=overwrite)
    assert path.read_bytes() == before


def test_statistics_pass_refuses_missing_directory(tmp_path, run):
    with pytest.raises(OutputError, match="does not exist"):
        run(tmp_path / "none" / "out.pt", Net(), Untouchable())


def test_statistics_pass_refuses_unfit_weights_unread(tmp_path, run):
    with pytest.raises(ModelError, match="does not fit the model"):
        run(tmp_path / "out.pt", nn.BatchNorm1d(3), Untouchable())


def interrupted():
    yield BATCHES[0]
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        (list, BatchNormError),
        (interrupted, KeyboardInterrupt),
        (lambda: [X * torch.nan], BatchNormError),
        (lambda: [X[:1]], BatchNormError),
    ],
    ids=["empty", "Ctrl-C", "nan", "single"],
)
def test_statistics_pass_writes_nothing_on_failure(tmp_path, run, batches, error):
    with pytest.raises(error):
        run(tmp_path / "out.pt", Net(), batches())
    assert listing(tmp_path) == ["run", "run/epoch_1.pt", "run/epoch_2.pt", "run/epoch_3.pt"]


def test_update_checkpoint_copies_model_without_batchnorm(tmp_path, caplog):
    caplog.set_level("INFO", "ckptavg")
    state = nn.Linear(4, 3).state_dict()
    checkpoint = open_checkpoint(save(tmp_path / "in.pt", state))
    how = StatisticsPass(nn.Linear(4, 3), BATCHES, RUNTIME)
    result, made = update_checkpoint(checkpoint, tmp_path / "out.pt", how)
    assert (result.layers, made.bn) == (0, "none")
    assert "nothing to recompute" in caplog.text
    assert torch.equal(
        read_state_dict(open_checkpoint(tmp_path / "out.pt"))["weight"], state["weight"]
    )


def test_update_checkpoint_refuses_overflow(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(2))
    half = {
        name: t.half() if t.is_floating_point() else t for name, t in model.state_dict().items()
    }
    torch.save(half, tmp_path / "half.pt")
    data = [1e4 * torch.randn(50, 2)]
    with pytest.raises(NonFiniteError, match=r"0\.running_var is too large for float16"):
        update_checkpoint(
            open_checkpoint(tmp_path / "half.pt"),
            tmp_path / "out.pt",
            StatisticsPass(model, data, RUNTIME),
        )
    assert not (tmp_path / "out.pt").exists()


# Several averages

NAMES = ("last2.pt", "all.safetensors", "first.pt", "weighted.pt")


class Read(list):
    """Batches that count how often they are read."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


@pytest.fixture
def averages(checkpoints):
    """Some whose checkpoints come in another order than in what stands before them."""
    return [
        plan_average(checkpoints[1:]),
        plan_average(checkpoints),
        plan_average(checkpoints[:1]),
        plan_average(checkpoints, weights=[3, 1, 2]),
    ]


def write_all(averages, directory, model=None, data=BATCHES, **care):
    directory.mkdir(exist_ok=True)
    how = StatisticsPass(model or Net(), data, RUNTIME)
    return write_averages(averages, [directory / name for name in NAMES], how, **care)


def fitting(monkeypatch, count):
    """Let memory hold so many averages: each is there twice."""
    monkeypatch.setattr(recompute, "count_models_that_fit", lambda *_: 2 * count)


@pytest.fixture
def alone(tmp_path, averages):
    """What each of the averages is when it is written by itself."""
    (tmp_path / "alone").mkdir()
    for planned, name in zip(averages, NAMES, strict=True):
        write_average(planned, tmp_path / "alone" / name, StatisticsPass(Net(), BATCHES, RUNTIME))
    return tmp_path / "alone"


def assert_as_alone(directory, alone):
    assert listing(directory) == listing(alone) == sorted(NAMES)
    for name in NAMES:
        assert (directory / name).read_bytes() == (alone / name).read_bytes(), name


@pytest.mark.parametrize("together", [1, 2, 3, 1000])
def test_write_averages_makes_same_files_as_alone(monkeypatch, tmp_path, averages, alone, together):
    fitting(monkeypatch, together)
    data = Read(BATCHES)
    done = write_all(averages, tmp_path / "out", data=data)
    assert_as_alone(tmp_path / "out", alone)
    assert data.passes == -(-4 // together) if together < 4 else 1
    for (result, made), name in zip(done, NAMES, strict=True):
        assert (result.layers, result.batches, result.samples) == (1, 4, 50)
        assert made == open_checkpoint(tmp_path / "out" / name).provenance


def test_write_averages_reads_inputs_and_data_once(monkeypatch, tmp_path, averages, checkpoints):
    read = counted_reads(monkeypatch)
    data = Read(BATCHES)
    write_all(averages, tmp_path / "out", data=data)
    weights = sum(tensor.nbytes for tensor in state_of(1).values())
    assert {place: read[place] for place in map(str, (c.path for c in checkpoints))} == {
        str(c.path): weights for c in checkpoints
    }
    assert data.passes == 1


@pytest.mark.parametrize("together", [1, 3, 1000])
def test_write_averages_makes_same_digests_as_alone(monkeypatch, tmp_path, averages, together):
    fitting(monkeypatch, together)
    done = write_all(averages, tmp_path / "out", digests=True)
    for planned, name, (_, made) in zip(averages, NAMES, done, strict=True):
        how = StatisticsPass(Net(), BATCHES, RUNTIME)
        _, expected = write_average(planned, tmp_path / f"alone-{name}", how, digests=True)
        assert made == expected
        assert open_checkpoint(tmp_path / "out" / name).provenance == expected


# Memory


class Scarce(Net):
    """Refuses to run while more than so many copies of it are alive, itself included."""

    alive = weakref.WeakSet()
    most = 0
    batch = 0  # in which it refuses: the last one is smaller

    def __init__(self):
        super().__init__()
        Scarce.alive.add(self)

    def __deepcopy__(self, memo):
        made = Scarce()
        made.load_state_dict(self.state_dict())
        return made

    def forward(self, x):
        if len(Scarce.alive) > Scarce.most and (Scarce.batch == 0 or len(x) < 16):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(x)


@pytest.fixture
def scarce(monkeypatch):
    def scarce(most, batch=0):
        monkeypatch.setattr(Scarce, "alive", weakref.WeakSet())
        monkeypatch.setattr(Scarce, "most", most)
        monkeypatch.setattr(Scarce, "batch", batch)
        return Scarce()

    return scarce


@pytest.mark.parametrize("batch", [0, -1])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_write_averages_makes_same_files_after_oom(tmp_path, averages, alone, scarce, most, batch):
    done = write_all(averages, tmp_path / "out", scarce(most, batch))
    assert_as_alone(tmp_path / "out", alone)
    assert [result.samples for result, _ in done] == [50] * 4


def test_write_averages_makes_same_digests_after_oom(monkeypatch, tmp_path, averages):
    """Half a tensor has gone by when the first try fails."""
    from ckptavg.outputs.digests import Leaves

    fed, update = [], Leaves.update

    def exhausted(self, number, offset, data):
        fed.append(len(data))
        if len(fed) == 5:
            update(self, number, offset, data[: len(data) // 2])
            raise MemoryError
        update(self, number, offset, data)

    expected = [made for _, made in write_all(averages, tmp_path / "whole", digests=True)]
    monkeypatch.setattr(Leaves, "update", exhausted)
    found = [made for _, made in write_all(averages, tmp_path / "out", digests=True)]
    assert found == expected


def test_write_averages_survives_oom_while_writing(monkeypatch, tmp_path, averages, alone):
    write, filled = OutputWriter.write_state_dict, []

    def exhausted(self, state_dict):
        filled.append(self.target.path.name)
        if len(filled) == 2:
            raise MemoryError
        return write(self, state_dict)

    monkeypatch.setattr(OutputWriter, "write_state_dict", exhausted)
    assert len(write_all(averages, tmp_path / "out")) == 4
    assert filled[:3] == [NAMES[0], NAMES[1], NAMES[0]]
    assert_as_alone(tmp_path / "out", alone)


def test_statistics_pass_reports_too_little_memory(tmp_path, run, scarce):
    with pytest.raises(EvaluationError, match="memory of cpu is too small for a single model"):
        run(tmp_path / "out.pt", scarce(0), BATCHES)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize("passes", [1, 4])
def test_write_averages_takes_iterator_for_one_pass_only(
    monkeypatch, tmp_path, averages, alone, passes
):
    fitting(monkeypatch, 4 // passes)
    batches = iter(BATCHES)
    if passes == 1:
        write_all(averages, tmp_path / "out", data=batches)
        assert_as_alone(tmp_path / "out", alone)
        return
    with pytest.raises(EvaluationError, match="read only once"):
        write_all(averages, tmp_path / "out", data=batches)
    assert len(list(batches)) == len(BATCHES)


@pytest.mark.parametrize("together", [1, 2, 1000])
@pytest.mark.parametrize(("others", "error"), [(1, NonFiniteError), (0, BatchNormError)])
def test_write_averages_writes_none_if_one_fails(
    monkeypatch, tmp_path, averages, states, together, others, error
):
    fitting(monkeypatch, together)
    bad = copy.deepcopy(states[1])
    bad["body.weight"][0, 0] = torch.inf
    odd = opened(tmp_path / "odd", [bad, *states[:others]])
    with pytest.raises(error):
        write_all([*averages[:3], plan_average(odd)], tmp_path / "out")
    assert listing(tmp_path / "out") == []


@pytest.mark.parametrize("together", [1, 1000])
def test_write_averages_writes_none_if_one_is_unfit(monkeypatch, tmp_path, averages, together):
    fitting(monkeypatch, together)
    other = opened(tmp_path / "odd", [state_of(1, TwoNames)])
    with pytest.raises(ModelError, match=r"weighted\.pt does not fit"):
        write_all([*averages[:3], plan_average(other)], tmp_path / "out")
    assert listing(tmp_path / "out") == []


# Tensors that share storage


class Tied(Net):
    """Its table is a strided view, and its first weight has a second name."""

    def __init__(self):
        super().__init__()
        self.again = self.body
        self.register_buffer("view", torch.arange(12.0).view(3, 4).T[1:])


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("kind", ["copy", "average"])
def test_statistics_pass_keeps_ties_and_views(tmp_path, name, kind):
    states = []
    for seed in (1, 2):
        model = Tied()
        torch.manual_seed(seed)
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape))
        states.append({**model.state_dict()})
    checkpoints = opened(tmp_path / "run", states)
    how, out = StatisticsPass(Tied(), BATCHES, RUNTIME), tmp_path / name
    if kind == "copy":
        update_checkpoint(checkpoints[0], out, how)
        expected = states[0]
    else:
        write_average(plan_average(checkpoints), out, how)
        expected = average_of(states)
    found = assert_refreshed(out, expected)
    assert torch.equal(found["again.weight"], found["body.weight"])
    if name.endswith(".pt"):
        stored = torch.load(out, weights_only=True)["state_dict"]
        assert stored["again.weight"].data_ptr() == stored["body.weight"].data_ptr()
