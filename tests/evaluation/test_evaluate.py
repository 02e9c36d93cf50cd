"""Candidates scored side by side, against float64 by hand and scikit-learn."""

import json
import weakref
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import opened, save
from sklearn.metrics import log_loss
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ckptavg import Candidate, evaluate, open_checkpoint, update_bn
from ckptavg.averaging.plan import plan_average
from ckptavg.errors import EvaluationError, ModelError, UsageError
from ckptavg.evaluation import session
from ckptavg.evaluation.candidates import candidates_of
from ckptavg.evaluation.results import Result, is_worse
from ckptavg.runs.run import as_run

CLASSES = 3
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Net(nn.Module):
    """One BatchNorm layer whose inputs do not depend on the batch."""

    calls = Counter()  # forward passes by `tag`, which tells the checkpoints apart

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.9)
        self.head = nn.Linear(5, CLASSES)
        self.register_buffer("tag", torch.tensor(0))

    def forward(self, x):
        Net.calls[int(self.tag)] += 1
        return self.head(self.drop(self.norm(self.body(x)).relu()))


class Constant(nn.Module):
    """Puts out its only weight for every sample."""

    def __init__(self, logits=(0.0, 0.0)):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


class Loader(list):
    """A list of batches that counts how often it is read."""

    def __init__(self, batches):
        super().__init__(batches)
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def state_of(seed):
    """Weights and statistics of their own."""
    generator = torch.Generator().manual_seed(seed)
    state = Net().state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape, generator=generator) / 2)
        if name.endswith("running_var"):
            value.copy_(value.abs() + 0.5)
    state["tag"] = torch.tensor(seed)
    return state


