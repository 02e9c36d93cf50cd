"""Finding, ordering, de-duplicating and selecting checkpoints."""

import json
import os
import re
import shutil

import pytest
import torch
from helpers import names, save, save_weight

from ckptavg import average, open_run
from ckptavg.batchnorm.checkpoints import update_checkpoint
from ckptavg.batchnorm.recompute import StatisticsPass
from ckptavg.errors import CheckpointError, CkptavgError, RunError, UsageError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.running_statistics import Statistics
from ckptavg.models.runtime import Runtime
from ckptavg.runs import duplicates
from ckptavg.runs.run import as_run


def numbered(directory, count, **beside):
    """A run epoch_1.pt ... with one value of each list in ``beside`` recorded a checkpoint."""
    for i in range(1, count + 1):
        recorded = {name: values[i - 1] for name, values in beside.items()}
        save_weight(directory / f"epoch_{i}.pt", i, **recorded)
    return directory


def hf_checkpoint(directory, value, step=None, suffix=".safetensors", history=()):
    """A directory as the Hugging Face Trainer writes it."""
    name = "model.safetensors" if suffix == ".safetensors" else "pytorch_model.bin"
    save_weight(directory / name, value)
    (directory / "config.json").write_text("{}")
    torch.save({"state": {}, "param_groups": [{"lr": 0.1}]}, directory / "optimizer.pt")
    torch.save({"cpu": torch.get_rng_state()}, directory / "rng_state.pth")
    if step is not None:
        state = {"global_step": step, "epoch": step / 100, "log_history": list(history)}
        (directory / "trainer_state.json").write_text(json.dumps(state))
    return directory


def numbers(run):
    """The i of epoch_i.pt, in order."""
    return [int(name.removeprefix("epoch_").removesuffix(".pt")) for name in names(run)]


# Order


def test_order_is_by_recorded_step(tmp_path):
    for age, (name, step) in enumerate([("c", 20), ("a", 100), ("b", 3)]):
        path = save_weight(tmp_path / f"{name}.pt", step, global_step=step)
        os.utime(path, (1e9 - age, 1e9 - age))
    run = open_run(tmp_path)
    assert names(run) == ["b.pt", "c.pt", "a.pt"]
    assert [c.step for c in run] == [3, 20, 100]


def test_order_is_by_epoch_without_step(tmp_path):
    for name, epoch in [("c", 2), ("a", 10), ("b", 1.5)]:
        save_weight(tmp_path / f"{name}.pt", epoch, epoch=epoch)
    run = open_run(tmp_path)
    assert names(run) == ["b.pt", "c.pt", "a.pt"]
    assert [c.step for c in run] == [1.5, 2, 10]


def test_order_prefers_step_to_epoch(tmp_path):
    save_weight(tmp_path / "a.pt", 1, global_step=300, epoch=1.0)
    save_weight(tmp_path / "b.pt", 2, global_step=200, epoch=1.0)
    run = open_run(tmp_path)
    assert [(c.path.name, c.step) for c in run] == [("b.pt", 200), ("a.pt", 300)]


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".pth.tar"])
@pytest.mark.parametrize(
    "pattern", ["epoch_{}", "ckpt-{}", "{}", "model.{}", "Step{:06d}", "v2-e{}"]
)
def test_order_is_by_number_without_record(tmp_path, pattern, suffix):
    order = [1, 2, 9, 10, 11, 100]
    for age, i in enumerate(order):
        path = save_weight(tmp_path / (pattern.format(i) + suffix), i)
        os.utime(path, (1e9 - age, 1e9 - age))
    run = open_run(tmp_path)
    assert names(run) == [pattern.format(i) + suffix for i in order]
    assert [c.step for c in run] == order


def test_order_is_by_epoch_in_name(tmp_path):
    for epoch, loss in [(2, "0.91"), (10, "0.15"), (9, "0.33")]:
        save_weight(tmp_path / f"resnet50-epoch={epoch}-loss={loss}.ckpt", epoch)
    assert [c.step for c in open_run(tmp_path)] == [2, 9, 10]


def test_order_is_by_name_where_some_lack_records(tmp_path):
    save_weight(tmp_path / "epoch_2.pt", global_step=7)
    save_weight(tmp_path / "epoch_10.pt", 1.0)
    save_weight(tmp_path / "epoch_1.pt", global_step=900)
    run = open_run(tmp_path)
    assert numbers(run) == [1, 2, 10]
    assert [c.step for c in run] == [1, 2, 10]
    assert any("ordered by name" in note for note in run.notes)


@pytest.mark.parametrize("name", ["global_step", "epoch"])
def test_order_by_name_ignores_recorded_zero(tmp_path, name):
    save_weight(tmp_path / "epoch_0.pt", **{name: 0})
    save_weight(tmp_path / "epoch_1.pt", 1.0)
    save_weight(tmp_path / "epoch_2.pt", 2.0)
    assert numbers(open_run(tmp_path)) == [0, 1, 2]


def test_order_is_by_epoch_where_steps_restart(tmp_path):
    places = [(0, 100), (0, 200), (1, 100), (1, 200)]
    for name, (epoch, step) in zip("dbca", places, strict=True):
        save_weight(tmp_path / f"{name}.pt", epoch + step, epoch=epoch, step=step)
    run = open_run(tmp_path)
    assert [(c.record.epoch, c.record.step) for c in run] == places


def test_safetensors_metadata_records_step(tmp_path):
    for name, step in [("a", 10), ("b", 9)]:
        save_weight(tmp_path / f"{name}.safetensors", step, step=step)
    assert [(c.path.stem, c.step) for c in open_run(tmp_path)] == [("b", 9), ("a", 10)]


