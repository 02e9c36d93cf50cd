"""Scores of candidates while data goes by: retries, ensembles across passes, several processes."""

import itertools

import numpy as np
import pytest
import torch
from fellows import Echo, together
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg.distributed.peers import SingleProcess
from ckptavg.errors import EvaluationError
from ckptavg.evaluation.candidate_scores import CandidateScore, FiniteCheck, concatenate_samples
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.weight_sets import WeightSet
from ckptavg.tasks import Samples
from ckptavg.tasks.base import LogMean
from ckptavg.tasks.classification import Classification
from ckptavg.tasks.regression import Regression

CLASSES = 4
SIZES = (3, 5, 1, 2)  # of the batches
N = sum(SIZES)
TASK = Classification()


def logits_of(seed, members):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(members, N, CLASSES, generator=generator, dtype=torch.float64)


LABELS = torch.randint(CLASSES, (N,), generator=torch.Generator().manual_seed(9))


def weight_sets_of(count):
    return [WeightSet(f"network {i}", None) for i in range(count)]


def board_of(members, kind="ensemble"):
    return CandidateScore(Candidate("x", kind, (), ()), members, TASK)


def hear(board, network, logits, batches=None):
    """Let a board take in a network's outputs on some batches."""
    parts = zip(logits.split(SIZES), LABELS.split(SIZES), strict=True)
    for number, (outputs, labels) in enumerate(parts):
        if batches is None or number in batches:
            found = TASK.predict(outputs, labels)
            board.add(number, network, found, TASK.samples(found, labels), labels)


