"""LoRA adapters that PEFT saved: averaged to an adapter whose merged weights are the mean."""

import copy
import json
import math
import shutil

import pytest
import torch
from click.testing import CliRunner
from helpers import same_bits
from safetensors.torch import save_file
from torch import nn

from ckptavg import average, open_run
from ckptavg.cli import main
from ckptavg.errors import (
    CkptavgError,
    MismatchError,
    UnsupportedTensorError,
    UsageError,
)

peft = pytest.importorskip("peft")
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*embedding layers found in `target_modules`"),
    pytest.mark.filterwarnings("ignore:.*groups > 1"),
    pytest.mark.filterwarnings("ignore:.*Could not find a config file"),
    pytest.mark.filterwarnings("ignore:.*lora_B.bias"),  # which it takes for ungathered factors
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*pin_memory"),
]


class Net(nn.Module):
    """One layer of each kind that LoRA adapts, and a head that is trained whole."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 6)
        self.conv1 = nn.Conv1d(6, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(5, 4, (3, 1), padding=(1, 0))
        self.grouped = nn.Conv1d(4, 6, 3, padding=1, groups=2)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens):
        x = torch.tanh(self.linear(self.embed(tokens))).transpose(1, 2)
        x = torch.tanh(self.conv2(self.conv1(x)[..., None])[..., 0])
        return self.head(self.grouped(x).mean(-1))


ALL = ["embed", "linear", "conv1", "conv2"]
TOKENS = torch.tensor([[0, 1, 2, 3], [6, 5, 4, 3]])


def base():
    torch.manual_seed(0)
    return Net().double()


def write_run(directory, count=3, safe=True, base_model=base, **settings):
    """Adapters as training leaves them, numbered; returns the directory."""
    settings = {"r": 2, "lora_alpha": 6, "target_modules": ALL, "lora_dropout": 0.1} | settings
    for i in range(1, count + 1):
        model = peft.get_peft_model(base_model(), peft.LoraConfig(**copy.deepcopy(settings)))
        torch.manual_seed(i)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, dtype=torch.float64)
        model.save_pretrained(directory / f"checkpoint-{i}", safe_serialization=safe)
    return directory


def loaded(path, base_model=base):
    return peft.PeftModel.from_pretrained(base_model(), path).eval()


def merged(path, base_model=base):
    """The base with an adapter merged into it by PEFT."""
    return loaded(path, base_model).merge_and_unload().state_dict()


def assert_is_mean_of_merged(out, run, weights, base_model=base):
    """By hand in float64: Σ cᵢ·(W + s·BᵢAᵢ) is what the average's own merge gives."""
    states = [merged(c.path, base_model) for c in open_run(run)]
    shares = [w / math.fsum(weights) for w in weights]
    for name, value in merged(out, base_model).items():
        mean = sum(c * state[name] for c, state in zip(shares, states, strict=True))
        torch.testing.assert_close(value, mean, rtol=1e-13, atol=1e-13, msg=name)


@pytest.fixture
def invoke():
    def run(*words):
        return CliRunner().invoke(main, [str(word) for word in words])

    return run


SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"linear": 4, "conv.": 3},
        "alpha_pattern": {"linear": 5, "embed": 1},
    },
    "rslora patterns": {
        "use_rslora": True,
        "rank_pattern": {"linear": 4},
        "alpha_pattern": {"linear": 5},
    },
    "full tensors": {"modules_to_save": ["head"], "bias": "lora_only"},
    "bias of B": {"lora_bias": True, "target_modules": ["linear", "conv1", "conv2"]},
    "of a pattern": {"target_modules": r"linear|conv\d"},
}


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 2.5], [2.0, 3.0, 5.0]])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_peft_average_merges_to_mean_of_merged_weights(tmp_path, settings, weights):
    run = write_run(tmp_path / "run", **settings)
    out = average(open_run(run), weights=weights, out=tmp_path / "out")
    assert_is_mean_of_merged(out, run, weights or [1.0] * 3)


@pytest.mark.parametrize("weights", [None, [2.0, 3.0, 5.0]])
def test_peft_average_is_exact_for_grouped_convolutions(tmp_path, weights):
    """PEFT cannot merge these, but the outputs are linear in this layer's weights."""
    run = write_run(tmp_path / "run", target_modules=["grouped"], lora_dropout=0.0)
    out = average(open_run(run), weights=weights, out=tmp_path / "out")
    shares = [w / 10 for w in weights] if weights else [1 / 3] * 3
    with torch.no_grad():
        each = [loaded(c.path)(TOKENS) for c in open_run(run)]
        got = loaded(out)(TOKENS)
    mean = sum(c * y for c, y in zip(shares, each, strict=True))
    torch.testing.assert_close(got, mean, rtol=1e-13, atol=1e-13)


