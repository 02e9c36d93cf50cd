"""Runs whose steps stand in the names of directories above their checkpoints."""

from __future__ import annotations

import itertools
import json
import re
import shutil

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from helpers import names, save_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptavg import average, open_run
from ckptavg.cli import main
from ckptavg.errors import RunError
from ckptavg.runs.discovery.numbered import mask_step, short_names

STEPS = (500, 1000, 1500)
PLACES = [  # the directory of a step, and the checkpoint in it
    ("checkpoint-{}", "unet/diffusion_pytorch_model.safetensors"),
    ("global_step_{}", "actor/huggingface/model.safetensors"),
    ("epoch0-step{}", "model/model.safetensors"),
    ("step{}", "model_and_optim/a/b/model.safetensors"),
    ("{}", "model.pt"),
    ("{:07d}", "weights/model.pt"),
    ("iter_{:07d}", "mp_rank_00/model_optim_rng.pt"),
    ("model-run:v{}", "model.ckpt"),
    ("10k-run_step={}", "text_encoder_2/model.safetensors"),
    ("checkpoint_{}", "model_1.safetensors"),
    ("checkpoint-{}", "global_step{}/pytorch_model.bin"),
    ("{}_steps", "last.ckpt"),
]


def save_run(directory, series, below, steps=STEPS):
    """A run with the step in the upper directory's name only; the checkpoints' paths."""
    paths = []
    for step in steps:
        path = directory / series.format(step) / below.format(step)
        save_weight(path, float(step))
        lone = path.name in ("model.safetensors", "diffusion_pytorch_model.safetensors")
        paths.append(path.parent if lone or path.name == "pytorch_model.bin" else path)
    return paths


def steps_of(run):
    return [c.step for c in run]


@pytest.mark.parametrize(("series", "below"), PLACES)
def test_numbered_directories_are_one_run(tmp_path, series, below):
    paths = save_run(tmp_path, series, below)
    for order in itertools.permutations(paths):
        run = open_run(*order)
        assert [c.path for c in run] == paths
        assert steps_of(run) == list(STEPS)
    run = open_run(tmp_path)
    assert [c.path for c in run] == paths
    assert steps_of(run.last(2)) == steps_of(run.steps(700)) == [1000, 1500]
    assert average(run, scheme="ema:decay=0.5")["w"] == 500 / 4 + 1000 / 4 + 1500 / 2


@pytest.mark.parametrize(("series", "below"), PLACES)
def test_numbered_directories_may_be_named(tmp_path, series, below):
    paths = save_run(tmp_path, series, below)
    run = open_run(*(tmp_path / series.format(step) for step in (1500, 500, 1000)))
    assert [c.path for c in run] == paths
    assert len(run.trainings) == 1


@pytest.mark.parametrize(
    "days",
    [
        ["2023-12-31", "2024-01-05", "2024-02-01"],
        ["20231231_235959", "20240105_000000", "20240201_120000"],
        ["run-2023-12-31T23:59:59", "run-2024-01-05T00:00:00", "run-2024-02-01T12:00:00"],
    ],
)
def test_dated_directories_are_in_order(tmp_path, days):
    for value, day in enumerate(days):
        save_weight(tmp_path / day / "model.pt", value)
    for run in (open_run(tmp_path), open_run(*sorted(tmp_path.glob("*/model.pt"), reverse=True))):
        assert [c.path.parent.name for c in run] == days
        assert steps_of(run) == sorted(steps_of(run))
        assert not run.notes


@settings(deadline=None)
@given(st.data())
def test_numbered_directories_are_in_order_at_any_depth(tmp_path_factory, data):
    directory = tmp_path_factory.mktemp("run")
    steps = data.draw(st.lists(st.integers(0, 10**6), min_size=2, max_size=5, unique=True))
    word = data.draw(st.sampled_from(["checkpoint-", "step", "global_step_", "iter_00", ""]))
    parts = st.sampled_from(["unet", "model", "actor", "hf", "state"])
    below = data.draw(st.lists(parts, max_size=4))
    for step in steps:
        save_weight(directory.joinpath(f"{word}{step}", *below, "model.safetensors"), step)
    assert steps_of(open_run(directory)) == sorted(steps)
    shutil.rmtree(directory)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_step_is_read_from_trainer_state_above(tmp_path):
    for step in (1000, 500):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        for name in ("pytorch_model_fsdp_0", "optimizer_0"):
            dcp.save({"model": {"w": torch.ones(2)}}, checkpoint_id=checkpoint / name)
        state = {"global_step": step, "epoch": step / 500, "log_history": []}
        (checkpoint / "trainer_state.json").write_text(json.dumps(state))
        torch.save({}, checkpoint / "rng_state_0.pth")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"global_step": 9999}))
    run = open_run(tmp_path)
    assert [(c.step, c.record.epoch) for c in run] == [(500, 1.0), (1000, 2.0)]
    assert names(run) == ["pytorch_model_fsdp_0"] * 2
    assert len(open_run(*tmp_path.glob("checkpoint-*")).trainings) == 1


