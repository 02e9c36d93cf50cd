"""Models from Hugging Face directories, built from the configuration without downloads."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

from ckptavg.data.hub import is_cached, offline
from ckptavg.errors import CheckpointError, CkptavgError, SpecError, short
from ckptavg.formats.huggingface.layout import CONFIG
from ckptavg.io import bounded_json
from ckptavg.io.neighbours import suggest_neighbours
from ckptavg.optional import import_optional
from ckptavg.runs.run import open_run

log = logging.getLogger("ckptavg")
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


def find_model_directory(name: str) -> Path:
    """Find the directory with a model's configuration; for a run, that of the last checkpoint.

    Args:
        name: The directory of a model or of a run.

    Raises:
        SpecError: There is no such directory.
    """
    directory = Path(name)
    if (directory / CONFIG).is_file():
        return directory
    if directory.is_dir() and (last := _last_checkpoint(directory)) is not None:
        return last
    if directory.exists():
        raise SpecError(
            f"{directory} is no directory with a {CONFIG}, nor a run of such directories",
            "Expected hf:DIR.",
        )
    # Such a name is probably that of a repository on the hub.
    if name.count("/") == 1 and not directory.parent.exists():
        remedy = f"Nothing is downloaded: hf download {name} --local-dir DIR, then name hf:DIR."
    else:
        remedy = suggest_neighbours(directory)
    raise SpecError(f"{directory} does not exist", remedy)


def find_tokenizer_directory(directory: Path) -> Path:
    """Find the directory with a model's tokenizer: the model's, else the parent (the run's)."""
    for home in (directory, directory.parent):
        for pattern in _TOKENIZER_FILES:
            if any(home.glob(pattern)):
                return home
    return directory


def _last_checkpoint(directory: Path) -> Path | None:
    """Return the last checkpoint of a run if this is a directory with a configuration."""
    try:
        *_, last = open_run(directory).opened
    except CkptavgError:
        return None
    path = Path(str(last.path))
    if not (path / CONFIG).is_file():
        return None
    return path


def build_model(name: str, **keywords: Any) -> Any:
    """Build the transformers model that a directory's configuration names, freshly initialized.

    Nothing is downloaded, and no request goes to the hub.

    Args:
        name: The directory of a model or of a run.
        keywords: Settings for the configuration.

    Raises:
        SpecError: There is no configuration, or it names an unknown architecture or a backbone
            whose configuration is not in the cache.
    """
    directory = str(find_model_directory(name))
    if Path(directory) != Path(name):
        log.info("the model is that of %s, the last checkpoint of the run", directory)
    transformers = import_optional("transformers", "transformers")
    # Without a value, transformers asks on the terminal.
    keywords.setdefault("trust_remote_code", False)
    try:
        with offline():
            config = transformers.AutoConfig.from_pretrained(
                directory, local_files_only=True, **keywords
            )
            names = config.architectures or []
            if not names or not hasattr(transformers, names[0]):
                raise SpecError(
                    f"{directory}/config.json names no architecture that transformers knows"
                )
            # A pretrained backbone would be downloaded; the checkpoints hold its weights.
            for settings in _settings(config, transformers.PretrainedConfig):
                if settings.get("use_pretrained_backbone"):
                    settings["use_pretrained_backbone"] = False
            return getattr(transformers, names[0])(config)
    # transformers raises errors of many types for a backbone without a configuration.
    except Exception as error:
        backbone = _lacking_backbone(Path(directory))
        if backbone is None:
            raise
        raise SpecError(
            f"{directory}/config.json names the backbone {short(backbone)}, of which this machine "
            "has no configuration",
            f"Fetch it first: hf download {short(backbone)} config.json.",
        ) from error


def _settings(config: Any, kind: type) -> Iterator[dict[str, Any]]:
    """Yield the settings of a configuration and of all nested configurations.

    Args:
        config: A dict of plain values, or a configuration object.
        kind: The class of configuration objects.
    """
    # ``visited`` guards against configurations that refer to each other.
    waiting, visited = [config], set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, kind):
            value = vars(value)
        if isinstance(value, dict):
            waiting += value.values()
            yield value


def _lacking_backbone(directory: Path) -> str | None:
    """Return the hub name of a backbone whose configuration is not in the cache; None without."""
    try:
        config = bounded_json.read(directory / "config.json")
    except (OSError, ValueError, CheckpointError):
        return None
    for settings in _settings(config, NoneType):
        backbone = settings.get("backbone")
        if isinstance(backbone, str) and "/" in backbone:
            repository = backbone.rpartition(":")[2]
            if not is_cached(repository):
                return repository
    return None
