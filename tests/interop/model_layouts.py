"""Tools that save models as directories within directories; registered like ``layouts``."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from layouts import Layout, Net, State, Written, copied, register
from safetensors.torch import load_file


def nudge(model: torch.nn.Module) -> None:
    """A step of training, as far as a checkpoint shows it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))


@register
class Diffusers(Layout):
    """The training scripts of diffusers: the network and its EMA copy, below each step."""

    name = "diffusers training"
    needs = ("diffusers", "accelerate")
    checkpoints = {f"checkpoint-{step}/unet": step for step in (8, 9, 10)}
    left_out = tuple(f"checkpoint-{step}/unet_ema" for step in (8, 9, 10))
    key = ""
    output = "average"

    def write(self, directory: Path) -> Written:
        import accelerate
        from diffusers import UNet2DModel
        from diffusers.training_utils import EMAModel

        blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
        model = UNet2DModel(
            sample_size=8, layers_per_block=1, block_out_channels=(8,), norm_num_groups=4, **blocks
        )
        ema = EMAModel(model.parameters(), model_cls=UNet2DModel, model_config=model.config)
        accelerator = accelerate.Accelerator(cpu=True)

        def save_models(models, weights, output_dir):
            ema.save_pretrained(str(Path(output_dir, "unet_ema")))
            for network in models:
                network.save_pretrained(str(Path(output_dir, "unet")))
                weights.pop()

        accelerator.register_save_state_pre_hook(save_models)
        model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
        states = []
        for name in self.checkpoints:
            nudge(model)
            ema.step(model.parameters())
            accelerator.save_state(str(directory / Path(name).parent))
            states.append(copied(model.state_dict()))
        accelerator.free_memory()
        return Written(directory, states)

    def load_back(self, path: Path) -> State:
        from diffusers import UNet2DModel

        return copied(UNet2DModel.from_pretrained(path).state_dict())


@register
class SentenceTransformers(Layout):
    """Modules in numbered directories, two of which hold weights."""

    name = "sentence-transformers"
    needs = ("sentence_transformers",)
    checkpoints = {f"checkpoint-{step}": step for step in (8, 9, 10)}
    key = ""
    output = "average"

    def write(self, directory: Path) -> Written:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
        from transformers import BertConfig, BertModel, BertTokenizerFast

        base = directory / "base"
        base.mkdir(parents=True)
        letters = "abcdefghijklmnopqrstuvwxyz"
        tokens = [
            "[PAD]",
            "[UNK]",
            "[CLS]",
            "[SEP]",
            "[MASK]",
            *letters,
            *(f"##{c}" for c in letters),
        ]
        (base / "vocab.txt").write_text("\n".join(tokens))
        BertTokenizerFast(vocab_file=str(base / "vocab.txt")).save_pretrained(base)
        config = BertConfig(
            vocab_size=len(tokens), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=32,
        )  # fmt: skip
        BertModel(config).save_pretrained(base)
        modules = [Transformer(str(base)), Pooling(16, "cls"), Dense(16, 8), Normalize()]
        model = SentenceTransformer(modules=modules, device="cpu")
        shutil.rmtree(base)
        states = []
        for name in self.checkpoints:
            nudge(model)
            model.save_pretrained(str(directory / name))
            states.append(self.weights(directory / name))
        return Written(directory, states)

    def weights(self, path: Path) -> State:
        """The tensors of both files, by the file's directory and the name in it."""
        state = load_file(path / "model.safetensors")
        dense = load_file(path / "2_Dense" / "model.safetensors")
        return state | {f"2_Dense/{name}": value for name, value in dense.items()}

    def load_back(self, path: Path) -> State:
        from sentence_transformers import SentenceTransformer

        model = SentenceTransformer(str(path), device="cpu")
        assert [type(module).__name__ for module in model] == [
            "Transformer", "Pooling", "Dense", "Normalize",
        ]  # fmt: skip
        assert model[1].pooling_mode == "cls"
        state = copied(model[0].auto_model.state_dict())
        return state | {f"2_Dense/{name}": v for name, v in copied(model[2].state_dict()).items()}


