"""Fuzz one target: ``python tests/fuzz/run.py TARGET --runs N``.

Guided by coverage where atheris is installed (``pip install atheris``), else by chance alone.
What it finds lands beside it as ``crash-*``, ``timeout-*`` or ``oom-*``; give that file to
``--replay``, mend the cause, and keep the file in ``corpus/TARGET``.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

_HERE = Path(__file__).parent
sys.path += [str(_HERE.parents[1]), str(_HERE.parent / "support")]

FLAGS = {  # libFuzzer's: seconds and MiB a case, bytes of an input
    "timeout": 10, "rss_limit_mb": 2500, "malloc_limit_mb": 700, "max_len": 20_000,
    "print_final_stats": 1,
}  # fmt: skip


def mutations(seeds: Sequence[bytes], seed: int) -> Iterator[bytes]:
    """Damaged copies of the seeds without end, the same for the same number."""
    chance = random.Random(seed)
    while True:
        data = bytearray(chance.choice(seeds))
        for _ in range(1 << chance.randrange(4)):
            _damage(data, chance.choice(seeds), chance)
        yield bytes(data)


def _damage(data: bytearray, other: bytes, chance: random.Random) -> None:
    at = chance.randrange(len(data) + 1)
    length = 1 << chance.randrange(7)
    kind = chance.randrange(5)
    if kind == 0 and data:
        data[at % len(data)] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, chance.randrange(256)))
    elif kind == 1:
        del data[at : at + length]
    elif kind == 2:
        data[at:at] = chance.randbytes(min(length, 16))
    elif kind == 3:
        begin = chance.randrange(len(other) + 1)
        data[at : at + length] = other[begin : begin + length]
    else:
        data[at:at] = data[at : at + length] * chance.randrange(1, 4)


def main() -> None:
    """Parse the command line, import what is fuzzed, and fuzz or replay."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--replay", type=Path, help="feed this one file")
    parser.add_argument("--corpus", type=Path, help="where inputs that reach new code are kept")
    options = parser.parse_args()
    atheris = None if options.replay else _instrumented()
    from targets import CORPUS, TARGETS

    target = TARGETS[options.target]
    room = Path(tempfile.mkdtemp(prefix="ckptavg-fuzz-")) / "room"
    files = sorted((CORPUS / options.target).glob("*"))
    if options.replay:
        files = [options.replay]
    seeds = [*target.seeds(), *(path.read_bytes() for path in files)]
    for data in seeds:  # which also loads whatever modules they need
        target.run(data, room)
    if options.replay:
        return
    if atheris is not None:
        corpus = _filled(options.corpus or room.with_name("corpus"), seeds)
        flags = FLAGS | {"runs": options.runs, "seed": options.seed}
        arguments = [sys.argv[0], *(f"-{k}={v}" for k, v in flags.items()), str(corpus)]
        atheris.Setup(arguments, lambda data: target.run(data, room))
        atheris.Fuzz()
    for data in itertools.islice(mutations(seeds, options.seed), options.runs):
        target.run(data, room)


def _instrumented() -> ModuleType | None:
    """Import the parsers so that coverage is seen; atheris, or None where it is not installed."""
    import torch  # noqa: F401 - before anything is instrumented

    try:
        import atheris
    except ImportError:
        return None
    with atheris.instrument_imports(include=["ckptavg.formats", "pickletools", "zipfile"]):
        import ckptavg.formats.registry
        import ckptavg.formats.torch_save.writer  # noqa: F401
    return atheris


def _filled(corpus: Path, seeds: Sequence[bytes]) -> Path:
    corpus.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(data)
    return corpus


if __name__ == "__main__":
    main()