def test_run_may_mix_formats(tmp_path):
    save_weight(tmp_path / "epoch_1.safetensors", 1.0)
    save_weight(tmp_path / "epoch_2.pt", 2.0)
    save_weight(tmp_path / "epoch_3.ckpt", 3.0)
    assert [c.step for c in open_run(tmp_path)] == [1, 2, 3]


# What repeats another checkpoint


def symlink(original, alias):
    alias.symlink_to(original.name)


def hard_link(original, alias):
    alias.hardlink_to(original)


def copy(original, alias):
    shutil.copy(original, alias)


def saved_again(original, alias):
    content = torch.load(original, weights_only=True)
    torch.save(content | {"note": "saved a second time, with another pickle"}, alias)
    assert alias.read_bytes() != original.read_bytes()


ALIASES = [
    "last.ckpt", "last-v1.ckpt", "checkpoint.pth", "model_best.pth.tar", "best_epoch_2.pt",
    "final.pt",
]  # fmt: skip


@pytest.mark.parametrize("make", [symlink, hard_link, copy, saved_again])
@pytest.mark.parametrize("alias", ALIASES)
def test_alias_counts_once(tmp_path, alias, make):
    numbered(tmp_path, 3, epoch=[1, 2, 3])
    make(tmp_path / "epoch_2.pt", tmp_path / alias)
    run = open_run(tmp_path)
    assert numbers(run) == [1, 2, 3]
    assert (tmp_path / alias, "repeats epoch_2.pt") in run.left_out
    assert any(alias in note and "epoch_2.pt" in note for note in run.notes)


@pytest.mark.parametrize("make", [symlink, hard_link, copy])
def test_alias_of_bare_weights_counts_once(tmp_path, make):
    numbered(tmp_path, 3)
    make(tmp_path / "epoch_3.pt", tmp_path / "last.pt")
    assert numbers(open_run(tmp_path)) == [1, 2, 3]


def test_best_checkpoint_of_its_own_is_noted(tmp_path):
    numbered(tmp_path, 3, epoch=[7, 8, 9])
    save_weight(tmp_path / "best.pt", 50, epoch=2)
    save_weight(tmp_path / "last.pt", 51, epoch=10)
    run = open_run(tmp_path)
    assert [checkpoint.step for checkpoint in run] == [2, 7, 8, 9, 10]
    assert run.notes == ("best.pt repeats no other checkpoint, and counts as one of its own",)


def test_best_checkpoints_alone_have_no_note(tmp_path):
    for epoch in (1, 2, 3):
        save_weight(tmp_path / f"best-{epoch}.pt", epoch, epoch=epoch)
    assert open_run(tmp_path).notes == ()


def test_alias_of_safetensors_is_compared_by_bytes(tmp_path):
    for i in (1, 2):
        save_weight(tmp_path / f"epoch_{i}.safetensors", i)
    save_weight(tmp_path / "last.safetensors", 2)
    save_weight(tmp_path / "best.safetensors", 3)
    assert names(open_run(tmp_path)) == [
        "epoch_1.safetensors", "epoch_2.safetensors", "best.safetensors",
    ]  # fmt: skip


def test_link_with_number_keeps_its_place(tmp_path):
    numbered(tmp_path / "run", 3)
    (tmp_path / "run" / "epoch_2.pt").rename(tmp_path / "archived.pt")
    (tmp_path / "run" / "epoch_2.pt").symlink_to(tmp_path / "archived.pt")
    assert numbers(open_run(tmp_path / "run")) == [1, 2, 3]


def test_aliases_of_one_checkpoint_count_once(tmp_path):
    numbered(tmp_path, 2)
    for alias in ("last.pt", "best.pt"):
        copy(tmp_path / "epoch_2.pt", tmp_path / alias)
    assert numbers(open_run(tmp_path)) == [1, 2]


