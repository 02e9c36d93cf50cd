"""``--model`` and ``--data`` specifications: what they build, and what is said if they do not."""

import contextlib
import importlib
import json
import socket
import sys

import numpy as np
import pytest
import torch
from spec_helpers import (
    CIFAR10,
    CIFAR100,
    COLOUR,
    IMAGENET,
    assert_uniform,
    error_of,
    normalized,
    write,
)
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models

from ckptavg.errors import SpecError, UsageError
from ckptavg.specs.arguments import parse_arguments, plain_value
from ckptavg.specs.sources import make_data, make_model

# Arguments


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("true", True),
        ("False", False),
        ("None", None),
        ("[1,2]", [1, 2]),
        ("'3'", "3"),
        ("resnet", "resnet"),
        ("a=b", "a=b"),
        ("", ""),
        ("/data/x.py:fn", "/data/x.py:fn"),
        ("__import__('os')", "__import__('os')"),
    ],
)
def test_argument_is_a_literal_or_text(text, expected):
    value = plain_value(parse_arguments([f"key={text}"])["key"])
    assert value == expected
    assert type(value) is type(expected)


def test_parse_arguments_takes_several_pairs():
    arguments = parse_arguments(["a=1", "b=x"])
    assert {name: plain_value(value) for name, value in arguments.items()} == {"a": 1, "b": "x"}
    assert parse_arguments([]) == {}


@pytest.mark.parametrize("pair", ["key", "=3", "a b=3", "", "--x=1"])
def test_parse_arguments_refuses_texts_without_key(pair):
    with pytest.raises(UsageError, match="key=value but got"):
        parse_arguments([pair])


@pytest.mark.parametrize("spec", ["resnet18", "", "torchvision:", ":make", "a/b.py"])
@pytest.mark.parametrize("build", [make_model, lambda spec: make_data(spec, train=True)])
def test_specification_of_unknown_form_is_refused(build, spec):
    message = error_of(build, spec, kind=UsageError)
    assert "package.module:factory or path/file.py:factory" in message
    assert repr(spec) in message


# Factories of the user's


def test_factory_is_found_in_a_file():
    path = write("deep/nets.py")
    for spec in (f"{path}:make_net", f"{path.resolve()}:make_net"):
        assert make_model(spec).in_features == 3
    model = make_model(f"{path}:make_net", {"width": 5, "bias": False})
    assert (model.in_features, model.bias) == (5, None)


def test_factory_in_a_file_imports_siblings():
    write("deep/widths_of_nets.py", "WIDTH = 7")
    path = write("deep/nets.py", "import widths_of_nets as w\nfrom torch import nn\n"
                 "def make(): return nn.Linear(w.WIDTH, 1)")  # fmt: skip
    assert make_model(f"{path}:make").in_features == 7


def test_factory_is_found_in_a_local_module():
    write("nets_package/__init__.py", "")
    write("nets_package/small.py")
    assert make_model("nets_package.small:make_net").in_features == 3
    assert make_model("nets_package.small:Family.small").in_features == 1


def test_factory_may_be_a_class():
    assert isinstance(
        make_model("torch.nn:Linear", {"in_features": 2, "out_features": 1}), nn.Linear
    )


def test_factory_files_of_one_name_are_separate():
    for width in (3, 4):
        text = f"from torch import nn\ndef make(): return nn.Linear({width}, 1)"
        path = write(f"run{width}/model_of_the_run.py", text)
        assert make_model(f"{path}:make").in_features == width


def test_factory_file_may_have_the_name_of_a_module():
    import json

    path = write("json.py")
    assert make_model(f"{path}:make_net").in_features == 3
    assert importlib.import_module("json") is json


def test_factory_arguments_may_have_any_name():
    model = make_model(f"{write('nets.py')}:named", {"spec": 2, "factory": 4})
    assert (model.in_features, model.out_features) == (2, 4)


@pytest.mark.parametrize(("name", "kind"), [("make_data", Dataset), ("make_loader", DataLoader)])
@pytest.mark.parametrize("train", [True, False])
def test_data_factory_gives_dataset_or_loader(name, kind, train):
    data = make_data(f"{write('data_of_mine.py')}:{name}", train=train)
    assert isinstance(data, kind)


