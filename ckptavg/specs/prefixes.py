"""Forms of specifications: the prefixes of models and data, and texts that list them."""

from __future__ import annotations

from typing import Literal

Kind = Literal["model", "data"]

LIGHTNING = "lightning"
"""Prefix for the class of a LightningModule, whose arguments the checkpoints record."""

# Prefix → what comes after the colon.
_MODELS = {"torchvision": "NAME", "timm": "NAME", "hf": "DIR", LIGHTNING: "path/file.py:Class"}
_IMAGES = {"imagefolder": "DIR", "cifar10": "DIR", "cifar100": "DIR"}
_TEXTS = {"text": "FILE", "tokens": "FILE"}

MODEL_PREFIXES = tuple(_MODELS)
TEXT_PREFIXES = tuple(_TEXTS)
DATA_PREFIXES = (*_IMAGES, *_TEXTS)
PREFIXES: dict[Kind, tuple[str, ...]] = {"model": MODEL_PREFIXES, "data": DATA_PREFIXES}


def _list_forms(forms: dict[str, str]) -> str:
    return ", ".join(f"{prefix}:{name}" for prefix, name in forms.items())


OWN_CODE = "package.module:factory or path/file.py:factory"
"""Forms of users' own models and data."""
MODEL_FORMS = _list_forms(_MODELS)
IMAGE_FORMS = _list_forms(_IMAGES)
DATA_FORMS = _list_forms(_IMAGES | _TEXTS)
MODEL_HELP = f"{MODEL_FORMS}, {OWN_CODE}"
"""All forms of a model."""
DATA_HELP = f"{DATA_FORMS}, {OWN_CODE}"
"""All forms of data."""
