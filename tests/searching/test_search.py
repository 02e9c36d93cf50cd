"""Searches of runs in which the best average is known."""

import json
import math
import shlex

import pytest
import torch
from click.testing import CliRunner
from landscapes import Net, data_of, save_run
from noisy_runs import TRUTH, Linear, samples, save_noisy_run

import ckptavg
from ckptavg import evaluate, search
from ckptavg.cli import main
from ckptavg.errors import EvaluationError, UsageError

DATA = samples(1, 600)


@pytest.fixture
def run(tmp_path):
    return save_noisy_run(tmp_path / "run")


def names(result):
    return [ranked.name for ranked in result.ranking]


def test_search_finds_the_mean_of_a_noisy_run(run):
    result = search(run, Linear(), DATA, budget=40)
    assert result.verdict.outcome == "average"
    # All that cannot be told from the best is a mean of many; of these, all have no parameter.
    assert result.winner.name in ("mean of all 8", "linear of 8")
    assert result.judgement.difference.low > 0
    assert "over the last checkpoint on 300 samples that had no say" in result.verdict.text
    assert {"step_8.pt (last)", "step_1.pt", "mean of the last 2"} <= set(names(result))


def test_search_scores_are_those_of_evaluate(run):
    result = search(run, Linear(), DATA, budget=12, families=["window"])
    half = torch.utils.data.Subset(DATA, _selection(result))
    for ranked in result.ranking:
        recipe = ranked.scored.proposal.recipe
        members = [run[position] for position in recipe.positions]
        (scored,) = evaluate([ckptavg.Candidate.of_average(members)], Linear(), half)
        assert ranked.select == pytest.approx(scored.metrics["top1"])
    judged = torch.utils.data.Subset(DATA, _report(result))
    winner = [run[position] for position in result.winner.scored.proposal.recipe.positions]
    scored = evaluate(
        [ckptavg.Candidate.of_checkpoint(run[-1], last=True), ckptavg.Candidate.of_average(winner)],
        Linear(), judged,
    )  # fmt: skip
    difference = scored[1].versus.difference
    assert result.judgement.difference == difference
    assert result.judgement.metrics["top1"] == pytest.approx(scored[1].metrics["top1"])


def _selection(result):
    from ckptavg.searching.split import split_samples

    return split_samples(600, DATA.targets, seed=0).selection.tolist()


def _report(result):
    return sorted(set(range(600)) - set(_selection(result)))


def test_search_keeps_the_last_of_identical_checkpoints(tmp_path):
    run = save_noisy_run(tmp_path / "same", noise=0)
    result = search(run, Linear(), DATA, budget=30)
    assert result.verdict.outcome == "keep-last"
    assert result.verdict.text.startswith("nothing is better than the last checkpoint")
    assert result.command == ""
    assert all(ranked.plateau for ranked in result.ranking)


@pytest.mark.parametrize("seed", range(3))
def test_search_keeps_the_last_if_nothing_is_better(tmp_path, seed):
    """Labels that have nothing to do with the inputs: no candidate is better than another."""
    run = save_noisy_run(tmp_path / "run", seed=seed)
    generator = torch.Generator().manual_seed(seed)
    data = torch.utils.data.TensorDataset(
        DATA.tensors[0], torch.randint(4, (600,), generator=generator)
    )
    assert search(run, Linear(), data, budget=30, seed=seed).verdict.outcome == "keep-last"


def test_search_elects_a_single_checkpoint(tmp_path):
    run = save_noisy_run(tmp_path / "run", count=6, noise=4)
    path = run[2].path
    torch.save({"state_dict": {"head.weight": TRUTH}, "step": 3}, path)
    run = ckptavg.open_run(tmp_path / "run")
    result = search(run, Linear(), DATA, families=["checkpoint"])
    assert (result.verdict.outcome, result.winner.name) == ("checkpoint", "step_3.pt")


