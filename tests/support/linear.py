"""Whole evaluations of linear models, by hand."""

import pytest
import torch
from torch.utils.data import TensorDataset

from ckptavg import evaluate
from ckptavg.evaluation.candidates import Candidate
from ckptavg.formats import open_checkpoint


def assert_scored_by_hand(tmp_path, task, targets_of, compute, metric):
    """Assert that two of three checkpoints, their difference and their ensemble are right."""
    torch.manual_seed(0)
    x, model, states = torch.randn(60, 4), torch.nn.Linear(4, 3), []
    targets = targets_of(x @ torch.randn(4, 3))
    for number in range(3):
        model.reset_parameters()
        states.append({k: v.clone() for k, v in model.state_dict().items()})
        torch.save(states[-1], tmp_path / f"epoch_{number}.pt")
    opened = [open_checkpoint(tmp_path / f"epoch_{number}.pt") for number in range(3)]
    last = Candidate.of_checkpoint(opened[-1], last=True)
    found = evaluate(
        [opened[0], last, Candidate.of_ensemble(opened)],
        model,
        TensorDataset(x, targets),
        task=task,
        batch_size=16,
    )
    outputs = [x @ state["weight"].T + state["bias"] for state in states]
    for result, expected in zip(found, (outputs[0], outputs[2]), strict=False):
        assert result.metrics == pytest.approx(compute(expected, targets), rel=1e-5)
    mean = task.mean()
    for output in outputs:
        mean.add(task.predict(output, targets), targets)
    scores = task.scores()
    scores.update(mean.value(), targets)
    assert found[2].metrics == pytest.approx(scores.compute(), rel=1e-5)
    versus = found[0].versus
    difference = found[0].metrics[metric] - found[1].metrics[metric]
    assert (versus.metric, versus.reference) == (metric, "epoch_2.pt")
    assert versus.difference.value == pytest.approx(difference, rel=1e-9)