class Experts(nn.Module):
    """Weights of several experts in one parameter."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5, 4, dtype=torch.float64))

    def forward(self, x):
        return torch.einsum("bi,eoi->beo", x, self.weight)


def experts():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4, dtype=torch.float64), Experts())


@pytest.mark.parametrize("weights", [None, [2.0, 3.0, 5.0]])
def test_peft_average_is_exact_for_experts_in_one_parameter(tmp_path, weights):
    settings = {"target_modules": ["0"], "target_parameters": ["1.weight"], "lora_dropout": 0.0}
    run = write_run(tmp_path / "run", base_model=experts, **settings)
    out = average(open_run(run), weights=weights, out=tmp_path / "out")
    assert_is_mean_of_merged(out, run, weights or [1.0] * 3, experts)


@pytest.mark.parametrize("safe", [True, False])
def test_peft_uniform_average_copies_factors(tmp_path, safe):
    run = write_run(tmp_path / "run", safe=safe)
    average(open_run(run), out=tmp_path / "out")
    got = peft.load_peft_weights(tmp_path / "out", device="cpu")
    inputs = [peft.load_peft_weights(c.path, device="cpu") for c in open_run(run)]
    for name in got:
        dim = 0 if "_A" in name else 1
        assert same_bits(got[name], torch.cat([state[name] for state in inputs], dim)), name
    assert set(got) == set(inputs[0])


def test_peft_config_changes_only_ranks(tmp_path):
    run = write_run(tmp_path / "run", rank_pattern={"linear": 4}, alpha_pattern={"embed": 1})
    average(open_run(run), out=tmp_path / "out")
    before, after = (
        json.loads((p / "adapter_config.json").read_text())
        for p in (run / "checkpoint-3", tmp_path / "out")
    )
    assert after == before | {"r": 6, "rank_pattern": {"linear": 12}}


def test_peft_average_in_16_bits_rounds_once(tmp_path):
    run = write_run(tmp_path / "run", target_modules=["linear"])
    for c in open_run(run):
        state = {k: v.bfloat16() for k, v in peft.load_peft_weights(c.path, device="cpu").items()}
        save_file(state, c.path / "adapter_model.safetensors", {"format": "pt"})
    weights = [0.1, 0.2, 0.4]
    average(open_run(run), weights=weights, out=tmp_path / "out")
    got = peft.load_peft_weights(tmp_path / "out", device="cpu")
    name = "base_model.model.linear.lora_B.weight"
    inputs = [peft.load_peft_weights(c.path, device="cpu")[name] for c in open_run(run)]
    divisor = math.fsum(weights) / 3
    blocks = [(w * b.double() / divisor).bfloat16() for w, b in zip(weights, inputs, strict=True)]
    assert same_bits(got[name], torch.cat(blocks, 1))


def test_peft_average_of_wide_factors_is_exact(tmp_path):
    def wide():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3000, 700, dtype=torch.float64))

    settings = {"r": 200, "target_modules": ["0"]}
    run = write_run(tmp_path / "run", base_model=wide, **settings)
    average(open_run(run), weights=[1, 2, 4], out=tmp_path / "out")
    got = peft.load_peft_weights(tmp_path / "out", device="cpu")
    inputs = [peft.load_peft_weights(c.path, device="cpu") for c in open_run(run)]
    a, b = (f"base_model.model.0.lora_{x}.weight" for x in "AB")
    assert torch.equal(got[a], torch.cat([s[a] for s in inputs]))
    scaled = [w * s[b] / (7 / 3) for w, s in zip([1, 2, 4], inputs, strict=True)]
    assert torch.equal(got[b], torch.cat(scaled, 1))


def test_peft_average_can_be_averaged_again(tmp_path):
    run = write_run(tmp_path / "run", count=4)
    saved = sorted(run.iterdir())
    first = average(open_run(*saved[:2]), out=tmp_path / "first")
    second = average(open_run(*saved[2:]), out=tmp_path / "second")
    out = average(open_run(first, second), out=tmp_path / "out")
    assert_is_mean_of_merged(out, run, [1.0] * 4)


# From a Trainer


def test_peft_run_of_trainer_is_averaged_without_its_root(tmp_path, invoke):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=8)

    def gpt2():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(config).double()

    lora = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    data = [{"input_ids": t, "labels": t} for t in torch.arange(64).view(8, 8) % 16]
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"), max_steps=4, save_steps=1, learning_rate=0.5, report_to=[],
        per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    model = peft.get_peft_model(gpt2(), lora)
    trainer = transformers.Trainer(model, arguments, train_dataset=data)
    trainer.train()
    trainer.save_model()
    run = open_run(tmp_path / "run")
    assert [c.step for c in run] == [1, 2, 3, 4]
    assert [p.name for p, _ in run.left_out] == ["run"]
    out = average(run, out=tmp_path / "out")
    assert_is_mean_of_merged(out, tmp_path / "run", [1.0] * 4, gpt2)
    shown = invoke("inspect", tmp_path / "run")
    assert "LoRA adapter of rank 2" in shown.stdout
    assert "repeats checkpoint-4" in shown.stdout


# The command line


def test_peft_average_notes_stacked_ranks(tmp_path, invoke):
    run = write_run(tmp_path / "run")
    shown = invoke("average", run, "-o", tmp_path / "out")
    assert shown.exit_code == 0, shown.output
    assert "stacking their ranks, 3 × 2 = 6" in " ".join(shown.stderr.split())
    assert "config.json, which the input lacks" not in shown.stderr


def test_inspect_shows_ranks_of_adapters(tmp_path, invoke):
    run = write_run(tmp_path / "run")
    average(open_run(run), out=tmp_path / "out")
    one = invoke("inspect", run / "checkpoint-1")
    assert "a LoRA adapter of rank 2" in one.stdout
    made = invoke("inspect", tmp_path / "out")
    assert "a LoRA adapter of rank 6" in made.stdout
    assert "made by ckptavg" in made.stdout


def test_peft_files_may_be_named_for_directories(tmp_path, invoke):
    run = write_run(tmp_path / "run")
    files = sorted(run.glob("*/adapter_model.safetensors"))
    assert invoke("average", *files, "-o", tmp_path / "out").exit_code == 0
    assert_is_mean_of_merged(tmp_path / "out", run, [1.0] * 3)


def test_overwrite_is_needed_to_replace_an_adapter(tmp_path):
    run = write_run(tmp_path / "run")
    average(open_run(run), out=tmp_path / "out")
    with pytest.raises(CkptavgError, match="overwrite"):
        average(open_run(run), out=tmp_path / "out")
    average(open_run(run).last(2), out=tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 4


@pytest.mark.parametrize("name", ["out.safetensors", "out.pt"])
def test_peft_average_refuses_a_file_as_output(tmp_path, name):
    run = write_run(tmp_path / "run")
    with pytest.raises(UsageError, match=r"adapter_config.json has to stand beside"):
        average(open_run(run), out=tmp_path / name)
    assert not (tmp_path / name).exists()


def test_peft_adapters_are_refused_as_models(tmp_path, invoke):
    run = write_run(tmp_path / "run")
    (tmp_path / "f.py").write_text(
        "import torch\ndef model():\n    return torch.nn.Linear(2, 2)\n"
        "def data():\n    return torch.utils.data.TensorDataset(torch.ones(4, 2), torch.ones(4))\n"
    )
    model, data = f"{tmp_path}/f.py:model", f"{tmp_path}/f.py:data"
    for words in [
        ("eval", run / "checkpoint-1", "--model", model, "--data", data),
        ("eval", "--run", run, "--model", model, "--data", data),
        ("update-bn", run / "checkpoint-1", "-o", tmp_path / "o", "--model", model,
         "--train-data", data),
        ("average", run, "-o", tmp_path / "o", "--model", model, "--train-data", data),
    ]:  # fmt: skip
        shown = invoke(*words)
        assert shown.exit_code == 1
        assert "holds an adapter and no model" in shown.stderr
        assert "merge_and_unload" in shown.stderr


# What is refused

REFUSED = {
    "DoRA": ({"use_dora": True, "target_modules": ["linear"]}, "use_dora"),
    "PiSSA": (
        {"base_model": Net, "init_lora_weights": "pissa", "target_modules": ["linear"]},
        "started by pissa",
    ),
    "experts of several ranks": (
        {"base_model": experts, "target_modules": ["0"], "target_parameters": ["1.weight"],
         "lora_dropout": 0.0, "rank_pattern": {"0": 3}},
        "target_parameters and a rank_pattern",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "why"), REFUSED.values(), ids=REFUSED)
def test_peft_kinds_without_exact_mean_are_refused(tmp_path, settings, why):
    run = write_run(tmp_path / "run", **settings)
    assert "cannot be averaged" in open_run(run).checkpoints[0].notes[0]
    with pytest.raises(UnsupportedTensorError, match=f"{why}.*Merge the adapters"):
        average(open_run(run), out=tmp_path / "out")


def test_peft_adapters_other_than_lora_are_refused(tmp_path):
    for i in (1, 2):
        model = peft.get_peft_model(
            base(), peft.IA3Config(target_modules=["linear"], feedforward_modules=[])
        )
        model.save_pretrained(tmp_path / f"checkpoint-{i}")
    with pytest.raises(UnsupportedTensorError, match="type IA3"):
        average(open_run(tmp_path), out=tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "value"),
    [("r", 3), ("lora_alpha", 7), ("use_rslora", True), ("alpha_pattern", {"linear": 2})],
)
def test_peft_average_refuses_different_ranks_or_scales(tmp_path, name, value):
    run = write_run(tmp_path / "run", count=2)
    shutil.rmtree(run / "checkpoint-1")
    write_run(tmp_path / "other", count=1, **{name: value})
    shutil.move(tmp_path / "other" / "checkpoint-1", run)
    with pytest.raises(MismatchError, match=f"checkpoint-1 has {name}"):
        average(open_run(run), out=tmp_path / "out")


def test_peft_average_refuses_different_targets(tmp_path):
    run = write_run(tmp_path / "run", count=2)
    write_run(tmp_path / "run", count=1, target_modules=["linear"])
    with pytest.raises(MismatchError, match="lacks"):
        average(open_run(run), out=tmp_path / "out")


def test_peft_average_refuses_adapters_beside_models(tmp_path):
    run = write_run(tmp_path / "run", count=1)
    model = tmp_path / "run" / "checkpoint-2"
    model.mkdir()
    torch.save(base().state_dict(), model / "pytorch_model.bin")
    with pytest.raises(MismatchError, match="holds an adapter and"):
        average(open_run(run), out=tmp_path / "out")
    with pytest.raises(MismatchError, match="holds an adapter and"):
        average(open_run(run / "checkpoint-1"), base=model, out=tmp_path / "out")


def test_exclude_refuses_factors_of_adapters(tmp_path):
    run = write_run(tmp_path / "run", modules_to_save=["head"])
    with pytest.raises(UsageError, match="the patterns leave out"):
        average(open_run(run), exclude="*embed*", out=tmp_path / "out")
    out = average(open_run(run), exclude="*head*", out=tmp_path / "out")
    last = merged(run / "checkpoint-3")
    assert torch.equal(merged(out)["head.weight"], last["head.weight"])


def test_nonfinite_factor_names_its_checkpoint(tmp_path):
    run = write_run(tmp_path / "run", target_modules=["linear"])
    state = peft.load_peft_weights(run / "checkpoint-2", device="cpu")
    state["base_model.model.linear.lora_A.weight"][0, 0] = math.nan
    save_file(state, run / "checkpoint-2" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(CkptavgError, match=r"lora_A.weight is NaN in .*checkpoint-2"):
        average(open_run(run), out=tmp_path / "out")


def test_adapter_config_missing_is_an_error(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "checkpoint-2" / "adapter_config.json").unlink()
    with pytest.raises(CkptavgError, match=r"without its adapter_config.json"):
        average(open_run(run))


def test_peft_average_refuses_ungathered_factors(tmp_path):
    run = write_run(tmp_path / "run", target_modules=["linear"])
    state = peft.load_peft_weights(run / "checkpoint-2", device="cpu")
    state = {name: torch.zeros(0) for name in state}
    save_file(state, run / "checkpoint-2" / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedTensorError, match="without gathering"):
        average(open_run(run), out=tmp_path / "out")


def test_peft_average_refuses_to_untie_factors(tmp_path):
    run = write_run(tmp_path / "run", target_modules=["linear"])
    for c in open_run(run):
        path = c.path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"ensure_weight_tying": True}))
    average(open_run(run), out=tmp_path / "out")
    with pytest.raises(UnsupportedTensorError, match="untie"):
        average(open_run(run), weights=[1, 2, 3], out=tmp_path / "unequal")