def save_networks(directory, *networks, steps=STEPS):
    for network in networks:
        save_run(directory, "checkpoint-{}", f"{network}/model.safetensors", steps)
    return directory


def test_ema_copies_beside_network_are_left_out(tmp_path):
    save_networks(tmp_path, "unet", "unet_ema")
    for run in (open_run(tmp_path), open_run(*sorted(tmp_path.iterdir()))):
        assert names(run) == ["unet"] * 3
        assert [path.name for path, _ in run.left_out] == ["unet_ema"] * 3
        (note,) = run.notes
        assert re.search(r"checkpoint-500/unet_ema and 2 more are left out: an EMA copy", note) or (
            "unet_ema and 2 more" in note
        )
    assert names(open_run(tmp_path / "checkpoint-500")) == ["unet"]
    assert names(open_run(*tmp_path.glob("*/unet_ema"))) == ["unet_ema"] * 3
    assert names(open_run(tmp_path, glob="*/unet_ema")) == ["unet_ema"] * 3


def test_networks_side_by_side_are_refused_with_patterns(tmp_path):
    save_networks(tmp_path, "unet", "text_encoder", "text_encoder_2", "unet_ema")
    with pytest.raises(RunError, match="3 networks side by side") as refused:
        open_run(tmp_path)
    patterns = re.findall(r"'([^']+)'", str(refused.value))
    assert sorted(set(patterns)) == ["*/text_encoder", "*/text_encoder_2", "*/unet"]
    for pattern in patterns:
        run = open_run(tmp_path, glob=pattern)
        assert set(names(run)) == {pattern.removeprefix("*/")}
        assert steps_of(run) == list(STEPS)
    with pytest.raises(RunError, match="3 networks side by side"):
        open_run(*tmp_path.iterdir())
    assert len(open_run(*tmp_path.glob("*/unet"), *tmp_path.glob("*/text_encoder")).trainings) == 2


def test_glob_with_slash_selects_steps(tmp_path):
    save_networks(tmp_path, "unet", "vae")
    assert steps_of(open_run(tmp_path, glob="checkpoint-1*/unet")) == [1000, 1500]
    assert steps_of(open_run(tmp_path, glob="unet")) == list(STEPS)


def test_open_run_refuses_two_kinds_of_steps(tmp_path):
    save_run(tmp_path, "checkpoint-{}", "model.pt")
    save_run(tmp_path, "epoch_{}", "model.pt", (1, 2))
    with pytest.raises(RunError, match=r"'checkpoint-\*/model\.pt', 'epoch_\*/model\.pt'"):
        open_run(tmp_path)
    assert steps_of(open_run(tmp_path, glob="epoch_*/model.pt")) == [1, 2]


def test_pipeline_at_root_does_not_hide_steps(tmp_path):
    save_networks(tmp_path, "unet")
    for network in ("unet", "vae", "text_encoder"):
        save_weight(tmp_path / network / "model.safetensors", 7.0)
    run = open_run(tmp_path)
    assert steps_of(run) == list(STEPS)
    assert {path.name for path, _ in run.left_out} == {"unet", "vae", "text_encoder"}
    index = {name: ["diffusers", "Model"] for name in ("unet", "vae", "text_encoder")}
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"_class_name": "Pipeline"}))
    again = open_run(tmp_path)
    assert steps_of(again) == list(STEPS)
    assert [path for path, _ in again.left_out] == [tmp_path]


def test_model_at_root_comes_last(tmp_path):
    save_networks(tmp_path, "unet")
    save_weight(tmp_path / "diffusion_pytorch_model.safetensors", 2000.0)
    run = open_run(tmp_path)
    assert [c.path for c in run][-1] == tmp_path
    assert len(run) == 4
    save_networks(tmp_path, "vae")
    assert [c.path for c in open_run(tmp_path)] == [tmp_path]


def test_step_without_weights_is_noted_or_refused(tmp_path):
    save_networks(tmp_path, "unet")
    shutil.rmtree(tmp_path / "checkpoint-1500" / "unet")
    run = open_run(tmp_path)
    assert steps_of(run) == [500, 1000]
    assert any("checkpoint-1500 is left out: holds no weights" in note for note in run.notes)
    (tmp_path / "checkpoint-1500" / "trainer_state.json").write_text("{}")
    with pytest.raises(RunError, match="checkpoint-1500 looks like a checkpoint") as refused:
        open_run(tmp_path)
    assert "delete" not in str(refused.value)
    assert steps_of(open_run(*(tmp_path / f"checkpoint-{step}" for step in STEPS[:2]))) == [
        500,
        1000,
    ]


def test_open_run_refuses_runs_below_steps(tmp_path):
    for stage in (1, 2):
        save_run(tmp_path / f"step_{stage}", "", "epoch_{}.pt", (1, 2))
    with pytest.raises(RunError, match=r"2 runs: .*step_1, .*step_2"):
        open_run(tmp_path)


def test_open_run_names_top_directories_of_runs(tmp_path):
    for agent in ("actor", "critic"):
        save_run(tmp_path / agent, "global_step_{}", "huggingface/model.safetensors")
    with pytest.raises(RunError, match=r"2 runs: [^ ]*actor, [^ ]*critic\."):
        open_run(tmp_path)


