"""Ensembles of SWAG's samples: the mean of outputs, whatever runs together, and what is refused."""

import json
import logging

import pytest
import torch
from click.testing import CliRunner
from fellows import together
from helpers import opened, save
from torch import nn
from torch.utils.data import TensorDataset

import ckptavg
from ckptavg import Candidate, compare, evaluate
from ckptavg.averaging.compute import compute_state_dicts
from ckptavg.averaging.plan import plan_average
from ckptavg.averaging.swag.sampling import plan_samples
from ckptavg.averaging.swag.specification import Swag
from ckptavg.cli import main
from ckptavg.data.loaders import open_loader
from ckptavg.errors import RunError, UsageError
from ckptavg.evaluation import session
from ckptavg.evaluation.ensembles import Ensembles, parse_ensembles
from ckptavg.models.runtime import Runtime

FACTORIES = """
import torch
from torch import nn

def model():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

def plain():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))

def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 4, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randint(3, (40,), generator=generator))
"""


def network():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


def plain_network():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


def samples(seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 4, generator=generator)
    return TensorDataset(x, torch.randint(3, (40,), generator=generator))


DATA, TRAIN = samples(1), samples(0)


def states(model, count=5):
    torch.manual_seed(0)
    start = model().state_dict()
    found = []
    for _ in range(count):
        state = {}
        for name, value in start.items():
            state[name] = value
            if value.is_floating_point():
                state[name] = value + 0.2 * torch.rand(value.shape)
        found.append(state)
    return found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("run"), states(network))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("plain"), states(plain_network))


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "net.py").write_text(FACTORIES)
    for epoch, state in enumerate(states(network), 1):
        save(tmp_path / "run" / f"epoch_{epoch}.pt", state, epoch=epoch)
    for epoch, state in enumerate(states(plain_network), 1):
        save(tmp_path / "plain" / f"epoch_{epoch}.pt", state, epoch=epoch)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def eval_command(*args, model="model"):
    options = ["--model", f"net.py:{model}", "--data", "net.py:data", "--data-arg", "seed=1"]
    return CliRunner().invoke(main, ["eval", *map(str, args), *options])


def mean_nll(models, data=DATA):
    inputs, targets = data.tensors
    with torch.no_grad():
        chances = torch.stack([model(inputs).softmax(1) for model in models]).mean(0)
    return float(nn.functional.nll_loss(chances.log(), targets))


# The score


def test_swag_candidate_averages_softmax_of_samples(plain):
    swag = Swag(samples=4, rank=3, seed=2)
    models = []
    for state in compute_state_dicts(plan_samples(plan_average(plain), swag)):
        model = plain_network()
        model.load_state_dict(state)
        models.append(model.eval())
    (result,) = evaluate(
        [Candidate.of_swag(plain, samples=4, rank=3, seed=2)], plain_network(), DATA
    )
    assert result.metrics["nll"] == pytest.approx(mean_nll(models), rel=1e-5)
    assert result.bn == "none"


def test_swag_candidate_has_recomputed_statistics_per_sample(checkpoints):
    swag = Swag(samples=3)
    models = []
    for state in compute_state_dicts(plan_samples(plan_average(checkpoints), swag)):
        model = network()
        model.load_state_dict(state)
        # One batch of all data, whose statistics are exact in torch's own training mode.
        model[1].momentum = 1.0
        with torch.no_grad():
            model.train()(TRAIN.tensors[0])
        models.append(model.eval())
    candidate = Candidate.of_swag(checkpoints, samples=3)
    (result,) = evaluate([candidate], network(), DATA, train_loader=TRAIN)
    assert result.metrics["nll"] == pytest.approx(mean_nll(models), rel=1e-5)
    assert result.bn == "recomputed"


def test_swag_result_tells_specification(checkpoints):
    candidate = Candidate.of_swag(checkpoints, samples=3, seed=4)
    (result,) = evaluate([candidate], network(), DATA, train_loader=TRAIN)
    plain = result.as_json()
    assert plain["kind"] == "ensemble"
    assert plain["name"] == "SWAG ensemble of 3 (seed 4)"
    assert plain["checkpoints"] == [str(checkpoint.path) for checkpoint in checkpoints]
    assert plain["coefficients"] == [0.2] * 5
    assert plain["forwards"] == 3
    assert plain["swag"] == {"samples": 3, "rank": 10, "columns": 5, "scale": 0.5, "seed": 4}
    assert 0 <= plain["disagreement"] <= 1


# Independent of what runs together


@pytest.mark.parametrize("fitting", [1, 2, 3, 100])
@pytest.mark.parametrize("batch_size", [7, 40])
def test_swag_scores_are_independent_of_groups(monkeypatch, checkpoints, fitting, batch_size):
    candidates = [
        *checkpoints,
        Candidate.of_average(checkpoints),
        Candidate.of_swag(checkpoints, samples=4),
        Candidate.of_swag(checkpoints[1:], samples=2, rank=3),
    ]
    (alone,) = evaluate([candidates[-2]], network(), DATA, train_loader=TRAIN, batch_size=40)
    monkeypatch.setattr(session, "count_models_that_fit", lambda *_: fitting)
    # The first layer's outputs are normalized alone, so that statistics do not depend on batches.
    found = evaluate(candidates, network(), DATA, train_loader=TRAIN, batch_size=batch_size)
    assert found[-2].metrics == pytest.approx(alone.metrics, rel=1e-5)


