"""Settings of a training that its checkpoints hold: arguments, hyperparameters, configuration."""

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
    """Read what a checkpoint holds beside its weights, as plain values.

    No object of the file is built, a few harmless types such as ``argparse.Namespace`` aside.

    Args:
        checkpoint: A file of ``torch.save``, or a directory of Lightning's.

    Returns:
        The entries beside the weights; empty where the layout has none.

    Raises:
        CheckpointError: The file cannot be read any more.
    """
    if checkpoint.layout == "distributed":
        meta = lightning.read_meta(checkpoint.path)
        return {} if meta is None else meta.entries
    if checkpoint.layout != "torch" or not checkpoint.key:
        return {}
    tree = zip_reader.read(checkpoint.path).tree
    if not isinstance(tree, dict):
        return {}
    keeper = Keeper(key=checkpoint.key, plain=False, tensor=lambda *_: None, replaced={})
    weights = checkpoint.key.partition(".")[0]
    return keeper.entries({name: value for name, value in tree.items() if name != weights})


def configured_directory(checkpoint: Checkpoint) -> Location | None:
    """Find the directory whose ``config.json`` describes a checkpoint's model; None without one."""
    path = checkpoint.path
    home = path.parent if path.name in layout.WEIGHT_FILES else path
    is_model = checkpoint.layout == "huggingface" or home != path
    return home if is_model and (home / layout.CONFIG).is_file() else None


def read_configuration(directory: Location) -> Mapping[str, Any]:
    """Read a directory's ``config.json``; empty where it is no JSON object."""
    try:
        configuration = bounded_json.read(directory / layout.CONFIG)
    except (OSError, ValueError, CheckpointError):
        return {}
    return configuration if isinstance(configuration, dict) else {}
