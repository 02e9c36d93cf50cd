"""The command line: what a person types, sees, and finds on the disk afterwards."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from command_line import ckptavg, network, one_line_error
from safetensors.torch import load_file

from ckptavg.cli import main

LABELS_OF_THE_LAST = """
import torch, net

def fitted():
    torch.manual_seed(0)
    x, last = 30 * torch.randn(64, 8), net.model()
    last.load_state_dict(torch.load("run/epoch_4.pt")["state_dict"])
    last.eval()
    return torch.utils.data.TensorDataset(x, last(x).argmax(1).detach())
"""


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path)["state_dict"]


def test_average_writes_the_mean_and_shows_the_plan(home: Path) -> None:
    result = ckptavg("average", "run", "-o", "out.safetensors")
    assert result.exit_code == 0, result.output
    out = load_file(home / "out.safetensors")
    inputs = [weights(home / "run" / f"epoch_{i}.pt") for i in range(1, 5)]
    expected = sum(w["1.weight"].double() for w in inputs) / 4
    assert torch.equal(out["1.weight"], expected.float())
    assert "run/epoch_1.pt" not in result.stdout
    for text in ("epoch_1.pt", "0.25", "0.025", "stale", "out.safetensors"):
        assert text in result.stdout
    assert "note: BatchNorm statistics" in result.stderr


@pytest.mark.parametrize(
    ("flags", "kept"),
    [
        (["--last", 2], [3, 4]),
        (["--every", 2], [2, 4]),
        (["--from", 2, "--to", 3], [2, 3]),
        (["--cycle", 2], [2, 4]),
        (["--cycle", "2:1"], [1, 3]),
        (["--at-lr-min"], [4]),
        (["--best", 2, "--metric", "val_acc", "--mode", "max"], [1, 2]),
        (["--best", 1, "--metric", "val_acc", "--mode", "min"], [4]),
        (["--glob", "*_[13].pt"], [1, 3]),
        (["--from", 2, "--every", 2, "--last", 1], [4]),
    ],
)
def test_selection_flags_choose_checkpoints(
    home: Path, flags: list[object], kept: list[int]
) -> None:
    result = ckptavg("average", "run", "--dry-run", "--json", *flags)
    assert result.exit_code == 0, result.output
    assert [c["step"] for c in json.loads(result.stdout)["checkpoints"]] == kept


def test_selection_applies_to_each_run(home: Path) -> None:
    (home / "other").mkdir()
    for epoch in (7, 8):
        torch.save({"state_dict": network().state_dict(), "epoch": epoch}, f"other/e{epoch}.pt")
    result = ckptavg("average", "run", "other", "--last", 1, "--dry-run", "--json")
    assert [c["step"] for c in json.loads(result.stdout)["checkpoints"]] == [4, 8]


def test_sample_is_seeded(home: Path) -> None:
    picks = []
    for seed in (1, 1, 2, 3, 4, 5):
        result = ckptavg("average", "run", "--sample", f"2:{seed}", "--dry-run", "--json")
        picks.append(tuple(c["step"] for c in json.loads(result.stdout)["checkpoints"]))
    assert picks[0] == picks[1]
    assert len(set(picks)) > 1


def test_weights_are_normalized_and_shown(home: Path) -> None:
    result = ckptavg("average", "run", "--last", 3, "--weights", "2,3,5", "--dry-run", "--json")
    assert [c["coefficient"] for c in json.loads(result.stdout)["checkpoints"]] == [0.2, 0.3, 0.5]


def test_dry_run_writes_nothing(home: Path) -> None:
    before = sorted(home.rglob("*"))
    assert ckptavg("average", "run", "-o", "out.pt", "--dry-run").exit_code == 0
    assert sorted(home.rglob("*")) == before


def test_json_is_alone_on_stdout(home: Path) -> None:
    result = ckptavg("average", "run", "-o", "out.pt", "--json")
    made = json.loads(result.stdout)
    assert made["output"] == "out.pt"
    assert made["bytes"] == (home / "out.pt").stat().st_size
    assert made["bn"] == "stale"
    assert len(made["checkpoints"]) == 4


def test_quiet_leaves_stderr_empty(home: Path) -> None:
    result = ckptavg("average", "run", "-o", "out.pt", "-q")
    assert result.exit_code == 0
    assert result.stderr == ""


def test_quiet_leaves_the_result_on_stdout(home: Path) -> None:
    result = ckptavg("average", "run", "-o", "out.pt", "-q")
    assert result.stdout.startswith("wrote out.pt (")
    assert len(result.stdout.splitlines()) == 1
    assert "epoch_1.pt" in ckptavg("average", "run", "--dry-run", "-q").stdout
    assert "epoch_4.pt" in ckptavg("eval", "run/epoch_4.pt", *EVAL, "-q").stdout


@pytest.mark.parametrize("what", ["--model", "--train-data"])
def test_average_reports_broken_factories_before_the_plan(home: Path, what: str) -> None:
    flags = {"--model": "net.py:model", "--train-data": "net.py:data"} | {what: "net.py:nothing"}
    result = ckptavg("average", "run", "-o", "out.pt", *[x for pair in flags.items() for x in pair])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "nothing" in one_line_error(result)


def test_average_with_model_recomputes_statistics(home: Path) -> None:
    flags = ["--model", "net.py:model", "--train-data", "net.py:data"]
    result = ckptavg("average", "run", "-o", "out.pt", *flags)
    assert result.exit_code == 0, result.output
    assert "recomputed" in result.stdout
    out = weights(home / "out.pt")
    inputs = torch.utils.data.default_collate([x for x, _ in _data(home)]).double()
    hidden = inputs @ out["1.weight"].double().T + out["1.bias"].double()
    torch.testing.assert_close(out["2.running_mean"], hidden.mean(0).float())
    torch.testing.assert_close(out["2.running_var"], hidden.var(0).float())


def test_update_bn_changes_only_statistics(home: Path) -> None:
    flags = ["--model", "net.py:model", "--train-data", "net.py:data", "-o", "out.pt"]
    result = ckptavg("update-bn", "run/epoch_4.pt", *flags)
    assert result.exit_code == 0, result.output
    before, after = weights(home / "run" / "epoch_4.pt"), weights(home / "out.pt")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"2.running_mean", "2.running_var", "2.num_batches_tracked"}


EVAL = ["--model", "net.py:model", "--data", "net.py:data", "--data-arg", "seed=1"]
TRAIN = ["--train-data", "net.py:data"]


def test_eval_compares_all_candidates(home: Path) -> None:
    flags = [*EVAL, *TRAIN, "--each", "--compare", "fge", "--json"]
    result = ckptavg("eval", "run/epoch_1.pt", "--run", "run", *flags)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["candidates"]
    kinds = [(c["kind"], c["bn"]) for c in found]
    assert kinds == [("checkpoint", "own")] * 5 + [
        ("average", "stale"),
        ("average", "recomputed"),
        ("ensemble", "own"),
    ]
    assert [c["forwards"] for c in found] == [1] * 7 + [4]
    for candidate in found:
        assert set(candidate["metrics"]) == {"top1", "nll", "ece", "n"}
        assert candidate["metrics"]["n"] == 40
        assert sum(candidate["coefficients"]) == pytest.approx(1)


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_eval_writes_results_file(home: Path, suffix: str) -> None:
    result = ckptavg("eval", "--run", "run", *EVAL, "--results", f"r{suffix}")
    assert result.exit_code == 0, result.output
    text = (home / f"r{suffix}").read_text()
    if suffix == ".json":
        assert len(json.loads(text)["candidates"]) == 2
    else:
        assert len(text.splitlines()) == 3
        assert text.startswith("name,kind,checkpoints,coefficients,bn,forwards,top1")


def test_fail_if_worse_exits_with_3(home: Path) -> None:
    (home / "labels.py").write_text(LABELS_OF_THE_LAST)
    flags = ["--model", "net.py:model", "--data", "labels.py:fitted", "--fail-if-worse"]
    result = ckptavg("eval", "--run", "run", *flags)
    assert result.exit_code == 3, result.output
    assert "does worse than the last checkpoint" in result.stderr
    assert ckptavg("eval", "--run", "run", "--last", 1, *flags).exit_code == 0


def test_inspect_lists_a_run(home: Path) -> None:
    torch.save({"state": {}, "param_groups": []}, home / "run" / "optimizer.pt")
    os.link(home / "run" / "epoch_4.pt", home / "run" / "last.pt")
    result = ckptavg("inspect", "run")
    assert result.exit_code == 0, result.output
    for text in ("4 checkpoints", "val_acc", "state_dict", "not a model's weights", "repeats"):
        assert text in result.stdout
    listed = json.loads(ckptavg("inspect", "run", "--json").stdout)
    assert [c["step"] for c in listed["checkpoints"]] == [1, 2, 3, 4]
    assert {Path(x["path"]).name for x in listed["left_out"]} == {"optimizer.pt", "last.pt"}


def test_inspect_shows_how_a_checkpoint_was_made(home: Path) -> None:
    ckptavg("average", "run", "-o", "out.pt", "--scheme", "ema:decay=0.9")
    result = ckptavg("inspect", "out.pt")
    assert result.exit_code == 0, result.output
    for text in ("1.weight", "float32", "4×8", "BatchNorm layers: 1 (2)", "ema:decay=0.9", "stale"):
        assert text in result.stdout
    assert json.loads(ckptavg("inspect", "out.pt", "--json").stdout)["ckptavg"]["bn"] == "stale"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["average", "nowhere", "-o", "o.pt"], ["nowhere", "does not exist"]),
        (["average", "empty", "-o", "o.pt"], ["empty", "no checkpoint"]),
        (["average", "run", "-o", "run/epoch_1.pt", "--overwrite"], ["is an input"]),
        (["average", "run", "-o", "net.py.pt", "--key", "nope"], ["nope", "state_dict", "--key"]),
        (["average", "run", "--weights", "1,2", "-o", "o.pt"], ["2 weights", "4 checkpoints"]),
        (["average", "run", "-o", "no/such/dir/o.pt"], ["does not exist"]),
        (["eval", "--run", "run", *EVAL[:1], "nomodule:f", *EVAL[2:]], ["nomodule", "no module"]),
        (["eval", "--run", "run", *EVAL[:1], "net.py:modle", *EVAL[2:]], ["modle", "model?"]),
        (
            ["eval", "--run", "run", *EVAL, "--model-arg", "classes=7"],
            ["shape", "--model and its arguments"],
        ),
        (["eval", "--run", "run", *EVAL, "--model-arg", "depth=7"], ["depth", "It takes classes"]),
        (["eval", "--run", "run", *EVAL[:3], "net.py:broken"], ["RuntimeError", "--forward"]),
        (["eval", "--run", "run", *EVAL, "--device", "cuda:99"], ["cuda:99", "not available"]),
    ],
)
def test_errors_are_one_line_with_a_remedy(home: Path, args: list[str], words: list[str]) -> None:
    (home / "empty").mkdir()
    line = one_line_error(ckptavg(*args))
    for word in words:
        assert word in line
    assert not list(home.glob("o.pt")) + list(home.glob(".*tmp*"))


def resave(path: Path, **changes: torch.Tensor | None) -> None:
    """Change, add or (None) drop tensors of a checkpoint."""
    saved = torch.load(path)
    state = dict(saved["state_dict"]) | changes
    torch.save(saved | {"state_dict": {k: v for k, v in state.items() if v is not None}}, path)


BREAKAGES = {
    "missing tensor": (lambda run: resave(run / "epoch_2.pt", **{"1.bias": None}), "lacks 1"),
    "extra tensor": (lambda run: resave(run / "epoch_2.pt", extra=torch.ones(1)), "1 more (extra)"),
    "other shape": (
        lambda run: resave(run / "epoch_2.pt", **{"1.bias": torch.ones(9)}),
        "1.bias has the shape (9,)",
    ),
    "NaN": (
        lambda run: resave(run / "epoch_2.pt", **{"1.bias": torch.full((4,), torch.nan)}),
        "1.bias is NaN",
    ),
    "truncated file": (lambda run: os.truncate(run / "epoch_2.pt", 900), "epoch_2.pt"),
    "unknown entry": (
        lambda run: torch.save({"ema": network().state_dict()}, run / "epoch_2.pt"),
        "ema: 9 tensors). Name the entry by --key, for instance --key ema",
    ),
}


@pytest.mark.parametrize(("damage", "words"), BREAKAGES.values(), ids=BREAKAGES)
def test_average_refuses_damaged_runs_without_output(
    home: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(home / "run")
    before = sorted(home.rglob("*"))
    line = one_line_error(ckptavg("average", "run", "-o", "o.pt"))
    assert words in line
    assert "epoch_2.pt" in line
    assert sorted(home.rglob("*")) == before


def test_average_checks_free_space_first(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    assert "where 0 B are free" in one_line_error(ckptavg("average", "run", "-o", "o.pt"))
    assert not list(home.glob("*o.pt*"))


def test_weights_in_another_order_than_the_run_are_noted(home: Path) -> None:
    paths = ["run/epoch_3.pt", "run/epoch_1.pt"]
    result = ckptavg("average", *paths, "--weights", "3,1", "--dry-run")
    assert "in the run's order, not in the order given" in result.stderr
    result = ckptavg("average", *reversed(paths), "--weights", "3,1", "--dry-run")
    assert "order given" not in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ["average", "run"],
        ["average", "run", "-o", "o.pt", "--scheme", "swa2"],
        ["average", "run", "-o", "o.pt", "--weights", "1,nan,1,1"],
        ["average", "run", "-o", "o.pt", "--weights", "a,b"],
        ["average", "run", "-o", "o.pt", "--cycle", "x"],
        ["average", "run", "-o", "o.pt", "--metric", "val_acc"],
        ["average", "run", "-o", "o.pt", "--mode", "max"],
        ["average", "run", "-o", "o.pt", "--model", "net.py:model"],
        ["average", "run", "-o", "o.xyz"],
        ["average", "run", "-o", "o.pt", "--dtype", "int8"],
        ["eval", *EVAL],
        ["eval", "run", *EVAL],
        ["eval", "run/epoch_1.pt", *EVAL, "--each"],
        ["eval", "--run", "run", *EVAL, "--results", "r.txt"],
        ["eval", "--run", "run", "--model", "net", "--data", "net.py:data"],
    ],
)  # fmt: skip
def test_usage_errors_exit_with_2(home: Path, args: list[str]) -> None:
    one_line_error(ckptavg(*args), code=2)


def test_output_is_kept_without_overwrite(home: Path) -> None:
    (home / "o.pt").write_text("precious")
    assert "--overwrite" in one_line_error(ckptavg("average", "run", "-o", "o.pt"))
    assert (home / "o.pt").read_text() == "precious"
    assert ckptavg("average", "run", "-o", "o.pt", "--overwrite").exit_code == 0
    assert weights(home / "o.pt")


def test_average_of_one_checkpoint_is_noted(home: Path) -> None:
    result = ckptavg("average", "run", "--last", 1, "-o", "o.pt")
    assert result.exit_code == 0
    assert "note: one checkpoint is selected" in result.stderr


def test_debug_shows_the_traceback(home: Path) -> None:
    result = ckptavg("average", "nowhere", "-o", "o.pt", "--debug")
    assert result.exception is not None
    assert "nowhere" in str(result.exception)


def run_python(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, check=False, cwd=cwd
    )


@pytest.mark.parametrize("args", [["--help"], ["average", "-h"], ["inspect", "run"], ["--version"]])
def test_help_and_inspect_do_not_import_torch(home: Path, args: list[str]) -> None:
    done = run_python("-X", "importtime", "-m", "ckptavg", *args, cwd=home)
    assert done.returncode == 0, done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "click" in imported
    assert "torch" not in imported


def test_package_import_does_not_import_torch() -> None:
    code = "import sys, ckptavg; dir(ckptavg); assert 'torch' not in sys.modules"
    assert run_python("-c", code).returncode == 0


def test_package_has_all_public_names() -> None:
    import ckptavg as package

    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="nonsense"):
        package.nonsense  # noqa: B018


def test_help_has_the_essentials_on_its_first_screen() -> None:
    first_screen = "\n".join(ckptavg("average", "--help").stdout.splitlines()[:24])
    for text in ("PATH", "-o, --out", ".safetensors", "--dry-run", "ckptavg average runs/swa -o"):
        assert text in first_screen


@pytest.mark.slow
def test_interrupt_leaves_nothing_and_exits_130(home: Path) -> None:
    command = [sys.executable, "-m", "ckptavg", "average", "run", "-o", "o.pt"]
    command += ["--model", "net.py:model", "--train-data", "net.py:slow"]

    def heed_interrupts() -> None:  # which a process started in the background does not
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
        preexec_fn=heed_interrupts,  # noqa: PLW1509 - a call that takes no lock
    ) as process:
        deadline = time.monotonic() + 240
        while not (home / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 130, stderr
    assert "Interrupted" in stderr
    assert not list(home.glob("*o.pt*"))


def _data(home: Path) -> torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]:
    scope: dict[str, object] = {}
    exec((home / "net.py").read_text(), scope)
    return scope["data"]()  # type: ignore[operator]


def test_json_is_strict_for_metrics_not_finite(home: Path) -> None:
    saved = torch.load(home / "run" / "epoch_1.pt")
    torch.save(saved | {"val_acc": float("nan")}, home / "run" / "epoch_1.pt")

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    listed = json.loads(ckptavg("inspect", "run", "--json").stdout, parse_constant=refuse)
    assert listed["checkpoints"][0]["metrics"]["val_acc"] is None


@pytest.mark.parametrize("command", [[], ["average"], ["eval"], ["update-bn"], ["inspect"]])
def test_help_keeps_lines_of_its_examples(command: list[str]) -> None:
    text = ckptavg(*command, "-h").stdout
    assert "\\b" not in text
    assert "\b" not in text
    if command not in ([], ["inspect"]):
        assert any(line.startswith("    ckptavg ") for line in text.splitlines())


def test_inspect_ignores_damaged_records(home: Path) -> None:
    saved = torch.load(home / "run" / "epoch_1.pt")
    torch.save(saved | {"ckptavg": '{"checkpoints": 5}'}, home / "odd.pt")
    assert ckptavg("inspect", "odd.pt").exit_code == 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--last", "2"],
        ["--scheme", "linear"],
        ["--from", "1"],
        ["--to", "2"],
        ["--metric", "val_acc"],
        ["--mode", "max"],
    ],
)
def test_selection_flags_need_a_run(home: Path, flags: list[str]) -> None:
    line = one_line_error(ckptavg("eval", "run/epoch_1.pt", *EVAL, *flags), code=2)
    assert f"{flags[0]} needs --run" in line


@pytest.mark.parametrize("flags", [[], ["--metric", "val_acc"], ["--mode", "max"]])
def test_best_takes_the_only_metric(home: Path, flags: list[str]) -> None:
    result = ckptavg("average", "run", "-o", "o.pt", "--best", "2", *flags, "--json")
    made = json.loads(result.stdout)["checkpoints"]
    assert [Path(c["path"]).name for c in made] == ["epoch_1.pt", "epoch_2.pt"]
    assert "the best 2 are those with the highest val_acc" in result.stderr


def test_best_asks_for_one_of_several_metrics(home: Path) -> None:
    for epoch in range(1, 5):
        path = home / "run" / f"epoch_{epoch}.pt"
        torch.save(torch.load(path) | {"val_loss": 1 / epoch, "sharpness": 0.1 * epoch}, path)
    line = one_line_error(ckptavg("average", "run", "-o", "o.pt", "--best", "2"), code=2)
    assert "by which metric? The checkpoints record val_acc, val_loss, sharpness" in line
    options = ["--best", "2", "--metric", "sharpness"]
    line = one_line_error(ckptavg("average", "run", "-o", "o.pt", *options), code=2)
    assert "'sharpness' does not tell which of its values are better. Name the mode" in line


@pytest.mark.parametrize("command", ["average", "eval", "update-bn", "inspect"])
def test_help_shows_few_options_and_full_help_all(command: str) -> None:
    short, full = (ckptavg(command, flag).stdout for flag in ("--help", "--help-all"))
    options = main.commands[command].params
    names = [o.opts[-1] for o in options if isinstance(o, click.Option) and not o.hidden]
    assert names
    assert [name for name in names if f"{name} " not in full + " "] == []
    shown = [name for name in names if f"{name} " in short]
    assert 4 <= len(shown) <= 16
    assert f"{command} --help-all shows" in short.replace("\n", " ")


def test_help_indents_continued_lines_of_examples() -> None:
    for command in ("average", "eval", "update-bn"):
        lines = ckptavg(command, "-h").stdout.splitlines()
        broken = [i for i, line in enumerate(lines) if line.endswith("\\")]
        assert broken
        assert all(lines[i + 1].startswith("        --") for i in broken)


@pytest.mark.parametrize("command", ["average", "update-bn"])
def test_output_refuses_standard_output(home: Path, command: str) -> None:
    options = ["--model", "net.py:model", "--train-data", "net.py:data"]
    line = one_line_error(ckptavg(command, "run", "-o", "-", *options), code=2)
    assert "expected a file or a directory but got '-'" in line
    assert not (home / "-").exists()


def test_help_points_to_functions_of_your_own() -> None:
    for command in ("average", "eval", "update-bn"):
        assert "functions of your own" in ckptavg(command, "-h").stdout.replace("\n", " ")
    assert "functions of your own" not in ckptavg("inspect", "-h").stdout


def test_help_all_shows_functions_of_your_own() -> None:
    full = ckptavg("eval", "--help-all").stdout
    for text in ("def model(", "def data(", "--model-arg width=128", "--train-data-arg train=true"):
        assert text in full


def test_help_lists_commands_with_full_summaries() -> None:
    listed = ckptavg("--help").stdout.partition("Commands:")[2]
    assert "..." not in listed


def test_arguments_of_training_data_need_the_data(home: Path) -> None:
    command = ["average", "run", "-o", "b.pt", "--train-data-arg", "train=yes"]
    line = one_line_error(ckptavg(*command), code=2)
    assert "--train-data-arg needs --train-data" in line
    assert not Path("b.pt").exists()
