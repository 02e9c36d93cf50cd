"""What trainers leave that is a directory a checkpoint; registered like those in ``layouts``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from layouts import Layout, Net, State, Written, copied, fit, register
from safetensors.torch import load_file


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


@register
class Trainer(Layout):
    """The Hugging Face Trainer: its own files beside the weights, the last model at the root."""

    name = "Hugging Face Trainer"
    needs = ("transformers", "accelerate")
    checkpoints = {"checkpoint-8": 8, "checkpoint-9": 9, "checkpoint-10": 10}
    left_out = (".",)
    key = ""
    output = "average"

    def write(self, directory: Path) -> Written:
        import transformers

        model = self._model()
        data = [{"input_ids": t, "labels": t} for t in torch.arange(64).view(8, 8) % 16]
        arguments = transformers.TrainingArguments(
            str(directory), max_steps=10, save_steps=1, save_total_limit=3, report_to=[],
            per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data)
        trainer.train()
        trainer.save_model()
        states = [load_file(directory / name / "model.safetensors") for name in self.checkpoints]
        return Written(directory, states)

    def load_back(self, path: Path) -> State:
        import transformers

        model = transformers.GPT2LMHeadModel.from_pretrained(path)
        assert model.lm_head.weight is model.transformer.wte.weight
        state = copied(model.state_dict())
        del state["lm_head.weight"]  # tied, and so not in the files either
        return state

    def _model(self):
        import transformers

        config = transformers.GPT2Config(
            n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8, bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)


@register
class Accelerate(Layout):
    """Accelerate's ``save_state`` of two models, of which the first is taken."""

    name = "Accelerate"
    needs = ("accelerate",)
    checkpoints = {f"checkpoint_{i}": i for i in range(3)}
    key = ""
    output = "average"

    def write(self, directory: Path) -> Written:
        import accelerate

        accelerator = accelerate.Accelerator(cpu=True)
        model, _ = accelerator.prepare(Net(), torch.nn.Linear(2, 2))
        optimizer = accelerator.prepare(torch.optim.AdamW(model.parameters(), lr=0.01))
        states = []
        for name in self.checkpoints:
            fit(model, optimizer)
            accelerator.save_state(str(directory / name))
            states.append(copied(model.state_dict()))
        accelerator.free_memory()
        assert (directory / "checkpoint_0" / "model_1.safetensors").is_file()
        return Written(directory, states)

    def load_back(self, path: Path) -> State:
        import accelerate

        model = Net()
        accelerate.load_checkpoint_in_model(model, str(path), strict=True)
        return copied(model.state_dict())


@register
class Adapters(Layout):
    """LoRA: the mean of the products, by factors that stand beside each other."""

    name = "PEFT (LoRA)"
    needs = ("peft",)
    checkpoints = {f"checkpoint-{i}": i for i in (1, 2, 3)}
    key = ""
    output = "average"
    loads_back = "✓, rank n·r"

    def write(self, directory: Path) -> Written:
        import peft

        model = peft.get_peft_model(Net(), self._settings())
        for name in self.checkpoints:
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = torch.randn(parameter.shape)
            model.save_pretrained(directory / name)
        files = [directory / name / "adapter_model.safetensors" for name in self.checkpoints]
        return Written(directory, [load_file(file) for file in files])

    def averaged(self, states: list[State]) -> State:
        along = {name: 0 if "lora_A" in name else 1 for name in states[0]}
        return {name: torch.cat([s[name] for s in states], along[name]) for name in along}

    def load_back(self, path: Path) -> State:
        import peft

        torch.manual_seed(1)
        net = Net()
        model = peft.PeftModel.from_pretrained(net, str(path))
        return copied(peft.get_peft_model_state_dict(model))

    def _settings(self):
        import peft

        return peft.LoraConfig(r=2, lora_alpha=4, target_modules=["head", "features.0"])


class DeepSpeed(Layout):
    """Three tags of DeepSpeed's engine, run in a process of its own."""

    needs = ("deepspeed",)
    checkpoints = {f"global_step{i}": i for i in (1, 2, 3)}
    key = "module"
    output = "average.pt"
    stage: int

    def write(self, directory: Path) -> Written:
        training = Path(__file__).with_name("deepspeed_training.py")
        command = [sys.executable, training, "engine", str(self.stage), directory]
        subprocess.run(command, check=True, capture_output=True)
        files = [directory / name / "mp_rank_00_model_states.pt" for name in self.checkpoints]
        whole = [torch.load(f, weights_only=False)["module"] for f in files if f.is_file()]
        return Written(directory, whole)

    def load_back(self, path: Path) -> State:
        return torch.load(path)["state_dict"]


@register
class Whole(DeepSpeed):
    """Stages 1 and 2, whose 16-bit weights are whole."""

    name = "DeepSpeed ZeRO 1, 2"
    stage = 2
    loads_back = "under `state_dict`"


@register
class Partitioned(DeepSpeed):
    """Stage 3, whose weights are spread over the optimizer's files."""

    name = "DeepSpeed ZeRO 3"
    stage = 3
    refused = "no: prints the `zero_to_fp32.py` commands"