def test_data_factory_takes_arguments():
    path = write("data_of_mine.py")
    assert len(make_data(f"{path}:make_data", {"samples": 9}, train=True)) == 9


@pytest.mark.parametrize("home", ["no_such_module", "no_such_module.nets", "torch.no_such_module"])
def test_missing_module_is_an_error(home):
    message = error_of(make_model, f"{home}:make")
    assert "no module named" in message
    assert "no_such_module" in message
    assert "PYTHONPATH" in message


def test_missing_file_is_an_error():
    assert "the file nets/none.py does not exist" in error_of(make_model, "nets/none.py:make")


@pytest.mark.parametrize("home", ["nets_of_mine", "nets_of_mine.py"])
def test_missing_attribute_is_an_error(home):
    write("nets_of_mine.py")
    message = error_of(make_model, f"{home}:make_nett")
    assert f"{home} has no attribute 'make_nett'" in message
    assert "Did you mean make_net" in message


@pytest.mark.parametrize("home", ["nets_of_mine", "nets_of_mine.py"])
def test_failing_factory_is_named(home):
    write("nets_of_mine.py")
    message = error_of(make_model, f"{home}:broken")
    assert f"{home}:broken failed: ValueError: no such width" in message


def test_factory_refuses_unknown_arguments():
    spec = f"{write('nets.py')}:make_net"
    assert "Did you mean width?" in error_of(make_model, spec, {"widht": 3})
    assert "It takes width, bias." in error_of(make_model, spec, {"groups": 3})


def test_factory_must_be_callable():
    message = error_of(make_model, f"{write('nets.py')}:WIDTH")
    assert "callable but is a int" in message


BROKEN_IMPORTS = {
    "raises": ("raise OSError('no disk')", "OSError: no disk"),
    "is no Python": ("def make(:", "SyntaxError"),
    "lacks a dependency": ("import not_installed", "No module named 'not_installed'"),
}


@pytest.mark.parametrize(("text", "cause"), BROKEN_IMPORTS.values(), ids=BROKEN_IMPORTS)
@pytest.mark.parametrize("home", ["nets_of_mine", "nets_of_mine.py"])
def test_module_that_fails_on_import_is_an_error(home, text, cause):
    write("nets_of_mine.py", text)
    for _ in range(2):  # a half-imported module is not kept
        message = error_of(make_model, f"{home}:make")
        assert f"importing {home} failed" in message
        assert cause in message


@pytest.mark.parametrize(("text", "cause"), BROKEN_IMPORTS.values(), ids=BROKEN_IMPORTS)
def test_package_that_fails_on_import_is_an_error(text, cause):
    write("package_of_mine/__init__.py", text)
    write("package_of_mine/nets.py")
    message = error_of(make_model, "package_of_mine.nets:make_net")
    assert "importing package_of_mine" in message
    assert cause in message


@pytest.mark.parametrize(
    ("name", "kind"),
    [("make_number", "int"), ("make_nothing", "NoneType"), ("make_data", "Tensor")],
)
def test_model_factory_must_return_a_module(name, kind):
    message = error_of(make_model, f"{write('nets.py')}:{name}")
    assert f"expected to return a torch.nn.Module but returned a {kind}" in message


@pytest.mark.parametrize(
    ("name", "kind"), [("make_number", "int"), ("make_nothing", "None"), ("make_net", "Linear")]
)
def test_data_factory_must_return_data(name, kind):
    message = error_of(make_data, f"{write('nets.py')}:{name}", train=True)
    assert f"expected to return a Dataset or a DataLoader but returned a {kind}" in message


def test_factory_error_is_one_line():
    path = write("nets.py", "def make(): raise ValueError('first\\nsecond')")
    assert "\n" not in error_of(make_model, f"{path}:make")


# Libraries of models


def test_torchvision_model_is_built():
    model = make_model("torchvision:resnet18", {"num_classes": 7})
    assert type(model).__name__ == "ResNet"
    assert model.fc.out_features == 7


