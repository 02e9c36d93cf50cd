"""What trainers leave: written by the tool itself where it is installed, else in the form it has.

One class per layout, registered in ``LAYOUTS`` in the order of the table in examples/README.md. To
add one, write a class with ``@register``: the checks in ``test_layouts.py`` and the table take it
up.
"""

from __future__ import annotations

import abc
import argparse
import datetime
import functools
import importlib
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

State = dict[str, torch.Tensor]


@dataclass
class Written:
    """A run on disk, and what was saved in its three checkpoints, under the bare model's names."""

    path: Path
    states: list[State]


class Layout(abc.ABC):
    """A row of the table, and what is expected of it.

    Attributes:
        name: As the table shows it.
        needs: Modules that must be importable.
        checkpoints: Name → step of what a run is made of, in order.
        left_out: Names of what lies beside them and is not taken.
        key: The entry that holds the weights.
        output: What to call the average so that the tool loads it.
        loads_back: What the table's last cell says where all is well.
        refused: What its first cell says if the layout cannot be averaged, in words of the error.
    """

    name: str
    needs: tuple[str, ...] = ()
    checkpoints: dict[str, float]
    left_out: tuple[str, ...] = ()
    key: str
    output: str
    loads_back: str = "✓"
    refused: str = ""

    @abc.abstractmethod
    def write(self, directory: Path) -> Written:
        """Train for three checkpoints, with the traps that the tool lays."""

    def averaged(self, states: list[State]) -> State:
        """By hand: summed in float64 in order, divided and rounded once; integers from the last."""
        return {
            name: (sum(state[name].double() for state in states) / len(states)).to(last.dtype)
            if last.is_floating_point()
            else last
            for name, last in states[-1].items()
        }

    @abc.abstractmethod
    def load_back(self, path: Path) -> State:
        """What the tool's model holds once it has loaded an average."""


LAYOUTS: list[Layout] = []


def register(layout: type[Layout]) -> type[Layout]:
    LAYOUTS.append(layout())
    return layout


@contextmanager
def others_at_work() -> Iterator[None]:
    """The tools' own warnings are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Net(nn.Module):
    """A network with BatchNorm, small enough to train in no time."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU())
        self.head = nn.Linear(width, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images).mean((2, 3)))


def images() -> torch.Tensor:
    return torch.rand(4, 3, 32, 32)


