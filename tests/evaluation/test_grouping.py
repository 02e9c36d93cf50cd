"""Results do not depend on what runs together: groups, retries, processes; and bad data is met."""

import copy
import itertools
import weakref

import numpy as np
import pytest
import torch
from fellows import together
from helpers import opened
from selecting import combinations, first_only
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptavg import Candidate, evaluate
from ckptavg.averaging.plan import plan_average
from ckptavg.data.loaders import open_loader
from ckptavg.errors import BatchNormError, EvaluationError, ModelError, UsageError
from ckptavg.evaluation import session
from ckptavg.evaluation.session import score
from ckptavg.evaluation.significance import compare
from ckptavg.models.runtime import Runtime
from ckptavg.tasks import Samples

CLASSES = 3
CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self, classes=CLASSES):
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, classes)
        self.register_buffer("tag", torch.tensor(0))

    def forward(self, x):
        return self.head(self.norm(self.body(x)).relu())


def state_of(seed):
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in Net().state_dict().items()
    }
    state["norm.running_var"] = state["norm.running_var"].abs() + 0.5
    return state | {"tag": torch.tensor(seed)}


def samples(count, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return x, torch.randint(CLASSES, (count,), generator=generator)


X, Y = samples(40, 0)
DATA = TensorDataset(X, Y)
TRAIN = TensorDataset(*samples(50, 1))
SIZE = 16
STATES = [state_of(seed) for seed in range(1, 6)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("run"), STATES)


@pytest.fixture(scope="module")
def candidates(checkpoints):
    """Singles, averages, and ensembles that overlap, so that they part in many ways."""
    planned = plan_average(checkpoints[:3])
    return [
        Candidate.of_checkpoint(checkpoints[4], "last", last=True),
        Candidate.of_checkpoint(checkpoints[0]),
        Candidate.of_average(planned, "stale", recompute=False),
        Candidate.of_average(planned, "fresh", recompute=True),
        Candidate.of_average(plan_average(checkpoints[1:]), "another", recompute=True),
        Candidate.of_ensemble(checkpoints, "all"),
        Candidate.of_ensemble([checkpoints[i] for i in (3, 0, 3)], "twice"),
    ]


NETWORKS = 5 + 3


def run(candidates, model=None, data=DATA, train=TRAIN, **how):
    how = {"batch_size": SIZE} | how
    return evaluate(candidates, model or Net(), data, train_loader=train, **how)


@pytest.fixture(scope="module")
def expected(candidates):
    return run(candidates)


def numbers(value, path=""):
    """All numbers in plain values, by where they stand."""
    if isinstance(value, dict):
        parts = [numbers(part, f"{path}.{key}") for key, part in value.items()]
    elif isinstance(value, list):
        parts = [numbers(part, f"{path}.{i}") for i, part in enumerate(value)]
    else:
        return {path: value}
    return {key: part for each in parts for key, part in each.items()}


def close(value, within):
    return pytest.approx(value, rel=within) if isinstance(value, (int, float)) else value


def assert_same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        mine, theirs = numbers(one.as_json()), numbers(other.as_json())
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert value == close(theirs[key], 1e-9), key


def fitting(monkeypatch, count):
    monkeypatch.setattr(session, "count_models_that_fit", lambda *_: count)


# Groups and order

PAIRS = list(itertools.combinations(range(7), 2))  # of candidates


@pytest.mark.parametrize("size", range(1, NETWORKS + 1))
def test_results_are_independent_of_group_size(monkeypatch, candidates, expected, size):
    fitting(monkeypatch, size)
    assert_same(run(candidates), expected)


@combinations(turn=[1, 3, -1], size=[2, 3, 100])
def test_results_are_independent_of_candidate_order(monkeypatch, candidates, expected, size, turn):
    fitting(monkeypatch, size)
    order = list(range(len(candidates)))[::turn] if turn < 0 else list(range(len(candidates)))
    order = order[turn:] + order[:turn] if turn > 0 else order
    found = run([candidates[i] for i in order])
    assert_same(found, [expected[i] for i in order])


@first_only("kept", PAIRS, ids=map(str, PAIRS))
def test_candidate_scores_are_independent_of_others(candidates, expected, kept):
    found = run([candidates[i] for i in kept])
    for one, place in zip(found, kept, strict=True):
        assert one.metrics == pytest.approx(expected[place].metrics, rel=1e-12)


def test_on_results_is_called_after_each_pass(monkeypatch, candidates, expected):
    fitting(monkeypatch, 3)
    told = []
    loader = [
        open_loader(d, Runtime(CPU, batch_size=SIZE), shuffle=d is TRAIN) for d in (DATA, TRAIN)
    ]
    found = score(candidates, Net(), loader[0], Runtime(CPU), loader[1], on_results=told.append)
    assert [len(results) for results in told] == sorted(len(results) for results in told)
    assert len(told) == 3
    assert len(told[0]) < len(told[-1]) == len(candidates)
    assert_same(told[-1], expected)
    assert_same(found, expected)


# Comparisons


def right_of(state):
    model = Net()
    model.load_state_dict(state)
    return (model.eval()(X).argmax(1) == Y).double()


def test_versus_compares_candidates_with_last(checkpoints, expected):
    last, first = right_of(STATES[4]), right_of(STATES[0])
    by_hand = compare(Samples(first), Samples(last)).scale_by(100)
    assert expected[0].versus is None
    assert expected[1].versus.reference == "last"
    assert expected[1].versus.metric == "top1"
    assert expected[1].versus.difference == by_hand
    only = int((first > last).sum()) - int((last > first).sum())
    assert by_hand.value == pytest.approx(100 * only / len(X))


def test_versus_takes_first_candidate_where_none_is_last(checkpoints):
    found = run(checkpoints[:3])
    assert [r.versus and r.versus.reference for r in found] == [None, "epoch_1.pt", "epoch_1.pt"]


def test_ensemble_details_have_disagreement(expected):
    models = [Net() for _ in STATES]
    for model, state in zip(models, STATES, strict=True):
        model.load_state_dict(state)
    answers = np.stack([model.eval()(X).argmax(1).numpy() for model in models])
    pairs = [(answers[i] != answers[j]).mean() for i, j in itertools.combinations(range(5), 2)]
    details = expected[5].details
    assert details["disagreement"] == pytest.approx(np.mean(pairs))
    assert details["not_unanimous"] == pytest.approx((answers != answers[0]).any(0).mean())


def test_details_have_bins_of_calibration_error(expected):
    for result in expected:
        bins = [one for one in result.details["reliability"] if one["n"]]
        gaps = [one["n"] * abs(one["accuracy"] - one["confidence"]) for one in bins]
        assert sum(gaps) / len(X) == pytest.approx(result.metrics["ece"])
        assert sum(one["n"] for one in bins) == len(X)


# Memory

ERRORS = {
    "cuda": lambda: torch.OutOfMemoryError("CUDA out of memory"),
    "python": MemoryError,
    "cpu": lambda: torch.empty(1 << 62, dtype=torch.uint8),
}


class Scarce(Net):
    """Refuses to be copied, or to run, while more than so many copies of it are alive."""

    alive = weakref.WeakSet()
    most = 0
    stage = "copy"
    error = MemoryError

    def __deepcopy__(self, memo):
        if Scarce.stage == "copy" and len(Scarce.alive) >= Scarce.most:
            self.refuse()
        made = Scarce()
        made.load_state_dict(self.state_dict())
        Scarce.alive.add(made)
        return made

    def forward(self, x):
        # a layer whose statistics are being taken has its forward wrapped
        is_watched = "forward" in vars(self.norm)
        stage = "statistics" if is_watched else "last" if len(x) < SIZE else "scores"
        if stage == Scarce.stage and len(Scarce.alive) > Scarce.most:
            self.refuse()
        return super().forward(x)

    def refuse(self):
        made = Scarce.error()
        raise made


@pytest.fixture
def scarce(monkeypatch):
    def scarce(most, stage, error=MemoryError):
        monkeypatch.setattr(Scarce, "alive", weakref.WeakSet())
        monkeypatch.setattr(Scarce, "most", most)
        monkeypatch.setattr(Scarce, "stage", stage)
        monkeypatch.setattr(Scarce, "error", staticmethod(error))
        return Scarce()

    return scarce


STAGES = ["copy", "statistics", "scores", "last"]


@combinations(most=[1, 2, 3, 5], stage=STAGES)
def test_exhausted_memory_changes_no_result(scarce, candidates, expected, most, stage):
    assert_same(run(candidates, scarce(most, stage)), expected)


@combinations(error=ERRORS, stage=STAGES)
def test_exhausted_memory_is_recognized_in_every_error(scarce, candidates, expected, stage, error):
    assert_same(run(candidates, scarce(2, stage, ERRORS[error])), expected)


@first_only("stage", STAGES)
def test_exhausted_memory_with_one_model_is_an_error(scarce, candidates, stage):
    with pytest.raises(EvaluationError) as told:
        run(candidates, scarce(0, stage))
    assert str(told.value) == (
        "the memory of cpu is too small for a single model. "
        f"Lower `batch_size` (now {SIZE}), or name another `device`."
    )


@first_only("stage", STAGES)
def test_model_errors_are_not_taken_for_exhausted_memory(scarce, candidates, stage):
    with pytest.raises((EvaluationError, RuntimeError), match="mine alone"):
        run(candidates, scarce(1, stage, lambda: RuntimeError("mine alone")))


def test_exhausted_memory_keeps_results_of_earlier_passes(
    monkeypatch, scarce, candidates, expected
):
    fitting(monkeypatch, 4)
    assert_same(run(candidates, scarce(3, "last")), expected)


@pytest.mark.parametrize("size", [2, 100])
def test_exhausted_memory_after_a_pass_counts_nothing_twice(
    monkeypatch, candidates, expected, size
):
    fitting(monkeypatch, size)
    tries = []

    def told(results):
        tries.append(len(results))
        if len(tries) == 1:
            raise MemoryError

    runtime = Runtime(CPU, batch_size=SIZE)
    data, train = (open_loader(d, runtime, shuffle=d is TRAIN) for d in (DATA, TRAIN))
    found = score(candidates, Net(), data, runtime, train, on_results=told)
    assert_same(found, expected)


def test_exhausted_memory_refuses_a_training_iterator(scarce, checkpoints):
    averages = [
        Candidate.of_average(plan_average(checkpoints[i:]), str(i), recompute=True)
        for i in range(3)
    ]
    train = iter(TRAIN.tensors[0].split(SIZE))
    with pytest.raises(EvaluationError, match="read only once"):
        run(averages, scarce(2, "statistics"), train=train)


# Data that can be read once only


def test_iterators_serve_one_pass(candidates, expected):
    def batches():
        return zip(X.split(SIZE), Y.split(SIZE), strict=True)

    train = open_loader(TRAIN, Runtime(CPU, batch_size=SIZE), shuffle=True)
    assert_same(run(candidates, data=batches(), train=iter(train)), expected)


@pytest.mark.parametrize("which", ["data", "train"])
def test_iterators_are_refused_for_several_passes(monkeypatch, candidates, which):
    fitting(monkeypatch, 1)
    batches = iter([(X, Y)])
    with pytest.raises(EvaluationError, match="read only once"):
        run(candidates, **{which: batches})
    assert len(list(batches)) == 1


def test_training_iterator_serves_one_of_several_passes(monkeypatch, checkpoints):
    fitting(monkeypatch, 2)
    planned = plan_average(checkpoints)
    wanted = [*checkpoints, Candidate.of_average(planned, "fresh", recompute=True)]
    train = open_loader(TRAIN, Runtime(CPU, batch_size=SIZE), shuffle=True)
    found, expected = (run(wanted, train=each) for each in (iter(train), TRAIN))
    assert_same(found, expected)


# Several processes


@combinations(count=[2, 3, 5], size=[3, 100])
def test_processes_match_one_process(monkeypatch, candidates, expected, count, size):
    """Five processes share three batches."""
    fitting(monkeypatch, size)
    runtime = Runtime(CPU, batch_size=SIZE)

    def work(peers):
        data = open_loader(DATA, runtime, shuffle=False, peers=peers)
        train = open_loader(TRAIN, runtime, shuffle=True, peers=peers)
        return score(candidates, Net(), data, runtime, train, peers=peers)

    for found in together(count, work):
        for one, other in zip(found, expected, strict=True):
            mine, theirs = numbers(one.as_json()), numbers(other.as_json())
            assert mine.keys() == theirs.keys()
            for key, value in mine.items():
                assert value == close(theirs[key], 1e-6), key


def test_processes_take_groups_of_smallest_memory(monkeypatch, checkpoints):
    runtime, sizes = Runtime(CPU, batch_size=SIZE), iter([4, 2])
    monkeypatch.setattr(session, "count_models_that_fit", lambda *_: next(sizes))
    wanted = [Candidate.of_checkpoint(c) for c in checkpoints[:4]]

    def work(peers):
        told = []
        data = open_loader(DATA, runtime, shuffle=False, peers=peers)
        score(wanted, Net(), data, runtime, peers=peers, on_results=told.append)
        return len(told)

    assert together(2, work) == [2, 2]


# Data and models that do not fit


def template_and_state():
    model = Net().train()
    model.norm.eval()
    return model, copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]


