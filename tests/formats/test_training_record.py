"""Step, epoch, learning rate and metrics as trainers write them beside the weights."""

from __future__ import annotations

import argparse
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptavg.formats import Record, open_checkpoint
from ckptavg.formats.huggingface.trainer_state import read_record


def weights() -> dict[str, torch.Tensor]:
    return torch.nn.Linear(2, 2).state_dict()


def optimizer(lr: float) -> dict:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 100.0}]
    return torch.optim.SGD(groups, lr=lr, momentum=0.9).state_dict()


@pytest.fixture
def recorded(tmp_path):
    """What is read back of the record in a file that torch.save wrote."""

    def save_and_open(value, key=None) -> Record:
        torch.save(value, tmp_path / "checkpoint.pt")
        return open_checkpoint(tmp_path / "checkpoint.pt", key).record

    return save_and_open


BEST = {"acc": 0.5}
TRAINERS = {
    "ImageNet example": (
        lambda: {"epoch": 5, "arch": "resnet18", "state_dict": weights(), "best_acc1": 71.5,
                 "optimizer": optimizer(0.1), "scheduler": {"last_epoch": 5, "_step_count": 6}},
        Record(None, 5, 0.1, {"best_acc1": 71.5}),
    ),
    "Lightning": (
        lambda: {"epoch": 4, "global_step": 5000, "pytorch-lightning_version": "2.5.0",
                 "state_dict": weights(), "loops": {"fit_loop": {"epoch_progress": {"done": 5}}},
                 "callbacks": {"ModelCheckpoint": {"best_model_score": 0.5}},
                 "optimizer_states": [optimizer(0.02)], "lr_schedulers": [{"last_epoch": 5}],
                 "hyper_parameters": {"lr": 0.3, "width": 8}},
        Record(5000, 4, 0.02, {}),
    ),
    "nanoGPT": (
        lambda: {"model": weights(), "optimizer": optimizer(6e-4), "iter_num": 2000,
                 "best_val_loss": 2.75, "config": {"batch_size": 12}},
        Record(2000, None, 6e-4, {"best_val_loss": 2.75}),
    ),
    "timm": (
        lambda: {"epoch": 9, "arch": "vit", "state_dict": weights(), "optimizer": optimizer(1e-3),
                 "version": 2, "args": argparse.Namespace(lr=0.5, epochs=300), "metric": 80.25},
        Record(None, 9, 1e-3, {"metric": 80.25}),
    ),
    "detectron": (
        lambda: {"model": weights(), "iteration": 89999, "optimizer": optimizer(2e-3)},
        Record(89999, None, 2e-3, {}),
    ),
    "tutorial": (
        lambda: {"epoch": 2, "model_state_dict": weights(),
                 "optimizer_state_dict": optimizer(0.5), "loss": 0.25, "lr": 0.125},
        Record(None, 2, 0.125, {"loss": 0.25}),
    ),
    "nested metrics and NumPy numbers": (
        lambda: {"step": np.int64(7), "epoch": np.float32(1.5), "lr": np.float64(0.25),
                 "model": weights(), "metrics": {"val": {"acc": np.float32(0.5), "n": 10}},
                 "loss": np.float16(2.0), "done": True, "note": "x", "curve": [1.0, 2.0]},
        Record(7, 1.5, 0.25, {"metrics.val.acc": 0.5, "metrics.val.n": 10, "loss": 2.0}),
    ),
    "the best so far is the last": (
        lambda: {"model": weights(), "metrics": BEST, "best": BEST},
        Record(metrics={"metrics.acc": 0.5, "best.acc": 0.5}),
    ),
    "a loop of one's own": (
        lambda: {"net": weights(), "ep": 12, "it": 750, "val_acc": 0.5, "current_lr": 0.01,
                 "optim": optimizer(0.01), "sched": {"gamma": 0.1, "last_epoch": 12}},
        Record(None, 12, 0.01, {"val_acc": 0.5}),
    ),
    "YOLO": (
        lambda: {"epoch": 3, "best_fitness": 0.5, "model": weights(), "updates": 480,
                 "train_metrics": {"metrics/mAP50(B)": 0.25, "val/box_loss": 1.5},
                 "train_args": {"lr0": 0.01, "box": 7.5}, "version": "8.3"},
        Record(None, 3, None, {"best_fitness": 0.5, "train_metrics.metrics/mAP50(B)": 0.25,
                               "train_metrics.val/box_loss": 1.5}),
    ),
    "means of an epoch beside its clocks": (
        lambda: {"model": weights(), "train_loss_epoch": 0.5, "best_loss_epoch": 7, "saved_time": 9,
                 "lr_backbone": 0.1, "learningRate": 0.2, "success_rate": 0.75, "itersDone": 3},
        Record(metrics={"train_loss_epoch": 0.5, "success_rate": 0.75}),
    ),
    "rates by group": (
        lambda: {"model": weights(), "lr": [0.1, 0.01], "steps": 3.0},
        Record(3, None, 0.1, {}),
    ),
    "numbers among the tensors": (
        lambda: weights() | {"epoch": 3, "val_loss": 0.5}, Record(None, 3, None, {"val_loss": 0.5})
    ),
    "nothing but weights": (weights, Record()),
}  # fmt: skip


