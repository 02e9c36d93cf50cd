"""Runs of the Hugging Face Trainer: averaged, exact, and loaded by ``from_pretrained``."""

import pytest
import torch
from click.testing import CliRunner
from helpers import average_by_hand, same_bits

from ckptavg import average, open_run
from ckptavg.cli import main

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # which the Trainer needs
pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Six checkpoints of a small GPT-2 whose head is tied, and the last one's model at the root."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    data = [{"input_ids": tokens, "labels": tokens} for tokens in torch.arange(64).view(8, 8) % 16]
    directory = tmp_path_factory.mktemp("trainer") / "run"
    arguments = transformers.TrainingArguments(
        str(directory), max_steps=12, save_steps=2, logging_steps=1, learning_rate=0.1,
        per_device_train_batch_size=2, report_to=[], use_cpu=True, disable_tqdm=True,
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    trainer.train()
    trainer.save_model()
    return directory


def weights(path):
    return transformers.GPT2LMHeadModel.from_pretrained(path).state_dict()


def assert_mean(out, inputs):
    states = [weights(path) for path in inputs]
    for name, value in weights(out).items():
        by_hand = average_by_hand([s[name] for s in states], [1.0] * len(states), value.dtype)
        assert same_bits(value, by_hand), name


def test_trainer_run_has_records_and_counts_root_once(run):
    opened = open_run(run)
    assert [(c.path.name, c.step) for c in opened] == [
        (f"checkpoint-{i}", i) for i in range(2, 13, 2)
    ]
    assert all({"loss", "eval_loss"} <= set(c.record.metrics) for c in opened)
    assert [c.record.lr for c in opened] == sorted((c.record.lr for c in opened), reverse=True)
    assert [(path.name, why) for path, why in opened.left_out] == [("run", "repeats checkpoint-12")]


def test_trainer_average_loads_with_tied_head(run, tmp_path):
    out = average(open_run(run), out=tmp_path / "out")
    model = transformers.GPT2LMHeadModel.from_pretrained(out)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert_mean(out, [run / f"checkpoint-{i}" for i in range(2, 13, 2)])


def test_trainer_average_keeps_shards(run, tmp_path):
    for i in (2, 4, 6):
        model = transformers.GPT2LMHeadModel.from_pretrained(run / f"checkpoint-{i}")
        model.save_pretrained(tmp_path / "run" / f"checkpoint-{i}", max_shard_size="2KB")
    shards = sorted(p.name for p in (tmp_path / "run" / "checkpoint-2").glob("*.safetensors"))
    assert len(shards) > 1
    out = average(open_run(tmp_path / "run"), out=tmp_path / "out")
    assert sorted(p.name for p in out.glob("*.safetensors")) == shards
    assert_mean(out, [run / f"checkpoint-{i}" for i in (2, 4, 6)])


def test_trainer_run_takes_only_the_model(run):
    beside = {p.name for p in (run / "checkpoint-2").iterdir()}
    assert {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"} < beside
    names = {name for c in open_run(run) for name in c.tensors}
    assert names == set(weights(run)) - {"lm_head.weight"}


def test_inspect_shows_one_trainer_checkpoint(run):
    shown = CliRunner().invoke(main, ["inspect", str(run / "checkpoint-4")])
    assert shown.exit_code == 0
    assert "step 4" in shown.stdout


def test_trainer_files_named_are_one_run_by_step(run):
    named = open_run(*run.glob("checkpoint-*/model.safetensors"))
    assert [c.step for c in named.last(2)] == [10, 12]
