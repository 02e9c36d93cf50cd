"""Registry of the built-in tasks by name."""

from __future__ import annotations

import importlib

from ckptavg.errors import UsageError, short
from ckptavg.tasks.base import Task

DEFAULT_TASK = "image-classification"
NAMED = {
    DEFAULT_TASK: ("classification", "Classification"),
    "causal-lm": ("language", "CausalLM"),
    "multi-label": ("multilabel", "MultiLabel"),
    "regression": ("regression", "Regression"),
}


def as_task(task: object) -> Task:
    """Return the task for a caller's argument; image classification where None.

    Args:
        task: A task, or a task's name: image-classification, causal-lm, ...

    Raises:
        UsageError: The argument is neither a task nor a known name.
    """
    if isinstance(task, Task):
        return task
    if task is None or (isinstance(task, str) and task in NAMED):
        return make_named(task or DEFAULT_TASK)
    expected = f"task is expected to be a ckptavg.Task or one of {', '.join(NAMED)}"
    if isinstance(task, type) and issubclass(task, Task):
        name = short(task.__name__)
        raise UsageError(f"{expected}, but is the class {name}", f"Call it: {name}().")
    raise UsageError(f"{expected}, but is {short(repr(task))}")


def make_named(name: str) -> Task:
    """Make the task of a name in ``NAMED``."""
    # Imported on demand: a run needs only one task's module.
    module, kind = NAMED[name]
    task: Task = getattr(importlib.import_module(f"ckptavg.tasks.{module}"), kind)()
    return task
