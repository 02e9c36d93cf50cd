"""Commands and code of a report: quoted for a shell, and right for each selection."""

from __future__ import annotations

import subprocess

import pytest
import torch
from helpers import names, save

import ckptavg
from ckptavg.display.shell_words import quote
from ckptavg.plots.report.recipe import Invocation, Symbol, keywords_of, write_recipe


@pytest.fixture
def run(tmp_path):
    for epoch in range(1, 7):
        lr = 0.1 if epoch % 3 else 0.01
        save(tmp_path / "run" / f"epoch_{epoch}.pt", {"w": torch.tensor([epoch])}, lr=lr)
    return ckptavg.open_run(tmp_path / "run")


def code_of(run, selection, **changes):
    settings = {
        "paths": ("run",), "opening": {}, "averaging": {}, "recomputing": {}, "model": "net",
        "data": "data", "training": None, **changes,
    }  # fmt: skip
    return write_recipe(Invocation(**settings), run, selection, recomputes=False).python


@pytest.mark.parametrize(
    "word",
    [
        "plain", "two words", "it's", 'a "quote"', "$HOME", "`ls`", "a\nb", "back\\slash",
        "\x1b[31m",
        "left\u202eright", "ze\u200bro", "caf\u00e9", "a'\u202e\\n", "-x", "*", "; rm x",
    ],
)  # fmt: skip
def test_quote_gives_the_word_back_in_a_shell(word):
    quoted = quote(word)
    assert all(character.isprintable() for character in quoted)
    shown = subprocess.run(
        ["bash", "-c", f"printf %s {quoted}"], capture_output=True, check=True,
        env={"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert shown.stdout.decode() == word


def test_quote_of_a_name_that_is_not_utf8():
    shown = subprocess.run(
        ["bash", "-c", f"printf %s {quote('a' + chr(0xDCFF))}"], capture_output=True, check=True
    )
    assert shown.stdout == b"a\xff"


def test_quote_removes_secrets():
    assert quote("https://user:word@host/run?token=1") == "https://host/run"


@pytest.mark.parametrize(
    ("select", "code"),
    [
        (lambda run: run, "run,"),
        (lambda run: run.last(2), "run.last(2)"),
        (lambda run: run.at_lr_min(), "run.at_lr_min()"),
        (lambda run: run.steps(2, 4), None),
    ],
)
def test_recipe_selects_what_was_averaged(run, select, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    selection = select(run)
    written = code_of(run, selection)
    if code is not None:
        assert f"ckptavg.average({code}" in written
    scope = {}
    exec(written.replace(", out='averaged.pt'", ""), scope)
    assert names(ckptavg.open_run(*[c.path for c in selection])) == names(selection)
    expected = ckptavg.average(selection)
    assert torch.equal(eval("ckptavg.average(" + last_argument(written) + ")", scope)["w"],
                       expected["w"])  # fmt: skip


def last_argument(code):
    return code.rpartition("ckptavg.average(")[2].partition(",")[0]


def test_recipe_breaks_long_calls(run):
    selection = run.steps(1, 3)
    code = code_of(run, selection)
    assert code.count("\n    ") >= 3
    compile(code, "code", "exec")


def test_keywords_leave_defaults_out():
    values = {"scheme": "uniform", "dtype": "float32", "seed": 0, "base": None, "include": ()}
    assert keywords_of(values) == {"dtype": "float32"}
    assert keywords_of({"bn_samples": ckptavg.Subset(5)}) == {"bn_samples": 5}
    assert keywords_of({"bn_samples": ckptavg.Subset(5, stratified=True)}) == {
        "bn_samples": Symbol("ckptavg.Subset(count=5, stratified=True)")
    }
    assert keywords_of({"forward": code_of, "device": torch.device("cpu")}) == {
        "forward": Symbol("code_of"), "device": "cpu",
    }  # fmt: skip


def test_recipe_breaks_long_calls_within_calls(run):
    settings = {"amp": "bf16", "batch_size": 64, "device": "cuda:0", "exclude": ["backbone.*"]}
    invocation = Invocation(("run",), {}, {}, settings, "net", "data", "training")
    code = write_recipe(invocation, run, run, recomputes=True).python
    compile(code, "code", "exec")
    assert "\n        amp='bf16',\n" in code
    assert max(map(len, code.splitlines())) <= 88
