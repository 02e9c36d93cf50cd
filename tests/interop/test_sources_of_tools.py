"""Data and models of timm, Lightning, datasets and transformers, as their own code makes them."""

import json

import pytest
import torch
from PIL import Image

from ckptavg.errors import SpecError
from ckptavg.specs.arguments import parse_arguments
from ckptavg.specs.sources import make_data, make_model


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def picture(tmp_path):
    """An image of noise, in the only class of images/."""
    (tmp_path / "images" / "noise").mkdir(parents=True)
    path = tmp_path / "images" / "noise" / "a.png"
    Image.effect_noise((300, 260), 90).convert("RGB").save(path)
    return Image.open(path).convert("RGB")


def prepared(model_spec, *pairs, settings=None):
    data = make_data(
        "imagefolder:images",
        parse_arguments(pairs),
        train=False,
        model_spec=model_spec,
        image_settings=settings,
    )
    return data[0][0]


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "mobilenetv3_small_050", "resnet18.tv_in1k"]
)
def test_timm_preset_prepares_images(picture, caplog, name):
    timm = pytest.importorskip("timm")
    caplog.set_level("INFO", "ckptavg")
    config = timm.data.resolve_model_data_config(timm.create_model(name))
    expected = timm.data.create_transform(**config, is_training=False)(picture)
    assert torch.equal(prepared(f"timm:{name}"), expected)
    assert f"by the preset of timm's {name}" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"img_size": 96},
        {"input_size": [3, 64, 64], "crop_pct": 1.0},
        {"mean": [0.5, 0.5, 0.5], "std": [0.1], "interpolation": "bilinear"},
        {"img_size": None, "mean": None, "crop_pct": None, "interpolation": "", "lr": 0.1},
    ],
)
def test_timm_preset_yields_to_training_settings(picture, settings):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18")
    config = timm.data.resolve_data_config(settings, model=model)
    expected = timm.data.create_transform(**config, is_training=False)(picture)
    assert torch.equal(prepared("timm:resnet18", settings=settings), expected)


def test_timm_preset_yields_to_options(picture):
    pytest.importorskip("timm")
    assert prepared("timm:resnet18", "size=32").shape == (3, 32, 32)


def test_timm_model_unknown_is_an_error():
    pytest.importorskip("timm")
    with pytest.raises(SpecError, match=r"timm has no model 'resnet81'. Did you mean .*resnet"):
        make_model("timm:resnet81")
    with pytest.raises(SpecError, match="Invalid pretrained tag"):
        make_model("timm:resnet18.nothing")


def test_huggingface_processor_prepares_images(picture, tmp_path, caplog):
    transformers = pytest.importorskip("transformers")
    caplog.set_level("INFO", "ckptavg")
    processor = transformers.ViTImageProcessor(
        size={"height": 48, "width": 48}, image_mean=[0.5] * 3, image_std=[0.25] * 3
    )
    processor.save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "config.json").write_text(json.dumps({"model_type": "vit"}))
    image = prepared(f"hf:{tmp_path / 'vit'}")
    loaded = transformers.AutoImageProcessor.from_pretrained(tmp_path / "vit")
    assert torch.equal(image, loaded(picture, return_tensors="pt")["pixel_values"][0])
    assert image.shape == (3, 48, 48)
    assert "resized to 48 and normalized by mean 0.5, 0.5, 0.5" in caplog.text


DATA = """
import datasets
import lightning
import torch
from torch.utils.data import DataLoader, TensorDataset

def rows(count):
    return TensorDataset(torch.zeros(count, 3), torch.zeros(count))

def several():
    return datasets.DatasetDict({
        name: datasets.Dataset.from_dict({"x": [[0.0]] * count, "labels": [0] * count})
        for name, count in {"train": 4, "validation": 3}.items()
    })

class Own(lightning.LightningDataModule):
    def __init__(self, size=2):
        super().__init__()
        self.size = size

    def setup(self, stage=None):
        if stage == "fit":
            self.rows = rows(self.size)
        if stage == "test":
            self.test = rows(9)

    def train_dataloader(self):
        return DataLoader(self.rows, 2, shuffle=True)

class Scored(Own):
    def val_dataloader(self):
        return DataLoader(self.rows, 1)

class Tested(Own):
    def test_dataloader(self):
        return DataLoader(self.test, 3)

made = lightning.LightningDataModule.from_datasets(rows(5), rows(6), batch_size=2)
"""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "pairs", "training", "scoring"),
    [
        ("several", [], 4, 3),
        ("Scored", ["size=7"], 4, 7),
        ("Tested", [], 1, 3),
        ("made", [], 3, 3),
    ],
)
def test_make_data_takes_lightning_and_datasets(tmp_path, name, pairs, training, scoring):
    pytest.importorskip("lightning")
    pytest.importorskip("datasets")
    (tmp_path / "data_of_tools.py").write_text(DATA)
    arguments = parse_arguments(pairs)
    for train, batches in ((True, training), (False, scoring)):
        data = make_data(f"data_of_tools.py:{name}", arguments, train=train)
        assert len(data) == batches


def test_make_data_refuses_module_without_loader(tmp_path):
    pytest.importorskip("lightning")
    pytest.importorskip("datasets")
    (tmp_path / "data_of_tools.py").write_text(DATA)
    with pytest.raises(SpecError, match="gives a Own that defines no val_dataloader or test_"):
        make_data("data_of_tools.py:Own", train=False)
