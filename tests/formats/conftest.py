"""What several of these modules need: archives forged byte by byte, refusals, hard limits."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from ckptavg.errors import CheckpointError
from ckptavg.formats import open_checkpoint

torch.set_num_threads(1)

# Opening a file of less than 1 MiB takes 50 ms and 30 MiB.
_LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (3, 3))
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
from ckptavg.errors import CheckpointError
from ckptavg.formats import open_checkpoint
try:
    open_checkpoint(sys.argv[1])
except CheckpointError as error:
    print("refused:", str(error)[:2000])
else:
    print("opened")
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
if peak > 256 << 10:
    sys.exit(f"it took {peak >> 10} MiB")
"""


@pytest.fixture
def refusal():
    """Open something that must not open; the one line that says why."""

    def refuse(path, key=None) -> str:
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(path, key)
        text = str(caught.value)
        assert text
        assert len(text.splitlines()) == 1
        return text

    return refuse


@pytest.fixture
def forge(tmp_path):
    """Write the archive that ``torch.save`` would have made of a pickle and some storages."""

    def write(pickle: bytes, storages: dict[str, bytes] | None = None, name="forged.pt") -> Path:
        path = tmp_path / name
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle)
            archive.writestr("archive/byteorder", "little")
            for key, content in (storages or {}).items():
                archive.writestr(f"archive/data/{key}", content)
            archive.writestr("archive/version", "3\n")
        return path

    return write


@pytest.fixture
def open_within_limits():
    """Open a file in a process of its own that may take 3 s of processor time and 256 MiB."""
    if not sys.platform.startswith("linux"):
        pytest.skip("limits and their measure are Linux's")

    def run(path: Path) -> str:
        done = subprocess.run(
            [sys.executable, "-c", _LIMITED, os.fspath(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-300:]}"
        return done.stdout

    return run


@pytest.fixture(scope="session")
def language_model():
    """A tiny language model whose output layer is tied to its embedding."""
    transformers = pytest.importorskip("transformers")
    transformers.utils.logging.disable_progress_bar()
    config = transformers.GPT2Config(
        n_layer=2,
        n_embd=16,
        n_head=2,
        vocab_size=50,
        n_positions=16,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.GPT2LMHeadModel(config).eval()