def fit(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """One step of training; the loss."""
    optimizer.zero_grad()
    loss = model(images()).square().mean()
    loss.backward()
    optimizer.step()
    return loss.item()


def copied(state: Any) -> State:
    return {name: value.detach().clone() for name, value in state.items()}


def loaded(model: nn.Module, state: Any) -> State:
    """The model's state dict once it has strictly loaded one."""
    model.load_state_dict(state)
    return copied(model.state_dict())


class Schedule:
    """A class of the user's among the hyperparameters."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup


@functools.cache
def lightning_module() -> type:
    """A LightningModule with all kinds of hyperparameters."""
    import lightning

    class LitNet(lightning.LightningModule):
        def __init__(self, width=4, args=None, root=None, schedule=None):
            super().__init__()
            self.save_hyperparameters()
            self.net = Net(width)

        def training_step(self, batch, _):
            return self.net(batch).square().mean()

        def validation_step(self, batch, _):
            self.log("val_loss", self.net(batch).square().mean())

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    return LitNet


def lightning_trainer(**settings: Any) -> Any:
    import lightning

    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return lightning.Trainer(accelerator="cpu", devices=1, **quiet, **settings)


def train_lightning(directory: Path, *callbacks: Any, save_last: Any = True) -> Written:
    """Three epochs of two steps each; what was saved at each step."""
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    saved: dict[int, State] = {}

    class Witness(Callback):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint):
            saved[checkpoint["global_step"]] = copied(checkpoint["state_dict"])

    hyperparameters = {
        "width": 5,
        "args": argparse.Namespace(lr=0.01),
        "root": Path("data"),
        "schedule": Schedule(3),
    }
    keeping = ModelCheckpoint(directory, save_top_k=-1, save_last=save_last, monitor="val_loss")
    trainer = lightning_trainer(max_epochs=3, callbacks=[*callbacks, Witness(), keeping])
    loader = torch.utils.data.DataLoader(torch.rand(8, 3, 8, 8), batch_size=4)
    trainer.fit(lightning_module()(**hyperparameters), loader, loader)
    return Written(directory, [saved[step] for step in sorted(saved)])


@register
class Lightning(Layout):
    name = "Lightning"
    needs = ("lightning",)
    checkpoints = {f"epoch={i}-step={2 * i + 2}.ckpt": 2 * i + 2 for i in range(3)}
    left_out = ("last.ckpt",)
    key = "state_dict"
    output = "average.ckpt"

    def write(self, directory):
        return train_lightning(directory)

    def load_back(self, path):
        module = lightning_module().load_from_checkpoint(path, weights_only=False)
        assert module.hparams.width == 5
        return copied(module.state_dict())


@register
class Timm(Layout):
    name = "timm"
    needs = ("timm",)
    checkpoints = {f"checkpoint-{i}.pth.tar": i for i in (1, 2, 3)}
    left_out = ("last.pth.tar", "model_best.pth.tar", "recovery-3-7.pth.tar")
    key = "state_dict"
    output = "average.pth.tar"

    def model(self, **settings):
        import timm

        return timm.create_model("test_resnet", num_classes=2, **settings)

    def write(self, directory):
        from timm.utils import CheckpointSaver, ModelEmaV3

        model = self.model()
        optimizer, ema = torch.optim.SGD(model.parameters(), lr=0.05), ModelEmaV3(model, decay=0.9)
        args = argparse.Namespace(model="test_resnet", lr=0.05, output="output")
        directory.mkdir()
        saver = CheckpointSaver(
            model, optimizer, args, ema, checkpoint_dir=str(directory), recovery_dir=str(directory),
            max_history=3,
        )  # fmt: skip
        states = []
        for epoch, accuracy in enumerate((50.0, 60.0, 75.0, 70.0)):  # the first one is pruned
            fit(model, optimizer)
            ema.update(model)
            saver.save_checkpoint(epoch, accuracy)
            states.append(copied(model.state_dict()))
        saver.save_recovery(3, 7)
        return Written(directory, states[1:])

    def load_back(self, path):
        return copied(self.model(checkpoint_path=str(path)).state_dict())


class ExponentialMovingAverage(AveragedModel):
    """As the references train with it."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        super().__init__(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


@register
class TorchvisionReferences(Layout):
    name = "torchvision references"
    checkpoints = {f"model_{i}.pth": i for i in range(3)}
    left_out = ("checkpoint.pth",)
    key = "model"
    output = "average.pth"

    def write(self, directory):
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        ema = ExponentialMovingAverage(model, 0.9)
        directory.mkdir()
        states = []
        for epoch in range(3):
            fit(model, optimizer)
            ema.update_parameters(model)
            schedule.step()
            checkpoint = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": schedule.state_dict(),
                "epoch": epoch,
                "args": argparse.Namespace(data_path="imagenet", lr=0.1, epochs=3),
                "model_ema": ema.state_dict(),
                "scaler": torch.amp.GradScaler("cpu").state_dict(),
            }
            torch.save(checkpoint, directory / f"model_{epoch}.pth")
            torch.save(checkpoint, directory / "checkpoint.pth")
            states.append(copied(model.state_dict()))
        return Written(directory, states)

    def load_back(self, path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=False)
        assert checkpoint["args"].data_path == "imagenet"
        return loaded(Net(), checkpoint["model"])


@register
class Fairseq(Layout):
    name = "fairseq"
    checkpoints = {"checkpoint_1_500.pt": 500, "checkpoint1.pt": 1000, "checkpoint2.pt": 2000}
    left_out = ("checkpoint_best.pt", "checkpoint_last.pt")
    key = "model"
    output = "checkpoint_average.pth"

    def write(self, directory):
        model = Net()
        optimizer = torch.optim.Adam(model.parameters())
        directory.mkdir()
        states = []
        for name, updates in self.checkpoints.items():
            loss = fit(model, optimizer)
            history = {
                "criterion_name": "CrossEntropyCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"best": None},
                "num_updates": int(updates),
            }
            iterator = {"epoch": 2, "iterations_in_epoch": 0, "shuffle": True}
            state = {
                "args": None,
                "cfg": {"model": argparse.Namespace(arch="net"), "task": {"_name": "translation"}},
                "model": model.state_dict(),
                "criterion": None,
                "optimizer_history": [history],
                "task_state": {},
                "extra_state": {
                    "metrics": [(0, "default", {})],
                    "previous_training_time": 12.5,
                    "train_iterator": iterator,
                    "val_loss": loss,
                    "best": loss,
                },
                "last_optimizer_state": optimizer.state_dict(),
            }
            torch.save(state, directory / name)
            states.append(copied(model.state_dict()))
        for copy in self.left_out:
            shutil.copy(directory / "checkpoint2.pt", directory / copy)
        return Written(directory, states)

    def load_back(self, path):
        state = torch.load(path, map_location="cpu", weights_only=False)
        assert state["cfg"]["model"] == argparse.Namespace(arch="net")
        assert state["optimizer_history"][-1]["num_updates"] == 2000
        assert state["extra_state"]["train_iterator"]["epoch"] == 2
        return loaded(Net(), state["model"])


