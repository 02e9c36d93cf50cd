"""Models recorded in checkpoints: timm's arguments, Lightning's hyperparameters, HF's config."""

from __future__ import annotations

import argparse
import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ckptavg.errors import first_few, short
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.formats.huggingface.configuration import configured_directory, read_configuration
from ckptavg.specs import suggestions
from ckptavg.specs.arguments import Arguments
from ckptavg.specs.importing import find_object, parameters_of, partition_spec
from ckptavg.specs.prefixes import LIGHTNING, MODEL_PREFIXES

log = logging.getLogger("ckptavg")

# Arguments of timm's training script → keywords of timm.create_model.
_TIMM_ARGUMENTS = {
    "num_classes": "num_classes", "in_chans": "in_chans", "gp": "global_pool", "bn_eps": "bn_eps",
}  # fmt: skip
_TIMM_IMAGES = ("img_size", "input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
# Key that timm's CheckpointSaver writes; distinguishes its checkpoints from others with args.
_TIMM_VERSION = "version"
_ARGUMENTS = "args"
_HYPERPARAMETERS = "hyper_parameters"
_HYPERPARAMETERS_NAME = "hparams_name"
# Value of ``hparams_name`` if hyperparameters are separate arguments, not a single object.
_SEPARATE = "kwargs"
_MOST_SHOWN = 8
_LONGEST_VALUE = 40  # characters


@dataclass(frozen=True)
class ModelSource:
    """Specification of a model with the arguments of the factory.

    Attributes:
        spec: One of the forms in ``MODEL_HELP`` of ``ckptavg.specs.prefixes``.
        arguments: Keywords of the factory.
        image_settings: Image settings of a timm training.
    """

    spec: str
    arguments: Arguments = field(default_factory=dict)
    image_settings: Mapping[str, Any] = field(default_factory=dict)


class Hyperparameters(dict[str, Any]):
    """Hyperparameters in one object, readable as attributes or as entries."""

    def __getattr__(self, name: str) -> Any:
        """Return the entry of a name; wrap a nested dict in the same class."""
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        if type(value) is dict:
            return Hyperparameters(value)
        return value


def complete_source(
    spec: str | None, arguments: Arguments, checkpoints: Iterable[Checkpoint]
) -> ModelSource | None:
    """Complete a model's specification by the settings recorded in a checkpoint.

    Sources are the arguments of timm's training script (and timm's ``config.json``), the
    configuration of Hugging Face directories and the hyperparameters of a LightningModule. No
    checkpoint names the class of a LightningModule. Given arguments take precedence.

    Args:
        spec: One of the forms in ``MODEL_HELP`` of ``ckptavg.specs.prefixes``; None to take the
            recorded model.
        arguments: Given keywords of the factory.
        checkpoints: Checkpoints of the model; the first one with a record is used.

    Returns:
        The completed source; None where no model is given and none is recorded.

    Raises:
        SpecError: The class of a LightningModule cannot be found.
        CheckpointError: A checkpoint cannot be read.
    """
    if spec is not None and (cls := _lightning_class(spec)) is not None:
        recorded = _first(_lightning_arguments(cls, c) for c in checkpoints)
        return ModelSource(spec, _merge_arguments(recorded, arguments))
    if spec is not None and not spec.startswith("timm:"):
        return ModelSource(spec, arguments)
    source = _first(_recorded_source(checkpoint) for checkpoint in checkpoints)
    if spec is None:
        if source is None:
            return None
        _note_model(source, arguments)
        return ModelSource(source.spec, {**source.arguments, **arguments}, source.image_settings)
    # The record may be of another model than the given one, so that its arguments do not apply.
    if source is None or source.spec != spec:
        return ModelSource(spec, arguments)
    return ModelSource(spec, _merge_arguments(source.arguments, arguments), source.image_settings)


def records_hyperparameters(checkpoint: Checkpoint) -> bool:
    """Tell whether a checkpoint holds hyperparameters of a LightningModule."""
    return _HYPERPARAMETERS in checkpoint.format.read_settings(checkpoint)


def is_lightning_module(kind: object) -> bool:
    """Return True for a class that inherits from LightningModule, by name and without an import."""
    # The two packages of Lightning have a class of this name each.
    return isinstance(kind, type) and any(
        base.__name__ == "LightningModule" for base in kind.__mro__
    )


def _first(values: Iterable[Any]) -> Any:
    """Return the first value that is neither None nor empty; None if there is none."""
    for value in values:
        if value:
            return value
    return None


def _merge_arguments(recorded: Mapping[str, Any] | None, given: Arguments) -> Arguments:
    """Merge recorded and given arguments and log the recorded ones in use; given ones win."""
    recorded = recorded or {}
    if adopted := _describe_adopted(recorded, given):
        log.info("arguments of the model from the checkpoint: %s", adopted)
    return {**recorded, **given}


def _describe_adopted(recorded: Mapping[str, Any], given: Arguments) -> str:
    """Describe recorded arguments that are in use; return empty text for none."""
    pairs: list[str] = []
    for name, value in recorded.items():
        if name not in given:
            pairs.append(f"{name}={_value_text(value)}")
    return first_few(pairs, _MOST_SHOWN)


def _value_text(value: Any) -> str:
    """Word a value for a note: a short value itself, a long value by type."""
    text = str(value)
    if len(text) > _LONGEST_VALUE:
        return short(value)
    return short(text)


def _note_model(source: ModelSource, given: Arguments) -> None:
    description = f"{source.spec}, as the checkpoint records"
    if adopted := _describe_adopted(source.arguments, given):
        description += f", with {adopted}"
    log.info("the model is %s", description)


def _recorded_source(checkpoint: Checkpoint) -> ModelSource | None:
    """Return the model recorded in a checkpoint, by configuration or by timm's arguments."""
    directory = configured_directory(checkpoint)
    if directory is not None:
        return _configured_source(directory)
    settings = checkpoint.format.read_settings(checkpoint)
    arguments = settings.get(_ARGUMENTS)
    if _TIMM_VERSION not in settings or not isinstance(arguments, argparse.Namespace):
        return None
    return _timm_source(vars(arguments))


def _configured_source(directory: Any) -> ModelSource | None:
    """Return the model that a ``config.json`` describes: of transformers, or of timm."""
    configuration = read_configuration(directory)
    if configuration.get("architectures") and isinstance(directory, Path):
        return ModelSource(f"hf:{directory}")
    name, images = configuration.get("architecture"), configuration.get("pretrained_cfg")
    if not isinstance(name, str) or not isinstance(images, dict):
        return None
    arguments = _dict_or_empty(configuration.get("model_args"))
    for key in ("num_classes", "global_pool"):
        if configuration.get(key) is not None:
            arguments[key] = configuration[key]
    return ModelSource(f"timm:{name}", arguments, _present(images, _TIMM_IMAGES))


def _timm_source(arguments: Mapping[str, Any]) -> ModelSource | None:
    """Return the model that the arguments of timm's training script name."""
    name = arguments.get("model")
    if not isinstance(name, str) or "num_classes" not in arguments:
        return None
    model_arguments = _dict_or_empty(arguments.get("model_kwargs"))
    for option, keyword in _TIMM_ARGUMENTS.items():
        if arguments.get(option) is not None:
            model_arguments[keyword] = arguments[option]
    return ModelSource(f"timm:{name}", model_arguments, _present(arguments, _TIMM_IMAGES))


def _dict_or_empty(value: object) -> dict[str, Any]:
    """Copy a dict; return an empty dict for any other value."""
    if not isinstance(value, dict):
        return {}
    return dict(value)


def _present(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return the entries of some names, without missing ones and None."""
    return {name: values[name] for name in names if values.get(name) is not None}


def _lightning_class(spec: str) -> type | None:
    """Return the class of a LightningModule that a specification names; None for anything else."""
    target = spec.removeprefix(f"{LIGHTNING}:")
    home, _, name = partition_spec(target)
    if not home or not name or (target == spec and home in MODEL_PREFIXES):
        return None
    suggestions.refuse_mistyped(target, "model")
    kind = find_object(home, name)
    if isinstance(kind, type) and (target != spec or is_lightning_module(kind)):
        return kind
    return None


def _lightning_arguments(kind: type, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the arguments of a LightningModule that ``save_hyperparameters`` recorded.

    Arguments that the constructor does not take are left out, as in ``load_from_checkpoint``.
    """
    settings = checkpoint.format.read_settings(checkpoint)
    recorded = settings.get(_HYPERPARAMETERS)
    name = settings.get(_HYPERPARAMETERS_NAME)
    if recorded is None:
        return {}
    # The constructor takes all hyperparameters as one object, under the recorded name.
    if isinstance(name, str) and name != _SEPARATE:
        if isinstance(recorded, dict):
            recorded = Hyperparameters(recorded)
        recorded = {name: recorded}
    elif isinstance(recorded, argparse.Namespace):
        recorded = vars(recorded)
    arguments = _dict_or_empty(recorded)
    return {key: value for key, value in arguments.items() if _takes(kind, key)}


def _takes(kind: type, name: object) -> bool:
    """Tell whether a class's constructor has a parameter of a name, or takes all names."""
    if name in parameters_of(kind):
        return True
    try:
        parameters = inspect.signature(kind).parameters.values()
    except (TypeError, ValueError):
        return False
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return takes_all and isinstance(name, str) and not name.startswith("_")
