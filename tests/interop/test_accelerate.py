"""Directories that Accelerate's ``save_state`` wrote."""

import pytest
import torch
from click.testing import CliRunner
from helpers import average_by_hand, same_bits
from torch import nn

from ckptavg import average, open_run
from ckptavg.cli import main

accelerate = pytest.importorskip("accelerate")


class Counter:
    """Something of the user's that is saved too."""

    def state_dict(self):
        return {"count": torch.tensor([3.0])}

    def load_state_dict(self, state):
        pass


def write_run(directory, *, models=1, safe=True, saves=12):
    """Train and save; returns what each save held, a list of state dicts for each model."""
    torch.manual_seed(0)
    where = accelerate.utils.ProjectConfiguration(
        project_dir=directory, automatic_checkpoint_naming=True
    )
    accelerator = accelerate.Accelerator(cpu=True, project_config=where)
    networks = [nn.Linear(3, 2 + i) for i in range(models)]
    optimizer = torch.optim.AdamW([p for n in networks for p in n.parameters()], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loader = torch.utils.data.DataLoader(torch.randn(8, 3), batch_size=4, shuffle=True)
    *networks, optimizer, scheduler, loader = accelerator.prepare(
        *networks, optimizer, scheduler, loader
    )
    accelerator.register_for_checkpointing(Counter())
    held = [[] for _ in networks]
    for _ in range(saves):
        for network, states in zip(networks, held, strict=True):
            accelerator.backward(network(torch.randn(4, 3)).pow(2).mean())
            states.append({name: t.clone() for name, t in network.state_dict().items()})
        accelerator.save_state(safe_serialization=safe)
        optimizer.step()
    accelerator.free_memory()
    return held


def assert_mean(got, states):
    assert set(got) == set(states[0])
    for name, value in got.items():
        by_hand = average_by_hand([s[name] for s in states], [1.0] * len(states), value.dtype)
        assert same_bits(value, by_hand), name


def invoke(*words):
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.mark.parametrize("safe", [True, False])
def test_accelerate_run_is_ordered_and_averaged(tmp_path, safe):
    (states,) = write_run(tmp_path, safe=safe)
    run = open_run(tmp_path / "checkpoints")
    assert [c.path.name for c in run] == [f"checkpoint_{i}" for i in range(12)]
    assert [c.step for c in run] == list(range(12))
    assert_mean(average(run), states)
    assert_mean(average(run.last(3)), states[-3:])


def test_accelerate_run_takes_only_the_model(tmp_path):
    write_run(tmp_path, saves=2)
    saved = sorted(p.name for p in (tmp_path / "checkpoints" / "checkpoint_1").iterdir())
    assert {"optimizer.bin", "scheduler.bin", "random_states_0.pkl"} < set(saved)
    run = open_run(tmp_path / "checkpoints")
    assert not run.notes
    assert not any(c.notes for c in run)
    assert {name for c in run for name in c.tensors} == {"weight", "bias"}


def test_accelerate_project_leads_to_checkpoints(tmp_path):
    write_run(tmp_path, saves=2)
    shown = invoke("inspect", tmp_path)
    assert shown.exit_code == 0
    assert "2 checkpoints" in shown.stdout
    assert f"{tmp_path}/checkpoints" in shown.stdout


@pytest.mark.parametrize(
    ("safe", "first", "second"),
    [
        (True, "model.safetensors", "model_1.safetensors"),
        (False, "pytorch_model.bin", "pytorch_model_1.bin"),
    ],
)
def test_accelerate_second_model_is_noted_and_selectable(tmp_path, safe, first, second):
    one, other = write_run(tmp_path, models=2, safe=safe)
    run = tmp_path / "checkpoints"
    assert_mean(average(open_run(run)), one)
    shown = invoke("inspect", run)
    assert f"weights are taken from {first}; {second} beside it is another model's" in shown.stdout
    assert f"*/{second}" in shown.stdout

    named = open_run(*run.glob(f"checkpoint_*/{second}"))
    assert len(named.trainings) == 1
    assert [c.path.parent.name for c in named] == [f"checkpoint_{i}" for i in range(12)]
    assert [c.step for c in named] == list(range(12))
    assert_mean(average(named.last(2)), other[-2:])
    files = sorted(run.glob(f"checkpoint_*/{second}"))
    assert invoke("average", *files, "--last", 2, "-o", tmp_path / "o.pt").exit_code == 0
    assert_mean(torch.load(tmp_path / "o.pt", weights_only=True)["state_dict"], other[-2:])