def samples(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 1 + 2 * torch.randn(count, 4, generator=generator)
    return x, torch.randint(CLASSES, (count,), generator=generator)


X, Y = samples()
TRAIN = samples(50, seed=1)[0] - 3


def batches(size=16, x=X, y=Y):
    return Loader(zip(x.split(size), y.split(size), strict=True))


def probabilities(state, x=X):
    """Net's outputs in evaluation mode, by numpy in float64."""
    w = {name: value.double().numpy() for name, value in state.items()}
    hidden = x.double().numpy() @ w["body.weight"].T + w["body.bias"]
    scale = w["norm.weight"] / np.sqrt(w["norm.running_var"] + 1e-5)
    hidden = np.maximum((hidden - w["norm.running_mean"]) * scale + w["norm.bias"], 0)
    logits = hidden @ w["head.weight"].T + w["head.bias"]
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def with_statistics_of(state, x):
    """The state with the moments of its norm's inputs over all of x."""
    inputs = x.double() @ state["body.weight"].double().T + state["body.bias"].double()
    return state | {
        "norm.running_mean": inputs.mean(0),
        "norm.running_var": inputs.var(0, correction=1),
    }


def mean_of(states):
    return {k: torch.stack([s[k].double() for s in states]).mean(0) for k in states[0]}


def assert_scores(result, expected, y=Y):
    """Compare a result's metrics with those of probabilities."""
    right = expected.argmax(1) == y.numpy()
    assert result.metrics["n"] == len(y)
    assert result.metrics["top1"] == pytest.approx(100 * right.mean())
    assert result.metrics.keys() == {"top1", "nll", "ece", "n"}  # no top-5 of four classes
    assert result.metrics["nll"] == pytest.approx(
        log_loss(y, expected, labels=range(CLASSES)), rel=1e-5
    )
    bins = np.ceil(expected.max(1) * 15)
    gaps = [abs((right - expected.max(1))[bins == b].sum()) for b in range(1, 16)]
    assert result.metrics["ece"] == pytest.approx(sum(gaps) / len(y), rel=1e-4)


@pytest.fixture
def states():
    Net.calls.clear()
    return [state_of(seed) for seed in (1, 2, 3)]


@pytest.fixture
def checkpoints(tmp_path, states):
    return opened(tmp_path, states)


def checkpoint_of(directory, model, name="a.pt"):
    return save(directory / name, model.state_dict())


def average_of(checkpoints, recompute=False, name="average"):
    return Candidate.of_average(plan_average(checkpoints), name, recompute=recompute)


def every_kind(checkpoints):
    planned = plan_average(checkpoints)
    return [
        Candidate.of_checkpoint(checkpoints[-1]),
        Candidate.of_average(planned, "stale", recompute=False),
        Candidate.of_average(planned, "recomputed", recompute=True),
        Candidate.of_ensemble(checkpoints),
    ]


def metrics_by_name(results):
    return {r.candidate.name: r.metrics for r in results}


# Scores


def test_checkpoint_is_scored_unchanged(checkpoints, states):
    results = evaluate(checkpoints, Net(), batches())
    for result, state in zip(results, states, strict=True):
        assert_scores(result, probabilities(state))
    assert [r.candidate.name for r in results] == ["epoch_1.pt", "epoch_2.pt", "epoch_3.pt"]
    assert {r.bn for r in results} == {"own"}


def test_path_is_scored_as_its_checkpoint(checkpoints, states):
    paths = [checkpoints[0].path, str(checkpoints[1].path)]
    for result, state in zip(evaluate(paths, Net(), batches()), states, strict=False):
        assert_scores(result, probabilities(state))


def test_average_is_scored_with_stale_statistics(checkpoints, states):
    (result,) = evaluate([average_of(checkpoints)], Net(), batches())
    assert_scores(result, probabilities(mean_of(states)))
    assert result.bn == "stale"


@pytest.mark.parametrize("size", [50, 16, 7])
def test_average_is_scored_with_recomputed_statistics(checkpoints, states, size):
    candidate = average_of(checkpoints, recompute=True)
    (result,) = evaluate([candidate], Net(), batches(), train_loader=TRAIN.split(size))
    assert_scores(result, probabilities(with_statistics_of(mean_of(states), TRAIN)))
    assert result.bn == "recomputed"


def test_average_of_one_checkpoint_has_own_statistics(checkpoints, states):
    (result,) = evaluate([average_of(checkpoints[:1])], Net(), batches())
    assert_scores(result, probabilities(states[0]))
    assert result.bn == "own"


def test_ensemble_averages_softmax_outputs(checkpoints, states):
    (result,) = evaluate([Candidate.of_ensemble(checkpoints)], Net(), batches())
    assert_scores(result, np.mean([probabilities(s) for s in states], axis=0))
    assert (result.bn, result.forwards) == ("own", 3)


@pytest.mark.parametrize(("label", "probability"), [(0, 0.5748692), (1, 0.4251308)])
def test_ensemble_matches_worked_example(tmp_path, label, probability):
    members = [
        open_checkpoint(checkpoint_of(tmp_path, Constant(logits), f"{i}.pt"))
        for i, logits in enumerate([(2.0, 0.0), (0.0, 1.0)])
    ]
    data = batches(2, torch.zeros(5, 1), torch.full((5,), label))
    (result,) = evaluate([Candidate.of_ensemble(members)], Constant(), data)
    assert result.metrics["nll"] == pytest.approx(-np.log(probability), rel=1e-6)
    assert result.metrics["ece"] == pytest.approx(abs((label == 0) - 0.5748692), abs=1e-6)
    assert result.bn == "none"


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)], ids=str)
def test_evaluate_ignores_order_of_candidates(checkpoints, states, order):
    candidates = every_kind(checkpoints)
    results = evaluate(
        [candidates[i] for i in order], Net(), batches(), train_loader=TRAIN.split(16)
    )
    assert [r.candidate for r in results] == [candidates[i] for i in order]
    found = {r.candidate.name: r for r in results}
    average = mean_of(states)
    assert_scores(found["epoch_3.pt"], probabilities(states[-1]))
    assert_scores(found["stale"], probabilities(average))
    assert_scores(found["recomputed"], probabilities(with_statistics_of(average, TRAIN)))
    assert_scores(found["FGE ensemble"], np.mean([probabilities(s) for s in states], axis=0))


def test_ensemble_counts_a_repeated_member_twice(checkpoints, states):
    first, second, _ = checkpoints
    (result,) = evaluate([Candidate.of_ensemble([first, second, first])], Net(), batches())
    one, other, _ = (probabilities(s) for s in states)
    assert_scores(result, (2 * one + other) / 3)


@pytest.mark.parametrize("size", [1, 7, 40])
def test_scores_are_independent_of_batch_size(checkpoints, size):
    found, expected = (
        evaluate(every_kind(checkpoints), Net(), batches(n), train_loader=TRAIN.split(16))
        for n in (size, 16)
    )
    for one, other in zip(found, expected, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-5)


