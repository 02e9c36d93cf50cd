"""Checkpoints and directories that a user leaves out by their names."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from helpers import names, save_weight

from ckptavg import open_run
from ckptavg.cli import main
from ckptavg.errors import CkptavgError, RunError
from ckptavg.runs.discovery.reason import LeftOut, Reason


@pytest.fixture
def run(tmp_path):
    for i in (1, 2, 3, 4):
        save_weight(tmp_path / "run" / f"epoch_{i}.pt", float(i))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("skip", "expected"),
    [
        ("epoch_2.pt", [1, 3, 4]),
        (["epoch_2.pt", "*_4*"], [1, 3]),
        ("epoch_[23].pt", [1, 4]),
        ("run/epoch_1.pt", [2, 3, 4]),
        ("*/epoch_1.pt", [2, 3, 4]),
        ("other/epoch_1.pt", [1, 2, 3, 4]),
        ("run", [1, 2, 3, 4]),  # the run itself was named
        ([], [1, 2, 3, 4]),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_skip_leaves_out_matches(run, skip, expected, named):
    opened = open_run(*(sorted(run.iterdir()) if named else [run]), skip=skip)
    assert names(opened) == [f"epoch_{i}.pt" for i in expected]
    left_out = {1, 2, 3, 4} - set(expected)
    assert opened.excluded == tuple(
        LeftOut(run / f"epoch_{i}.pt", Reason.SKIPPED) for i in sorted(left_out)
    )
    idle = [skip] if skip and not left_out else []
    assert opened.notes == tuple(f"the pattern {pattern!r} skips nothing" for pattern in idle)


def test_skip_combines_with_glob(run):
    assert names(open_run(run, glob="epoch_[123].pt", skip="epoch_2*")) == [
        "epoch_1.pt", "epoch_3.pt",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["epoch_2.pt", "model.pt", "epoch_5 [x] 'y'.pt"])
def test_skip_remedy_for_damaged_file_works(run, name):
    """Run by a shell's rules, whatever the name."""
    import shlex

    (run / name).write_bytes(b"torn")
    args = ["average", str(run), "--dry-run", "--json"]
    failed = CliRunner().invoke(main, args)
    assert failed.exit_code == 1
    remedy = failed.stderr.partition("--skip ")[2].removesuffix(" leaves it out.\n")
    done = CliRunner().invoke(main, [*args, "--skip", *shlex.split(remedy)])
    assert done.exit_code == 0, done.output
    averaged = [c["path"] for c in json.loads(done.stdout)["checkpoints"]]
    assert averaged == [str(p) for p in sorted(run.glob("epoch_?.pt")) if p.name != name]


def test_skip_of_directory_leaves_out_all_below(tmp_path):
    for step in (500, 1000, 1500):
        save_weight(tmp_path / f"checkpoint-{step}" / "unet" / "model.safetensors", float(step))
        (tmp_path / f"checkpoint-{step}" / "unet" / "config.json").write_text("{}")
    assert [c.step for c in open_run(tmp_path, skip="checkpoint-1000")] == [500, 1500]
    assert [c.step for c in open_run(tmp_path, skip="checkpoint-1500/unet")] == [500, 1000]


def test_skip_leaves_out_directory_of_crash(tmp_path):
    for step in (500, 1000, 1500):
        save_weight(tmp_path / f"checkpoint-{step}" / "model.safetensors", float(step))
        for name in ("config.json", "trainer_state.json"):
            (tmp_path / f"checkpoint-{step}" / name).write_text(f'{{"global_step": {step}}}')
    (tmp_path / "checkpoint-500" / "model.safetensors").unlink()
    with pytest.raises(CkptavgError, match=r"holds no weights.*`skip=.checkpoint-500.` leaves"):
        list(open_run(tmp_path))
    assert [c.step for c in open_run(tmp_path).last(2)] == [1000, 1500]
    assert [c.step for c in open_run(tmp_path, skip="checkpoint-500")] == [1000, 1500]


def test_skip_of_all_is_refused(run):
    with pytest.raises(RunError, match=r"no checkpoint is left.*skipped, as asked for"):
        open_run(run, skip="*")


def test_inspect_lists_skipped_checkpoints(run):
    listed = CliRunner().invoke(main, ["inspect", str(run), "--skip", "*_1.pt", "--skip", "*_2.pt"])
    assert listed.exit_code == 0, listed.output
    assert listed.stdout.count(Reason.SKIPPED.value) == 2


def test_eval_refuses_skip_without_run(run):
    result = CliRunner().invoke(
        main, ["eval", str(run / "epoch_1.pt"), "--skip", "x", "--model", "m:f", "--data", "d:f"]
    )
    assert result.exit_code == 2
    assert "--skip needs --run" in result.stderr