@register
class ESPnet(Layout):
    name = "ESPnet"
    checkpoints = {"8epoch.pth": 8, "9epoch.pth": 9, "10epoch.pth": 10}
    left_out = (
        "checkpoint.pth", "latest.pth", "valid.acc.ave.pth", "valid.acc.ave_2best.pth",
        "valid.acc.best.pth",
    )  # fmt: skip
    key = ""
    output = "valid.acc.ave_3best.pth"

    def write(self, directory):
        model = Net()
        optimizer = torch.optim.Adam(model.parameters())
        directory.mkdir()
        (directory / "config.yaml").write_text("accum_grad: 1\n")
        states = []
        for name in self.checkpoints:
            fit(model, optimizer)
            states.append(copied(model.state_dict()))
            everything = {
                "model": model.state_dict(),
                "reporter": {"stats": {}, "epoch": int(name.removesuffix("epoch.pth"))},
                "optimizers": [optimizer.state_dict()],
                "schedulers": [None],
                "scaler": None,
            }
            torch.save(everything, directory / "checkpoint.pth")
            torch.save(model.state_dict(), directory / name)
        (directory / "latest.pth").symlink_to("10epoch.pth")
        (directory / "valid.acc.best.pth").symlink_to("9epoch.pth")
        theirs = {name: sum(s[name] for s in states[1:]) / 2 for name in states[0]}
        torch.save(theirs, directory / "valid.acc.ave_2best.pth")
        (directory / "valid.acc.ave.pth").symlink_to("valid.acc.ave_2best.pth")
        return Written(directory, states)

    def load_back(self, path):
        return loaded(Net(), torch.load(path, map_location="cpu", weights_only=True))


@register
class WeNet(Layout):
    name = "WeNet"
    checkpoints = {"epoch_0.pt": 0, "epoch_1.pt": 1, "epoch_2.pt": 2}
    left_out = ("final.pt", "init.pt", "avg_2.pt")
    key = ""
    output = "avg_3.pth"

    def write(self, directory):
        model = Net()
        optimizer = torch.optim.Adam(model.parameters())
        directory.mkdir()
        self.save(model, directory, "init", -1)
        states = []
        for epoch in range(3):
            fit(model, optimizer)
            self.save(model, directory, f"epoch_{epoch}", epoch)
            states.append(copied(model.state_dict()))
        theirs = {name: (states[1][name] + states[2][name]) / 2 for name in states[0]}
        torch.save(theirs, directory / "avg_2.pt")
        (directory / "final.pt").symlink_to("epoch_2.pt")
        return Written(directory, states)

    def save(self, model, directory, name, epoch):
        torch.save(model.state_dict(), directory / f"{name}.pt")
        (directory / f"{name}.yaml").write_text(f"epoch: {epoch}\ncv_loss: 0.5\nlr: 0.001\n")

    def load_back(self, path):
        return loaded(Net(), torch.load(path, map_location="cpu"))


class TinyGPT(nn.Module):
    """Its output layer tied to the embedding."""

    def __init__(self, n_embd: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, n_embd)
        self.block = nn.Linear(n_embd, n_embd)
        self.lm_head = nn.Linear(n_embd, 11, bias=False)
        self.wte.weight = self.lm_head.weight


@register
class NanoGPT(Layout):
    name = "nanoGPT (DDP, torch.compile)"
    checkpoints = {f"ckpt_{i}.pt": i for i in (250, 500, 1000)}
    left_out = ("ckpt.pt",)
    key = "model"
    output = "average.pt"

    def write(self, directory):
        directory.mkdir()
        states = []
        model = TinyGPT(6)
        wrapped = nn.DataParallel(torch.compile(model))  # its names are those of DDP
        for iteration in (250, 500, 1000):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.rand_like(parameter))
            checkpoint = {
                "model": wrapped.state_dict(),
                "optimizer": torch.optim.AdamW(model.parameters()).state_dict(),
                "model_args": {"n_embd": 6},
                "iter_num": iteration,
                "best_val_loss": torch.tensor(1.25),
                "config": {"out_dir": "out", "compile": True},
            }
            torch.save(checkpoint, directory / f"ckpt_{iteration}.pt")
            torch.save(checkpoint, directory / "ckpt.pt")
            states.append(copied(model.state_dict()))
        return Written(directory, states)

    def load_back(self, path):
        checkpoint = torch.load(path, map_location="cpu")
        model = TinyGPT(**checkpoint["model_args"])
        state = checkpoint["model"]
        prefix = "module._orig_mod."
        assert all(name.startswith(prefix) for name in state)
        return loaded(model, {name[len(prefix) :]: value for name, value in state.items()})