def test_scores_of_dataset_and_loader_are_equal(checkpoints):
    data = TensorDataset(X, Y)
    found = evaluate(checkpoints, Net(), data, batch_size=9)
    for loader in (DataLoader(data, 9), batches(9)):
        again = evaluate(checkpoints, Net(), loader)
        assert [r.metrics for r in again] == [r.metrics for r in found]


# One pass


def test_candidates_share_one_pass_and_its_forwards(checkpoints):
    data, train = batches(16), Loader(TRAIN.split(10))
    candidates = [*(Candidate.of_checkpoint(c) for c in checkpoints), *every_kind(checkpoints)]
    evaluate(candidates, Net(), data, train_loader=train)
    assert (data.passes, train.passes) == (1, 1)
    average = 3  # the tag, an integer, is the last checkpoint's
    assert Net.calls == {1: 3, 2: 3, average: 3 + 3 + (5 + 3)}


def test_averages_share_one_pass_over_training_data(checkpoints):
    train = Loader(TRAIN.split(10))
    candidates = [average_of(checkpoints[i:], recompute=True, name=str(i)) for i in range(3)]
    evaluate(candidates, Net(), batches(), train_loader=train)
    assert train.passes == 1


@pytest.mark.parametrize("together", [0, 1, 2, 1000])
def test_scores_are_independent_of_models_in_memory(monkeypatch, checkpoints, together):
    candidates = [*every_kind(checkpoints), average_of(checkpoints[1:], True, "another")]
    train = TensorDataset(TRAIN)
    expected = evaluate(candidates, Net(), batches(), train_loader=train, batch_size=16)
    monkeypatch.setattr(session, "count_models_that_fit", lambda *_: together)
    data = batches()
    found = evaluate(candidates, Net(), data, train_loader=train, batch_size=16)
    assert [r.metrics for r in found] == [r.metrics for r in expected]
    networks = 6  # three checkpoints; an average, stale and recomputed; another average
    assert data.passes == -(-networks // max(together, 1)) if together < networks else 1


def test_log_gives_number_of_passes(monkeypatch, caplog, checkpoints):
    caplog.set_level("INFO", "ckptavg")
    evaluate(checkpoints, Net(), batches())
    assert "3 candidates, 1 pass" in caplog.text
    monkeypatch.setattr(session, "count_models_that_fit", lambda *_: 2)
    evaluate(checkpoints, Net(), batches())
    assert "3 candidates, 2 passes" in caplog.text


class OtherEachTime:
    """Gives other batches in each pass."""

    def __init__(self, *passes):
        self.passes = iter(passes)

    def __iter__(self):
        return iter(next(self.passes))


def shuffled(seed):
    generator = torch.Generator().manual_seed(seed)
    return list(DataLoader(TensorDataset(X, Y), 16, shuffle=True, generator=generator))


ONE_PASS_DATA = {
    "shuffled": lambda: OtherEachTime(*(shuffled(seed) for seed in range(3))),
    "shorter": lambda: OtherEachTime(batches(), batches()[:-1], batches()),
    "longer": lambda: OtherEachTime(batches()[:-1], batches(), batches()),
    "a generator": lambda: iter(batches()),
}


@pytest.mark.parametrize("data", ONE_PASS_DATA.values(), ids=ONE_PASS_DATA)
def test_data_that_differ_between_passes_are_an_error(monkeypatch, checkpoints, data):
    torch.manual_seed(0)
    monkeypatch.setattr(session, "count_models_that_fit", lambda *_: 1)
    with pytest.raises(EvaluationError, match="pass"):
        evaluate(checkpoints, Net(), data())


@pytest.mark.parametrize("data", ONE_PASS_DATA.values(), ids=ONE_PASS_DATA)
def test_data_of_one_pass_may_have_any_order(checkpoints, data):
    assert len(evaluate(checkpoints, Net(), data())) == 3


def test_shuffling_loader_repeats_its_order_in_each_pass(monkeypatch, checkpoints):
    loader = DataLoader(TensorDataset(X, Y), 16, shuffle=True)
    together = evaluate(checkpoints, Net(), loader)
    monkeypatch.setattr(session, "count_models_that_fit", lambda *_: 1)
    apart = evaluate(checkpoints, Net(), loader)
    assert [r.metrics for r in apart] == [r.metrics for r in together]


def test_progress_reports_each_phase(checkpoints):
    told = []
    evaluate(
        [average_of(checkpoints, recompute=True)],
        Net(),
        batches(20),
        train_loader=TRAIN.split(25),
        progress=lambda *at: told.append(at),
    )
    assert told == [
        ("BatchNorm", 25, 0),
        ("BatchNorm", 50, 0),
        ("evaluation", 20, 0),
        ("evaluation", 40, 0),
    ]


# The model that is given


@pytest.mark.parametrize("training", [True, False])
def test_model_is_not_changed(checkpoints, training):
    model = Net().train(training)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    evaluate(every_kind(checkpoints), model, batches(), train_loader=TRAIN.split(16))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(m.training == training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_model_in_training_mode_is_scored_in_eval_mode(checkpoints, states):
    (result,) = evaluate(checkpoints[:1], Net().train(), batches())
    assert_scores(result, probabilities(states[0]))


def test_average_is_scored_in_precision_of_model(checkpoints, states):
    (result,) = evaluate([average_of(checkpoints)], Net().double(), batches(x=X.double()))
    stored = {k: v.float() for k, v in mean_of(states).items()}
    assert_scores(result, probabilities(stored))


# Statistics


def test_written_average_records_stale_statistics(tmp_path, checkpoints):
    from ckptavg import average

    written = average(checkpoints, out=tmp_path / "swa.pt")
    (result,) = evaluate([written], Net(), batches())
    assert result.bn == "stale"


def test_average_saved_by_torch_records_stale_statistics(tmp_path, checkpoints):
    from ckptavg import average

    torch.save(average(checkpoints), tmp_path / "swa.pth")
    (result,) = evaluate([tmp_path / "swa.pth"], Net(), batches())
    assert result.bn == "stale"
    recomputed = evaluate([tmp_path / "swa.pth"], Net(), batches(), train_loader=TRAIN.split(16))
    assert recomputed[0].bn == "recomputed"


def test_recompute_needs_training_data(checkpoints):
    with pytest.raises(UsageError, match="training data"):
        evaluate([average_of(checkpoints, recompute=True)], Net(), batches())


def test_recomputed_average_matches_update_bn(checkpoints, states):
    model = Net()
    model.load_state_dict(mean_of(states))
    update_bn(model, TRAIN.split(16))
    candidate = average_of(checkpoints, recompute=True)
    (result,) = evaluate([candidate], Net(), batches(), train_loader=TRAIN.split(16))
    assert_scores(result, probabilities(model.state_dict()))


# Batches and outputs


def by_keywords(batch):
    return {"x": batch[0], "labels": batch[1]}


@pytest.mark.parametrize("batch_of", [list, by_keywords], ids=["list", "dict"])
def test_batches_may_be_lists_or_dicts(checkpoints, states, batch_of):
    results = evaluate(checkpoints, Net(), [batch_of(b) for b in batches()])
    for result, state in zip(results, states, strict=True):
        assert_scores(result, probabilities(state))


def test_training_batches_may_have_labels(checkpoints, states):
    for batch_of in (tuple, by_keywords):
        data, train = (
            [batch_of((x, torch.zeros(len(x), dtype=torch.int64))) for x in values.split(16)]
            for values in (X, TRAIN)
        )
        candidate = average_of(checkpoints, recompute=True)
        (result,) = evaluate([candidate], Net(), data, train_loader=train)
        expected = probabilities(with_statistics_of(mean_of(states), TRAIN))
        assert_scores(result, expected, torch.zeros(40, dtype=torch.int64))


def test_training_batches_may_have_names(checkpoints, states):
    train = [(x, ["a name"] * len(x)) for x in TRAIN.split(16)]
    candidate = average_of(checkpoints, recompute=True)
    (result,) = evaluate([candidate], Net(), batches(), train_loader=train)
    assert_scores(result, probabilities(with_statistics_of(mean_of(states), TRAIN)))


def test_forward_option_takes_unusual_inputs(checkpoints, states):
    def wrapped(x):
        return [(SimpleNamespace(image=some), y) for some, y in batches(x=x)]

    def forward(model, batch):
        return model(batch[0].image)

    (result,) = evaluate(checkpoints[:1], Net(), wrapped(X), forward=forward)
    assert_scores(result, probabilities(states[0]))


@pytest.mark.parametrize(
    "train", [list(TRAIN.split(16)), [(x, torch.zeros(len(x))) for x in TRAIN.split(16)]]
)
def test_forward_option_runs_training_data(checkpoints, states, train):
    """It gets whole batches, which may be inputs alone when nothing is scored."""

    def forward(model, batch):
        return model((batch[0] if isinstance(batch, tuple) else batch)["image"])

    def unusual(batch):
        x, *labels = batch if isinstance(batch, tuple) else (batch,)
        return ({"image": x}, *labels) if labels else {"image": x}

    (result,) = evaluate(
        [average_of(checkpoints, recompute=True)],
        Net(),
        [unusual(b) for b in batches()],
        train_loader=[unusual(b) for b in train],
        forward=forward,
    )
    assert_scores(result, probabilities(with_statistics_of(mean_of(states), TRAIN)))


def test_batches_of_two_inputs_need_a_forward(checkpoints):
    data = [((x, x), y) for x, y in batches()]
    with pytest.raises(EvaluationError, match="forward="):
        evaluate(checkpoints, Net(), data)


# Data and models that do not fit


@pytest.mark.parametrize("label", [CLASSES, 7, -1])
def test_labels_beyond_classes_of_model_are_an_error(checkpoints, label):
    y = Y.clone()
    y[30] = label
    with pytest.raises(EvaluationError, match=f"the label {label}, but the model has 3 classes"):
        evaluate(checkpoints, Net(), batches(y=y))


@pytest.mark.parametrize("value", [0.5, torch.nan])
def test_labels_that_are_no_classes_are_an_error(checkpoints, value):
    y = Y.float()
    y[30] = value
    with pytest.raises(EvaluationError, match="label"):
        evaluate(checkpoints, Net(), batches(y=y))


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float32])
def test_labels_may_have_any_type(checkpoints, states, dtype):
    (result,) = evaluate(checkpoints[:1], Net(), batches(y=Y.to(dtype)))
    assert_scores(result, probabilities(states[0]))


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        ((4, 3, 2), (4,), r"\(4, 3, 2\) and \(4,\)"),
        ((4, 3), (4, 2), r"one-hot \(N, 3\) are expected, but got \(4, 2\)"),
        ((), (4,), r"\(\) and \(4,\)"),
        ((4, 3), (5,), r"\(4, 3\) and \(5,\)"),
    ],
)
def test_outputs_and_labels_of_unlike_shapes_are_an_error(checkpoints, outputs, labels, message):
    data = [(X[:4], torch.zeros(labels, dtype=torch.int64))]
    with pytest.raises(EvaluationError, match=message):
        evaluate(checkpoints, Net(), iter(data), forward=lambda *_: torch.zeros(outputs))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_outputs_not_finite_name_the_checkpoint(tmp_path, states, value):
    states[1]["head.bias"][0] = value
    with pytest.raises(EvaluationError, match=r"epoch_2\.pt: the outputs are not finite"):
        evaluate(opened(tmp_path, states), Net(), batches())