@pytest.mark.parametrize("count", [2, 3])
def test_swag_scores_are_independent_of_processes(checkpoints, count):
    candidate = Candidate.of_swag(checkpoints, samples=3)
    runtime = Runtime(torch.device("cpu"), batch_size=8)
    (alone,) = evaluate([candidate], network(), DATA, train_loader=TRAIN, batch_size=8)

    def work(fellow):
        data = open_loader(DATA, runtime, shuffle=False, peers=fellow)
        training = open_loader(TRAIN, runtime, shuffle=True, peers=fellow)
        return session.score([candidate], network(), data, runtime, training, peers=fellow)

    for (result,) in together(count, work):
        assert result.metrics == pytest.approx(alone.metrics, rel=1e-5)


# What is refused, and what is noted


def test_swag_without_training_data_is_refused(checkpoints):
    with pytest.raises(UsageError, match="needs training data"):
        evaluate([Candidate.of_swag(checkpoints)], network(), DATA)
    with pytest.raises(UsageError, match="BatchNorm statistics of swag"):
        compare(checkpoints, network(), DATA, ensemble="swag")


def test_swag_of_one_checkpoint_is_refused(checkpoints):
    with pytest.raises(RunError, match="at least two checkpoints"):
        Candidate.of_swag(checkpoints[:1])


def test_swag_notes_rank_above_checkpoints(plain, caplog):
    caplog.set_level(logging.INFO, "ckptavg")
    Candidate.of_swag(plain, rank=5)
    assert "rank" not in caplog.text
    Candidate.of_swag(plain, rank=6)
    assert "swag: rank 6 with 5 checkpoints: the low-rank part has 5 columns" in caplog.text


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (False, Ensembles()),
        (True, Ensembles(fge=True)),
        ("fge", Ensembles(fge=True)),
        ("swag:rank=3", Ensembles(swag=(Swag(rank=3),))),
        (["swag", "fge", "swag:samples=20"], Ensembles(fge=True, swag=(Swag(),))),
        ([], Ensembles()),
    ],
)
def test_parse_ensembles_reads_names(value, expected):
    assert parse_ensembles(value) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("swa", "expected to be fge or swag[:key=value,...] but got 'swa'. Did you mean swag?"),
        ("FGE", "but got 'FGE'. Did you mean fge?"),
        ("fge:rank=2", "fge has no options but got 'fge:rank=2'"),
        (3, "ensemble is expected to be True, fge, swag or swag:key=value but is 3"),
        ([True], "but is [True]"),
    ],
)
def test_parse_ensembles_refuses_others(value, message):
    with pytest.raises(UsageError) as error:
        parse_ensembles(value)
    assert message in str(error.value)


# The command


def test_compare_option_may_be_repeated(home):
    flags = ["--compare", "fge", "--compare", "swag:samples=3,rank=4", "--compare", "swag:rank=0"]
    result = eval_command("--run", "run", "--train-data", "net.py:data", *flags, "--json")
    assert result.exit_code == 0, result.output
    scored = json.loads(result.stdout)["candidates"]
    names = [candidate["name"] for candidate in scored]
    assert names[-3:] == [
        "FGE ensemble of 5", "SWAG ensemble of 3 (rank 4)", "SWAG ensemble of 20 (rank 0)",
    ]  # fmt: skip
    ensemble = ["fge", "swag:samples=3,rank=4", "swag:rank=0"]
    found = compare("run", network(), DATA, train_data=TRAIN, ensemble=ensemble)
    without_keys = [{k: v for k, v in c.items() if k != "key"} for c in scored]
    assert [result.as_json() for result in found] == without_keys


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--compare", "swag"], 2, "needs training data (--train-data)"),
        (["--compare", "swag:ranks=2"], 2, "Did you mean rank=2?"),
        (["--compare", "swat"], 2, "Did you mean swag?"),
        (["--compare", "swag", "--train-data", "net.py:data", "--last", "1"], 1, "two checkpoints"),
    ],
)
def test_compare_option_refuses_swag(home, flags, code, message):
    result = eval_command("--run", "run", *flags)
    assert result.exit_code == code
    assert message in " ".join(result.output.split())


def test_compare_option_needs_a_run(home):
    result = eval_command("run/epoch_1.pt", "--compare", "swag")
    assert result.exit_code == 2
    assert "--compare needs --run" in result.output


def test_swag_needs_no_training_data_without_batchnorm(home):
    result = eval_command("--run", "plain", "--compare", "swag:samples=2", "--json", model="plain")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["candidates"][-1]["bn"] == "none"


def test_resume_recognizes_swag_by_options(home, monkeypatch):
    def scores(options):
        flags = ["--compare", options, "--results", "r.json", "--resume"]
        result = eval_command("--run", "plain", *flags, "--json", model="plain")
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)["candidates"][-1]

    scored = []
    score = session.score

    def note_and_score(candidates, *arguments, **options):
        scored.extend(candidates)
        return score(candidates, *arguments, **options)

    monkeypatch.setattr(session, "score", note_and_score)
    first = scores("swag:samples=2,rank=3")
    scored.clear()
    assert scores("swag:samples=2,rank=3") == first
    assert not scored
    other = scores("swag:samples=2,rank=3,seed=1")
    assert scored[-1].swag == Swag(2, 3, None, 1)
    assert other["key"] != first["key"]
    assert other["metrics"]["nll"] != first["metrics"]["nll"]


def test_of_swag_takes_paths_and_selections(home):
    run = ckptavg.open_run("plain")
    one = Candidate.of_swag("plain", samples=2)
    two = Candidate.of_swag(run.last(3), "mine", samples=2)
    assert one.name == "SWAG ensemble of 2"
    assert two.name == "mine"
    assert len(two.checkpoints) == 3
    found = evaluate([one, two], plain_network(), DATA)
    assert [result.forwards for result in found] == [2, 2]
