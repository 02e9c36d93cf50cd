"""Scores of points, against networks that are built by hand at each point."""

import math

import pytest
import torch
from landscapes import Net, data_of, metrics_at, network_at, norm_of, save_run, state_of, weights_at

from ckptavg import Candidate, evaluate, open_run
from ckptavg.display.pass_progress import PassProgress, duration_text
from ckptavg.display.progress import PhaseProgress
from ckptavg.errors import CkptavgError, EvaluationError, UsageError
from ckptavg.landscape import points as points_module
from ckptavg.landscape.points import PointScore, PointScorer, require_finite

TRAIN, TEST = data_of(1, 96), data_of(2)
WEIGHTS = (0.5, -0.25, 0.0, 0.75, 0.0)


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run")


def test_point_scores_are_those_of_its_weights_by_hand(run):
    scorer = PointScorer.open(run, Net(), TEST, train_data=TRAIN, batch_size=32)
    (score,) = scorer.score([WEIGHTS])
    net = network_at(run, WEIGHTS, TRAIN)
    assert score.bn == "recomputed"
    for measured, data in ((score.data, TEST), (score.train, TRAIN)):
        for key, value in metrics_at(net, data).items():
            assert measured[key] == pytest.approx(value, abs=1e-5)


def test_point_that_is_a_checkpoint_scores_as_evaluate_does(run):
    scorer = PointScorer.open(run, Net(), TEST, train_data=TRAIN)
    scores = scorer.score([(0, 0, 1, 0, 0), WEIGHTS, (1, 0, 0, 0, 0)])
    wanted = evaluate([run[2], run[0]], Net(), TEST)
    assert scores[0].data == wanted[0].metrics
    assert scores[2].data == wanted[1].metrics
    assert [score.bn for score in scores] == ["own", "recomputed", "own"]


def test_point_without_training_data_is_stale_with_a_note(run, caplog):
    caplog.set_level("INFO", "ckptavg")
    (score,) = PointScorer.open(run, Net(), TEST).score([WEIGHTS])
    assert score.train is None
    assert score.bn == "stale"
    assert "pass `train_data` to recompute them" in caplog.text
    wanted = metrics_at(network_at(run, WEIGHTS, None), TEST)
    assert score.data["nll"] == pytest.approx(wanted["nll"], abs=1e-5)


def test_point_loss_with_weight_decay_adds_half_the_squared_norm_of_parameters(run):
    decay = 0.25
    scorer = PointScorer.open(run, Net(), TEST, train_data=TRAIN, weight_decay=decay)
    for score, weights in zip(
        scorer.score([WEIGHTS, (0, 1, 0, 0, 0)]), (WEIGHTS, (0, 1, 0, 0, 0)), strict=True
    ):
        added = score.train["l2_loss"] - score.train["nll"]
        assert added == pytest.approx(decay / 2 * norm_of(network_at(run, weights, None)))
        assert "l2_loss" not in score.data


@pytest.mark.parametrize("decay", [-1.0, math.nan, math.inf, "much"])
def test_weight_decay_is_a_number_from_0_on(run, decay):
    with pytest.raises(UsageError, match="weight_decay is expected to be"):
        PointScorer.open(run, Net(), TEST, train_data=TRAIN, weight_decay=decay)


def test_weight_decay_needs_training_data_and_a_loss(run):
    with pytest.raises(UsageError, match="there is none"):
        PointScorer.open(run, Net(), TEST, weight_decay=0.1)

    from ckptavg.tasks.classification import Classification

    class Own(Classification):
        loss = None

    with pytest.raises(UsageError, match="Own names none"):
        PointScorer.open(run, Net(), TEST, train_data=TRAIN, task=Own(), weight_decay=0.1)


class Explosive(Net):
    """Gives NaN where the first weight of the head is above a limit."""

    limit = 1e9

    def forward(self, x):
        outputs = super().forward(x)
        if self.head.weight[0, 0] > self.limit:
            return outputs * math.nan
        return outputs


def test_point_with_outputs_that_are_not_finite_is_a_hole(run, monkeypatch, caplog):
    caplog.set_level("INFO", "ckptavg")
    points = [(0, 0, 0, 0.5, 0.5), (0, 0, 1, 0, 0), (0.5, 0, 0, 0.5, 0)]
    first = [float(weights_at(run, p)["head.weight"][0, 0]) for p in points]
    order = sorted(range(3), key=first.__getitem__)
    monkeypatch.setattr(Explosive, "limit", (first[order[1]] + first[order[2]]) / 2)
    scorer = PointScorer.open(run, Explosive(), TEST, train_data=TRAIN, weight_decay=0.1)
    scores = scorer.score(points)
    for position in order[:2]:
        wanted = metrics_at(network_at(run, points[position], TRAIN), TEST)
        if position != 1:
            assert scores[position].data["nll"] == pytest.approx(wanted["nll"], abs=1e-5)
        assert not scores[position].is_hole
    hole = scores[order[2]]
    assert hole.is_hole
    for values in (hole.data, hole.train):
        metrics = [value for key, value in values.items() if key != "n"]
        assert metrics
        assert all(math.isnan(value) for value in metrics)
    assert hole.data.keys() == scores[order[0]].data.keys()
    require_finite(scores)
    assert "1 of 3 points are holes" in caplog.text


