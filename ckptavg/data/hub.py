"""Offline use of the Hugging Face libraries: only local files and the local cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ckptavg.models.shared_context import SharedContext
from ckptavg.optional import import_optional


def offline() -> AbstractContextManager[None]:
    """Keep the Hugging Face libraries offline within a context: local files and the cache only.

    A request to the hub fails at once. Once the last of several threads has left the context, the
    caller's mode is restored, and sessions that were opened in offline mode are closed.
    """
    return _offline.in_use()


@contextmanager
def _go_offline() -> Iterator[None]:
    """Set the mode of the libraries, which holds for the whole process."""
    hub = import_optional("huggingface_hub", "huggingface_hub")
    constants = import_optional("huggingface_hub.constants", "huggingface_hub")
    # The environment variable is read on import only, so the constant itself is changed.
    mode, repo_exists = constants.HF_HUB_OFFLINE, hub.HfApi.repo_exists
    constants.HF_HUB_OFFLINE, hub.HfApi.repo_exists = True, _answer_by_cache
    _forget_sessions()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, hub.HfApi.repo_exists = mode, repo_exists
        _forget_sessions()


_offline = SharedContext(_go_offline)


def is_cached(repository: str) -> bool:
    """Return True if the local cache has the configuration of a repository.

    The cache answers in place of the hub. Configurations name backbones of timm and of the hub in
    the same way, and transformers takes a name as timm's if the hub has no repository of that name.
    """
    hub = import_optional("huggingface_hub", "huggingface_hub")
    try:
        return isinstance(hub.try_to_load_from_cache(repository, "config.json"), str)
    # huggingface_hub raises ValueError for a text that cannot be a repository's name.
    except ValueError:
        return False


def _answer_by_cache(_: Any, repo_id: str, **__: Any) -> bool:
    """Answer ``HfApi.repo_exists`` without a request."""
    return is_cached(repo_id)


def _forget_sessions() -> None:
    """Close the HTTP sessions of huggingface_hub."""
    # Older versions cache sessions, and a session keeps the mode that it was opened in.
    utils = import_optional("huggingface_hub.utils", "huggingface_hub")
    reset = getattr(utils, "reset_sessions", None)
    if reset is not None:
        reset()
