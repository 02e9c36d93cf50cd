"""How many training samples BatchNorm statistics need, on the network of ``examples/digits.py``.

``python examples/digits.py --out DIR && python tests/benchmarks/enough.py DIR/constant`` scores the
run's average with statistics from ever more samples, drawn with ten seeds each.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from tables import Cells, Table, markdown, plain

import ckptavg
from ckptavg.averaging.plan import plan_average

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

COUNTS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line, score, print; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="checkpoints of examples/digits.py")
    parser.add_argument("--seeds", type=int, default=10, help="draws of each size (default: 10)")
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args(arguments)
    rows = {
        "all" if count is None else str(count): cells(options.run, count, options.seeds)
        for count in (*COUNTS, None)
    }
    table = Table("samples", rows)
    print((markdown if options.markdown else plain)([table]))
    return 0


def cells(run: str, count: int | None, seeds: int) -> Cells:
    """Mean and standard deviation of the scores over draws of so many samples."""
    found = [scores(run, count, seed) for seed in range(seeds)]
    columns = {
        "top-1 %": ([one["top1"] for one in found], 2),
        "NLL": ([one["nll"] for one in found], 4),
    }
    return {
        name: f"{statistics.mean(values):.{digits}f} ± {statistics.pstdev(values):.{digits}f}"
        for name, (values, digits) in columns.items()
    }


def scores(run: str, count: int | None, seed: int) -> dict[str, float]:
    """The metrics of the run's average with statistics from some samples."""
    import digits

    planned = plan_average(ckptavg.open_run(run))
    candidate = ckptavg.Candidate.of_average(planned, "average", recompute=True)
    (result,) = ckptavg.evaluate(
        [candidate], digits.model(), digits.test_data(),
        train_loader=digits.train_data(), bn_samples=count, seed=seed,
    )  # fmt: skip
    return dict(result.metrics)


if __name__ == "__main__":
    sys.exit(main())