def test_alias_without_checksums_is_compared_by_bytes(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        numbered(tmp_path, 2)
        save_weight(tmp_path / "last.pt", 3)
    finally:
        torch.serialization.set_crc32_options(before)
    copy(tmp_path / "epoch_2.pt", tmp_path / "best.pt")
    assert names(open_run(tmp_path)) == ["epoch_1.pt", "epoch_2.pt", "last.pt"]


def test_last_checkpoint_of_its_own_keeps_its_place(tmp_path):
    numbered(tmp_path, 2, global_step=[100, 200])
    save_weight(tmp_path / "last.pt", 3, global_step=250)
    save_weight(tmp_path / "best.pt", 4, global_step=150)
    run = open_run(tmp_path)
    assert names(run) == ["epoch_1.pt", "best.pt", "epoch_2.pt", "last.pt"]
    assert run.left_out == ()


def test_numbered_checkpoints_of_equal_weights_all_count(tmp_path):
    for i in (1, 2, 3):
        save_weight(tmp_path / f"epoch_{i}.pt", 5.0)
    assert numbers(open_run(tmp_path)) == [1, 2, 3]


def test_copy_of_same_step_counts_once(tmp_path):
    numbered(tmp_path, 2, global_step=[100, 200])
    copy(tmp_path / "epoch_2.pt", tmp_path / "epoch_2 (copy 1).pt")
    assert len(open_run(tmp_path)) == 2


def test_equal_steps_of_different_runs_all_count(tmp_path):
    for seed in ("a", "b"):
        numbered(tmp_path / seed, 2, global_step=[100, 200])
    run = open_run(tmp_path / "a", tmp_path / "b")
    assert [(c.path.parent.name, c.step) for c in run] == [
        ("a", 100), ("a", 200), ("b", 100), ("b", 200),
    ]  # fmt: skip
    assert len(run.trainings) == 2


@pytest.mark.parametrize(
    "again", ["run", "run/../run", "run/epoch_2.pt", "link", "link/epoch_2.pt"]
)
def test_open_run_counts_path_named_twice_once(tmp_path, again):
    numbered(tmp_path / "run", 3)
    (tmp_path / "link").symlink_to("run", target_is_directory=True)
    assert numbers(open_run(tmp_path / "run", tmp_path / again)) == [1, 2, 3]


# What is no checkpoint


OTHER_STATE = [
    "optimizer.pt", "optimizer.bin", "optim.pt", "optimizer_10.pt", "scheduler.pt",
    "lr_scheduler.pt", "rng_state.pth", "rng_state_0.pth", "random_states_0.pt",
    "training_args.bin", "scaler.pt",
]  # fmt: skip


@pytest.mark.parametrize("name", OTHER_STATE)
def test_other_state_is_no_checkpoint(tmp_path, name):
    numbered(tmp_path, 2)
    save_weight(tmp_path / name)
    run = open_run(tmp_path)
    assert numbers(run) == [1, 2]
    assert [path.name for path, _ in run.left_out] == [name]


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth", "scheduler.pt"])
def test_other_state_named_by_shell_is_left_out(tmp_path, name):
    numbered(tmp_path, 2)
    content = {
        "optimizer.pt": {"state": {0: {"m": torch.ones(1)}}, "param_groups": [{"lr": 0.1}]},
        "rng_state.pth": {"cpu": torch.get_rng_state()},
        "scheduler.pt": {"last_epoch": 3},
    }
    torch.save(content[name], tmp_path / name)
    run = open_run(*sorted(tmp_path.glob("*.pt*")))
    assert names(run) == ["epoch_1.pt", "epoch_2.pt"]
    assert [path.name for path, _ in run.left_out] == [name]


def test_other_state_alone_is_refused(tmp_path):
    paths = [save_weight(tmp_path / name) for name in ("optimizer.pt", "scheduler.pt")]
    with pytest.raises(RunError, match=r"optimizer\.pt \(not a model's weights\)"):
        open_run(*paths)


def test_optimizer_of_any_name_is_left_out(tmp_path):
    numbered(tmp_path, 2)
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "opt-000010.pt")
    run = open_run(tmp_path)
    assert numbers(run) == [1, 2]
    assert "optimizer" in dict(run.left_out)[tmp_path / "opt-000010.pt"]


def test_files_of_other_kinds_are_ignored(tmp_path):
    numbered(tmp_path, 2)
    for name in ("log.txt", "epoch_3.pt.tmp", "metrics.json", ".epoch_3.pt", "events.out.tfevents"):
        (tmp_path / name).write_text("no checkpoint")
    run = open_run(tmp_path)
    assert numbers(run) == [1, 2]
    assert run.left_out == ()


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 torn", b"not a checkpoint at all", bytes(100)]
)
def test_damaged_file_is_refused(tmp_path, content):
    numbered(tmp_path, 2)
    (tmp_path / "epoch_3.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"epoch_3\.pt.*`skip=.epoch_3\.pt.` leaves it out"):
        average(open_run(tmp_path))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_truncated_checkpoint_is_refused(tmp_path, suffix):
    for i in (1, 2):
        save(tmp_path / f"epoch_{i}{suffix}", {"w": torch.full((1000,), float(i))})
    with open(tmp_path / f"epoch_2{suffix}", "r+b") as file:
        file.truncate(3000)
    with pytest.raises(CheckpointError, match=rf"epoch_2\{suffix}.*truncated"):
        average(open_run(tmp_path))


def test_broken_link_is_refused(tmp_path):
    numbered(tmp_path, 2)
    (tmp_path / "last.pt").symlink_to("epoch_9.pt")
    with pytest.raises(CheckpointError, match=r"last\.pt"):
        open_run(tmp_path)


@pytest.mark.parametrize("out", ["swa.safetensors", "epoch_4.pt", "last.pt", "swa"])
def test_earlier_average_is_left_out(tmp_path, out):
    numbered(tmp_path, 3)
    average(open_run(tmp_path), out=tmp_path / out)
    run = open_run(tmp_path)
    assert numbers(run) == [1, 2, 3]
    assert run.left_out == ((tmp_path / out, "an average that ckptavg wrote"),)


def test_earlier_average_named_itself_is_taken(tmp_path):
    average(open_run(numbered(tmp_path, 2)), out=tmp_path / "swa.pt")
    assert names(open_run(tmp_path / "swa.pt")) == ["swa.pt"]


# What is a run


def test_open_run_needs_path():
    with pytest.raises(UsageError, match="no path"):
        open_run()


def test_missing_path_error_names_neighbours(tmp_path):
    numbered(tmp_path, 1)
    with pytest.raises(RunError, match=r"epoch_7\.pt does not exist.*epoch_1\.pt"):
        open_run(tmp_path / "epoch_7.pt")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("constnat", "Did you mean ROOT/constant?"),
        ("CONSTANT/", "Did you mean ROOT/constant?"),
        ("constnat/epoch_1.pt", "Did you mean ROOT/constant/epoch_1.pt?"),
        ("constnat/epoch_9.pt", "Did you mean ROOT/constant?"),
        ("constant/epohc_1.pt", "Did you mean ROOT/constant/epoch_1.pt?"),
        ("zebra", "ROOT holds ROOT/broken.pt, ROOT/constant, ROOT/swa.safetensors."),
        ("broken.pt", "ROOT/broken.pt is a link to a path that does not exist."),
    ],
)
def test_mistyped_path_error_suggests_path(tmp_path, typed, meant):
    numbered(tmp_path / "constant", 1)
    save_weight(tmp_path / "swa.safetensors")
    (tmp_path / "broken.pt").symlink_to("nowhere.pt")
    with pytest.raises(RunError) as caught:
        open_run(f"{tmp_path}/{typed}")
    assert caught.value.remedy == meant.replace("ROOT", str(tmp_path))