@register
class Marian(Layout):
    """A translation model, whose tokenizer is made of SentencePiece files."""

    name = "Marian"
    needs = ("transformers", "sentencepiece")
    checkpoints = {f"checkpoint-{step}": step for step in (8, 9, 10)}
    key = ""
    output = "average"

    def write(self, directory: Path) -> Written:
        from transformers import MarianConfig, MarianMTModel

        tokenizer = self.tokenizer(directory.with_name("tokenizer"))
        end = len(tokenizer) - 1
        layers = {f"{part}_layers": 1 for part in ("encoder", "decoder")}
        heads = {f"{part}_attention_heads": 2 for part in ("encoder", "decoder")}
        config = MarianConfig(
            vocab_size=len(tokenizer), d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16,
            pad_token_id=end, decoder_start_token_id=end, eos_token_id=0,
            max_position_embeddings=32, **layers, **heads,
        )  # fmt: skip
        model = MarianMTModel(config)
        states = []
        for name in self.checkpoints:
            nudge(model)
            model.save_pretrained(directory / name)
            tokenizer.save_pretrained(directory / name)
            states.append(load_file(directory / name / "model.safetensors"))
        return Written(directory, states)

    def tokenizer(self, directory: Path):
        """A tokenizer trained on three lines."""
        import sentencepiece
        from transformers import MarianTokenizer

        directory.mkdir()
        lines = ["the cat sat on the mat", "a dog ran in the park", "hello world this is a test"]
        text = directory / "text.txt"
        text.write_text("\n".join(lines * 50))
        for side in ("source", "target"):
            sentencepiece.SentencePieceTrainer.train(
                input=str(text), model_prefix=str(directory / side), vocab_size=40,
                model_type="bpe", minloglevel=9,
            )  # fmt: skip
            (directory / f"{side}.model").rename(directory / f"{side}.spm")
        pieces = sentencepiece.SentencePieceProcessor(str(directory / "source.spm"))
        words = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
        known = [word for word in words if word not in ("<s>", "</s>", "<unk>")]
        ids = {word: i for i, word in enumerate(["</s>", "<unk>", *known, "<pad>"])}
        (directory / "vocab.json").write_text(json.dumps(ids))
        files = (directory / name for name in ("source.spm", "target.spm", "vocab.json"))
        return MarianTokenizer(*map(str, files))

    def load_back(self, path: Path) -> State:
        from transformers import MarianMTModel, MarianTokenizer

        assert MarianTokenizer.from_pretrained(path)("the cat").input_ids[-1] == 0
        state = copied(MarianMTModel.from_pretrained(path).state_dict())
        return {name: state[name] for name in load_file(path / "model.safetensors")}


def train_in_two_processes(kind: str, directory: Path) -> None:
    """Have ``sharded_training.py`` write a run.

    The launcher and gloo take free ports, which others on the machine may take a moment before:
    then they try anew, as a person would.
    """
    script = Path(__file__).with_name("sharded_training.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for _ in range(3):
        shutil.rmtree(directory, ignore_errors=True)
        done = subprocess.run(
            [*launcher, script, kind, directory], check=False, capture_output=True, text=True
        )
        if done.returncode == 0:
            return
    raise AssertionError(f"{kind} wrote nothing: {done.stderr[-3000:]}")


@register
class ShardedTrainer(Layout):
    """The Hugging Face Trainer under FSDP, whose model is a distributed checkpoint of its own."""

    name = "Trainer under FSDP"
    needs = ("transformers", "accelerate")
    checkpoints = {f"checkpoint-{step}/pytorch_model_fsdp_0": step for step in (8, 9, 10)}
    key = "model"
    output = "average"

    def write(self, directory: Path) -> Written:
        train_in_two_processes("trainer", directory)
        return Written(directory, [self.load_back(directory / name) for name in self.checkpoints])

    def load_back(self, path: Path) -> State:
        model = Net(5)
        state = {"model": model.state_dict()}
        dcp.load(state, checkpoint_id=path)
        return copied(state["model"])


@register
class HuggingFaceWriter(Layout):
    """Safetensors of each rank, whose headers place their boxes in the whole tensors."""

    name = "torch's HuggingFaceStorageWriter"
    checkpoints = {f"step-{step}": step for step in (8, 9, 10)}
    key = ""
    output = "average"

    def write(self, directory: Path) -> Written:
        train_in_two_processes("hf-writer", directory)
        return Written(directory, [self.load_back(directory / name) for name in self.checkpoints])

    def load_back(self, path: Path) -> State:
        state = Net(5).state_dict()
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
        return copied(state)