def test_point_with_statistics_that_are_not_finite_is_a_hole(run, tmp_path):
    """The BatchNorm layer sees infinities, for which no statistics exist."""

    class Overflowing(Net):
        def forward(self, x):
            scale = 1.0 if float(self.head.weight[0, 0]) < limit else math.inf
            return self.head(self.norm(self.body(x) * scale).relu())

    points = [(0.5, 0.5, 0, 0, 0), (0, 0.5, 0.5, 0, 0)]
    first = [float(weights_at(run, p)["head.weight"][0, 0]) for p in points]
    limit = sum(first) / 2
    scores = PointScorer.open(run, Overflowing(), TEST, train_data=TRAIN).score(points)
    assert [score.is_hole for score in scores] == [value >= limit for value in first]


def test_points_that_are_all_holes_are_an_error():
    hole = PointScore({"top1": math.nan, "nll": math.nan}, None)
    with pytest.raises(EvaluationError, match="not finite at any of 2 points"):
        require_finite([hole, hole])


def test_points_have_an_interval_by_wilson(run):
    (score,) = PointScorer.open(run, Net(), TEST, train_data=TRAIN).score([WEIGHTS])
    # Wilson 1927, solved as the quadratic (p − s)² = z²·s(1 − s)/n for s.
    n, share, z = len(TEST), score.data["top1"] / 100, 1.959963984540054
    a, b, c = 1 + z**2 / n, -(2 * share + z**2 / n), share**2
    root = math.sqrt(b**2 - 4 * a * c)
    assert score.interval.keys() == {"top1", "nll"}
    assert score.interval["top1"] == pytest.approx(
        (100 * (-b - root) / (2 * a), 100 * (-b + root) / (2 * a))
    )


def test_points_of_any_other_weights_are_candidates(run):
    weights = state_of(77)
    scorer = PointScorer.open(run, Net(), TEST, train_data=TRAIN)
    (score,) = scorer.score([Candidate.of_weights(weights, recompute=False)])
    wanted = evaluate([weights], Net(), TEST)[0]
    assert score.data == wanted.metrics


def test_points_come_in_passes_of_growing_size_in_their_order(run, monkeypatch):
    monkeypatch.setattr(points_module, "_FIRST_PASS", 1)
    monkeypatch.setattr(points_module, "_LARGEST_PASS", 4)
    points = [(1 - t / 10, t / 10, 0, 0, 0) for t in range(1, 10)]
    scorer = PointScorer.open(run, Net(), TEST, train_data=TRAIN)
    counts, shown = [], []
    progress: PhaseProgress = lambda *values: shown.append(values)  # noqa: E731
    scores = scorer.score(points, progress, lambda scores: counts.append(len(scores)))
    assert counts == [1, 3, 7, 9]
    assert scores == PointScorer.open(run, Net(), TEST, train_data=TRAIN).score(points)
    for phase, samples in (("evaluation", 64), ("training data", 96), ("BatchNorm", 96)):
        of_phase = [(done, total) for name, done, total in shown if name == phase]
        assert of_phase[-1] == (samples * 9, samples * 9)
        assert of_phase == sorted(of_phase)


def test_points_tell_their_time_after_the_first_pass(run, monkeypatch, caplog):
    caplog.set_level("INFO", "ckptavg")
    monkeypatch.setattr(points_module, "_FIRST_PASS", 1)
    points = [(1 - t / 10, t / 10, 0, 0, 0) for t in range(1, 6)]
    PointScorer.open(run, Net(), TEST, train_data=TRAIN).score(points)
    assert "5 points in about 3 passes over the data, at most about" in caplog.text
    assert "candidates" not in caplog.text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "a second"), (40, "40 seconds"), (130, "2 minutes"), (9000, "2 hours")],
)
def test_duration_is_in_words(seconds, text):
    assert duration_text(seconds) == text


def test_progress_without_a_total_counts_samples():
    shown = []
    progress = PassProgress(lambda *values: shown.append(values), 10)
    progress.begin(4, 2)
    progress("evaluation", 8, 0)
    assert shown == [("evaluation", 16, 0)]


def test_data_for_a_single_pass_are_refused(run):
    with pytest.raises(CkptavgError, match="read only once"):
        PointScorer.open(run, Net(), iter([(torch.zeros(2, 4), torch.zeros(2))]))


def test_identity_counts_what_decides_scores(run, tmp_path):
    def identity(run=run, data=TEST, **options):
        return PointScorer.open(run, Net(), data, train_data=TRAIN, **options).identify()

    same = identity()
    assert identity() == same
    others = [
        identity(weight_decay=0.1), identity(batch_size=7), identity(data=data_of(3)),
        identity(bn_samples=9), identity(run=run.last(4)), identity(exclude="norm"),
    ]  # fmt: skip
    assert len({same, *others}) == 7


def test_identity_counts_the_files_of_checkpoints(tmp_path):
    same = save_run(tmp_path / "run", 3)
    before = PointScorer.open(same, Net(), TEST).identify()
    path = tmp_path / "run" / "step_2.pt"
    torch.save({"state_dict": state_of(9), "step": 2}, path)
    after = PointScorer.open(open_run(tmp_path / "run"), Net(), TEST).identify()
    assert after != before
