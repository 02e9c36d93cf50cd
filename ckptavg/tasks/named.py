"""Tasks by the names that ``--task`` knows."""

from __future__ import annotations

import importlib
from typing import Any

from ckptavg.errors import SpecError, UsageError, short
from ckptavg.factories import call_factory
from ckptavg.tasks.task import Task

USUAL = "image-classification"
_NAMED = {
    USUAL: ("classification", "Classification"),
    "causal-lm": ("language", "CausalLM"),
    "multi-label": ("multilabel", "MultiLabel"),
    "regression": ("regression", "Regression"),
}
_TEXT = ("text:", "tokens:")


def as_task(task: object) -> Task:
    """A task that a caller of the library passes; that for images where None.

    Args:
        task: The task, or the name of one: image-classification, causal-lm, ...

    Raises:
        UsageError: It is neither.
    """
    if isinstance(task, Task):
        return task
    if task is None or (isinstance(task, str) and task in _NAMED):
        return _make_named(task or USUAL)
    expected = f"task is expected to be a ckptavg.Task or one of {', '.join(_NAMED)}"
    if isinstance(task, type) and issubclass(task, Task):
        name = short(task.__name__)
        raise UsageError(f"{expected}, but is the class {name}", f"Call it: {name}().")
    raise UsageError(f"{expected}, but is {short(repr(task))}")


def make_task(spec: str, *, scoring: bool = True) -> Task:
    """The task of a name, or of a user's own class as ``path/file.py:Task``.

    Args:
        spec: The name or the class.
        scoring: False where the task only calls models, and needs no metrics.

    Raises:
        UsageError: There is no such name.
        SpecError: The class cannot be found, or is no task.
    """
    if spec in _NAMED:
        made: Any = _make_named(spec)
    elif ":" in spec:
        made = call_factory(spec)
    else:
        raise UsageError(
            f"task is expected to be one of {', '.join(_NAMED)}, or path/file.py:Task, "
            f"but got {spec!r}"
        )
    return _checked(spec, made, scoring=scoring)


def usual_task(data: str) -> str:
    """The name of the task that a data specification is for."""
    return "causal-lm" if data.startswith(_TEXT) else USUAL


def _make_named(name: str) -> Task:
    module, kind = _NAMED[name]
    made: Task = getattr(importlib.import_module(f"ckptavg.tasks.{module}"), kind)()
    return made


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