def test_open_checkpoint_error_suggests_path(tmp_path):
    numbered(tmp_path, 1)
    with pytest.raises(CheckpointError, match=r"does not exist\. Did you mean .*/epoch_1\.pt\?"):
        open_checkpoint(tmp_path / "epcoh_1.pt")


def test_glob_error_names_checkpoints_present(tmp_path):
    numbered(tmp_path / "run", 2)
    save_weight(tmp_path / "run" / "swa.pt", 7)
    with pytest.raises(RunError, match=r"no checkpoint matches 'epohc_\*\.pt'.*epoch_1\.pt"):
        open_run(tmp_path / "run", glob="epohc_*.pt")
    with pytest.raises(RunError, match=r"there are run/epoch_1\.pt, run/epoch_2\.pt"):
        open_run(tmp_path / "run", glob="runs/epoch_*.pt")


def test_empty_directory_is_refused(tmp_path):
    with pytest.raises(RunError, match="holds no checkpoint"):
        open_run(tmp_path)


def test_directory_of_other_state_is_refused(tmp_path):
    save_weight(tmp_path / "optimizer.pt")
    with pytest.raises(RunError, match="holds no checkpoint"):
        open_run(tmp_path)


def test_open_run_refuses_two_runs(tmp_path):
    for seed in ("seed1", "seed2"):
        numbered(tmp_path / seed, 2)
    with pytest.raises(RunError, match=r"2 runs: .*seed1, .*seed2"):
        open_run(tmp_path)


@pytest.mark.parametrize("is_finished", [False, True])
def test_open_run_refuses_two_hugging_face_runs(tmp_path, is_finished):
    for seed in ("seed1", "seed2"):
        if is_finished:
            hf_checkpoint(tmp_path / seed, 1000)
        for step in (500, 1000):
            hf_checkpoint(tmp_path / seed / f"checkpoint-{step}", step, step)
    with pytest.raises(RunError, match=r"2 runs: .*seed1, .*seed2"):
        open_run(tmp_path)


def test_open_run_takes_only_run_below(tmp_path):
    version = tmp_path / "lightning_logs" / "version_0"
    numbered(version / "checkpoints", 3)
    (version / "hparams.yaml").write_text("width: 8")
    (tmp_path / "lightning_logs" / "logs").mkdir()
    for path in (version, tmp_path / "lightning_logs", tmp_path):
        run = open_run(path)
        assert numbers(run) == [1, 2, 3]
        assert run.notes == (f"{path} holds no checkpoint itself: {version}/checkpoints is taken",)


def test_open_run_takes_only_hugging_face_run_below(tmp_path):
    hf_checkpoint(tmp_path / "gpt", 1000)
    for step in (500, 1000):
        hf_checkpoint(tmp_path / "gpt" / f"checkpoint-{step}", step, step)
    run = open_run(tmp_path)
    assert [checkpoint.step for checkpoint in run] == [500, 1000]
    assert f"{tmp_path} holds no checkpoint itself: {tmp_path}/gpt is taken" in run.notes


def test_open_run_refuses_runs_at_several_depths(tmp_path):
    numbered(tmp_path / "a", 2)
    numbered(tmp_path / "b" / "c", 2)
    with pytest.raises(RunError, match=r"holds 2 runs: [^ ]*/a, [^ ]*/b/c\. Name one"):
        open_run(tmp_path)
    run = open_run(tmp_path, skip="a")
    assert [str(c.path.parent) for c in run] == [str(tmp_path / "b" / "c")] * 2


@pytest.mark.parametrize("loose", [["best.pt"], ["model_7.pt"], ["best.pt", "last.pt"]])
@pytest.mark.parametrize("below", ["", "checkpoints"])
def test_loose_files_do_not_change_error_on_runs(tmp_path, loose, below):
    for seed in ("seed1", "seed2"):
        numbered(tmp_path / seed / below, 2)
    with pytest.raises(RunError) as without:
        open_run(tmp_path)
    for value, name in enumerate(loose):
        save_weight(tmp_path / name, value)
    with pytest.raises(RunError, match=r"holds 2 runs: .*seed1.*seed2") as caught:
        open_run(tmp_path)
    assert str(caught.value) == str(without.value)


def test_loose_file_beside_run_is_refused(tmp_path):
    numbered(tmp_path / "epochs", 2)
    save_weight(tmp_path / "best.pt", 7)
    with pytest.raises(RunError, match=r"holds best\.pt, and a run in epochs\. Name either"):
        open_run(tmp_path)


def test_series_beside_directory_with_run_is_taken(tmp_path):
    numbered(tmp_path, 2)
    numbered(tmp_path / "old", 2)
    run = open_run(tmp_path)
    assert [c.path.parent for c in run] == [tmp_path] * 2
    assert run.left_out == ((tmp_path / "old", "a run of its own"),)


def test_open_run_groups_files_by_directory(tmp_path):
    numbered(tmp_path / "a", 11)
    numbered(tmp_path / "b", 1)
    paths = [tmp_path / "a" / f"epoch_{i}.pt" for i in (10, 9)]
    run = open_run(*paths, tmp_path / "b" / "epoch_1.pt")
    assert [numbers(training) for training in run.trainings] == [[9, 10], [1]]


