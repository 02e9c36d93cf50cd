"""Tasks from names and specifications."""

from __future__ import annotations

from typing import Any

from ckptavg.errors import SpecError, UsageError
from ckptavg.errors.spelling import close_names, did_you_mean
from ckptavg.specs.importing import call_factory
from ckptavg.specs.prefixes import TEXT_PREFIXES
from ckptavg.tasks.base import Task
from ckptavg.tasks.named import DEFAULT_TASK, NAMED, make_named


def make_task(spec: str, *, scoring: bool = True) -> Task:
    """Make a task from a name, or from a user's class as ``path/file.py:Task``.

    Args:
        spec: The name or the class.
        scoring: False if the task only calls models and needs no metrics.

    Raises:
        UsageError: There is no task of this name.
        SpecError: The class cannot be found, or is not a complete task.
    """
    if spec in NAMED:
        task: Any = make_named(spec)
    elif ":" in spec:
        task = call_factory(spec)
    else:
        raise UsageError(
            f"task is expected to be one of {', '.join(NAMED)}, or path/file.py:Task, "
            f"but got {spec!r}",
            did_you_mean(close_names(spec, NAMED, 1)),
        )
    return _check(spec, task, scoring=scoring)


def default_task(data: str) -> str:
    """Return the name of the default task for a data specification."""
    if data.partition(":")[0] in TEXT_PREFIXES:
        return "causal-lm"
    return DEFAULT_TASK


def _check(spec: str, task: Any, *, scoring: bool) -> Task:
    """Return a task that is complete.

    Raises:
        SpecError: The object is no task, or lacks what scoring needs.
    """
    if not isinstance(task, Task):
        raise SpecError(
            f"{spec} is expected to give a ckptavg.tasks.Task but gives a {type(task).__name__}",
            "Make the task a subclass.",
        )
    if not scoring:
        return task
    if not task.metrics:
        raise SpecError(f"{spec} has no metrics", "Name them: metrics = (Metric(...),).")
    inherited = [
        name for name in ("predict", "scores") if getattr(type(task), name) is getattr(Task, name)
    ]
    if inherited:
        raise SpecError(
            f"{spec} does not define {' and '.join(inherited)}",
            "A task needs predict() and scores().",
        )
    return task