@pytest.mark.parametrize("name", ["resnet18", "lraspp_mobilenet_v3_large"])
def test_torchvision_model_downloads_no_weights(monkeypatch, name):
    """A segmentation model's backbone has pretrained weights by default."""
    downloads = []
    monkeypatch.setattr(
        models._api, "load_state_dict_from_url", lambda *a, **k: downloads.append(a)
    )
    with contextlib.suppress(SpecError):
        make_model(f"torchvision:{name}")
    assert downloads == []


def test_torchvision_model_unknown_is_an_error():
    message = error_of(make_model, "torchvision:resnet19")
    assert "torchvision has no model 'resnet19'" in message
    assert "resnet18" in message


def test_torchvision_model_refuses_unknown_arguments():
    message = error_of(make_model, "torchvision:resnet18", {"numclasses": 7})
    assert "torchvision:resnet18 failed" in message
    assert "numclasses" in message


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'torchvision'"), "torchvision is not installed"),
        (
            RuntimeError("operator torchvision::nms does not exist"),
            "does not fit the installed torch",
        ),
        (ImportError("undefined symbol"), "does not fit the installed torch"),
        (OSError("libcudart.so"), "does not fit the installed torch"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
@pytest.mark.parametrize(
    "build",
    [lambda: make_model("torchvision:resnet18"), lambda: make_data("cifar10:x", train=True)],
)
def test_torchvision_import_failure_is_explained(monkeypatch, build, error, said):
    def fail(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", fail)
    message = error_of(build)
    assert said in message
    assert "pip install" in message
    assert ("nms" in message) == ("nms" in str(error))


def test_timm_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert "pip install timm" in error_of(make_model, "timm:resnet18")


def test_timm_model_has_no_pretrained_weights(monkeypatch):
    calls = []

    class Timm:
        @staticmethod
        def create_model(name, **keywords):
            calls.append((name, keywords))
            return nn.Linear(1, 1)

    monkeypatch.setitem(sys.modules, "timm", Timm)
    make_model("timm:resnet18.a1", {"num_classes": 7})
    assert calls == [("resnet18.a1", {"pretrained": False, "num_classes": 7})]


@pytest.fixture
def hugging_face(tmp_path):
    from transformers import ResNetConfig

    def write(**settings):
        config = ResNetConfig(
            embedding_size=4,
            hidden_sizes=[4, 8],
            depths=[1, 1],
            layer_type="basic",
            num_labels=3,
            **settings,
        )
        config.save_pretrained(tmp_path / "hf")
        return f"hf:{tmp_path / 'hf'}"

    return write


def test_hugging_face_model_follows_its_config(hugging_face):
    spec = hugging_face(architectures=["ResNetForImageClassification"])
    model = make_model(spec)
    assert type(model).__name__ == "ResNetForImageClassification"
    assert model.eval()(pixel_values=torch.zeros(2, 3, 8, 8)).logits.shape == (2, 3)
    assert make_model(spec, {"num_labels": 5}).config.num_labels == 5


@pytest.mark.parametrize("settings", [{}, {"architectures": ["MyOwnNet"]}])
def test_hugging_face_config_needs_a_known_architecture(hugging_face, settings):
    assert "names no architecture" in error_of(make_model, hugging_face(**settings))


@pytest.fixture
def asked(monkeypatch):
    """The hosts that are asked for; none of them answers."""
    import huggingface_hub.constants

    hosts = []

    def refuse(host, *_, **__):
        hosts.append(host)
        raise OSError("no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return hosts


def detection(path, **backbone):
    """The configuration of a small detector."""
    sizes = {
        f"{part}_{size}": 8 if "dim" in size else 1
        for part in ("encoder", "decoder")
        for size in ("layers", "ffn_dim", "attention_heads")
    }
    config = {"model_type": "detr", "architectures": ["DetrForObjectDetection"], "d_model": 8}
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config | sizes | backbone))
    return f"hf:{path}"


BACKBONES = [
    {"use_timm_backbone": True},
    {"use_timm_backbone": True, "backbone_kwargs": {"out_indices": [1, 2, 3, 4]}},
    {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18",
                         "features_only": True, "use_pretrained_backbone": True,
                         "out_indices": [1, 2, 3, 4]}, "backbone": None},
]  # fmt: skip


