"""SpeechBrain's checkpointer at work, in a process of its own.

Its lazy modules fail for whoever looks through all that are loaded, as hypothesis does.

python speechbrain_training.py save DIRECTORY NAME...
python speechbrain_training.py load FILE OUT
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
from layouts import Net
from speechbrain.utils.checkpoints import Checkpointer, torch_recovery
from speechbrain.utils.epoch_loop import EpochCounter


def save(directory: Path, names: list[str]) -> None:
    """Save a checkpoint under each name, as after an epoch."""
    torch.manual_seed(0)
    model, epochs = Net(), EpochCounter(len(names))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parts = {"model": model, "optimizer": optimizer, "counter": epochs}
    saver = Checkpointer(directory, recoverables=parts)
    for _, name in zip(epochs, names, strict=True):
        with torch.no_grad():
            model.head.weight.add_(1)
        checkpoint = saver.save_checkpoint()
        # named after the second of saving, which may be the same for two
        shutil.move(checkpoint.path, directory / name)


def load(path: Path, out: Path) -> None:
    """Write the state of a model that has recovered from a file."""
    model = Net()
    torch_recovery(model, path, end_of_epoch=True)
    torch.save(model.state_dict(), out)


if __name__ == "__main__":
    command, first, *others = sys.argv[1:]
    if command == "save":
        save(Path(first), others)
    else:
        load(Path(first), Path(others[0]))