@pytest.mark.parametrize("data", [[], TensorDataset(X[:0], Y[:0])], ids=["loader", "dataset"])
def test_data_must_not_be_empty(checkpoints, data):
    with pytest.raises(EvaluationError, match="data is empty"):
        evaluate(checkpoints, Net(), data)


@pytest.mark.parametrize(
    "batch", [X[:4], (X[:4],), {"x": X[:4]}, {"x": X[:4], "labels": [*"abca"]}]
)
def test_batches_without_labels_are_an_error(checkpoints, batch):
    with pytest.raises(EvaluationError, match="labels"):
        evaluate(checkpoints, Net(), [batch])


def test_weights_that_do_not_fit_name_the_checkpoint(tmp_path):
    path = checkpoint_of(tmp_path, Constant())
    with pytest.raises(ModelError, match=r"a\.pt does not fit the model"):
        evaluate([path], Net(), batches())


def test_evaluate_needs_candidates():
    with pytest.raises(UsageError, match="nothing to evaluate"):
        evaluate([], Net(), batches())


# Candidates of a run, and what is reported


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ["checkpoint", "average"]),
        ({"recompute": True}, ["checkpoint", "average", "average"]),
        ({"each": True}, ["checkpoint", "checkpoint", "checkpoint", "average"]),
        ({"ensemble": True}, ["checkpoint", "average", "ensemble"]),
    ],
)
def test_candidates_of_run_follow_options(checkpoints, options, expected):
    run = as_run(checkpoints)
    found = candidates_of(run, run, plan_average(run), **options)
    assert [c.kind for c in found] == expected
    assert [c.name for c in found if c.name.endswith("(last)")] == ["epoch_3.pt (last)"]
    assert sum(c.recompute for c in found) == bool(options.get("recompute"))


