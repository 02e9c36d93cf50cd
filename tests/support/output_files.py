"""Outputs to publish and to look at, files or directories of a model."""

from __future__ import annotations

from pathlib import Path

from ckptavg.io.atomic import Publication


def fill(directory: Path, *names: str, content="old") -> Path:
    """A directory with a model's weights and other files; a name that ends in / is a directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in ("model.safetensors", *names):
        if name.endswith("/"):
            (directory / name).mkdir()
        else:
            (directory / name).write_text(content)
    return directory


def write(publication: Publication, content="new") -> None:
    """Fill a temporary."""
    if publication.directory:
        fill(publication.temporary, content=content)
    else:
        publication.temporary.write_text(content)


def content_of(path: Path) -> str:
    """What the output's file holds, or its directory's weights."""
    return (path / "model.safetensors" if path.is_dir() else path).read_text()


def names(directory: Path) -> set[str]:
    """Everything in a directory, hidden files too."""
    return {path.name for path in directory.iterdir()}