def test_open_run_takes_single_file(tmp_path):
    numbered(tmp_path, 3)
    run = open_run(str(tmp_path / "epoch_2.pt"))
    assert numbers(run) == [2]
    assert run.checkpoints[0].step == 2


def test_glob_keeps_matches_and_opens_nothing_else(tmp_path):
    numbered(tmp_path, 3)
    (tmp_path / "other_1.pt").write_bytes(b"damaged")
    run = open_run(tmp_path, glob="epoch_[23].pt")
    assert numbers(run) == [2, 3]
    assert [path.name for path, _ in run.left_out] == ["epoch_1.pt", "other_1.pt"]


def test_glob_without_match_is_refused(tmp_path):
    numbered(tmp_path, 3)
    with pytest.raises(RunError, match=r"no checkpoint matches 'x\*'"):
        open_run(tmp_path, glob="x*")


def test_key_names_entry_of_every_checkpoint(tmp_path):
    for i in (1, 2):
        weights = {"w": torch.tensor([float(i)])}
        torch.save({"state_dict": weights, "ema": {"a": {"v": weights["w"]}}}, tmp_path / f"{i}.pt")
    run = open_run(tmp_path, key="ema.a")
    assert [list(c.tensors) for c in run] == [["v"], ["v"]]
    with pytest.raises(CheckpointError, match=r"no entry 'ema\.b'"):
        open_run(tmp_path, key="ema.b")


# Hugging Face


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_hugging_face_checkpoints_are_ordered_by_step(tmp_path, suffix):
    for step in (500, 1000, 1500):
        hf_checkpoint(tmp_path / f"checkpoint-{step}", step, step, suffix)
    run = open_run(tmp_path)
    assert names(run) == ["checkpoint-500", "checkpoint-1000", "checkpoint-1500"]
    assert [(c.step, c.record.epoch) for c in run] == [(500, 5.0), (1000, 10.0), (1500, 15.0)]


def test_trainer_record_ends_at_its_own_step(tmp_path):
    history = [
        {"step": 500, "learning_rate": 0.3, "loss": 1.5},
        {"step": 500, "eval_loss": 1.25},
        {"step": 1000, "learning_rate": 0.1, "loss": 0.5},
    ]
    hf_checkpoint(tmp_path / "checkpoint-500", 1, 500, history=history)
    (checkpoint,) = open_run(tmp_path)
    assert checkpoint.record.lr == 0.3
    assert checkpoint.record.metrics == {"loss": 1.5, "eval_loss": 1.25}


def test_root_model_that_repeats_checkpoint_counts_once(tmp_path):
    for step in (500, 1000):
        hf_checkpoint(tmp_path / f"checkpoint-{step}", step, step)
    hf_checkpoint(tmp_path, 1000)
    run = open_run(tmp_path)
    assert names(run) == ["checkpoint-500", "checkpoint-1000"]
    assert (tmp_path, "repeats checkpoint-1000") in run.left_out


@pytest.mark.parametrize("name", ["out", "bert-2", "7"])
def test_root_model_of_its_own_comes_last(tmp_path, name):
    for step in (500, 1000):
        hf_checkpoint(tmp_path / name / f"checkpoint-{step}", step, step)
    hf_checkpoint(tmp_path / name, 1200)
    assert names(open_run(tmp_path / name)) == ["checkpoint-500", "checkpoint-1000", name]


def test_checkpoint_directory_without_weights_is_refused(tmp_path):
    """What a crash while saving leaves: passed over, the run would end earlier than it seems."""
    for step in (500, 1000, 1500):
        hf_checkpoint(tmp_path / f"checkpoint-{step}", step, step)
    (tmp_path / "checkpoint-1500" / "model.safetensors").unlink()
    with pytest.raises(CkptavgError, match="checkpoint-1500"):
        len(open_run(tmp_path))


def test_checkpoint_directory_is_taken_alone(tmp_path):
    hf_checkpoint(tmp_path / "checkpoint-500", 1, 500)
    assert names(open_run(tmp_path / "checkpoint-500")) == ["checkpoint-500"]


def test_checkpoint_directories_form_run(tmp_path):
    for step in (500, 1000):
        hf_checkpoint(tmp_path / f"checkpoint-{step}", step, step)
    run = open_run(tmp_path / "checkpoint-1000", tmp_path / "checkpoint-500")
    assert len(run.trainings) == 1
    assert names(run) == ["checkpoint-500", "checkpoint-1000"]


# Selections


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (lambda run: run.last(3), [10, 11, 12]),
        (lambda run: run.last(99), list(range(1, 13))),
        (lambda run: run.every(5), [2, 7, 12]),
        (lambda run: run.every(1), list(range(1, 13))),
        (lambda run: run.every(99), [12]),
        (lambda run: run.cycle(4), [4, 8, 12]),
        (lambda run: run.cycle(4, 2), [2, 6, 10]),
        (lambda run: run.cycle(4, 1), [1, 5, 9]),
        (lambda run: run.cycle(4, 6), [6, 10]),
        (lambda run: run.cycle(1), list(range(1, 13))),
        (lambda run: run.cycle(5), [5, 10]),
        (lambda run: run.steps(300, 500), [3, 4, 5]),
        (lambda run: run.steps(first=1100), [11, 12]),
        (lambda run: run.steps(last=250), [1, 2]),
        (lambda run: run.steps(201, 299.5), None),
        (lambda run: run.steps(200).every(3).last(2), [9, 12]),
        (lambda run: run.cycle(4).last(2), [8, 12]),
    ],
)
def test_selection_gives_part_of_run(tmp_path, select, expected):
    run = open_run(numbered(tmp_path, 12, global_step=[100 * i for i in range(1, 13)]))
    if expected is None:
        with pytest.raises(RunError, match="leaves none of 12 checkpoints"):
            select(run)
    else:
        assert numbers(select(run)) == expected
    assert len(run) == 12  # the run itself stays as it was


