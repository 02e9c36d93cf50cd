"""Notes of transformers and DeepSpeed while a command or the API runs a model."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")
if importlib.util.find_spec("deepspeed") is None:  # which warns where it is imported
    pytest.skip("deepspeed is not installed", allow_module_level=True)

ATTENTION = "passing in an `attention_mask`"
ACCELERATOR = "Setting accelerator to CPU"
OWN = """
import deepspeed
import transformers

def model():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained("model"))
"""
API = """
import logging
import numpy as np, torch, ckptavg, own
from ckptavg.tasks.language import CausalLM

ids = torch.from_numpy(np.load("ids.npy")).long().view(-1, 8)
data = [{"input_ids": row, "labels": row} for row in ids]
ckptavg.evaluate(["model"], own.model(), data, task=CausalLM())
assert logging.getLogger("transformers").level == logging.WARNING
"""
EVAL = (
    "-m", "ckptavg", "eval", "model", "--model", "own.py:model", "--data", "tokens:ids.npy",
    "--data-arg", "length=8", "--json",
)  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A small GPT-2, a factory of it, and tokens that look padded."""
    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=1, n_embd=8, vocab_size=16, n_positions=8, bos_token_id=0,
        eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(home / "model")
    (home / "own.py").write_text(OWN)
    np.save(home / "ids.npy", np.zeros(64, np.int64))
    return home


def stderr_of(home, *arguments, **environment):
    variables = {k: v for k, v in os.environ.items() if k != "TRANSFORMERS_VERBOSITY"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=home, env=variables | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    ("options", "environment", "attention", "accelerator"),
    [
        ((), {}, False, False),
        (("-v",), {}, True, True),
        ((), {"TRANSFORMERS_VERBOSITY": "warning"}, True, False),
    ],
    ids=["usual", "verbose", "own level"],
)
def test_command_shows_notes_of_tools_only_on_request(
    home, options, environment, attention, accelerator
):
    said = stderr_of(home, *EVAL, *options, **environment)
    assert (ATTENTION in said) is attention
    assert torch.cuda.is_available() or (ACCELERATOR in said) is accelerator


def test_api_keeps_notes_of_tools(home):
    said = stderr_of(home, "-c", API)
    assert ATTENTION in said