def test_candidates_of_take_last_checkpoint_of_run(checkpoints):
    run, selection = as_run(checkpoints), as_run(checkpoints[:2])
    found = candidates_of(run, selection, plan_average(selection), each=True, ensemble=True)
    assert [c.name for c in found if c.kind == "checkpoint"] == [
        "epoch_1.pt",
        "epoch_2.pt",
        "epoch_3.pt (last)",
    ]
    assert [c.path.name for c in found[-1].checkpoints] == ["epoch_1.pt", "epoch_2.pt"]


def test_candidates_of_recompute_nothing_without_batchnorm(tmp_path):
    run = as_run(opened(tmp_path, [Constant((float(i), 0.0)).state_dict() for i in range(2)]))
    found = candidates_of(run, run, plan_average(run), recompute=True)
    assert [c.kind for c in found] == ["checkpoint", "average"]
    results = evaluate(found, Constant(), batches(x=X, y=Y.clamp(max=1)))
    assert [r.bn for r in results] == ["none", "none"]


def test_results_as_json_have_all_fields(checkpoints):
    found = evaluate(every_kind(checkpoints), Net(), batches(), train_loader=TRAIN.split(16))
    rows = json.loads(json.dumps([r.as_json() for r in found]))
    paths = [str(c.path) for c in checkpoints]
    assert [(r["name"], r["kind"], r["bn"]) for r in rows] == [
        ("epoch_3.pt", "checkpoint", "own"),
        ("stale", "average", "stale"),
        ("recomputed", "average", "recomputed"),
        ("FGE ensemble", "ensemble", "own"),
    ]
    assert [r["checkpoints"] for r in rows] == [paths[2:], paths, paths, paths]
    assert rows[0]["coefficients"] == [1]
    for row in rows:
        assert sum(row["coefficients"]) == pytest.approx(1)
        assert row["metrics"].keys() == {"top1", "nll", "ece", "n"}
        assert row["metrics"]["n"] == 40