@pytest.mark.parametrize(
    "select",
    [
        lambda run: run.last(0),
        lambda run: run.last(-1),
        lambda run: run.every(0),
        lambda run: run.cycle(0),
        lambda run: run.cycle(4, 0),
        lambda run: run.best(0, "acc", "max"),
        lambda run: run.sample(0),
        lambda run: run.best(1, "acc", "highest"),
    ],
)
def test_selection_of_less_than_one_is_refused(tmp_path, select):
    run = open_run(numbered(tmp_path, 2, acc=[1.0, 2.0]))
    with pytest.raises(UsageError, match="expected"):
        select(run)


def test_cycle_longer_than_run_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"leaves none of 2 .*Their steps are"):
        open_run(numbered(tmp_path, 2)).cycle(3)


def test_steps_refuses_run_without_steps(tmp_path):
    save_weight(tmp_path / "model.pt")
    with pytest.raises(RunError, match="records no step or epoch and has none in its name"):
        open_run(tmp_path).steps(1)


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ([0.1] * 4, [1, 2, 3, 4]),
        ([0.04, 0.03, 0.02, 0.01] * 3, [4, 8, 12]),  # SWA's cyclical schedule
        ([0.05, 0.01, 0.05, 0.01, 0.05], [2, 4]),  # FGE, saved every half cycle
        ([0.01, 0.05, 0.01, 0.05, 0.01], [1, 3, 5]),
        ([0.4, 0.3, 0.2, 0.1], [4]),
        ([0.1, 0.1 * (1 + 1e-9), 0.1, 0.1 * (1 - 1e-9)], [1, 2, 3, 4]),
        ([0.05, 0.01, 0.01, 0.05, 0.01, 0.01], [2, 3, 5, 6]),
        ([0.0, 0.1, 0.0], [1, 3]),
        ([0.3], [1]),
        ([0.05, 0.05, 0.01, 0.05, 0.05, 0.01], [3, 6]),
        ([0.1, 0.1, 0.1, 0.01, 0.01, 0.01], [4, 5, 6]),
        ([0.05, 0.05, 0.05, 0.01, 0.05, 0.05, 0.05, 0.01], [4, 8]),
        ([0.01, 0.03, 0.03, 0.03, 0.05, 0.01], [1, 6]),
    ],
)
def test_at_lr_min_takes_minima(tmp_path, rates, expected):
    run = open_run(numbered(tmp_path, len(rates), lr=rates))
    assert numbers(run.at_lr_min()) == expected


def test_at_lr_min_reads_rate_of_first_group(tmp_path):
    for i, rate in enumerate([0.3, 0.1, 0.3, 0.1], 1):
        optimizer = {"state": {}, "param_groups": [{"lr": rate}, {"lr": 9.0}]}
        save_weight(tmp_path / f"epoch_{i}.pt", i, epoch=i, optimizer=optimizer)
    assert numbers(open_run(tmp_path).at_lr_min()) == [2, 4]


def test_at_lr_min_needs_recorded_rate(tmp_path):
    numbered(tmp_path, 2, lr=[0.1, 0.1])
    save_weight(tmp_path / "epoch_3.pt")
    with pytest.raises(
        RunError, match=r"no learning rate is recorded in .*epoch_3\.pt.*`\.cycle\(C\)`"
    ):
        open_run(tmp_path).at_lr_min()


@pytest.mark.parametrize(
    ("count", "mode", "expected"),
    [(1, "max", [2]), (2, "max", [2, 5]), (2, "min", [1, 4]), (9, "max", [1, 2, 3, 4, 5])],
)
def test_best_keeps_order_of_run(tmp_path, count, mode, expected):
    run = open_run(numbered(tmp_path, 5, acc=[0.1, 0.9, 0.5, 0.2, 0.7]))
    assert numbers(run.best(count, "acc", mode)) == expected


def test_best_takes_dotted_metric_and_skips_nan(tmp_path):
    metrics = [{"val": {"loss": loss}} for loss in (0.3, float("nan"), 0.1)]
    run = open_run(numbered(tmp_path, 3, metrics=metrics))
    assert numbers(run.best(2, "metrics.val.loss", "min")) == [1, 3]


def test_best_error_names_recorded_metrics(tmp_path):
    run = open_run(numbered(tmp_path, 2, acc=[1.0, 2.0], loss=[2.0, 1.0]))
    with pytest.raises(RunError, match=r"records no metric 'top1'.*acc, loss"):
        run.best(1, "top1", "max")
    with pytest.raises(RunError, match="records none at all"):
        open_run(numbered(tmp_path / "bare", 2)).best(1, "top1", "max")


def test_sample_follows_seed_without_replacement(tmp_path):
    run = open_run(numbered(tmp_path, 12))
    samples = [numbers(run.sample(5, seed)) for seed in range(20)]
    assert all(sorted(set(sample)) == sample and len(sample) == 5 for sample in samples)
    assert samples == [numbers(run.sample(5, seed)) for seed in range(20)]
    assert len({tuple(sample) for sample in samples}) > 10
    assert set().union(*samples) == set(range(1, 13))


