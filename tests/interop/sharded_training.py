"""Two processes that train one sharded network on the CPU and save it as PyTorch's tools do.

torchrun --nproc-per-node 2 sharded_training.py trainer|hf-writer DIRECTORY
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from layouts import Net, fit
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

STEPS = (8, 9, 10)


def save_by_hf_writer(model: nn.Module, directory: Path) -> None:
    """Safetensors files of each rank, with the offsets of its boxes in their headers."""
    writer = dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True)
    dcp.save(model.state_dict(), storage_writer=writer)


def save_by_trainer(model: nn.Module, directory: Path) -> None:
    """The directory that the Hugging Face Trainer leaves under FSDP.

    Accelerate refuses FSDP on a CPU, so its writer is called as the Trainer calls it.
    """
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import save_fsdp_model
    from transformers.trainer_callback import TrainerState

    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", cpu_ram_efficient_loading=False
    )
    save_fsdp_model(plugin, Accelerator(cpu=True), model, str(directory))
    if dist.get_rank() == 0:
        step = int(directory.name.rpartition("-")[2])
        TrainerState(global_step=step, epoch=step / 4).save_to_json(
            str(directory / "trainer_state.json")
        )


def main(kind: str, directory: Path) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Net(5)
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    save, name = {
        "trainer": (save_by_trainer, "checkpoint"),
        "hf-writer": (save_by_hf_writer, "step"),
    }[kind]
    for step in STEPS:
        fit(model, optimizer)
        save(model, directory / f"{name}-{step}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
