"""Tasks from the strings of ``--task``."""

from __future__ import annotations

from typing import Any

from ckptavg.errors import SpecError, UsageError
from ckptavg.errors.spelling import close_names, did_you_mean
from ckptavg.specs.importing import call_factory
from ckptavg.tasks.base import Task
from ckptavg.tasks.named import DEFAULT_TASK, NAMED, make_named

_TEXT = ("text:", "tokens:")


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
    return _checked(spec, task, scoring=scoring)


def default_task(data: str) -> str:
    """Return the name of the default task for a data specification."""
    return "causal-lm" if data.startswith(_TEXT) else DEFAULT_TASK


def _checked(spec: str, made: Any, *, scoring: bool) -> Task:
    if not isinstance(made, Task):
        raise SpecError(
            f"{spec} is expected to give a ckptavg.tasks.Task but gives a {type(made).__name__}",
            "Make it a subclass.",
        )
    if not scoring:
        return made
    if not made.metrics:
        raise SpecError(f"{spec} has no metrics", "Name them: metrics = (Metric(...),).")
    needed = [n for n in ("predict", "scores") if getattr(type(made), n) is getattr(Task, n)]
    if needed:
        raise SpecError(f"{spec} does not define {' and '.join(needed)}", "A task needs both.")
    return made