def assert_untouched(model, state, modes):
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes


class Broken:
    """Gives two batches, then fails."""

    def __init__(self, error):
        self.error = error

    def __iter__(self):
        yield from itertools.islice(DataLoader(DATA, 4), 2)
        raise self.error


@pytest.mark.parametrize("which", ["data", "train"])
@pytest.mark.parametrize("error", [OSError("gone"), KeyboardInterrupt(), ValueError("mine")])
def test_failing_loader_leaves_model_unchanged(candidates, which, error):
    given = template_and_state()
    with pytest.raises(type(error)) as told:
        run(candidates, given[0], **{which: Broken(error)})
    assert told.value is error
    assert_untouched(*given)


@pytest.mark.parametrize("train", [[], TensorDataset(X[:0])], ids=["loader", "dataset"])
def test_empty_training_data_are_an_error(candidates, train):
    given = template_and_state()
    with pytest.raises(BatchNormError, match="training data is empty"):
        run(candidates, given[0], train=train)
    assert_untouched(*given)


@pytest.mark.parametrize("data", [[], TensorDataset(X[:0], Y[:0])], ids=["loader", "dataset"])
@pytest.mark.parametrize("size", [1, 100])
def test_empty_evaluation_data_are_an_error(monkeypatch, candidates, data, size):
    fitting(monkeypatch, size)
    with pytest.raises(EvaluationError, match="evaluation data is empty"):
        run(candidates, data=data)


