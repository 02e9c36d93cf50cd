"""Options in messages: Python's arguments become the command line's flags."""

from __future__ import annotations

import ast
import re
import shlex

_SPAN = re.compile(r"`([^`]+)`")

# Arguments of the Python API whose flag has the same name, with dashes for underscores.
_ARGUMENTS = frozenset(
    {
        "amp",
        "base",
        "batch_size",
        "bn_samples",
        "data",
        "device",
        "digests",
        "dtype",
        "exclude",
        "forward",
        "glob",
        "include",
        "key",
        "model",
        "on_nonfinite",
        "overwrite",
        "resume",
        "results",
        "scheme",
        "seed",
        "skip",
        "task",
        "train_data",
        "weights",
        "workers",
    }
)
# Arguments with a name of their own on the command line.
_RENAMED = {
    "exclude_tensors": "exclude",
    "include_tensors": "include",
    "out": "out",
    "train_loader": "train-data",
}
# Arguments of `update_bn` that another command has under the same name in another sense.
_UPDATE_BN = {"exclude": "bn-exclude"}
# Objects that Python takes as they are, and the command line from a user's file.
_FROM_FILES = {"fn": "path/file.py:fn", "Task": "path/file.py:Task"}
# Methods that select checkpoints of a run.
_SELECTIONS = frozenset({"at_lr_min", "best", "cycle", "every", "last", "sample"})
# Bounds of `Run.steps`, in order.
_STEP_FLAGS = ("from", "to")


def for_shell(text: str) -> str:
    """Replace Python's arguments in a message by flags of the command line.

    Messages of the library name an argument as Python spells it, between backticks:
    "`overwrite=True`" becomes "--overwrite", "`key='model'`" becomes "--key model" and
    "`.cycle(4, 1)`" becomes "--cycle 4:1". Other text between backticks is left as it is.
    """
    return _SPAN.sub(_replace_span, text)


def _replace_span(match: re.Match[str]) -> str:
    flags = flags_of(match[1])
    if flags is None:
        return match[0]
    return flags


def flags_of(span: str) -> str | None:
    """Return the flags for an argument, or a selection, in Python's spelling.

    Args:
        span: ``name``, ``name=value``, ``.selection(...)`` or ``update_bn(name=value)``.

    Returns:
        The flags with values as a shell takes them; None for anything else.
    """
    if span.isidentifier():
        flag = _flag(span)
        return flag and f"--{flag}"
    if span.startswith("."):
        return _selection_flags(_parse_call(f"run{span}"))
    if span.startswith("update_bn("):
        return _argument_flags(_parse_call(span), _UPDATE_BN)
    return _argument_flags(_parse_call(f"call({span})"), {})


def _parse_call(source: str) -> ast.Call | None:
    try:
        expression = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(expression, ast.Call):
        return None
    return expression


def _flag(name: str) -> str | None:
    """Return the name of an argument's flag, or None if no command has such a flag."""
    if name in _ARGUMENTS:
        return name.replace("_", "-")
    return _RENAMED.get(name)


def _argument_flags(call: ast.Call | None, special: dict[str, str]) -> str | None:
    """Return the flags for a call's keywords, or None if one of these has no flag."""
    if call is None or call.args or not call.keywords:
        return None
    flags: list[str] = []
    for keyword in call.keywords:
        name = keyword.arg or ""
        flag = special.get(name) or _flag(name)
        if flag is None:
            return None
        flags += _with_values(flag, keyword.value)
    return " ".join(flags)


def _with_values(flag: str, value: ast.expr) -> list[str]:
    """Return a flag with its value, once per value of a list."""
    if isinstance(value, ast.Constant) and value.value is True:
        return [f"--{flag}"]
    values = [value]
    if isinstance(value, ast.List | ast.Tuple):
        values = value.elts
    return [f"--{flag} {_shell_word(item)}" for item in values]


def _shell_word(value: ast.expr) -> str:
    """Write a value as a word of the shell; a name stands for what the user fills in."""
    if isinstance(value, ast.Constant):
        return shlex.quote(str(value.value))
    source = ast.unparse(value)
    return _FROM_FILES.get(source, source)


def _selection_flags(call: ast.Call | None) -> str | None:
    """Return the flags for a method of a run that selects checkpoints."""
    if call is None or not isinstance(call.func, ast.Attribute):
        return None
    method = call.func.attr
    if method == "steps":
        bounds = zip(_STEP_FLAGS, call.args, strict=False)
        return " ".join(f"--{flag} {_shell_word(bound)}" for flag, bound in bounds)
    if method not in _SELECTIONS:
        return None
    flag = "--" + method.replace("_", "-")
    if call.args:
        flag += " " + ":".join(_shell_word(value) for value in call.args)
    further = [word for k in call.keywords for word in _with_values(k.arg or "", k.value)]
    return " ".join([flag, *further])
