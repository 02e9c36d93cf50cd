"""Parts of one model that ranks wrote: refused as parts, and nothing else refused with them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import names, save_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptavg import average, open_run
from ckptavg.errors import CkptavgError
from ckptavg.runs.discovery.ranks import parse_rank

LAYOUTS = [  # of the file of a rank below the directory of a step
    "consolidated.{:02d}.pth",
    "mp_rank_{:02d}/model_optim_rng.pt",
    "mp_rank_{:02d}_000/model_rng.pt",
    "mp_rank_00_{:03d}_000/model_rng.pt",
    "tp_rank_{:02d}_pp_rank_000/model_weights.ckpt",
    "tp_rank_00_pp_rank_{:03d}/model_weights.ckpt",
    "model_tp{}_pp0.pt",
    "model_wp0_pp{}.pt",
    "tensor_parallel_{}.pt",
    "weights.{}of2.pt",
    "tp0_ep{}.pt",
    "rank_{}.pt",
    "rank{}/model.pt",
    "checkpoint-rank-{}-of-2.pth",
    "pytorch_model_rank_{}.bin",
    "pytorch_model_fsdp_rank{}.bin",
    "model_world_size_2_rank_{}.pt",
    "actor/model_world_size_2_rank_{}.pt",
    "model_part_{}.pt",
    "checkpoint_last-model_part-{}-shard0.pt",
    "checkpoint_last-shard{}.pt",
    "model_shard_{}.safetensors",
]


def half(rank: int, step: int = 1) -> dict[str, torch.Tensor]:
    """A tensor-parallel rank's slice of a model."""
    generator = torch.Generator().manual_seed(step)
    whole = {
        "emb.weight": torch.randn(8, 4, generator=generator),
        "out.weight": torch.randn(6, 4, generator=generator),
        "norm.weight": torch.randn(4, generator=generator),
    }
    return {
        name: tensor.chunk(2)[rank].clone() if tensor.dim() > 1 else tensor
        for name, tensor in whole.items()
    }