def test_sample_of_too_many_is_refused(tmp_path):
    run = open_run(numbered(tmp_path, 3))
    assert numbers(run.sample(3)) == [1, 2, 3]
    with pytest.raises(RunError, match="cannot draw 4 of 3"):
        run.sample(4)


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        (lambda run: run.last(1), [[4], [6]]),
        (lambda run: run.every(3), [[1, 4], [3, 6]]),
        (lambda run: run.cycle(2), [[2, 4], [2, 4, 6]]),
        (lambda run: run.cycle(5), [[5]]),
        (lambda run: run.steps(3, 5), [[3, 4], [3, 4, 5]]),
        (lambda run: run.at_lr_min(), [[2, 4], [2, 4, 6]]),
        (lambda run: run.best(1, "acc", "max"), [[4], [6]]),
    ],
)
def test_selection_applies_to_each_run(tmp_path, select, expected):
    for name, count in (("a", 4), ("b", 6)):
        epochs = list(range(1, count + 1))
        rates = [0.1 if i % 2 else 0.01 for i in epochs]
        numbered(tmp_path / name, count, epoch=epochs, acc=epochs, lr=rates)
    run = select(open_run(tmp_path / "a", tmp_path / "b"))
    assert [numbers(training) for training in run.trainings] == expected


def test_sample_applies_to_each_run(tmp_path):
    for name in ("a", "b"):
        numbered(tmp_path / name, 5)
    run = open_run(tmp_path / "a", tmp_path / "b").sample(2)
    assert [len(training) for training in run.trainings] == [2, 2]


def test_as_run_keeps_given_order(tmp_path):
    run = open_run(numbered(tmp_path, 3))
    by_hand = as_run([run.checkpoints[2], run.checkpoints[0]])
    assert numbers(by_hand) == [3, 1]
    assert as_run(run) is run


@pytest.mark.parametrize(
    ("names_given", "expected", "words"),
    [
        (["loss=0.5-epoch=2", "loss=0.1-epoch=3", "loss=0.3-epoch=1"], [1, 2, 3], ""),
        (["seed0_epoch1", "seed1_epoch1"], [1, 1], "share the step 1"),
        (["epoch_1", "epoch_2", "model_best"], [1, 2, None], "no step is known for model_best"),
    ],
)
def test_steps_in_names_are_read_and_doubts_noted(tmp_path, names_given, expected, words):
    for i, name in enumerate(names_given):
        save_weight(tmp_path / f"{name}.pt", float(i))
    run = open_run(tmp_path)
    assert [c.step for c in run] == expected
    assert any(words in note for note in run.notes) if words else not run.notes


def test_run_notes_disagreeing_steps_and_epochs(tmp_path):
    for step, epoch in ((50, 1), (100, 0), (150, 1)):
        save_weight(tmp_path / f"s{step}.pt", step, epoch=epoch, step=step)
    run = open_run(tmp_path)
    assert [c.step for c in run] == [50, 100, 150]
    assert any("disagree" in note for note in run.notes)


