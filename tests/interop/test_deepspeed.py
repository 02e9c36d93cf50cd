"""Runs that DeepSpeed itself wrote, on the CPU and by a single rank."""

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import average_by_hand, same_bits

from ckptavg import average, open_run
from ckptavg.cli import main
from ckptavg.errors import CheckpointError

if importlib.util.find_spec("deepspeed") is None:  # which warns where it is imported
    pytest.skip("deepspeed is not installed", allow_module_level=True)

TRAINING = Path(__file__).with_name("deepspeed_training.py")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``trained(kind, stage)``: a run's directory, written once."""
    runs = {}

    def write(kind, stage):
        if kind == "trainer":
            pytest.importorskip("transformers")
            pytest.importorskip("accelerate")
        if (kind, stage) not in runs:
            out = tmp_path_factory.mktemp("deepspeed") / "run"
            subprocess.run(
                [sys.executable, TRAINING, kind, str(stage), out], check=True, capture_output=True
            )
            runs[kind, stage] = out
        return runs[kind, stage]

    return write


def inspect(path):
    return CliRunner().invoke(main, ["inspect", str(path)])


def commands(error):
    """The commands that an error prints, as a shell would take them apart."""
    text = str(error).partition(" (and likewise")[0]  # where long paths leave no room for all
    found = re.search(r"fp32'?: (python .*)", text)[1].split(" && ")
    return [[sys.executable, *shlex.split(command)[1:]] for command in found]


def states(pattern):
    """What each file holds, read by torch, as DeepSpeed has nothing to convert here."""
    return [torch.load(path, weights_only=False)["module"] for path in pattern]


def assert_mean(got, inputs):
    assert set(got) == set(inputs[0])
    for name, value in got.items():
        expected = average_by_hand([s[name] for s in inputs], [1.0] * len(inputs), value.dtype)
        assert same_bits(value, expected), name


@pytest.mark.parametrize("stage", [1, 2])
def test_deepspeed_16_bit_weights_are_averaged_and_noted(trained, stage):
    directory = trained("engine", stage)
    run = open_run(directory)
    assert [(c.path.name, c.step) for c in run] == [(f"global_step{i}", i) for i in (1, 2, 3)]
    files = sorted(directory.glob("*/mp_rank_00_model_states.pt"))
    assert_mean(average(run), states(files))
    shown = inspect(directory)
    assert "16-bit weights" in shown.stdout
    assert "zero_to_fp32.py" in shown.stdout
    assert "ds_config" not in shown.stdout


def test_deepspeed_tag_or_file_may_be_named(trained):
    directory = trained("engine", 2)
    tags = sorted(directory.glob("global_step*"))
    files = [tag / "mp_rank_00_model_states.pt" for tag in tags]
    assert [c.step for c in open_run(tags[1])] == [2]
    named = open_run(*files)
    assert [c.step for c in named.last(2)] == [2, 3]
    assert_mean(average(named), states(files))


def test_deepspeed_stage_3_is_refused_with_commands(trained, tmp_path):
    run = tmp_path / "a run"
    shutil.copytree(trained("engine", 3), run)
    with pytest.raises(CheckpointError, match="ZeRO stage 3") as refused:
        open_run(run)
    for command in commands(refused.value)[:2]:
        subprocess.run(command, check=True, capture_output=True)
    converted = open_run(f"{run}-fp32")
    masters = torch.load(f"{trained('engine', 3)}.masters")[:2]
    assert [c.step for c in converted] == [1, 2]
    assert_mean(average(converted), masters)


@pytest.mark.parametrize(("kind", "step"), [("lightning", 1), ("trainer", 2)])
def test_deepspeed_stage_3_of_trainers_is_refused(trained, tmp_path, kind, step):
    run = tmp_path / "run"
    shutil.copytree(trained(kind, 3), run)
    with pytest.raises(CheckpointError, match="ZeRO stage 3") as refused:
        open_run(run)
    subprocess.run(commands(refused.value)[step - 1], check=True, capture_output=True)
    assert [c.step for c in open_run(f"{run}-fp32")] == [step]


def test_deepspeed_stage_3_file_is_refused(trained):
    files = sorted(trained("engine", 3).glob("*/*_model_states.pt"))
    with pytest.raises(CheckpointError, match=r"stage 3.*zero_to_fp32.py .* -t global_step1$"):
        open_run(files[0])


def test_deepspeed_directories_of_lightning_are_averaged(trained):
    run = open_run(trained("lightning", 2))
    assert [c.path.name for c in run] == [f"epoch=0-step={i}.ckpt" for i in (1, 2, 3)]
    assert [(c.step, c.record.epoch) for c in run] == [(i, 0) for i in (1, 2, 3)]
    files = [c.path / "checkpoint" / "mp_rank_00_model_states.pt" for c in run]
    assert_mean(average(run), states(files))


def test_deepspeed_states_of_trainer_equal_its_weights(trained, tmp_path):
    directory = trained("trainer", 2)
    run = open_run(directory)
    assert [(c.path.name, c.step) for c in run] == [("checkpoint-1", 1), ("checkpoint-2", 2)]
    assert [len(open_run(c.path)) for c in run] == [1, 1]
    whole = average(run)

    shutil.copytree(directory, tmp_path / "run")
    for weights in tmp_path.glob("run/*/model.safetensors"):
        weights.unlink()
    states_alone = open_run(tmp_path / "run")
    assert [(c.path.name, c.step) for c in states_alone] == [
        ("checkpoint-1", 1),
        ("checkpoint-2", 2),
    ]
    got = average(states_alone)
    assert all(same_bits(got[name], value) for name, value in whole.items())
    out = average(states_alone, out=tmp_path / "out")
    import transformers

    model = transformers.GPT2LMHeadModel.from_pretrained(out)
    assert model.lm_head.weight.data_ptr() == model.transformer.wte.weight.data_ptr()
    assert same_bits(model.lm_head.weight.detach(), whole["transformer.wte.weight"])
