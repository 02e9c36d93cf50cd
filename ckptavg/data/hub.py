"""The Hugging Face hub, kept out of what is built from files on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ckptavg.optional import import_optional


@contextmanager
def offline() -> Iterator[None]:
    """Let the libraries of Hugging Face use files of this machine alone, its cache among them.

    What they would ask the hub for fails at once. Nothing of it stays: not the mode, and no session
    that was begun in it.
    """
    hub = import_optional("huggingface_hub", "huggingface_hub")
    constants = import_optional("huggingface_hub.constants", "huggingface_hub")
    mode, repo_exists = constants.HF_HUB_OFFLINE, hub.HfApi.repo_exists
    constants.HF_HUB_OFFLINE, hub.HfApi.repo_exists = True, _answer_by_cache
    _forget_sessions()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, hub.HfApi.repo_exists = mode, repo_exists
        _forget_sessions()


def is_cached(repository: str) -> bool:
    """Look up the configuration of a repository in the cache.

    It answers for the hub here: configurations name backbones of timm and of the hub alike, and
    transformers takes a name for timm's if the hub has no such repository.
    """
    hub = import_optional("huggingface_hub", "huggingface_hub")
    try:
        return isinstance(hub.try_to_load_from_cache(repository, "config.json"), str)
    except ValueError:  # no name of a repository
        return False


def _answer_by_cache(_: Any, repo_id: str, **__: Any) -> bool:
    return is_cached(repo_id)


def _forget_sessions() -> None:
    """Close sessions that older versions keep, and that know the mode in which they were begun."""
    utils = import_optional("huggingface_hub.utils", "huggingface_hub")
    reset = getattr(utils, "reset_sessions", None)
    if reset is not None:
        reset()
