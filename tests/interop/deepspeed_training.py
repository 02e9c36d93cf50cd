"""Trains with DeepSpeed in a process of its own: ``python deepspeed_training.py KIND STAGE OUT``.

KIND is ``engine`` (three tags in OUT), ``lightning`` (OUT/x.ckpt, by the very call that Lightning's
DeepSpeedStrategy makes, which itself needs a GPU) or ``trainer`` (a Hugging Face Trainer's OUT).
Beside OUT, ``OUT.masters`` holds the float32 master weights of each save.
"""

import os
import socket
import sys

import torch


def alone():
    """Make this process the only rank, on the CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {
        "DS_ACCELERATOR": "cpu", "DS_BUILD_OPS": "0", "RANK": "0", "LOCAL_RANK": "0",
        "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def configuration(stage):
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": False},
        "zero_allow_untested_optimizer": True,
    }


def train_engine(kind, stage, out):
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    deepspeed.init_distributed("gloo")
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2, bias=False)
    )
    adam = {"type": "AdamW", "params": {"lr": 0.01, "torch_adam": True}}
    settings = configuration(stage) | {"bf16": {"enabled": True}, "optimizer": adam}
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=model.parameters(), config=settings
    )
    masters = []
    for step in (1, 2, 3):
        engine.backward(engine(torch.randn(4, 8, dtype=torch.bfloat16)).pow(2).mean())
        engine.step()
        named = engine.module.named_parameters()
        masters.append({name: safe_get_full_fp32_param(p).clone() for name, p in named})
        if kind == "engine":
            engine.save_checkpoint(out)
        else:
            state = {"global_step": step, "epoch": 0, "pytorch-lightning_version": "2.6.0"}
            path = f"{out}/epoch=0-step={step}.ckpt"
            engine.save_checkpoint(path, client_state=state, tag="checkpoint")
    torch.save(masters, f"{out}.masters")


def train_trainer(stage, out):
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    import transformers

    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    data = [{"input_ids": tokens, "labels": tokens} for tokens in torch.arange(64).view(8, 8) % 16]
    settings = configuration(stage) | {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"
    }  # fmt: skip
    arguments = transformers.TrainingArguments(
        out, max_steps=2, save_steps=1, report_to=[], per_device_train_batch_size=2,
        disable_tqdm=True, deepspeed=settings,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    transformers.Trainer(model, arguments, train_dataset=data).train()


if __name__ == "__main__":
    alone()
    torch.manual_seed(0)
    kind, stage, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    if kind == "trainer":
        train_trainer(stage, out)
    else:
        train_engine(kind, stage, out)