@pytest.mark.parametrize("backbone", BACKBONES)
def test_hugging_face_timm_backbone_does_not_ask_the_hub(tmp_path, asked, backbone):
    pytest.importorskip("timm")
    import huggingface_hub

    exists = huggingface_hub.HfApi.repo_exists
    settings = {"backbone": "resnet18", "use_pretrained_backbone": True} | backbone
    model = make_model(detection(tmp_path / "detr", **settings))
    assert (64, 3, 7, 7) in [p.shape for p in model.parameters()]
    assert asked == []
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
    assert huggingface_hub.HfApi.repo_exists is exists


def test_hugging_face_backbone_comes_from_cache(tmp_path, asked, monkeypatch):
    import huggingface_hub
    from transformers import ResNetConfig

    spec = detection(tmp_path / "detr", backbone="someone/small", use_timm_backbone=False)
    message = error_of(make_model, spec)
    assert "names the backbone someone/small, of which this machine has no" in message
    assert "hf download someone/small config.json" in message
    cache = tmp_path / "cache" / "models--someone--small"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    small = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    small.save_pretrained(cache / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    model = make_model(spec)
    assert max(p.shape[0] for n, p in model.named_parameters() if "backbone" in n) == 8
    assert asked == []


def test_hugging_face_directory_needs_a_config(tmp_path):
    assert f"{tmp_path} is no directory with a config" in error_of(make_model, f"hf:{tmp_path}")


# Image folders


def test_image_folder_gets_usual_preparation(folder, caplog):
    caplog.set_level("INFO", "ckptavg")
    data = make_data(folder, train=False)
    assert [label for _, label in data] == [0, 0, 1]
    assert_uniform(data[0][0], (224, 224), normalized(COLOUR, *IMAGENET))
    assert "resized to 256, cropped to 224 and normalized as ImageNet's" in caplog.text


@pytest.mark.parametrize("train", [True, False])
def test_image_folder_gets_preset_of_model(folder, caplog, train):
    caplog.set_level("INFO", "ckptavg")
    data = make_data(folder, train=train, model_spec="torchvision:inception_v3")
    assert_uniform(data[0][0], (299, 299), normalized(COLOUR, *IMAGENET))
    assert "preset of Inception_V3_Weights" in caplog.text


@pytest.mark.parametrize("model_spec", ["nets.py:make", "hf:dir"])
def test_image_folder_without_model_preset_is_as_usual(folder, caplog, model_spec):
    caplog.set_level("INFO", "ckptavg")
    assert make_data(folder, train=False, model_spec=model_spec)[0][0].shape == (3, 224, 224)
    assert "resized to 256" in caplog.text


@pytest.mark.parametrize("home", ["prepare_images.py", "prepare_images"])
def test_image_folder_transform_replaces_the_preset(folder, home):
    write("prepare_images.py")
    arguments = {"transform": f"{home}:invert"}
    data = make_data(folder, arguments, train=False, model_spec="torchvision:resnet18")
    assert data[0][0].tolist() == [0, 204, 255]
    assert arguments == {"transform": f"{home}:invert"}


def test_image_folder_transform_is_logged(folder, caplog):
    caplog.set_level("INFO", "ckptavg")
    make_data(folder, {"transform": f"{write('prepare.py')}:invert"}, train=False)
    assert "invert" in caplog.text


def test_image_folder_transform_unknown_is_an_error(folder):
    write("prepare.py")
    message = error_of(make_data, folder, {"transform": "prepare.py:inverse"}, train=False)
    assert "prepare.py has no attribute 'inverse'" in message
    assert "Did you mean invert" in message


@pytest.mark.parametrize("name", ["nowhere", "images/cats"])
def test_image_folder_must_hold_classes(folder, tmp_path, name):
    message = error_of(make_data, f"imagefolder:{tmp_path / name}", train=False)
    assert str(tmp_path / name) in message


# CIFAR


@pytest.mark.parametrize(
    ("kind", "train", "labels", "moments"),
    [
        ("cifar10", True, [1, 2, 3, 4, 5], CIFAR10),
        ("cifar10", False, [9], CIFAR10),
        ("cifar100", True, [42], CIFAR100),
        ("cifar100", False, [99], CIFAR100),
    ],
)
def test_cifar_directory_gives_its_splits(cifar, caplog, kind, train, labels, moments):
    caplog.set_level("INFO", "ckptavg")
    data = make_data(f"{kind}:{cifar}", train=train, model_spec="torchvision:resnet18")
    assert [label for _, label in data] == labels
    assert_uniform(data[0][0], (32, 32), normalized(COLOUR, *moments))
    assert f"normalized as {kind.upper()}'s" in caplog.text


def test_cifar_directory_takes_a_transform(cifar):
    write("prepare_images.py")
    arguments = {"transform": "prepare_images.py:invert"}
    assert make_data(f"cifar10:{cifar}", arguments, train=True)[0][0].tolist() == [0, 204, 255]


def test_cifar_directory_split_can_be_chosen(cifar):
    """To recompute statistics on, or score, the other split."""
    data = make_data(f"cifar10:{cifar}", {"train": False}, train=True)
    assert [label for _, label in data] == [9]


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar_directory_must_hold_batches(tmp_path, kind):
    message = error_of(make_data, f"{kind}:{tmp_path}", train=False)
    folder = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}[kind]
    assert f"{tmp_path} does not hold {folder}" in message


