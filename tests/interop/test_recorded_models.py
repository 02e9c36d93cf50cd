"""Models and their arguments as timm, Lightning and transformers record them in checkpoints."""

import argparse
import json
import sys

import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from ckptavg.cli import main
from ckptavg.formats import open_checkpoint
from ckptavg.specs.recorded import complete_source

CLASSES = 3


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])


def run(*words):
    """What a command prints as JSON, and its notes."""
    result = CliRunner().invoke(main, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout), " ".join(result.stderr.split())


@pytest.fixture
def images(tmp_path):
    """Two images of noise in each of three classes."""
    for label in range(CLASSES):
        folder = tmp_path / "images" / str(label)
        folder.mkdir(parents=True)
        for index in range(2):
            image = Image.effect_noise((40, 40), 20 + 30 * label + index)
            image.convert("RGB").save(folder / f"{index}.png")
    return "imagefolder:images"


@pytest.fixture
def timm_run(tmp_path):
    """Two epochs of timm's CheckpointSaver, with arguments as timm's training script has them."""
    timm = pytest.importorskip("timm")
    utils = pytest.importorskip("timm.utils")
    torch.manual_seed(0)
    args = argparse.Namespace(
        model="resnet10t", num_classes=CLASSES, in_chans=None, gp="avgmax", img_size=32,
        input_size=None, mean=[0.5, 0.4, 0.3], std=None, interpolation="bilinear", crop_pct=None,
        model_kwargs={"act_layer": "silu"}, lr=0.1, bn_eps=None,
    )  # fmt: skip
    model = timm.create_model(
        args.model, num_classes=CLASSES, global_pool=args.gp, **args.model_kwargs
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    directory = tmp_path / "run"
    directory.mkdir()
    saver = utils.CheckpointSaver(
        model, optimizer, args=args, checkpoint_dir=str(directory), max_history=4
    )
    for epoch in range(2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        saver.save_checkpoint(epoch, metric=float(epoch))
    return directory, model.eval()


def test_timm_arguments_give_model_and_image_settings(timm_run):
    directory, _ = timm_run
    source = complete_source(None, {}, [open_checkpoint(directory / "checkpoint-1.pth.tar")])
    assert source.spec == "timm:resnet10t"
    assert source.arguments == {
        "num_classes": CLASSES,
        "global_pool": "avgmax",
        "act_layer": "silu",
    }
    assert source.image_settings == {
        "img_size": 32,
        "mean": [0.5, 0.4, 0.3],
        "interpolation": "bilinear",
    }


@pytest.mark.parametrize("named", [[], ["--model", "timm:resnet10t"]], ids=["left out", "named"])
def test_timm_run_is_scored_as_trained(timm_run, images, named):
    timm = pytest.importorskip("timm")
    directory, model = timm_run
    outcome, notes = run("eval", "--run", directory, "--data", images, *named)
    transform = timm.data.create_transform(
        (3, 32, 32), mean=(0.5, 0.4, 0.3), std=(0.229, 0.224, 0.225), interpolation="bilinear",
        crop_pct=timm.data.resolve_data_config({}, model=model)["crop_pct"], is_training=False,
    )  # fmt: skip
    losses = []
    for label in range(CLASSES):
        for index in range(2):
            image = transform(Image.open(f"images/{label}/{index}.png"))
            with torch.no_grad():
                losses.append(-model(image[None]).double().log_softmax(1)[0, label].item())
    last = outcome["candidates"][0]
    assert last["name"].endswith("(last)")
    assert last["metrics"]["nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert "num_classes=3" in notes


def test_model_arguments_override_recorded_ones(timm_run):
    directory, _ = timm_run
    opened = open_checkpoint(directory / "checkpoint-1.pth.tar")
    source = complete_source("timm:resnet10t", {"num_classes": 7}, [opened])
    assert source.arguments["num_classes"] == 7
    assert source.arguments["act_layer"] == "silu"
    other = complete_source("timm:resnet18", {}, [opened])
    assert other.arguments == {}


def test_timm_run_recomputes_statistics_without_model(timm_run, images):
    directory, _ = timm_run
    made, notes = run("average", directory, "--train-data", images, "-o", "swa.pth.tar")
    assert made["bn"] == "recomputed"
    assert "the model is timm:resnet10t" in notes
    # the output holds the arguments, too
    updated, _ = run("update-bn", "swa.pth.tar", "--train-data", images, "-o", "again.pth.tar")
    assert updated["samples"] == 2 * CLASSES


def test_timm_config_gives_the_model(tmp_path):
    timm = pytest.importorskip("timm")
    hub = pytest.importorskip("timm.models")
    model = timm.create_model("resnet10t", num_classes=CLASSES)
    hub.save_for_hf(model, tmp_path / "hub", safe_serialization=True)
    source = complete_source(None, {}, [open_checkpoint(tmp_path / "hub" / "model.safetensors")])
    assert source.spec == "timm:resnet10t"
    assert source.arguments["num_classes"] == CLASSES
    assert source.image_settings["mean"] == list(model.pretrained_cfg["mean"])


@pytest.fixture
def language_run(tmp_path):
    """Two checkpoints of a small GPT-2, as the Trainer lays them out, and tokens."""
    transformers = pytest.importorskip("transformers")
    numpy = pytest.importorskip("numpy")
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    for step in (10, 20):
        torch.manual_seed(step)
        model = transformers.GPT2LMHeadModel(config)
        model.save_pretrained(tmp_path / "gpt" / f"checkpoint-{step}")
    numpy.save("ids.npy", numpy.arange(16, dtype=numpy.uint16))
    return tmp_path / "gpt", model.eval()


@pytest.mark.parametrize("named", [[], ["--model", "hf:gpt"]], ids=["left out", "of the run"])
def test_huggingface_run_is_scored_by_its_config(language_run, named):
    directory, model = language_run
    outcome, notes = run("eval", "--run", directory, "--data", "tokens:ids.npy", *named)
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        logits = model(input_ids=tokens).logits.double()
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    last = outcome["candidates"][0]
    assert last["metrics"]["nll"] == pytest.approx(expected.item(), rel=1e-5)
    assert "checkpoint-20" in notes


LIT = """
import lightning
import torch

class Base(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.inner = None

    def configure_model(self):
        if self.inner is None:
            layers = [torch.nn.Linear(2, self.hparams.width)]
            for _ in range(self.hparams.depth):
                layers += [torch.nn.BatchNorm1d(self.hparams.width)]
            self.inner = torch.nn.Sequential(*layers, torch.nn.Linear(self.hparams.width, 3))

    def forward(self, x):
        return self.inner(x)

    def training_step(self, batch, _):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Lit(Base):
    def __init__(self, width=4, depth=1, activation=None):
        super().__init__()
        self.save_hyperparameters(ignore=["activation"])

class Whole(Base):
    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters(config)
        assert config.width == config["width"]

def data():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(40, 2, generator=generator)
    return torch.utils.data.TensorDataset(points, (points[:, 0] > 0).long())
"""


@pytest.fixture
def lightning_run(tmp_path):
    """Trains the module of a file and returns the directory and the module."""
    lightning = pytest.importorskip("lightning")
    (tmp_path / "lit_module.py").write_text(LIT)
    sys.path.insert(0, str(tmp_path))
    sys.modules.pop("lit_module", None)
    import lit_module

    def train(module):
        callback = lightning.pytorch.callbacks.ModelCheckpoint(
            str(tmp_path / "lit"), "{epoch}", save_top_k=-1
        )
        trainer = lightning.Trainer(
            max_epochs=2, logger=False, callbacks=[callback], enable_progress_bar=False,
            enable_model_summary=False, accelerator="cpu",
        )  # fmt: skip
        loader = torch.utils.data.DataLoader(lit_module.data(), 8)
        trainer.fit(module, loader)
        return tmp_path / "lit", module.eval()

    yield lit_module, train
    sys.modules.pop("lit_module", None)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("spec", ["lightning:lit_module.py:Lit", "lit_module.py:Lit"])
def test_lightning_hyperparameters_are_taken(lightning_run, spec):
    module, train = lightning_run
    directory, trained = train(module.Lit(width=6, depth=2))
    outcome, notes = run(
        "eval", "--run", directory, "--model", spec, "--data", "lit_module.py:data"
    )
    points, labels = module.data().tensors
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(trained(points).double(), labels)
    assert outcome["candidates"][0]["metrics"]["nll"] == pytest.approx(expected.item(), rel=1e-5)
    assert "depth=2" in notes
    assert "width=6" in notes


@pytest.mark.filterwarnings("ignore")
def test_lightning_hyperparameters_may_be_one_object(lightning_run):
    module, train = lightning_run
    config = lightning_config(width=5, depth=1)
    directory, trained = train(module.Whole(config))
    outcome, _ = run(
        "eval", "--run", directory, "--model", "lightning:lit_module.py:Whole",
        "--data", "lit_module.py:data",
    )  # fmt: skip
    points, labels = module.data().tensors
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(trained(points).double(), labels)
    assert outcome["candidates"][0]["metrics"]["nll"] == pytest.approx(expected.item(), rel=1e-5)


def lightning_config(**values):
    """A mapping with attributes, as Lightning's users pass one."""
    fabric = pytest.importorskip("lightning.fabric.utilities.data")
    return fabric.AttributeDict(values)


@pytest.mark.filterwarnings("ignore")
def test_lightning_run_needs_its_class(lightning_run):
    module, train = lightning_run
    directory, _ = train(module.Lit())
    result = CliRunner().invoke(
        main, ["eval", "--run", str(directory), "--data", "lit_module.py:data"]
    )
    assert result.exit_code == 2
    assert "lightning:path/file.py:Class" in result.stderr