def test_open_run_names_runs_of_different_depths(tmp_path):
    save_run(tmp_path / "ppo", "global_step_{}", "actor/huggingface/model.safetensors")
    save_run(tmp_path / "sd", "checkpoint-{}", "unet/model.safetensors")
    with pytest.raises(RunError, match=r"2 runs: [^ ]*ppo, [^ ]*sd\."):
        open_run(tmp_path)


@pytest.mark.parametrize("names_given", [("seed1", "seed2"), ("v1", "v2"), ("lr0.1", "lr0.2")])
def test_open_run_takes_no_seed_or_version_for_step(tmp_path, names_given):
    paths = [save_weight(tmp_path / name / "final.pt", i) for i, name in enumerate(names_given)]
    assert len(open_run(*paths).trainings) == 2
    with pytest.raises(RunError, match="2 runs"):
        open_run(tmp_path)


def test_training_state_beside_model_is_no_network(tmp_path):
    for step in STEPS:
        home = tmp_path / f"step{step}"
        save_weight(home / "model_and_optim" / "model.safetensors", step)
        for rank in range(2):
            torch.save({"state": 1}, save_weight(home / "train" / f"rank{rank}.pt"))
    assert names(open_run(tmp_path)) == ["model_and_optim"] * 3


def test_mask_step_ignores_other_numbers():
    same = [("epoch=1-loss=0.3", "epoch=12-loss=0.25"), ("step_900", "step_1k"), ("1", "0020")]
    assert all(mask_step(one) == mask_step(other) for one, other in same)
    none = ["seed1", "version_0", "resnet50_checkpoints", "text_encoder_2", "lora_rank_8", "last"]
    assert all(mask_step(name) is None for name in none)


def test_short_names_tell_paths_apart(tmp_path):
    paths = [tmp_path / f"step_{i}" / "actor" / "hf" for i in (1, 2)]
    assert short_names(paths) == ["step_1/actor/hf", "step_2/actor/hf"]
    assert short_names([paths[0], tmp_path / "b"]) == ["hf", "b"]


def test_commands_take_numbered_directories(tmp_path):
    save_networks(tmp_path / "run", "unet", "unet_ema")
    shown = CliRunner().invoke(main, ["inspect", str(tmp_path / "run")])
    assert "checkpoint-1000/unet" in shown.output
    made = CliRunner().invoke(
        main, ["average", str(tmp_path / "run"), "--last", "2", "-o", str(tmp_path / "x.pt")]
    )
    assert made.exit_code == 0, made.output
    assert torch.load(tmp_path / "x.pt")["state_dict"]["w"] == 1250


PIPELINE = {"_class_name": "P", "unet": ["diffusers", "U"], "vae": ["diffusers", "V"]}


@pytest.mark.parametrize("below", ["unet", "."])
@pytest.mark.parametrize("copies", [True, False])
def test_network_is_averaged_without_pipeline_at_root(tmp_path, below, copies):
    name = "diffusion_pytorch_model.safetensors"
    for step in (500, 1000):
        save_weight(tmp_path / "run" / f"checkpoint-{step}" / below / name, float(step))
        if copies and below == "unet":
            save_weight(tmp_path / "run" / f"checkpoint-{step}" / "unet_ema" / name, 1.0)
    for part in ("unet", "vae"):
        save_weight(tmp_path / "run" / part / name, 0)
    (tmp_path / "run" / "model_index.json").write_text(json.dumps(PIPELINE))
    run = open_run(tmp_path / "run")
    assert [c.step for c in run] == [500, 1000]
    assert average(run)["w"] == 750
    assert any("several directories" in note for note in run.notes)


def test_pipelines_of_steps_and_root_are_one_run(tmp_path):
    for value, folder in enumerate(("checkpoint-500", "checkpoint-1000", ".")):
        for part in ("unet", "vae"):
            name = "diffusion_pytorch_model.safetensors"
            save_weight(tmp_path / "run" / folder / part / name, float(value))
        (tmp_path / "run" / folder / "model_index.json").write_text(json.dumps(PIPELINE))
    run = open_run(tmp_path / "run")
    assert len(run) == 3
    assert set(average(run)) == {"unet/w", "vae/w"}


@pytest.mark.parametrize("names_of_runs", [("2024-01-01", "2024-01-02"), ("1", "2")])
@pytest.mark.parametrize("file", ["model.pt", "unet/model.pt"])
def test_open_run_refuses_runs_named_by_date_or_number(tmp_path, names_of_runs, file):
    for name, step in itertools.product(names_of_runs, (500, 1000)):
        path = tmp_path / name / f"step_{step}" / file
        path.parent.mkdir(parents=True)
        save_weight(path, step)
    with pytest.raises(RunError, match=r"holds 2 runs: .*Name one") as caught:
        open_run(tmp_path)
    for name in names_of_runs:
        assert str(tmp_path / name) in str(caught.value)
        assert [c.step for c in open_run(tmp_path / name)] == [500, 1000]
