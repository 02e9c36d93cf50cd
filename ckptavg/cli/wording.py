"""Options in messages: Python's arguments become the command line's flags."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field

_SPAN = re.compile(r"`([^`]+)`")
_STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_VALUE = rf"(?:{_STRING}|[\w.+-]+)"
_ITEM = re.compile(_VALUE)
_CALL = re.compile(r"(?:\.(?P<method>[a-z_]+)|update_bn)\((?P<arguments>[^\n]*)\)")
_ARGUMENT = re.compile(
    rf"(?:(?P<name>[a-z_]+)=)?(?P<value>{_VALUE}|\[{_VALUE}(?:, {_VALUE})*\])(?:, |$)"
)
_ESCAPE = re.compile(
    r"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|U(000[0-9a-f]{5}|0010[0-9a-f]{4})|(.))", re.DOTALL
)
_CONTROLS = {"n": "\n", "r": "\r", "t": "\t"}

# Arguments of the Python API whose flag has the same name, with dashes for underscores.
_ARGUMENTS = frozenset(
    {
        "amp",
        "base",
        "batch_size",
        "beyond",
        "bn_samples",
        "centers",
        "data",
        "device",
        "digests",
        "directions",
        "dtype",
        "exclude",
        "forward",
        "glob",
        "include",
        "key",
        "margin",
        "model",
        "on_nonfinite",
        "order",
        "overwrite",
        "points",
        "radius",
        "resume",
        "results",
        "rise",
        "scheme",
        "seed",
        "skip",
        "task",
        "through",
        "train_data",
        "weight_decay",
        "weights",
        "window",
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
    call = _CALL.fullmatch(span)
    if call and call["method"]:
        return _selection_flags(call["method"], _parse_arguments(call["arguments"]))
    if call:
        return _argument_flags(_parse_arguments(call["arguments"]), _UPDATE_BN)
    return _argument_flags(_parse_arguments(span), {})


@dataclass
class _Arguments:
    """Arguments of a call, each value as one word of the shell per item."""

    positional: list[list[str]] = field(default_factory=list)
    keywords: dict[str, list[str]] = field(default_factory=dict)


def _parse_arguments(text: str) -> _Arguments | None:
    """Parse the arguments of a call; None where the text is none.

    Names in messages come from files that are not trusted, so Python's own parser never sees them.
    """
    arguments = _Arguments()
    position = 0
    while position < len(text):
        match = _ARGUMENT.match(text, position)
        if match is None:
            return None
        position = match.end()
        values = [_shell_word(item[0]) for item in _ITEM.finditer(match["value"])]
        if match["name"]:
            arguments.keywords[match["name"]] = values
        else:
            arguments.positional.append(values)
    return arguments


def _flag(name: str) -> str | None:
    """Return the name of an argument's flag, or None if no command has such a flag."""
    if name in _ARGUMENTS:
        return name.replace("_", "-")
    return _RENAMED.get(name)


def _argument_flags(arguments: _Arguments | None, special: dict[str, str]) -> str | None:
    """Return the flags for a call's keywords, or None if one of these has no flag."""
    if arguments is None or arguments.positional or not arguments.keywords:
        return None
    flags: list[str] = []
    for name, values in arguments.keywords.items():
        flag = special.get(name) or _flag(name)
        if flag is None:
            return None
        flags += _with_values(flag, values)
    return " ".join(flags)


def _with_values(flag: str, values: list[str]) -> list[str]:
    """Return a flag with its value, once per value of a list."""
    if values == ["True"]:
        return [f"--{flag}"]
    return [f"--{flag} {value}" for value in values]


def _shell_word(literal: str) -> str:
    """Write a literal as a word of the shell; a name stands for what the user fills in."""
    if literal[0] in "'\"":
        return shlex.quote(_ESCAPE.sub(_unescape, literal[1:-1]))
    return _FROM_FILES.get(literal, literal)


def _unescape(match: re.Match[str]) -> str:
    """Return the character that an escape of Python stands for."""
    code = match[1] or match[2] or match[3]
    if code:
        return chr(int(code, 16))
    return _CONTROLS.get(match[4], match[4])


def _selection_flags(method: str, arguments: _Arguments | None) -> str | None:
    """Return the flags for a method of a run that selects checkpoints."""
    if arguments is None:
        return None
    words = [value for values in arguments.positional for value in values]
    if method == "steps":
        bounds = zip(_STEP_FLAGS, words, strict=False)
        return " ".join(f"--{flag} {word}" for flag, word in bounds)
    if method not in _SELECTIONS:
        return None
    flags = ["--" + method.replace("_", "-")]
    if words:
        flags.append(":".join(words))
    for name, values in arguments.keywords.items():
        flags += _with_values(name, values)
    return " ".join(flags)
