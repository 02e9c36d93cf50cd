"""Lightning: hyperparameters of any class, links, averages kept by callbacks, monitored metrics."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import names
from layouts import Lightning, lightning_module, lightning_trainer, others_at_work, train_lightning

from ckptavg import average, open_run

pytest.importorskip("lightning")


@pytest.fixture(scope="module")
def run(written):
    return written(next(x for x in [Lightning()]))


@pytest.fixture(scope="module")
def averaged(run, tmp_path_factory):
    return average(open_run(run.path), out=tmp_path_factory.mktemp("out") / "average.ckpt")


def test_lightning_output_keeps_hyperparameters(averaged):
    with others_at_work():
        module = lightning_module().load_from_checkpoint(averaged, weights_only=False)
    assert module.hparams.width == 5
    assert module.hparams.args == argparse.Namespace(lr=0.01)
    assert module.hparams.root == Path("data")
    assert module.hparams.schedule is None


def test_lightning_output_validates_in_trainer(averaged):
    loader = torch.utils.data.DataLoader(torch.rand(4, 3, 8, 8), batch_size=4)
    with others_at_work():
        module = lightning_module()(width=5)
        trainer = lightning_trainer()
        (measured,) = trainer.validate(
            module, loader, ckpt_path=averaged, verbose=False, weights_only=False
        )
        expected = lightning_module().load_from_checkpoint(averaged, weights_only=False)
        (direct,) = trainer.validate(expected, loader, verbose=False)
    assert measured == direct
    assert measured["val_loss"] > 0


def test_lightning_output_has_no_optimizer_state(averaged):
    checkpoint = torch.load(averaged, weights_only=False)
    assert "optimizer_states" not in checkpoint
    assert (checkpoint["epoch"], checkpoint["global_step"]) == (2, 6)


def test_lightning_last_link_counts_once(tmp_path):
    with others_at_work():
        train_lightning(tmp_path, save_last="link")
    assert (tmp_path / "last.ckpt").is_symlink()
    run = open_run(tmp_path)
    assert names(run) == list(Lightning.checkpoints)
    assert run.left_out == ((tmp_path / "last.ckpt", "repeats epoch=2-step=6.ckpt"),)


def test_lightning_metric_is_recorded_by_checkpoint(run):
    last = torch.load(run.path / "last.ckpt", weights_only=False)
    (state,) = last["callbacks"].values()
    scores = {Path(path).name: float(score) for path, score in state["best_k_models"].items()}
    opened = open_run(run.path)
    assert {c.path.name: c.record.metrics["val_loss"] for c in opened} == scores
    best = min(scores, key=scores.__getitem__)
    assert names(opened.best(1, "val_loss", "min")) == [best]


def test_lightning_metric_ignores_stale_callbacks(tmp_path):
    kept = {"/elsewhere/epoch=1.ckpt": torch.tensor(0.25)}
    stale = {"/elsewhere/other.ckpt": torch.tensor(0.5)}
    callbacks = {
        "one": {"monitor": "val_loss", "best_k_models": kept, "current_score": torch.tensor(0.25)},
        "two": {"monitor": "val_acc", "best_k_models": stale, "current_score": torch.tensor(0.5)},
    }
    state = {"state_dict": {"w": torch.zeros(2)}, "callbacks": callbacks, "epoch": 1}
    torch.save(state, tmp_path / "epoch=1.ckpt")
    (checkpoint,) = open_run(tmp_path)
    assert checkpoint.record.metrics == {"val_loss": 0.25}


@pytest.fixture(scope="module")
def weight_averaging(tmp_path_factory):
    callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    directory = tmp_path_factory.mktemp("ema")
    with others_at_work():
        train_lightning(directory, callbacks.EMAWeightAveraging(decay=0.5))
    return directory


def test_lightning_weight_averaging_is_noted(weight_averaging):
    run = open_run(weight_averaging)
    assert {c.key for c in run} == {"state_dict"}
    for checkpoint in run:
        (note,) = checkpoint.notes
        assert "running average" in note
        assert "`key='current_model_state'`" in note


def test_lightning_trained_weights_have_a_key(weight_averaging):
    path = weight_averaging / "epoch=2-step=6.ckpt"
    saved = torch.load(path, weights_only=False)
    raw = average(open_run(path, key="current_model_state"))
    assert torch.equal(raw["net.head.weight"], saved["current_model_state"]["net.head.weight"])
    assert not torch.equal(raw["net.head.weight"], saved["state_dict"]["net.head.weight"])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_lightning_average_of_shards_is_loaded(tmp_path):
    from lightning.fabric.utilities.load import _load_distributed_checkpoint
    from lightning.pytorch.utilities.consolidate_checkpoint import _format_checkpoint

    with others_at_work():
        module = lightning_module()(width=5)
        for step in (10, 20):
            folder = tmp_path / "run" / f"epoch=1-step={step}.ckpt"
            folder.mkdir(parents=True)
            state = {name: torch.full_like(t, step) for name, t in module.state_dict().items()}
            dcp.save({"model": state}, checkpoint_id=folder)
            meta = {"pytorch-lightning_version": "2.6.0", "global_step": step, "epoch": 1}
            torch.save(meta | {"hyper_parameters": {"width": 5}}, folder / "meta.pt")
        out = average(open_run(tmp_path / "run"), out=tmp_path / "average")
        whole = _format_checkpoint(_load_distributed_checkpoint(out))
        torch.save(whole, tmp_path / "whole.ckpt")
        loaded = lightning_module().load_from_checkpoint(tmp_path / "whole.ckpt")
    assert all(torch.equal(p, torch.full_like(p, 15)) for p in loaded.parameters())


@pytest.mark.parametrize("interval", ["epoch", "step"])
def test_lightning_rate_at_cycle_end_is_of_the_next_cycle(tmp_path, interval):
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Cyclical(lightning_module()):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            length = 3 if interval == "epoch" else 6
            schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, length)
            return [optimizer], [{"scheduler": schedule, "interval": interval}]

    keeping = ModelCheckpoint(tmp_path, save_top_k=-1, monitor="val_loss")
    loader = torch.utils.data.DataLoader(torch.rand(8, 3, 8, 8), batch_size=4)
    with others_at_work():
        lightning_trainer(max_epochs=6, callbacks=[keeping]).fit(Cyclical(), loader, loader)
    run = open_run(tmp_path)
    assert [checkpoint.record.lr for checkpoint in run.cycle(3)] == [pytest.approx(0.1)] * 2
    assert "Lightning saves after the scheduler's step" in run.at_lr_min().notes[-1]
