"""A language model that needs a task of its own: nanoGPT's gives only the last token's logits.

    pip install ".[examples]"
    python examples/nanogpt_task.py

trains a small GPT on the bytes of Python's own source files and saves checkpoints as nanoGPT does.
Then the last checkpoint, the average and the ensemble are compared, the task named by its file:

    ckptavg eval --run nanogpt-run --last 4 --compare fge --model examples/nanogpt_task.py:model \
        --data tokens:nanogpt-run/data/val.bin --data-arg length=64 \
        --task examples/nanogpt_task.py:Task
"""

from __future__ import annotations

import argparse
import ast
import pathlib
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from ckptavg.tasks.language import CausalLM

LENGTH = 64  # tokens of a window
VOCABULARY = 256  # a token is a byte
BATCH = 16
STEPS = 800
START = 500  # checkpoints are saved after this step
SAVE_EVERY = 50  # steps


class Task(CausalLM):
    """Causal language modelling with the inputs as targets, too.

    With targets, nanoGPT's model returns the logits of all positions; without, of the last one.
    """

    def forward(self, model: nn.Module, inputs: dict[str, Tensor]) -> Any:
        """Call the model on a batch of windows (N, LENGTH)."""
        return model(inputs["input_ids"], inputs["input_ids"])


@dataclass
class Config:
    """Sizes of the network, under nanoGPT's names."""

    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each behind a LayerNorm."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        width = config.n_embd
        self.attention = nn.MultiheadAttention(width, config.n_head, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the next hidden states (N, T, width)."""
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device)
        normed = self.norms[0](x)
        attended, _ = self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)
        x = x + attended
        return x + self.feed_forward(self.norms[1](x))  # type: ignore[no-any-return]


class GPT(nn.Module):
    """A small GPT that is called as nanoGPT's is."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, config.n_embd)
        self.positions = nn.Embedding(LENGTH, config.n_embd)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.n_layer)))
        self.norm = nn.LayerNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return logits and loss; without targets, only the last position's logits."""
        positions = torch.arange(idx.shape[1], device=idx.device)
        hidden = self.norm(self.blocks(self.tokens(idx) + self.positions(positions)))
        if targets is None:
            return self.head(hidden[:, [-1]]), None
        logits = self.head(hidden)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def model() -> nn.Module:
    """Return the network, untrained."""
    return GPT(Config())


def write_tokens(out: Path) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Write data/train.bin and data/val.bin as nanoGPT does, and return the training tokens."""
    data = out / "data"
    data.mkdir(exist_ok=True)
    sources = [argparse, ast, pathlib]
    text = "\n".join(Path(str(source.__file__)).read_text("utf-8") for source in sources)
    validation = Path(str(textwrap.__file__)).read_text("utf-8")
    tokens = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint16)
    tokens.tofile(data / "train.bin")
    np.frombuffer(validation.encode(), dtype=np.uint8).astype(np.uint16).tofile(data / "val.bin")
    return tokens


def train(out: Path) -> None:
    """Train at a constant learning rate, and save checkpoints along the way."""
    torch.manual_seed(0)
    tokens = torch.from_numpy(write_tokens(out).astype(np.int64))
    network = model()
    optimizer = torch.optim.AdamW(network.parameters(), lr=6e-3)
    for step in range(1, STEPS + 1):
        starts = torch.randint(len(tokens) - LENGTH, (BATCH, 1))
        windows = tokens[starts + torch.arange(LENGTH + 1)]
        _, loss = network(windows[:, :-1], windows[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step > START and step % SAVE_EVERY == 0:
            checkpoint = {"model": network.state_dict(), "iter_num": step}
            torch.save(checkpoint, out / f"ckpt_{step:04d}.pt")


def main() -> None:
    """Train, and say where the checkpoints are."""
    parser = argparse.ArgumentParser(description="Train a small GPT on source files.")
    parser.add_argument("--out", type=Path, default=Path("nanogpt-run"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    train(out)
    print(f"checkpoints and tokens are in {out.resolve()}")


if __name__ == "__main__":
    main()