@pytest.mark.parametrize(("state", "expected"), TRAINERS.values(), ids=TRAINERS)
def test_record_reads_trainers(state, expected, recorded):
    assert recorded(state()) == expected


def test_record_step_takes_first_known_name(recorded):
    assert recorded({"model": weights(), "iteration": 3, "global_step": 10}).step == 10
    assert recorded({"model": weights(), "step": "ten", "iteration": 3}).step == 3


@pytest.mark.parametrize("step", [1.5, True, "7", None, float("nan"), float("inf"), [3]])
def test_record_step_is_whole_number(recorded, step):
    assert recorded({"model": weights(), "step": step}).step is None


@pytest.mark.parametrize("epoch", [True, "7", None, float("nan"), float("inf")])
def test_record_epoch_is_finite_number(recorded, epoch):
    assert recorded({"model": weights(), "epoch": epoch}).epoch is None


def test_record_reads_values_beside_nested_entry(recorded):
    tree = {"state": {"model": weights()}, "epoch": 3, "acc": 0.5}
    assert recorded(tree, "state.model") == Record(None, 3, None, {"acc": 0.5})


@pytest.mark.parametrize("name", ["step", "epoch", "lr", "loss"])
def test_record_ignores_numbers_beyond_float(recorded, name):
    found = recorded({"model": weights(), name: 10**400, "acc": 0.5})
    assert found.metrics["acc"] == 0.5
    for value in (found.step, found.epoch, found.lr, *found.metrics.values()):
        assert value is None or float(value) == value


def test_record_reads_safetensors_metadata(tmp_path):
    metadata = {"format": "pt", "step": "120", "epoch": "1.5", "lr": "1e-3", "loss": "-0.5"}
    save_file(weights(), tmp_path / "x.safetensors", metadata | {"run": "a", "odd": "²"})
    found = open_checkpoint(tmp_path / "x.safetensors").record
    assert found == Record(120, 1.5, 1e-3, {"loss": -0.5})


@pytest.mark.parametrize("digits", [400, 5000])
def test_record_ignores_metadata_beyond_float(tmp_path, digits):
    save_file(weights(), tmp_path / "x.safetensors", {"step": "7", "hash": "1" * digits})
    assert open_checkpoint(tmp_path / "x.safetensors").record.step == 7


HISTORY = [
    {"epoch": 0.5, "learning_rate": 5e-5, "loss": 2.0, "step": 50},
    {"epoch": 0.5, "eval_loss": 1.5, "eval_accuracy": 0.5, "step": 50},
    {"epoch": 1.0, "learning_rate": 2.5e-5, "loss": 1.0, "step": 100},
    {"epoch": 1.0, "eval_loss": 1.25, "step": 100},
    {"epoch": 2.0, "learning_rate": 0.0, "loss": 0.5, "step": 200},
]


