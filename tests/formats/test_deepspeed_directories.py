"""DeepSpeed directories, with what its engine (``_common_checkpoint_state``) puts in the files."""

from pathlib import Path

import pytest
import torch

from ckptavg import average, open_run
from ckptavg.errors import CheckpointError, RunError


def states(tag, name="mp_rank_00_model_states.pt", value=1.0, step=3, **changed):
    """One rank's model states."""
    tag.mkdir(parents=True, exist_ok=True)
    weights = {"w": torch.full((2, 2), value).bfloat16()}
    state = {
        "module": weights, "buffer_names": [], "optimizer": None,
        "param_shapes": [{"w": torch.Size([2, 2])}], "global_steps": step, "ds_config": {"a": 1},
    }  # fmt: skip
    torch.save(state | changed, tag / name)
    return tag


def partitioned(tag, rank=0):
    """One rank's model states of ZeRO stage 3: placeholders."""
    name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
    return states(tag, name, module={"w": torch.empty(0)})


def test_deepspeed_tags_are_ordered_by_step(tmp_path):
    for i, step in enumerate([100, 9]):
        states(tmp_path / f"global_step{step}", value=i, step=step)
    (tmp_path / "latest").write_text("global_step100")
    (tmp_path / "zero_to_fp32.py").write_text("")
    run = open_run(tmp_path)
    assert [(c.path.name, c.step) for c in run] == [("global_step9", 9), ("global_step100", 100)]
    assert average(run)["w"].eq(0.5).all()


def test_deepspeed_run_of_one_tag_is_run(tmp_path):
    states(tmp_path / "one" / "global_step1")
    states(tmp_path / "two" / "global_step1", value=3.0)
    assert [c.path.name for c in open_run(tmp_path / "one")] == ["global_step1"]
    assert len(open_run(tmp_path / "one", tmp_path / "two").trainings) == 2
    with pytest.raises(RunError, match="2 runs"):
        open_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mp_rank_01_model_states.pt", "tensor-parallel ranks hold slices of the model"),
        ("layer_00-model_00-model_states.pt", "pipeline stages hold parts of the model"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "expert-parallel ranks hold parts"),
    ],
)
def test_deepspeed_weights_split_over_ranks_are_refused(tmp_path, name, why):
    states(states(tmp_path / "global_step1"), name)
    with pytest.raises(CheckpointError, match=rf"{why}.*{name}"):
        open_run(tmp_path)


def test_deepspeed_partitioned_weights_get_command_each(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in (1, 2):
        partitioned(partitioned(Path(f"run/global_step{step}")), 1)
    first, second = (
        f"python run/zero_to_fp32.py run run-fp32/global_step{step} -t global_step{step}"
        for step in (1, 2)
    )
    with pytest.raises(CheckpointError, match=f"average run-fp32: {first} && {second}$"):
        open_run("run")


def test_deepspeed_message_shows_whole_commands_only(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for step in range(100):
        partitioned(Path(f"run/global_step{step}"))
    with pytest.raises(CheckpointError) as refused:
        open_run("run")
    shown = str(refused.value).count(" -t global_step")
    assert "..." not in str(refused.value)
    assert shown > 5
    assert f"(and likewise for {100 - shown} more)" in str(refused.value)


def test_deepspeed_16_bit_weights_with_masters_are_noted(tmp_path):
    tag = states(tmp_path / "global_step1")
    assert not open_run(tag).checkpoints[0].notes
    torch.save({}, tag / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert "zero_to_fp32.py gives the float32 ones" in open_run(tag).checkpoints[0].notes[0]


def test_deepspeed_command_for_relative_tag_runs(tmp_path, monkeypatch):
    partitioned(tmp_path / "run" / "global_step3")
    monkeypatch.chdir(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"python zero_to_fp32.py \. fp32/global_step3 -t"):
        open_run("global_step3")
    monkeypatch.chdir("global_step3")
    with pytest.raises(CheckpointError, match=rf"{tmp_path}/run-fp32/global_step3 -t global_step3"):
        open_run(".")


def test_deepspeed_partitioned_tags_may_be_left_out_by_glob(tmp_path):
    partitioned(tmp_path / "global_step3")
    states(tmp_path / "global_step4")
    assert len(open_run(tmp_path, glob="*4")) == 1


def test_deepspeed_partitioned_file_alone_is_refused(tmp_path):
    tag = partitioned(tmp_path / "global_step3")
    file = next(tag.glob("*model_states.pt")).rename(tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"placeholders and no weights.*zero_to_fp32"):
        open_run(file)


def test_deepspeed_gathered_weights_are_preferred(tmp_path):
    checkpoint = tmp_path / "checkpoint-7"
    partitioned(checkpoint / "global_step7")
    torch.save({"w": torch.ones(2)}, checkpoint / "pytorch_model.bin")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 7}')
    for path in (tmp_path, checkpoint):
        assert [Path(c.path).name for c in open_run(path)] == ["checkpoint-7"]