def save_ranks(directory, layout, states, **beside):
    """The file of each rank; they are numbered from 0."""
    paths = []
    for rank, state in enumerate(states):
        path = directory / layout.format(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save({"model": state, **beside} if beside else state, path)
        paths.append(path)
    return paths


def refusal(*paths, **options) -> str:
    with pytest.raises(CkptavgError) as refused:
        average(open_run(*paths, **options))
    assert len(str(refused.value).splitlines()) == 1
    return str(refused.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_are_refused_as_parts_of_one_model(tmp_path, layout):
    for step in (500, 1000):
        halves = [half(0, step), half(1, step)]
        paths = save_ranks(tmp_path / f"iter_{step:07d}", layout, halves, iteration=step)
        assert "parts of one model: 2 ranks" in refusal(*paths)
        assert "parts of one model: 2 ranks" in refusal(tmp_path / f"iter_{step:07d}")
        assert len(open_run(paths[0])) == 1
    told = refusal(tmp_path)
    assert f"{tmp_path / 'iter_0000500'}" in told
    assert "parts of one model: 2 ranks" in told
    assert "parts of one model: 2 ranks" in refusal(*tmp_path.rglob("*.*"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rank_alone_forms_run(tmp_path, layout):
    paths = [
        *save_ranks(tmp_path / "iter_0001000", layout, [half(0)], iteration=1000),
        *save_ranks(tmp_path / "iter_0000500", layout, [half(0)], iteration=500),
    ]
    for run in (open_run(*paths), open_run(tmp_path)):
        assert [c.path for c in run] == paths[::-1]
        assert len(run.trainings) == 1


def test_ranks_outside_step_directories_are_parts(tmp_path):
    save_ranks(tmp_path / "release", "mp_rank_{:02d}/model_optim_rng.pt", [half(0), half(1)])
    assert "parts of one model: 2 ranks" in refusal(tmp_path / "release")


def test_ranks_error_names_conversion_tool(tmp_path):
    for layout, words in (
        ("consolidated.{:02d}.pth", "convert_llama_weights_to_hf"),
        ("mp_rank_{:02d}/model_optim_rng.pt", "tools/checkpoint/convert.py"),
        ("model_world_size_2_rank_{}.pt", "verl.model_merger"),
        ("pytorch_model_fsdp_rank{}.bin", "torch.distributed.checkpoint"),
    ):
        home = tmp_path / words
        assert words in refusal(*save_ranks(home, layout, [half(0), half(1)]))


def test_glob_selects_one_rank(tmp_path):
    for step in (1, 2):
        save_ranks(tmp_path / f"iter_{step}", "mp_rank_{:02d}/m.pt", [half(0), half(1)])
    assert [c.step for c in open_run(tmp_path, glob="mp_rank_00/*")] == [1, 2]


def test_ranks_with_same_weights_count_once(tmp_path):
    save_ranks(tmp_path, "checkpoint-rank{}.pt", [half(0), half(0)], step=3)
    run = open_run(tmp_path)
    assert names(run) == ["checkpoint-rank0.pt"]


def test_replicas_count_once_despite_statistics(tmp_path):
    for epoch in (1, 2, 3):
        for rank in (0, 1):
            norm = torch.nn.BatchNorm1d(3)
            norm.weight.data.fill_(epoch)
            norm.running_mean.fill_(10 * epoch + rank)
            torch.save(norm.state_dict(), tmp_path / f"epoch{epoch}_rank{rank}.pt")
    run = open_run(tmp_path).last(2)
    assert names(run) == ["epoch2_rank0.pt", "epoch3_rank0.pt"]
    assert average(run)["running_mean"].tolist() == [25] * 3
    assert any("epoch1_rank1.pt and 2 more are left out" in note for note in run.notes)


def test_ranks_replicated_in_part_are_parts(tmp_path):
    for rank, state in enumerate([half(0), half(0), half(1), half(1)]):
        torch.save(state, tmp_path / f"pp{rank // 2}_dp{rank % 2}.pt")
    assert "parts of one model: 4 ranks" in refusal(tmp_path)


def test_ranks_are_not_numbers_of_different_steps(tmp_path):
    for i in (1, 2, 3):
        torch.save({"model": half(0, i), "step": 10 * i}, tmp_path / f"pp{i}.pt")
    assert [c.step for c in open_run(tmp_path)] == [10, 20, 30]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized")
def test_dcp_shards_without_metadata_are_parts(tmp_path):
    dcp.save({"model": half(0)}, checkpoint_id=tmp_path / "step_1")
    shard = tmp_path / "step_1" / "__0_0.distcp"
    assert names(open_run(shard)) == ["step_1"]
    (tmp_path / "step_1" / ".metadata").unlink()
    for path in (tmp_path, tmp_path / "step_1", shard):
        told = refusal(path)
        assert "parts of one model" in told
        assert "delete" not in told


@pytest.mark.parametrize(
    "files",
    [
        ["model_0.pt", "model_1.pt", "model_2.pt"],
        ["checkpoint_00.pt", "checkpoint_01.pt", "checkpoint_10.pt"],
        ["ep0-ba10-rank0.pt", "ep0-ba20-rank0.pt", "ep1-ba30-rank0.pt"],
        ["model.pt.ep1.pt", "model.pt.ep2.pt", "model.pt.ep3.pt"],
        ["cp_0.pt", "cp_1.pt", "cp_2.pt"],
        ["ep0.pt", "ep1.pt", "ep2.pt"],
        ["mp_0.pt", "mp_1.pt", "mp_2.pt"],
        ["consolidated_10.pth", "consolidated_20.pth", "consolidated_30.pth"],
        ["lora_rank_1.pt", "lora_rank_2.pt", "lora_rank_3.pt"],
        ["rank_4.pt", "rank_8.pt", "rank_16.pt"],
        ["stage_0.pt", "stage_1.pt", "stage_2.pt"],
        ["part_0.pt", "part_1.pt", "part_2.pt"],
        ["frank0.pt", "frank1.pt", "frank2.pt"],
    ],
)
@pytest.mark.parametrize("beside", [{}, {"epoch": 3}, {"step": 7}])
def test_numbered_checkpoints_are_no_ranks(tmp_path, files, beside):
    for i, file in enumerate(files):
        save_weight(tmp_path / file, float(i), **beside)
    assert average(open_run(tmp_path))["w"] == 1
    assert average(open_run(*tmp_path.iterdir()))["w"] == 1


@pytest.mark.parametrize("files", [("0.pt", "1.pt"), ("slice_00.pt", "slice_01.pt")])
def test_slices_of_one_step_are_parts(tmp_path, files):
    for rank, file in enumerate(files):
        torch.save({"model": half(rank), "iteration": 500}, tmp_path / file)
    told = refusal(tmp_path)
    assert "parts of one model: 2 files" in told
    assert "name each of them" in told
    average(open_run(*tmp_path.iterdir()))


def test_slices_of_one_epoch_are_parts(tmp_path):
    for rank in (0, 1):
        state = {"model": half(rank), "epoch": 3}
        torch.save(state, tmp_path / f"weights_process{rank}.pt")
    assert "parts of one model: 2 files" in refusal(tmp_path)


def test_slices_of_uneven_size_are_parts(tmp_path):
    for rank, rows in enumerate((5, 4)):
        state = {"emb": torch.randn(rows, 4), "norm": torch.ones(4)}
        torch.save({"model": state, "iteration": 500}, tmp_path / f"m{rank}.pt")
    assert "parts of one model: 2 files" in refusal(tmp_path)


def test_stages_of_one_model_are_parts(tmp_path):
    for stage in range(3):
        torch.save({f"layers.{stage}.w": torch.ones(2)}, tmp_path / f"stage_{stage}.pt")
    assert "parts of one model: 3 files" in refusal(tmp_path)
    assert len(open_run(tmp_path)) == 3


def test_steps_with_constant_buffers_are_no_slices(tmp_path):
    """A few vectors that no step changes make no slices."""
    for i in range(2):
        state = half(0, i) | {"inv_freq": torch.arange(3.0), "bias": torch.randn(4)}
        torch.save({"model": state, "step": 10}, tmp_path / f"ckpt_{i}.pt")
    average(open_run(tmp_path))


def test_vocabulary_that_grew_is_no_slice(tmp_path):
    for i in range(2):
        state = {"emb": torch.ones(8 + i, 4)}
        torch.save({"model": state, "step": 10 * i}, tmp_path / f"ckpt_{i}.pt")
    assert "parts of one model" not in refusal(tmp_path)


@settings(deadline=None)
@given(st.lists(st.integers(0, 99), min_size=1, max_size=3), st.sampled_from(["tp", "pp", "rank_"]))
def test_parse_rank_finds_ranks_in_any_name(tmp_path_factory, ranks, word):
    name = "-".join(f"{word}{rank:02d}" for rank in ranks)
    found = parse_rank(Path("/run/step_500") / name / "model.pt")
    assert found.ranks == tuple(map(str, ranks))
    other = "-".join(f"{word}{rank + 1:03d}" for rank in ranks)
    assert parse_rank(Path("/run/step_500") / other / "model.pt").model == found.model
    assert parse_rank(Path("/run/step_501") / name / "model.pt").model != found.model