def trainer_state(tmp_path, content) -> Record | None:
    path = tmp_path / "trainer_state.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_record(tmp_path)


def test_trainer_state_is_read_up_to_its_step(tmp_path):
    state = {"global_step": 100, "epoch": 1.0, "best_metric": 1.25, "log_history": HISTORY}
    assert trainer_state(tmp_path, state) == Record(
        100, 1.0, 2.5e-5, {"loss": 1.0, "eval_loss": 1.25}
    )


@pytest.mark.parametrize(
    ("saved", "expected"),
    [
        (100, {"loss": 1.0, "eval_loss": 1.25}),
        (150, {}),  # between two evaluations: neither is of these weights
        (200, {"loss": 0.5}),
        (None, {}),
    ],
)
def test_trainer_state_metrics_belong_to_their_step(tmp_path, saved, expected):
    state = {"global_step": saved, "log_history": HISTORY}
    assert trainer_state(tmp_path, state).metrics == expected


@given(
    saved=st.integers(1, 9),
    logged=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=12),
)
def test_trainer_state_drops_metrics_of_other_steps(tmp_path_factory, saved, logged):
    history = [{"step": step, "eval_loss": value} for step, value in logged]
    found = trainer_state(
        tmp_path_factory.mktemp("run"), {"global_step": saved, "log_history": history}
    )
    own = [value for step, value in logged if step == saved]
    assert found.metrics == ({"eval_loss": own[-1]} if own else {})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", None),
        ("[]", None),
        ("[" * 200_000, None),
        ('{"global_step": 3}', Record(3)),
        ('{"global_step": 3, "log_history": 7}', Record(3)),
        ('{"global_step": 3, "log_history": [1, null, {"step": "x", "loss": 2}]}',
         Record(3)),
        ('{"global_step": "3", "epoch": true}', Record()),
        ('{"global_step": ' + "9" * 400 + "}", Record()),
        ('{"global_step": 3, "log_history": [{"loss": ' + "9" * 400 + "}]}", Record(3)),
    ],
    ids=lambda v: str(v)[:50],
)  # fmt: skip
def test_trainer_state_tolerates_odd_content(tmp_path, content, expected):
    assert trainer_state(tmp_path, content) == expected


def test_trainer_state_absent_is_none(tmp_path):
    assert read_record(tmp_path) is None


# ------------------------------------------------------------------------- tensors for numbers


@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
     torch.int16, torch.int8, torch.uint8],
    ids=str,
)  # fmt: skip
def test_record_reads_scalar_tensors(recorded, dtype):
    value = torch.tensor(3, dtype=dtype)
    tree = {"model": weights(), "global_step": value, "epoch": value, "metrics": {"acc": value}}
    assert recorded(tree) == Record(3, 3, None, {"metrics.acc": 3})


def test_record_reads_scalar_of_larger_storage(recorded):
    losses = torch.tensor([0.5, 0.25, 0.125])
    assert recorded({"model": weights(), "loss": losses[1]}).metrics == {"loss": 0.25}


@pytest.mark.parametrize(
    "value",
    [torch.tensor(True), torch.tensor(1j), torch.zeros(1), torch.zeros(0)],
    ids=["bool", "complex", "vector", "empty"],
)
def test_record_metrics_exclude_other_tensors(recorded, value):
    assert recorded({"model": weights(), "x": value}).metrics == {}


def test_record_metrics_exclude_counters_of_ema(recorded):
    ema = {"bn.running_mean": torch.zeros(3), "bn.num_batches_tracked": torch.tensor(7)}
    assert recorded({"model": weights(), "ema": ema}).metrics == {}


def test_record_limits_tensors_read(recorded):
    tree = {"model": weights()} | {f"m{i}": torch.tensor(1.0) for i in range(1000)}
    assert 0 < len(recorded(tree).metrics) < 1000


# ----------------------------------------------------------------------------- one level down


