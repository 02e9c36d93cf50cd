"""Trainers that save in ways of their own; registered like ``layouts``."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from layouts import Layout, Net, State, Written, copied, images, register
from torch import nn
from torch.nn import functional


def saved_states(paths: list[Path], key: str = "") -> list[State]:
    """The state dicts of files, by torch's own reader."""
    states = []
    for path in paths:
        saved = torch.load(path, weights_only=False)
        states.append(copied(saved[key] if key else saved))
    return states


@register
class Fastai(Layout):
    """``Learner.fit`` with a file per epoch, the optimizer's state in it."""

    name = "fastai"
    needs = ("fastai",)
    checkpoints = {f"net_{i}.pth": i for i in range(3)}
    key = "model"
    output = "models/average.pth"

    def learner(self, directory: Path):
        from fastai.data.core import DataLoaders
        from fastai.data.load import DataLoader
        from fastai.learner import Learner

        samples = torch.utils.data.TensorDataset(torch.rand(16, 3, 8, 8), torch.rand(16, 2))
        loaders = DataLoaders(DataLoader(samples, bs=4), DataLoader(samples, bs=4))
        return Learner(loaders, Net(), loss_func=functional.mse_loss, path=directory)

    def write(self, directory: Path) -> Written:
        from fastai.callback.tracker import SaveModelCallback

        learner = self.learner(directory)
        saver = SaveModelCallback(every_epoch=True, with_opt=True, fname="net")
        with learner.no_bar(), learner.no_logging():
            learner.fit(3, cbs=saver)
        models = directory / "models"
        return Written(models, saved_states([models / name for name in self.checkpoints], "model"))

    def load_back(self, path: Path) -> State:
        learner = self.learner(path.parent.parent)
        learner.create_opt()
        learner.load(path.stem)
        return copied(learner.model.state_dict())


@register
class MMEngine(Layout):
    """The runner with its EMA hook, which swaps the two state dicts while it saves."""

    name = "mmengine"
    needs = ("mmengine",)
    checkpoints = {f"epoch_{i}.pth": 2 * i for i in (1, 2, 3)}
    key = "state_dict"
    output = "average.pth"

    def model(self) -> nn.Module:
        from mmengine.model import BaseModel

        class Network(BaseModel):
            def __init__(self) -> None:
                super().__init__()
                self.net = Net()

            def forward(self, inputs, mode="tensor"):
                outputs = self.net(inputs)
                return {"loss": outputs.square().mean()} if mode == "loss" else outputs

        return Network()

    def write(self, directory: Path) -> Written:
        from mmengine.runner import Runner

        samples = [{"inputs": image} for image in images()]
        runner = Runner(
            self.model(),
            work_dir=str(directory),
            train_dataloader=torch.utils.data.DataLoader(samples, batch_size=2),
            train_cfg={"by_epoch": True, "max_epochs": 3},
            optim_wrapper={"type": "OptimWrapper", "optimizer": {"type": "SGD", "lr": 0.1}},
            default_hooks={"checkpoint": {"type": "CheckpointHook", "interval": 1}},
            custom_hooks=[{"type": "EMAHook"}],
            log_level="ERROR",
            experiment_name=re.sub(r"\W", "_", str(directory)),
        )
        runner.train()
        return Written(
            directory, saved_states([directory / name for name in self.checkpoints], self.key)
        )

    def load_back(self, path: Path) -> State:
        from mmengine.runner import load_checkpoint

        model = self.model()
        load_checkpoint(model, str(path), strict=True)
        return copied(model.state_dict())


@register
class SpeechBrain(Layout):
    """A directory per checkpoint, named after its date; one file in it has the weights."""

    name = "SpeechBrain"
    dates = ("2026-01-09+23-59-59", "2026-01-10+00-00-01", "2026-02-01+00-00-00")
    checkpoints = {f"CKPT+{date}+00/model.ckpt": float(re.sub(r"\D", "", date)) for date in dates}
    left_out = tuple(f"CKPT+{date}+00/counter.ckpt" for date in dates)
    key = ""
    output = "average/model.ckpt"

    def write(self, directory: Path) -> Written:
        if importlib.util.find_spec("speechbrain") is None:
            pytest.skip("could not import 'speechbrain'")
        self.run("save", directory, *(str(Path(name).parent) for name in self.checkpoints))
        return Written(directory, saved_states([directory / name for name in self.checkpoints]))

    def load_back(self, path: Path) -> State:
        state = path.with_name("state.pt")
        self.run("load", path, state)
        return torch.load(state)

    def run(self, *arguments: str | Path) -> None:
        """Call the script that imports the tool."""
        script = Path(__file__).with_name("speechbrain_training.py")
        subprocess.run([sys.executable, script, *arguments], check=True, capture_output=True)