# Text


@pytest.fixture
def language_model(tmp_path):
    """A directory with the configuration and the tokenizer of a language model, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(tmp_path / "lm")
    sizes = {"n_embd": 4, "n_layer": 1, "n_head": 1, "bos_token_id": 0, "eos_token_id": 0}
    config = GPT2Config(vocab_size=3, n_positions=5, architectures=["GPT2LMHeadModel"], **sizes)
    config.save_pretrained(tmp_path / "lm")
    write("val.txt", "a b b a c " * 3)
    return f"hf:{tmp_path / 'lm'}"


def test_text_follows_tokenizer_and_context_of_model(language_model):
    data = make_data("text:val.txt", train=False, model_spec=language_model)
    assert data[0]["input_ids"].tolist() == [0, 1, 1, 0, 2]
    assert len(data) == 4
    logits = make_model(language_model)(data[3]["input_ids"][None]).logits
    assert logits.shape == (1, 5, 3)


def test_text_arguments_override_the_model(language_model, tmp_path):
    arguments = {"tokenizer": str(tmp_path / "lm"), "length": 8, "stride": 4}
    for model_spec in (language_model, "nets.py:make", ""):
        data = make_data("text:val.txt", arguments, train=False, model_spec=model_spec)
        assert data[1]["input_ids"].tolist() == [2, 0, 1, 1, 0, 2, 0, 1]


def test_text_needs_a_tokenizer(language_model, hugging_face):
    message = error_of(make_data, "text:val.txt", train=False, model_spec="nets.py:make")
    assert "tokenizer=DIR" in message
    spec = hugging_face()
    message = error_of(make_data, "text:val.txt", train=False, model_spec=spec)
    assert f"{spec[3:]} holds no tokenizer" in message


def test_tokens_follow_context_of_model(language_model):
    np.arange(20, dtype="<u2").tofile("val.bin")
    data = make_data("tokens:val.bin", train=False, model_spec=language_model)
    assert data[1]["input_ids"].tolist() == [4, 5, 6, 7, 8]
    assert len(make_data("tokens:val.bin", train=False)[0]["input_ids"]) == 20
    data = make_data("tokens:val.bin", {"dtype": "uint32"}, train=False)
    assert data[0]["input_ids"].tolist()[:2] == [1 << 16, (3 << 16) + 2]


@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_text_refuses_unknown_arguments(kind, language_model):
    message = error_of(
        make_data, f"{kind}:val.txt", {"lenght": 3}, train=False, model_spec=language_model
    )
    assert "lenght" in message
    assert "Did you mean length?" in message


def test_tokens_prefix_mistyped_gets_a_suggestion():
    assert "Did you mean tokens:" in error_of(make_data, "tokns:val.bin", train=False)


def test_factory_needs_no_torchvision(monkeypatch):
    for part in ("torchvision", "torchvision.models", "torchvision.datasets"):
        monkeypatch.setitem(sys.modules, part, None)
    path = write("nets.py")
    make_model(f"{path}:make_net")
    make_data(f"{path}:make_data", train=True)
    assert "torchvision is not installed" in error_of(make_model, "torchvision:resnet18")