def test_adapter_without_configuration_is_refused(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    save_weight(tmp_path / "checkpoint-10" / "adapter_model.safetensors", 1.0)
    with pytest.raises(RunError, match=r"an adapter without its adapter_config.json"):
        open_run(tmp_path)


def test_open_run_names_runs_below_loose_file(tmp_path):
    save_weight(tmp_path / "sgd_160.pt", 1.0)
    numbered(tmp_path / "constant", 2)
    numbered(tmp_path / "cyclical", 2)
    with pytest.raises(RunError, match=r"2 runs: .*constant, .*cyclical"):
        open_run(tmp_path)


def test_run_below_another_is_left_out(tmp_path):
    numbered(tmp_path, 2)
    numbered(tmp_path / "old", 2)
    run = open_run(tmp_path)
    assert numbers(run) == [1, 2]
    assert (tmp_path / "old", "a run of its own") in run.left_out


def test_refreshed_checkpoint_keeps_its_place(tmp_path):
    from ckptavg.averaging.compute import read_state_dict
    from ckptavg.batchnorm.checkpoints import prepare_copy
    from ckptavg.outputs.provenance import build_provenance
    from ckptavg.outputs.writing import open_targets

    numbered(tmp_path / "run", 2)
    for checkpoint in open_run(tmp_path / "run"):
        made = build_provenance("none", [checkpoint], [1.0], Statistics("recomputed"))
        out = tmp_path / f"{'ba'[int(checkpoint.step) - 1]}.pt"
        target = prepare_copy(checkpoint, out, made, overwrite=False)
        with open_targets([target]) as outputs:
            outputs.writers[0].write_state_dict(read_state_dict(checkpoint))
    assert names(open_run(tmp_path / "a.pt", tmp_path / "b.pt")) == ["b.pt", "a.pt"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_recomputed_copy_counts_once_beside_source(tmp_path, suffix):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    run = tmp_path / "run"
    for i in (1, 2, 3):
        save(run / f"epoch_{i}{suffix}", model.state_dict() | {"0.bias": torch.full((2,), i)})
    how = StatisticsPass(model, [torch.randn(8, 3)], Runtime(torch.device("cpu")))
    copy = run / f"epoch_3_bn{suffix}"
    update_checkpoint(open_checkpoint(run / f"epoch_3{suffix}"), copy, how)
    moved = run.rename(tmp_path / "moved")  # since then the path in its provenance is another
    opened = open_run(moved)
    assert names(opened) == [f"epoch_{i}{suffix}" for i in (1, 2, 3)]
    why = f"a copy of epoch_3{suffix} with recomputed statistics"
    assert opened.left_out == ((moved / copy.name, why),)
    assert any(copy.name in note for note in opened.notes)
    assert names(open_run(moved, glob="*_bn*")) == [copy.name]


def test_aliases_are_compared_in_linear_time(tmp_path, monkeypatch):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        for i in range(300):
            save_weight(tmp_path / f"best_{i}.pt", i)
    finally:
        torch.serialization.set_crc32_options(before)
    blocks, read = duplicates._blocks, []
    monkeypatch.setattr(duplicates, "_blocks", lambda *a: read.append(a) or blocks(*a))
    assert len(open_run(tmp_path)) == 300
    assert len(read) == 300


# Files of one name in several directories


def test_step_directories_of_one_file_name_are_one_run(tmp_path):
    for i in (9, 10, 100):
        save_weight(tmp_path / f"epoch=1-step={i}" / "ema_2.pt", i)
    run = open_run(*tmp_path.glob("*/ema_2.pt"))
    assert [c.step for c in run.last(2)] == [10, 100]
    assert [c.path.parent.name for c in run] == [f"epoch=1-step={i}" for i in (9, 10, 100)]
    assert len(open_run(*tmp_path.iterdir()).trainings) == 1


def test_other_directories_with_one_file_name_are_runs(tmp_path):
    paths = [save_weight(tmp_path / f"seed{i}" / "final.pt", i) for i in (1, 2)]
    paths += [save_weight(tmp_path / f"{run}_step_{i}" / "f.pt", i) for run in "ab" for i in (1, 2)]
    paths += [save_weight(tmp_path / place / "step_1" / "f.pt") for place in "cd"]
    trainings = open_run(*paths).trainings
    assert sorted(len(training) for training in trainings) == [1, 1, 1, 1, 2, 2]


def test_neighbours_in_step_directory_stay_together(tmp_path):
    for step in (1, 2):
        numbered(tmp_path / f"step_{step}", 2)
    trainings = open_run(*tmp_path.glob("*/*.pt")).trainings
    assert [[c.path.name for c in t] for t in trainings] == [["epoch_1.pt", "epoch_2.pt"]] * 2


def test_open_run_names_runs_further_down(tmp_path):
    for version in ("version_0", "version_1"):
        below = tmp_path / "lightning_logs" / version / "checkpoints"
        save_weight(below / "epoch=0-step=2.ckpt")
    with pytest.raises(RunError, match=r"holds 2 runs: .*version_0.*version_1"):
        open_run(tmp_path)


@pytest.mark.parametrize(
    ("series", "patterns"),
    [
        (("{}_net_G_A.pth", "{}_net_G_B.pth"), ("*_net_G_A.pth", "*_net_G_B.pth")),
        (("netD_epoch_{}.pt", "netG_epoch_{}.pt"), ("netD_epoch_*.pt", "netG_epoch_*.pt")),
        (("seed0_epoch_{}.pt", "seed1_epoch_{}.pt"), ("seed0_epoch_*.pt", "seed1_epoch_*.pt")),
        (("actor_{}.pt", "critic_{}.pt", "target_{}.pt"), ("actor_*.pt",)),
    ],
)
def test_series_of_same_steps_are_refused(tmp_path, series, patterns):
    for step in (5, 10):
        for i, name in enumerate(series):
            save_weight(tmp_path / name.format(step), float(i))
    with pytest.raises(
        RunError, match=re.escape(f"Select one with `glob='{patterns[0]}'`")
    ) as error:
        average(open_run(tmp_path))
    assert all(pattern in str(error.value) for pattern in patterns)
    average(open_run(tmp_path, glob=patterns[0]))
    average(open_run(*sorted(tmp_path.iterdir())))  # who names each one means it


def test_unnumbered_directory_among_steps_is_left_out(tmp_path):
    for name in ("checkpoint-1", "checkpoint-2", "best", "."):
        save_weight(tmp_path / "run" / name / "model.safetensors", float(len(name)))
    run = open_run(tmp_path / "run")
    assert (tmp_path / "run" / "best", "without a number, unlike its neighbours") in run.left_out


def test_selection_notes_fewer_than_asked(tmp_path):
    numbered(tmp_path / "a", 3, val_acc=[0.1, 0.2, float("nan")])
    run = open_run(tmp_path / "a")
    assert run.last(50).notes == ("the last 50 are asked for, and there are only 3",)
    (note, _) = run.best(3, "val_acc").notes
    assert note == "the best 3 are asked for, and there are only 2"
    assert run.last(3).notes == run.last(1).notes == ()


def test_last_notes_run_with_fewer_than_asked(tmp_path):
    numbered(tmp_path / "a", 3)
    numbered(tmp_path / "b", 1)
    (note,) = open_run(tmp_path / "a", tmp_path / "b").last(2).notes
    assert note == f"the last 2 are asked for, and there is only 1 in {tmp_path / 'b'}"


@pytest.mark.parametrize(
    ("metric", "meant"),
    [
        ("val_ac", "Did you mean val_acc?"),
        ("acc", "Did you mean val_acc or best_acc?"),
        ("val/loss", "Did you mean val_loss?"),
        ("bleu", "It records val_acc, val_loss, best_acc."),
    ],
)
def test_best_error_suggests_metric(tmp_path, metric, meant):
    numbered(tmp_path, 2, val_acc=[0.1, 0.2], val_loss=[2.0, 1.0], best_acc=[0.1, 0.2])
    with pytest.raises(RunError) as caught:
        open_run(tmp_path).best(1, metric)
    assert caught.value.remedy == meant