def test_search_judges_on_report_data(run):
    result = search(run, Linear(), DATA, report_data=samples(5, 250), budget=20)
    assert (result.selection_count, result.judgement.difference.n) == (600, 250)


def test_search_decides_by_another_metric(run):
    result = search(run, Linear(), DATA, budget=10, metric="nll")
    assert result.verdict.text.count("NLL −") == 1
    assert result.judgement.difference.high < 0
    values = [ranked.select for ranked in result.ranking]
    assert values == sorted(values)


def test_search_spends_no_more_than_its_budget(run):
    for budget in (2, 5, 17):
        result = search(run, Linear(), DATA, budget=budget)
        assert len(set(names(result))) <= budget


def test_search_stability_counts_families(run):
    result = search(run, Linear(), DATA, budget=12, repeats=5)
    assert sum(result.stability.values()) == 5


def test_search_is_the_same_for_any_batch_size(run):
    first, second = (search(run, Linear(), DATA, budget=20, batch_size=b) for b in (600, 7))
    assert first.as_json() == second.as_json()


def test_search_ranks_a_candidate_without_finite_outputs_last(tmp_path):
    run = save_noisy_run(tmp_path / "run", count=4)
    torch.save({"state_dict": {"head.weight": TRUTH * math.inf}, "step": 2}, run[1].path)
    run = ckptavg.open_run(tmp_path / "run")
    result = search(run, Linear(), DATA, budget=20)
    worst = result.ranking[-1]
    assert math.isnan(worst.select)
    assert not worst.plateau
    assert "step_2.pt" in names(result)[-8:]
    assert any("step_2.pt: the outputs are not finite" in note for note in result.notes)


def test_search_needs_finite_outputs_of_the_last(tmp_path):
    run = save_noisy_run(tmp_path / "run", count=3)
    torch.save({"state_dict": {"head.weight": TRUTH * math.inf}, "step": 3}, run[2].path)
    with pytest.raises(EvaluationError, match=r"step_3.pt \(last\): the outputs are not finite"):
        search(ckptavg.open_run(tmp_path / "run"), Linear(), DATA)


def test_search_tells_what_each_checkpoint_contributes(run):
    result = search(run, Linear(), DATA, families=["window", "without-one"])
    by_name = {ranked.name: ranked.select for ranked in result.ranking}
    whole = by_name["mean of all 8"]
    assert len(result.contributions) == 8
    assert result.contributions[3] == whole - by_name["mean of all but step_4.pt"]
    # The mean without the first is a window of the last seven.
    assert result.contributions[0] == whole - by_name["mean of the last 7"]
    assert search(run, Linear(), DATA, families=["linear"]).contributions == ()


def test_search_recomputes_statistics(tmp_path):
    run = save_run(tmp_path / "run")
    result = search(run, Net(), data_of(2, 90), train_data=data_of(1, 90), families=["window"])
    states = {ranked.scored.bn for ranked in result.ranking}
    assert states == {"own", "stale", "recomputed"}


def test_search_elects_recomputed_statistics_of_the_last(tmp_path):
    """Statistics that lag behind are all that is wrong with the last checkpoint."""
    run = save_noisy_run(tmp_path / "run", count=4, noise=0, norm=True)
    for step, checkpoint in enumerate(run, start=1):
        state = torch.load(checkpoint.path, weights_only=True)
        state["state_dict"]["norm.running_mean"] += step * torch.arange(8.0)
        torch.save(state, checkpoint.path)
    run = ckptavg.open_run(tmp_path / "run")
    report = samples(5, 300)
    for report_data in (None, report):
        result = search(
            run, Linear(norm=True), DATA, train_data=samples(3, 500), report_data=report_data,
            families=["checkpoint"],
        )  # fmt: skip
        last, recomputed = [r for r in result.ranking if r.name == "step_4.pt (last)"][::-1]
        assert (last.scored.bn, recomputed.scored.bn) == ("own", "recomputed")
        assert result.winner == recomputed
        assert result.verdict.outcome == "checkpoint"
        assert result.verdict.text.startswith(
            "step_4.pt (last) with recomputed statistics: top-1 +"
        )
    result.write_winner(tmp_path / "best.pt")
    written = torch.load(tmp_path / "best.pt", weights_only=True)["state_dict"]
    inputs = samples(3, 500).tensors[0]
    torch.testing.assert_close(written["norm.running_mean"], inputs.mean(0), atol=1e-5, rtol=1e-5)