def test_record_reads_composer_timestamp(recorded):
    clock = {"Timestamp": {"epoch": 2, "batch": 300, "sample": 9600}}
    state = {"model": weights(), "timestamp": clock, "optimizers": {"SGD": optimizer(0.25)}}
    assert recorded({"state": state, "rng": []}) == Record(300, 2, 0.25, {})


def test_record_reads_fairseq_num_updates(recorded):
    tree = {
        "model": weights(),
        "optimizer_history": [{"num_updates": 100}, {"num_updates": 500}],
        "last_optimizer_state": optimizer(0.5),
        "extra_state": {"val_loss": 2.0, "train_iterator": {"epoch": 3}},
    }
    assert recorded(tree) == Record(500, None, 0.5, {"extra_state.val_loss": 2.0})


CLOCKS = {
    "icefall": (
        {"batch_idx_train": 28000, "cur_epoch": 5, "best_train_epoch": 3, "average_period": 200},
        (28000, 5),
    ),
    "mmengine": ({"meta": {"epoch": 2, "iter": 300, "seed": 7, "hook_msgs": {}}}, (300, 2)),
    "mmcv, of an early version": ({"meta": {"mmcv_version": "1.0", "iter": 300}}, (300, None)),
    "torchtune": ({"steps_run": 40, "epochs_run": 1, "total_epochs": 3, "seed": 1}, (40, 1)),
    "an epoch beside a step further down": (
        {"epoch": 4, "trainer": {"progress": {"global_step": torch.tensor(900)}}}, (900, 4),
    ),
    "the step beside wins": ({"step": 3, "meta": {"iter": 300}}, (3, None)),
    "an optimizer's own steps": (
        {"state": {"param_groups": [{"lr": 0.5}], "state": {}, "step": 7}}, (None, None),
    ),
    "a list": ({"meta": [{"iter": 3}], "progress": 0.5}, (None, None)),
}  # fmt: skip


@pytest.mark.parametrize(("beside", "position"), CLOCKS.values(), ids=CLOCKS)
def test_record_reads_clocks_of_trainers(recorded, beside, position):
    found = recorded({"model": weights(), **beside})
    assert (found.step, found.epoch) == position


@pytest.mark.parametrize("parent", ["/runs/x", r"C:\runs\x", r"D:\my runs", r"\\server\share"])
def test_record_reads_lightning_scores_of_any_system(tmp_path, parent):
    separator = "\\" if "\\" in parent else "/"
    kept = {f"{parent}{separator}epoch={e}.ckpt": torch.tensor(e / 4) for e in (2, 3)}
    callbacks = {"ModelCheckpoint": {"monitor": "val_loss", "best_k_models": kept}}
    torch.save({"state_dict": weights(), "callbacks": callbacks}, tmp_path / "epoch=3.ckpt")
    assert open_checkpoint(tmp_path / "epoch=3.ckpt").record.metrics == {"val_loss": 0.75}


@pytest.mark.parametrize(
    "odd",
    [
        {"timestamp": "2026-01-01"},
        {"timestamp": {"Timestamp": 3}},
        {"optimizer_history": []},
        {"optimizer_history": [None]},
        {"optimizers": {}},
        {"callbacks": [1]},
        {"callbacks": {"a": None, "b": {"monitor": 3}, "c": {"monitor": "x"}}},
    ],
    ids=str,
)
def test_record_tolerates_odd_clocks(recorded, odd):
    assert recorded({"model": weights(), "epoch": 3, **odd}).epoch == 3


def test_record_ignores_negative_epoch(recorded):
    assert recorded({"model": weights(), "epoch": -1}) == Record()


def test_record_of_many_callbacks_stays_within_limits(tmp_path, open_within_limits):
    state = {"monitor": "loss", "best_k_models": {f"/a/{i}.ckpt": 1.0 for i in range(50_000)}}
    callbacks = {f"callback {i}": dict(state, monitor=f"loss{i}") for i in range(200)}
    torch.save({"model": weights(), "callbacks": callbacks}, tmp_path / "7.ckpt")
    assert open_within_limits(tmp_path / "7.ckpt") == "opened\n"