def test_model_with_more_classes_does_not_fit(candidates):
    with pytest.raises(ModelError, match=r"head\.weight has the shape \(3, 6\).*\(7, 6\)"):
        run(candidates, Net(7))


def test_outputs_of_fewer_classes_than_labels_are_an_error(candidates):
    with pytest.raises(EvaluationError, match="label 2, but the model has 2 classes"):
        run(candidates, forward=lambda model, batch: model(batch[0])[:, :2])


def test_batches_without_labels_are_an_error(candidates):
    with pytest.raises(EvaluationError, match=r"\(inputs, labels\)"):
        run(candidates, data=X.split(SIZE))


@pytest.mark.parametrize(
    ("data", "bad"), [(DATA, 8), (DATA, 16), (TensorDataset(X[:5], Y[:5]), 5)],
    ids=["the last batch", "an earlier batch", "the only batch"],
)  # fmt: skip
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_outputs_not_finite_name_their_checkpoint(checkpoints, data, bad, value):
    def forward(model, batch):
        x = batch[0]
        outputs = model(x)
        return outputs + value if len(x) == bad and int(model.tag) in (3, 5) else outputs

    with pytest.raises(EvaluationError, match=r"epoch_3\.pt: the outputs are not finite"):
        run(checkpoints, data=data, forward=forward)


class Untouchable:
    def __iter__(self):
        raise AssertionError("the data were read")


def test_unknown_amp_is_refused_before_reading(candidates):
    with pytest.raises(UsageError, match="off, bf16, fp16"):
        run(candidates, data=Untouchable(), train=Untouchable(), amp="int8")


@pytest.mark.parametrize("count", [0, -5])
def test_bn_samples_below_one_are_refused_before_reading(candidates, count):
    with pytest.raises(UsageError, match="a sample or more"):
        run(candidates, data=Untouchable(), bn_samples=count)