def test_candidate_coefficients_follow_the_scheme(checkpoints):
    planned = plan_average(checkpoints, "linear")
    candidate = Candidate.of_average(planned, "linear", recompute=False)
    assert candidate.coefficients == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def scored(kind, top1, bn="own", name="x", last=False):
    return Result(Candidate(name, kind, (), (), last=last), {"top1": top1, "nll": -top1}, bn)


LAST = scored("checkpoint", 90.0, last=True)


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        ([scored("average", 89.9, "stale")], True),
        ([scored("average", 90.0, "stale")], False),
        ([scored("average", 91.0, "stale"), scored("average", 89.0, "recomputed")], True),
        ([scored("average", 10.0, "stale"), scored("average", 91.0, "recomputed")], False),
        ([scored("average", 91.0, "none"), scored("ensemble", 10.0)], False),
        ([scored("average", 91.0, "none"), scored("checkpoint", 95.0, name="e (last)")], False),
    ],
)
def test_is_worse_compares_recomputed_average_with_last(others, expected):
    assert is_worse([LAST, *others]) is expected
    assert is_worse([*others, LAST]) is expected


def test_is_worse_needs_an_average_and_last_checkpoint():
    with pytest.raises(UsageError, match="candidates_of"):
        is_worse([scored("checkpoint", 1.0)])


def test_model_copies_stay_within_memory(monkeypatch, checkpoints):
    alive = set()

    class Counted(Net):
        def __deepcopy__(self, memo):
            made = Net()
            made.load_state_dict(self.state_dict())
            alive.add(id(made))
            weakref.finalize(made, alive.discard, id(made))
            most.append(len(alive))
            return made

    most: list[int] = []
    monkeypatch.setattr(session, "count_models_that_fit", lambda *_: 1)
    train = TensorDataset(TRAIN)
    evaluate(every_kind(checkpoints), Counted(), batches(), train_loader=train)
    assert max(most) == 1


# Devices


@pytest.mark.gpu
@gpu
def test_scores_on_gpu_match_cpu(checkpoints):
    train = TensorDataset(TRAIN)
    found, expected = (
        evaluate(every_kind(checkpoints), Net(), batches(), train_loader=train, device=device)
        for device in ("cuda", "cpu")
    )
    for one, other in zip(found, expected, strict=True):
        assert one.metrics == pytest.approx(other.metrics, rel=1e-3)
