"""Verification from Python; what the command line shows of it is tested in cli/."""

import pytest
import torch

import ckptavg
from ckptavg.errors import CkptavgError


@pytest.fixture
def run(tmp_path):
    """Three checkpoints, and their average with digests beside them."""
    directory = tmp_path / "run"
    directory.mkdir()
    for epoch in range(3):
        generator = torch.Generator().manual_seed(epoch)
        state = {"w": torch.randn(50, generator=generator)}
        torch.save({"state_dict": state, "epoch": epoch}, directory / f"epoch_{epoch}.pt")
    ckptavg.average(directory, out=directory / "swa.safetensors", digests=True)
    return directory


def states(findings):
    return {(finding.path.rsplit("/", 1)[-1], finding.part): finding.state for finding in findings}


def flip_bit(path, value):
    """Change the last bit of a float32 value in a file."""
    contents = bytearray(path.read_bytes())
    place = contents.index(value.numpy().tobytes())
    contents[place] ^= 1
    path.write_bytes(contents)


def test_verify_finds_intact_files_the_same(run):
    assert states(ckptavg.verify(run)) == {
        ("epoch_0.pt", "archive"): "same",
        ("epoch_1.pt", "archive"): "same",
        ("epoch_2.pt", "archive"): "same",
        ("swa.safetensors", "record"): "same",
        ("swa.safetensors", "weights"): "same",
        ("epoch_0.pt", "input"): "same",
        ("epoch_1.pt", "input"): "same",
        ("epoch_2.pt", "input"): "same",
    }


def test_verify_finds_a_flipped_bit_of_an_input_and_of_the_average(run):
    flip_bit(run / "epoch_1.pt", torch.load(run / "epoch_1.pt")["state_dict"]["w"][7])
    changed = [f for f in ckptavg.verify(run) if f.wrong]
    assert states(changed) == {
        ("epoch_1.pt", "archive"): "changed",
        ("epoch_1.pt", "input"): "changed",
    }


def test_verify_takes_a_single_average_and_reports_its_progress(run):
    counts = []
    findings = ckptavg.verify(
        run / "swa.safetensors", progress=lambda phase, done, total: counts.append((phase, done))
    )
    assert ("swa.safetensors", "weights") in states(findings)
    assert not any(finding.wrong for finding in findings)
    assert {phase for phase, _ in counts} == {"verifying"}


def test_verify_says_where_nothing_was_recorded(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(2)}, tmp_path / "a.safetensors")
    (finding,) = ckptavg.verify(tmp_path / "a.safetensors")
    assert (finding.part, finding.state, finding.wrong) == ("weights", "nothing recorded", False)


def test_verify_raises_where_there_is_no_run(tmp_path):
    with pytest.raises(CkptavgError):
        ckptavg.verify(tmp_path / "absent")
