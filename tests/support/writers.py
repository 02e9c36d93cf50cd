"""Checkpoints in every layout, each as its own tool writes it."""

import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from helpers import save
from safetensors.torch import save_file


def legacy(values, path):
    torch.save(values, path, _use_new_zipfile_serialization=False)


def lightning(values, path):
    wrapped = {f"_orig_mod.{name}": tensor for name, tensor in values.items()}
    torch.save({"state_dict": wrapped, "global_step": 3, "hyper_parameters": {"a": 1}}, path)


def pickled_module(values, path):
    module = torch.nn.Module()
    module.body, module.head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2, bias=False)
    module.load_state_dict(values)
    torch.save({"model": module}, path)


def shards(values, path):
    path.mkdir()
    index = {}
    for i, (name, tensor) in enumerate(values.items()):
        index[name] = f"model-{i}.safetensors"
        save_file({name: tensor}, path / index[name])
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def hub_bin(values, path):
    path.mkdir()
    torch.save(values, path / "pytorch_model.bin")


def distributed(values, path):
    dcp.save({"model": values}, checkpoint_id=path)


WRITERS = {
    "a.safetensors": save_file,
    "b.pt": torch.save,
    "c.pt": legacy,
    "d.ckpt": lightning,
    "e.pt": pickled_module,
    "f": shards,
    "g": hub_bin,
    "h": distributed,
}


def write_trainer_checkpoint(directory: Path, state: dict[str, torch.Tensor], step: int) -> None:
    """Write a checkpoint of the Hugging Face Trainer: two shards and the files beside them."""
    directory.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    half = len(state) // 2
    shards = {"model-00001-of-00002.safetensors": dict(list(state.items())[:half])}
    shards["model-00002-of-00002.safetensors"] = dict(list(state.items())[half:])
    for name, part in shards.items():
        save(directory / name, part)
    index = {"weight_map": {k: name for name, part in shards.items() for k in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(json.dumps({"torch_dtype": "float32", "step": step}))
    (directory / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (directory / "generation_config.json").write_text("")