def test_search_writes_the_winner(run, tmp_path):
    result = search(run, Linear(), DATA, budget=10, families=["window"])
    result.write_winner(tmp_path / "best.pt")
    written = torch.load(tmp_path / "best.pt", weights_only=True)["state_dict"]
    expected = ckptavg.average(run)
    assert torch.equal(written["head.weight"], expected["head.weight"])


def model_file(tmp_path):
    path = tmp_path / "model.py"
    path.write_text(
        "from noisy_runs import Linear, samples\n"
        "def model(): return Linear()\n"
        "def data(train=False, count=600): return samples(1, count)\n"
    )
    return path


def test_search_command_makes_the_winner(run, tmp_path):
    path = model_file(tmp_path)
    words = [
        "search", str(tmp_path / "run"), "--model", f"{path}:model", "--data", f"{path}:data",
        "--budget", "20",
    ]  # fmt: skip
    out = tmp_path / "best.safetensors"
    shown = CliRunner().invoke(main, [*words, "-o", str(out), "--json"])
    assert shown.exit_code == 0, shown.output
    result = json.loads(shown.stdout)
    assert result["verdict"] == "average"
    first = out.read_bytes()
    program, *command = shlex.split(result["command"])
    assert program == "ckptavg"
    made = CliRunner().invoke(main, [*command, "--overwrite"])
    assert made.exit_code == 0, made.output
    assert out.read_bytes() == first


def test_search_shows_ranking_verdict_and_command(run, tmp_path):
    path = model_file(tmp_path)
    shown = CliRunner().invoke(
        main,
        ["search", str(tmp_path / "run"), "--model", f"{path}:model", "--data", f"{path}:data"],
    )
    assert shown.exit_code == 0, shown.output
    assert "ranking on 300 samples that choose" in shown.stdout
    assert "that had no say in choosing it" in shown.stdout
    assert f"ckptavg average {tmp_path}" in shown.stdout


def test_search_fails_if_nothing_is_better(tmp_path):
    save_noisy_run(tmp_path / "run", noise=0)
    path = model_file(tmp_path)
    out = tmp_path / "out.pt"
    shown = CliRunner().invoke(
        main,
        ["search", str(tmp_path / "run"), "--model", f"{path}:model", "--data", f"{path}:data",
         "--fail-if-worse", "-o", str(out)],
    )  # fmt: skip
    assert shown.exit_code == 3, shown.output
    assert "keep it" in shown.stdout
    assert not out.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"families": ["windw"]}, "Did you mean window"),
        ({"families": []}, "no family"),
        ({"metric": "acc"}, "top1, top5, nll, ece"),
        ({"budget": 1}, "budget"),
        ({"select_fraction": 1.5}, "between 0 and 1"),
        ({"repeats": -1}, "repeats"),
    ],
)
def test_search_refuses_wrong_options(run, options, words):
    with pytest.raises(UsageError) as caught:
        search(run, Linear(), DATA, **options)
    assert words in f"{caught.value} {caught.value.remedy}"


def test_search_refuses_a_metric_without_samples(run):
    with pytest.raises(EvaluationError, match=r"no values per sample of ece"):
        search(run, Linear(), DATA, metric="ece")


def test_search_refuses_a_single_checkpoint(tmp_path):
    run = save_noisy_run(tmp_path / "run", count=1)
    with pytest.raises(UsageError, match="there is one"):
        search(run, Linear(), DATA)


def test_search_refuses_too_few_samples(run):
    with pytest.raises(EvaluationError, match="too few"):
        search(run, Linear(), samples(1, 8))
