"""The paper's figures from the checkpoints of paper.py, each by one ``ckptavg plot``."""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import train
from trajectories import Settings, file_name

# Figures whose points are chosen, not given by the checkpoints.
SAMPLED_FIGURES = ("plane", "pca", "segment", "rays")


def choose_checkpoints(directory: Path, settings: Settings) -> dict[str, list[str]]:
    """Return the arguments of ``ckptavg plot`` for one seed, by the kind of figure.

    Args:
        directory: Directory of the seed.
        settings: Settings of the training.
    """
    constant = str(directory / "constant")
    sgd = str(directory / "sgd" / file_name(settings.budget))
    return {
        "geometry": [constant],
        "curve": [constant],
        "plane": [constant, "--through", f"first,average,{sgd}"],
        "pca": [constant],
        "segment": [constant, "--ends", f"average,{sgd}"],
        "rays": [constant, "--centers", f"average,{sgd}"],
        "ensemble": [constant],
    }


def list_commands(chosen: argparse.Namespace) -> dict[str, list[str]]:
    """Return the words of ``ckptavg plot`` for one seed, by the kind of figure."""
    here = os.path.relpath(Path(__file__).parent)
    scored = ["--model", f"{here}/networks.py:{train.network_name(chosen)}"]
    for option, split in (("data", "test"), ("train-data", "train")):
        scored += [f"--{option}", f"{here}/images.py:{split}"]
        scored += [f"--{option}-arg", f"limit={chosen.figures}"]
        if chosen.root:
            scored += [f"--{option}-arg", f"root={chosen.root}"]
    if chosen.bf16:
        scored += ["--amp", "bf16"]
    words: dict[str, list[str]] = {}
    settings = train.read_settings(chosen)
    for kind, arguments in choose_checkpoints(chosen.out / "seed_0", settings).items():
        stem = chosen.out / "figures" / kind
        words[kind] = ["plot", kind, *arguments, "-o", f"{stem}.png"]
        if kind != "geometry":
            words[kind] += [*scored, "--results", f"{stem}.json", "--resume"]
        if kind in SAMPLED_FIGURES:
            words[kind] += ["--weight-decay", f"{settings.weight_decay:g}"]
            words[kind] += ["--points", str(chosen.points)]
    return words


def draw(chosen: argparse.Namespace) -> None:
    """Draw all kinds of figures of the first seed, and show the commands.

    Raises:
        SystemExit: A figure cannot be drawn; ckptavg has said why.
    """
    (chosen.out / "figures").mkdir(exist_ok=True)
    for words in list_commands(chosen).values():
        print(f"\n$ ckptavg {shlex.join(words)}", flush=True)
        code = subprocess.run([sys.executable, "-m", "ckptavg", *words], check=False).returncode
        if code:
            raise SystemExit(code)
