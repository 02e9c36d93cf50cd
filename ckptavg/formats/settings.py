"""Settings of a training run in a checkpoint: arguments, hyperparameters, configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ckptavg.errors import CheckpointError
from ckptavg.formats import lightning
from ckptavg.formats.checkpoint import Checkpoint
from ckptavg.formats.huggingface import layout
from ckptavg.formats.safe_pickle.allowlist import Keeper
from ckptavg.formats.torch_save import zip_reader
from ckptavg.io import bounded_json
from ckptavg.io.paths import Location


def read_settings(checkpoint: Checkpoint) -> Mapping[Any, Any]:
    """Read the entries beside the weights of a checkpoint, as plain values.

    No object of the file is built, except a few harmless types such as ``argparse.Namespace``.

    Args:
        checkpoint: A file of ``torch.save``, or a directory of Lightning's.

    Returns:
        The entries beside the weights; empty if the layout has no such entries.

    Raises:
        CheckpointError: The file can no longer be read.
    """
    if checkpoint.layout == "distributed":
        meta = lightning.read_meta(checkpoint.path)
        return {} if meta is None else meta.entries
    # Without a key the file is the state dict itself, and nothing is beside the weights.
    if checkpoint.layout != "torch" or not checkpoint.key:
        return {}
    tree = zip_reader.read(checkpoint.path).tree
    if not isinstance(tree, dict):
        return {}
    keeper = Keeper(key=checkpoint.key, plain=False, tensor=lambda *_: None, replaced={})
    weights = checkpoint.key.partition(".")[0]
    return keeper.entries({name: value for name, value in tree.items() if name != weights})


def configured_directory(checkpoint: Checkpoint) -> Location | None:
    """Find the directory whose ``config.json`` describes a checkpoint's model, else None."""
    path = checkpoint.path
    # A file of weights with the usual name belongs to the model directory that holds the file.
    home = path.parent if path.name in layout.WEIGHT_FILES else path
    is_model = checkpoint.layout == "huggingface" or home != path
    return home if is_model and (home / layout.CONFIG).is_file() else None


def read_configuration(directory: Location) -> Mapping[str, Any]:
    """Read a directory's ``config.json``; return an empty dict if the file is no JSON object."""
    try:
        configuration = bounded_json.read(directory / layout.CONFIG)
    except (OSError, ValueError, CheckpointError):
        return {}
    return configuration if isinstance(configuration, dict) else {}