def run_pass(boards, group, logits, stops=None):
    """One pass of some weight sets; one that breaks off after ``stops`` batches does not count."""
    for board in boards:
        board.begin()
    whole = stops is None
    for number in range(len(SIZES) if stops is None else stops):
        for network, board in itertools.product(group, boards):
            hear(board, network, logits[network], [number])
        for board in boards:
            board.end_batch(number)
    for board in boards if whole else ():
        board.commit(group)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(-1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def assert_scores(board, probabilities):
    """The board has the scores of these probabilities: (N, classes)."""
    labels = LABELS.numpy()
    found = board.scores.compute()
    assert found["n"] == N
    assert found["top1"] == pytest.approx(100 * (probabilities.argmax(1) == labels).mean())
    nll = -np.log(probabilities[range(N), labels]).mean()
    assert found["nll"] == pytest.approx(nll, rel=1e-12)
    right = (probabilities.argmax(1) == labels).tolist()
    assert concatenate_samples(board.samples).values.tolist() == right


def disagreement_by_hand(answers):
    pairs = [*itertools.combinations(range(len(answers)), 2)]
    differing = sum((answers[i] != answers[j]).sum() for i, j in pairs)
    return differing / (len(pairs) * answers.shape[1])


# A candidate's scores


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_candidate_score_counts_each_member_once(data):
    """Members may be named twice; a board may hear of weight_sets that are none of its own."""
    count = data.draw(st.integers(1, 5))
    weight_sets = weight_sets_of(count + 1)
    members = data.draw(st.lists(st.sampled_from(weight_sets[:count]), min_size=1, max_size=6))
    logits = dict(zip(weight_sets, logits_of(count, count + 1), strict=True))
    order = data.draw(st.permutations(weight_sets))
    cuts = sorted(data.draw(st.sets(st.integers(1, count), max_size=count)))
    board = board_of(members)
    single = board_of([members[0]], "checkpoint")
    for start, end in itertools.pairwise([0, *cuts, count + 1]):
        group = order[start:end]
        for stops in data.draw(st.lists(st.integers(0, len(SIZES) - 1), max_size=2)):
            run_pass([board, single], group, logits, stops)
        run_pass([board, single], group, logits)
    assert board.complete
    assert single.complete
    every = np.stack([softmax(logits[m].numpy()) for m in members])
    assert_scores(board, every.mean(0))
    assert_scores(single, softmax(logits[members[0]].numpy()))
    if len(members) > 1:
        found = board.details()["disagreement"]
        assert found == pytest.approx(disagreement_by_hand(every.argmax(2)))


def test_candidate_score_is_complete_after_all_members():
    first, second = weight_sets = weight_sets_of(2)
    logits = dict(zip(weight_sets, logits_of(0, 2), strict=True))
    board = board_of(weight_sets)
    run_pass([board], [first, second], logits, stops=2)
    assert not board.complete
    run_pass([board], [second], logits)
    assert not board.complete
    run_pass([board], [first], logits)
    assert board.complete


def test_candidate_score_ignores_passes_when_complete():
    first, second = weight_sets = weight_sets_of(2)
    logits = dict(zip(weight_sets, logits_of(0, 2), strict=True))
    board = board_of([first], "checkpoint")
    run_pass([board], [first], logits)
    expected = board.scores.compute()
    run_pass([board], [second], logits, stops=1)
    run_pass([board], [second], logits)
    assert board.scores.compute() == expected
    assert len(board.samples) == len(SIZES)


def test_candidate_score_offloads_outputs_after_each_batch(monkeypatch):
    """All of the outputs of a pass would not fit there."""
    weight_sets = weight_sets_of(3)
    logits = dict(zip(weight_sets, logits_of(0, 3), strict=True))
    board, offloaded = board_of(weight_sets), []
    monkeypatch.setattr(LogMean, "offload", lambda mean: offloaded.append(mean.members))
    board.begin()
    for number in range(2):
        for network in weight_sets[:2]:
            hear(board, network, logits[network], [number])
        assert len(offloaded) == number
        board.end_batch(number)
    assert offloaded == [2, 2]
    hear(board, weight_sets[2], logits[weight_sets[2]], [0])
    board.end_batch(0)
    assert offloaded == [2, 2]  # it is complete


def test_candidate_score_of_checkpoint_has_no_disagreement():
    network = weight_sets_of(1)
    logits = {network[0]: logits_of(0, 1)[0]}
    board = board_of(network, "checkpoint")
    run_pass([board], network, logits)
    assert board.details().keys() == {"reliability"}


def test_candidate_score_has_disagreement_of_ensemble():
    weight_sets = weight_sets_of(3)
    answers = torch.tensor([[0] * N, [0] * N, [0] * (N - 3) + [1, 1, 2]])
    logits = dict(zip(weight_sets, torch.nn.functional.one_hot(answers, 3) * 5.0, strict=True))
    global_labels = LABELS.clamp(max=2)
    board = board_of(weight_sets)
    board.begin()
    for network in weight_sets:
        found = TASK.predict(logits[network], global_labels)
        board.add(0, network, found, TASK.samples(found, global_labels), global_labels)
    board.commit(weight_sets)
    assert board.details()["disagreement"] == pytest.approx(2 * 3 / (3 * N))
    assert board.details()["not_unanimous"] == pytest.approx(3 / N)


# Several processes


def figures(details):
    """All numbers in details, those of reliability bins too."""
    bins = details["reliability"]
    named = {f"{i} {k}": v for i, one in enumerate(bins) for k, v in one.items() if v is not None}
    return named | {k: v for k, v in details.items() if k != "reliability"}


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("kind", ["checkpoint", "ensemble"])
def test_candidate_score_merges_processes(kind, count):
    """With six processes and four batches, two of them have none."""
    members = weight_sets_of(1 if kind == "checkpoint" else 3)
    logits = dict(zip(members, logits_of(1, len(members)), strict=True))
    whole = board_of(members, kind)
    run_pass([whole], members, logits)

    def work(peers):
        board = board_of(members, kind)
        mine = list(zip(*(t.split(SIZES) for t in (LABELS, *logits.values())), strict=True))
        board.begin()
        for number, (labels, *outputs) in enumerate(mine[peers.rank :: peers.world_size]):
            for network, some in zip(members, outputs, strict=True):
                found = TASK.predict(some, labels)
                board.add(number, network, found, TASK.samples(found, labels), labels)
        board.commit(members)
        board.merge(peers)
        return board

    for board in together(count, work):
        assert board.scores.compute() == pytest.approx(whole.scores.compute(), rel=1e-12)
        assert figures(board.details()) == pytest.approx(figures(whole.details()), rel=1e-12)
        assert torch.equal(
            concatenate_samples(board.samples).values, concatenate_samples(whole.samples).values
        )


def test_candidate_score_merges_samples_in_batch_order():
    def work(peers):
        board = CandidateScore(
            Candidate("x", "checkpoint", (), ()), weight_sets_of(1), Regression()
        )
        for number in range(2 if peers.rank == 0 else 1):
            at = float(number * peers.world_size + peers.rank)
            board.samples[number] = Samples(
                torch.tensor([at, at + 0.5], dtype=torch.float64),
                torch.tensor([2 * at, 1.0]),
                metric="mse",
                scale=3.0,
            )
        board.merge(peers)
        return concatenate_samples(board.samples)

    for found in together(2, work):
        assert found.values.tolist() == [0, 0.5, 1, 1.5, 2, 2.5]
        assert found.weights.tolist() == [0, 1, 2, 1, 4, 1]
        assert (found.values.dtype, found.weights.dtype) == (torch.float64, torch.float32)
        assert (found.metric, found.scale) == ("mse", 3.0)


def test_candidate_score_merges_nothing_in_one_process():
    board = board_of(weight_sets_of(1), "checkpoint")
    scores = board.scores
    board.merge(SingleProcess())
    assert board.scores is scores


def test_candidate_score_merges_processes_without_samples():
    board = board_of(weight_sets_of(1), "checkpoint")
    board.merge(Echo(0, 2))
    assert concatenate_samples(board.samples) is None
    with pytest.raises(EvaluationError, match="data is empty"):
        board.scores.compute()


# FiniteCheck

GOOD, BAD = torch.tensor(True), torch.tensor(False)


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 4), st.data())
def test_finite_check_names_the_weight_set(batches, weight_sets, data):
    bad = data.draw(st.tuples(st.integers(0, batches - 1), st.integers(0, weight_sets - 1)))
    finite_check, ended = FiniteCheck(), []

    def look():
        for batch in range(batches):
            for network in range(weight_sets):
                finite_check.add(f"network {network}", BAD if (batch, network) == bad else GOOD)
            finite_check.end_batch()
            ended.append(batch)
        finite_check.end()

    with pytest.raises(EvaluationError, match=f"^network {bad[1]}: the outputs are not finite"):
        look()
    assert len(ended) <= bad[0] + 1  # it is met one batch late at most


def test_finite_check_accepts_finite_outputs():
    finite_check = FiniteCheck()
    finite_check.end()
    for _ in range(3):
        finite_check.add("a", GOOD)
        finite_check.end_batch()
    finite_check.end()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_finite_check_does_not_wait_for_gpu():
    finite_check = FiniteCheck()
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(3):
        for _ in range(50):
            busy = (busy @ busy).clamp(-1, 1)
        finite_check.add("a", torch.isfinite(busy).all())
        done = torch.cuda.current_stream().record_event()
        finite_check.end_batch()
        assert not done.query()
    finite_check.add("b", torch.isinf(busy).all())
    finite_check.end_batch()
    with pytest.raises(EvaluationError, match="b: the outputs"):
        finite_check.end()
