"""Images as ``imagefolder:`` and ``cifar10:`` prepare them: by transforms, options, presets."""

import pytest
import torch
from PIL import Image
from spec_helpers import CIFAR10, COLOUR, IMAGENET, assert_uniform, error_of, normalized, write
from torchvision import models, transforms

from ckptavg.specs.arguments import parse_arguments
from ckptavg.specs.sources import make_data

TRANSFORMS = """
import functools
import torch
from torchvision import transforms

def pixels(image):
    return torch.tensor(image.getpixel((0, 0)))

def scaled(image, by=1):
    return pixels(image) * by

doubled = functools.partial(scaled, by=2)
composed = transforms.Compose([transforms.Resize(8), transforms.ToTensor()])

def build(size=4):
    return transforms.Compose([transforms.Resize((size, size)), transforms.ToTensor()])

def build_for(train):
    return build(99 if train else 5)

def anything(*args):
    return pixels(args[0])

class Pixels:
    def __call__(self, image):
        return pixels(image)

def nothing():
    return 3

def broken():
    raise OSError("no such table")
"""


def image_of(source, *pairs, **keywords):
    return make_data(source, parse_arguments(pairs), train=False, **keywords)[0][0]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pixels", (3,)),
        ("doubled", (3,)),
        ("anything", (3,)),
        ("Pixels", (3,)),
        ("composed", (3, 8, 10)),
        ("build", (3, 4, 4)),
        ("build_for", (3, 5, 5)),
    ],
)
def test_transform_may_be_function_object_class_or_factory(folder, name, expected):
    path = write("prepare.py", TRANSFORMS)
    assert image_of(folder, f"transform={path}:{name}").shape == expected


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing", "expected to be a function of an image, or to return one, but gives a int"),
        ("broken", "prepare.py:broken failed: OSError: no such table (prepare.py:"),
    ],
)
def test_transform_factory_must_give_a_function(folder, name, said):
    path = write("prepare.py", TRANSFORMS)
    assert said in error_of(image_of, folder, f"transform={path}:{name}")


def test_transform_none_leaves_images_unchanged(folder, caplog):
    caplog.set_level("INFO", "ckptavg")
    image = image_of(folder, "transform=none", model_spec="torchvision:resnet18")
    assert_uniform(image, (30, 40), [c / 255 for c in COLOUR])
    assert "nothing else is done to them" in caplog.text


HALF = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.mark.parametrize(
    ("pairs", "size", "moments"),
    [
        (["size=32"], (32, 32), IMAGENET),
        (["size=32", "crop=24"], (24, 24), IMAGENET),
        (["size=20,10"], (20, 10), IMAGENET),
        (["size=32", "crop=none"], (32, 42), IMAGENET),
        (["size=none"], (30, 40), IMAGENET),
        (["size=none", "crop=16,8"], (16, 8), IMAGENET),
        (["crop=112"], (112, 112), IMAGENET),
        (["mean=0.5", "std=0.25"], (224, 224), HALF),
        (["mean=0.5,0.5,0.5", "std=[0.25,0.25,0.25]"], (224, 224), HALF),
        (["mean=none"], (224, 224), ((0.0,) * 3, (1.0,) * 3)),
    ],
)
@pytest.mark.parametrize("model_spec", ["", "torchvision:resnet18"])
def test_image_options_change_the_preset(folder, pairs, size, moments, model_spec):
    image = image_of(folder, *pairs, model_spec=model_spec)
    assert_uniform(image, size, normalized(COLOUR, *moments))


def test_crop_option_scales_the_resize_of_the_preset(tmp_path, folder):
    """As 224 of 256, so 112 of 128: the same pixels as those two options give."""
    path = tmp_path / "images" / "cats" / "a.png"
    Image.effect_noise((300, 200), 90).convert("RGB").save(path)
    by_hand = transforms.Compose([
        transforms.Resize(128), transforms.CenterCrop(112), transforms.ToTensor(),
        transforms.Normalize(*IMAGENET),
    ])  # fmt: skip
    assert torch.equal(image_of(folder, "crop=112"), by_hand(Image.open(path)))


def test_size_option_keeps_interpolation_of_model_preset(tmp_path, folder):
    path = tmp_path / "images" / "cats" / "a.png"
    Image.effect_noise((300, 200), 90).convert("RGB").save(path)
    preset = models.get_model_weights("efficientnet_b0").DEFAULT.transforms()
    assert preset.interpolation != transforms.InterpolationMode.BILINEAR
    by_hand = transforms.Compose([
        transforms.Resize(100, preset.interpolation), transforms.CenterCrop(100),
        transforms.ToTensor(), transforms.Normalize(*IMAGENET),
    ])  # fmt: skip
    image = image_of(folder, "size=100", model_spec="torchvision:efficientnet_b0")
    assert torch.equal(image, by_hand(Image.open(path)))


@pytest.mark.parametrize(
    ("pair", "said"),
    [
        ("size=big", "size is expected to be a number of pixels"),
        ("size=0", "size is expected"),
        ("crop=1,2,3", "crop is expected"),
        ("mean=1,2", "mean is expected to be one number, 3 with commas"),
        ("std=0", "std is expected"),
    ],
)
def test_image_options_refuse_bad_values(folder, pair, said):
    assert said in error_of(image_of, folder, pair)


def test_transform_excludes_image_options(folder):
    path = write("prepare.py", TRANSFORMS)
    message = error_of(image_of, folder, f"transform={path}:pixels", "size=3")
    assert "so size would do nothing" in message


SMALL = "images are 40x30 but are resized to 256: the argument size=30 leaves them as they are"


def test_small_images_are_warned_of(folder, caplog):
    caplog.set_level("WARNING", "ckptavg")
    image_of(folder)
    assert caplog.messages == [SMALL]


def test_small_images_are_warned_of_with_model_preset(folder, caplog):
    caplog.set_level("WARNING", "ckptavg")
    image_of(folder, model_spec="torchvision:resnet18")
    assert "are resized to 256" in SMALL
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("pair", ["size=200", "size=30", "transform=none", "size=none"])
def test_small_images_with_options_are_not_warned_of(folder, caplog, pair):
    caplog.set_level("WARNING", "ckptavg")
    image_of(folder, pair)
    assert caplog.messages == []


def test_small_images_among_large_are_not_warned_of(folder, tmp_path, caplog):
    Image.new("RGB", (200, 200), COLOUR).save(tmp_path / "images" / "dogs" / "large.png")
    caplog.set_level("WARNING", "ckptavg")
    image_of(folder)
    assert caplog.messages == []


def test_cifar_takes_image_options(cifar, caplog):
    caplog.set_level("INFO", "ckptavg")
    image = image_of(f"cifar10:{cifar}", "size=64", model_spec="torchvision:resnet18")
    assert_uniform(image, (64, 64), normalized(COLOUR, *CIFAR10))
    assert caplog.messages == [
        "images are resized to 64, cropped to 64 and normalized as CIFAR10's"
    ]


def test_log_gives_other_moments_as_numbers(cifar, caplog):
    caplog.set_level("INFO", "ckptavg")
    image_of(f"cifar10:{cifar}", "mean=0.5", "std=0.25")
    (said,) = caplog.messages
    assert said == "images are normalized by mean 0.5, 0.5, 0.5 and std 0.25, 0.25, 0.25"