class Classifier(nn.Module):
    """Like ComposerClassifier, it calls its network `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module = Net()


@register
class Composer(Layout):
    name = "Composer"
    checkpoints = {f"ep{i}-ba{100 * i}-rank0.pt": 100 * i for i in (1, 2, 10)}
    left_out = ("latest-rank0.pt",)
    key = "state.model"
    output = "average-rank0.pt"

    def write(self, directory):
        directory.mkdir()
        states = []
        model = Classifier()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for name, batch in self.checkpoints.items():
            fit(model.module, optimizer)
            clock = {
                "iteration": 0,
                "epoch": int(batch) // 100,
                "batch": int(batch),
                "sample": int(batch) * 32,
                "token": 0,
                "batch_in_epoch": 0,
                "total_wct": datetime.timedelta(seconds=batch),
            }
            state = {
                "model": model.state_dict(),
                "optimizers": {"SGD": optimizer.state_dict()},
                "schedulers": {},
                "algorithms": [],
                "callbacks": {"CheckpointSaver": {"all_saved_checkpoints_to_timestamp": []}},
                "timestamp": {"Timestamp": clock},
                "integrations": {},
                "metadata": {"composer_env_info": {"composer_version": "0.32.1"}},
            }
            rng = [{"python": (3, (1, 2), None), "torch": torch.get_rng_state()}]
            torch.save({"state": state, "rng": rng}, directory / name)
            states.append(copied(model.state_dict()))
        (directory / "latest-rank0.pt").symlink_to(name)
        return Written(directory, states)

    def load_back(self, path):
        return loaded(Classifier(), torch.load(path, map_location="cpu")["state"]["model"])


_MODULE_OF_THEIRS = """
from torch import nn

class DetectionModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.yaml = {"nc": 80}
"""


@contextmanager
def importable_only_here(directory: Path) -> Iterator[Any]:
    """A module with a network's class that can be imported for as long as the context lasts."""
    (directory / "their_tasks.py").write_text(_MODULE_OF_THEIRS)
    sys.path.insert(0, str(directory))
    try:
        yield importlib.import_module("their_tasks")
    finally:
        sys.path.remove(str(directory))
        sys.modules.pop("their_tasks", None)


@register
class Ultralytics(Layout):
    name = "Ultralytics"
    checkpoints = {"epoch0.pt": 0, "epoch1.pt": 1, "epoch2.pt": 2}
    left_out = ("best.pt", "last.pt")
    key = "ema"
    output = "average.pt"
    loads_back = "under `state_dict`"

    def write(self, directory):
        directory.mkdir()
        states = []
        with importable_only_here(directory) as their_tasks:
            model = their_tasks.DetectionModel().half()
            optimizer = {"state": {0: {"exp_avg": torch.rand(3)}}, "param_groups": [{"lr": 0.01}]}
            for epoch in range(3):
                with torch.no_grad():
                    for value in (*model.parameters(), model.model[1].running_mean):
                        value.add_(torch.rand_like(value))
                checkpoint = {
                    "epoch": epoch,
                    "best_fitness": 0.25,
                    "model": None,
                    "ema": model,
                    "updates": 10 * epoch,
                    "optimizer": optimizer,
                    "train_args": {"task": "detect"},
                    "train_metrics": {"metrics/mAP50(B)": 0.5 + epoch, "fitness": 0.25},
                    "date": "2026-01-01",
                }
                torch.save(checkpoint, directory / f"epoch{epoch}.pt")
                states.append(copied(model.state_dict()))
                if epoch > 0:  # the training's end strips its last and its best checkpoint
                    stripped = {"epoch": -1, "model": model, "ema": None, "optimizer": None}
                    name = "last.pt" if epoch == 2 else "best.pt"
                    torch.save(checkpoint | stripped, directory / name)
        return Written(directory, states)

    def load_back(self, path):
        model = nn.Module()
        model.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        return loaded(model.half(), torch.load(path, map_location="cpu")["state_dict"])


@register
class BeforeZip(Layout):
    name = "torch.save before 1.6"
    checkpoints = {f"epoch_{i}.pth": i for i in (9, 10, 11)}
    left_out = ("latest.pth",)
    key = "model_state_dict"
    output = "average.pth"

    def write(self, directory):
        model = Net()
        optimizer = torch.optim.Adam(model.parameters())
        directory.mkdir()
        states = []
        for epoch in (9, 10, 11):
            loss = fit(model, optimizer)
            checkpoint = {
                "epoch": epoch,
                "model_state_dict": model.state_dict(),
                "optimizer_state_dict": optimizer.state_dict(),
                "loss": loss,
            }
            for name in (f"epoch_{epoch}.pth", "latest.pth"):
                torch.save(checkpoint, directory / name, _use_new_zipfile_serialization=False)
            states.append(copied(model.state_dict()))
        return Written(directory, states)

    def load_back(self, path):
        return loaded(Net(), torch.load(path, map_location="cpu")["model_state_dict"])
