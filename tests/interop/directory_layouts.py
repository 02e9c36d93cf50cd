"""What trainers leave that is a directory a checkpoint; registered like those in ``layouts``."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from layouts import Layout, Net, State, Written, copied, fit, register


@register
class Distributed(Layout):
    """FSDP and its like, with a link to the newest."""

    name = "torch.distributed.checkpoint"
    checkpoints = {"step_8": 8, "step_9": 9, "step_10": 10}
    left_out = ("latest",)
    key = "app.model"
    output = "average"

    def write(self, directory: Path) -> Written:
        model = Net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        states = []
        for step in (8, 9, 10):
            fit(model, optimizer)
            saved = {"model": model.state_dict(), "optim": optimizer.state_dict(), "step": step}
            dcp.save({"app": saved}, checkpoint_id=directory / f"step_{step}")
            states.append(copied(model.state_dict()))
        (directory / "latest").symlink_to("step_10")
        return Written(directory, states)

    def load_back(self, path: Path) -> State:
        model = Net()
        state = {"app": {"model": model.state_dict(), "step": 0}}
        dcp.load(state, checkpoint_id=path)
        assert state["app"]["step"] == 10
        return copied(model.state_dict())
