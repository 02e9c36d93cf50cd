"""Table 1 of Izmailov et al. 2018 from saved checkpoints: SGD, FGE, and SWA at several budgets.

    python examples/paper.py --out paper-digits --budget 8 --seeds 2    # digits, half a minute
    python examples/paper.py --out paper --root cifar --network vgg16_bn --budget 200 --lr 0.05 \\
        --swa-lr 0.01 --device cuda --bf16

For each seed, three trajectories are trained (train.py), with a directory of checkpoints each:
``sgd`` for one budget, ``fge`` up to one budget, ``constant`` up to ``--length`` budgets. Then
ckptavg scores, in shared passes over the test images, the network that SGD ends with, the ensemble
of FGE's minima, and the averages of the constant trajectory up to 1, 1.25 and 1.5 budgets, their
BatchNorm statistics recomputed. The table (mean ± standard deviation over the seeds) is printed
and written to ``--out`` as Markdown and JSON.

Whatever is there already is not computed again: a seed whose checkpoints are complete is not
trained, a candidate or a point whose score is stored is not scored. So an interrupted command goes
on with the same words, and ``--seeds 5`` after ``--seeds 3`` adds two.

With ``--figures N``, ``ckptavg plot`` then draws the first seed into ``OUT/figures``. Each command
is shown as one would type it. Points are scored on N test images, with BatchNorm statistics of N
training images.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import images as image_data
import networks
import paper_figures
import torch
import train
from torch.utils.data import Dataset
from trajectories import Settings, Trajectory, file_name, make_trajectories

import ckptavg
from ckptavg import Candidate
from ckptavg.display.tables import Column, Table, rows_of_texts
from ckptavg.display.terminal import printed_table

AVERAGED_BUDGETS = (1.0, 1.25, 1.5)


@dataclass(frozen=True)
class Method:
    """A column of the table.

    Attributes:
        title: Title of the column.
        trajectory: Trajectory that the checkpoints come from.
        budgets: Budgets after which the trajectory is cut off.
    """

    title: str
    trajectory: str
    budgets: float


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of a score over seeds.

    Attributes:
        mean: Mean.
        deviation: Standard deviation of a sample (n − 1); None for a single value.
    """

    mean: float
    deviation: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        deviation = None
        if len(values) > 1:
            deviation = statistics.stdev(values)
        return cls(statistics.fmean(values), deviation)

    def text(self, sign: str = "-") -> str:
        """Return mean ± standard deviation; with the sign ``+`` for a difference."""
        mean = f"{self.mean:{sign}.2f}"
        if self.deviation is None:
            return mean
        return f"{mean} ± {self.deviation:.2f}"


# Table 1 of the paper: top-1 accuracy in %, by the number of classes of CIFAR. Columns: SGD, FGE
# after one budget, SWA after 1, 1.25 and 1.5 budgets.
PAPER: dict[int, dict[str, tuple[Spread, ...]]] = {
    10: {
        "VGG-16": (
            Spread(93.25, 0.16), Spread(93.52, None),
            Spread(93.59, 0.16), Spread(93.70, 0.22), Spread(93.64, 0.18),
        ),
        "ResNet-164": (
            Spread(95.28, 0.10), Spread(95.45, None),
            Spread(95.56, 0.11), Spread(95.77, 0.04), Spread(95.83, 0.03),
        ),
        "WRN-28-10": (
            Spread(96.18, 0.11), Spread(96.36, None),
            Spread(96.45, 0.11), Spread(96.64, 0.08), Spread(96.79, 0.05),
        ),
    },
    100: {
        "VGG-16": (
            Spread(72.55, 0.10), Spread(74.26, None),
            Spread(73.91, 0.12), Spread(74.17, 0.15), Spread(74.27, 0.25),
        ),
        "ResNet-164": (
            Spread(78.49, 0.36), Spread(79.84, None),
            Spread(79.77, 0.17), Spread(80.18, 0.23), Spread(80.35, 0.16),
        ),
        "WRN-28-10": (
            Spread(80.82, 0.23), Spread(82.27, None),
            Spread(81.46, 0.23), Spread(81.91, 0.27), Spread(82.15, 0.27),
        ),
    },
}  # fmt: skip


def list_methods(settings: Settings) -> list[Method]:
    """Return the columns of the table, those of SWA as far as the training goes."""
    methods = [Method("SGD", "sgd", 1.0), Method("FGE 1", "fge", 1.0)]
    for budgets in AVERAGED_BUDGETS:
        if budgets <= settings.length:
            methods.append(Method(f"SWA {budgets:g}", "constant", budgets))
    return methods


def list_trajectories(settings: Settings) -> list[Trajectory]:
    """Return the trajectories of one seed; that of FGE ends with the first budget."""
    short = replace(settings, length=1.0)
    return [
        *make_trajectories(("sgd", "constant"), settings),
        *make_trajectories(("fge",), short),
    ]


def list_checkpoints(method: Method, settings: Settings) -> list[str]:
    """Return the names of the checkpoints that a method combines, in order."""
    trajectory = next(t for t in list_trajectories(settings) if t.name == method.trajectory)
    end = method.budgets * settings.budget
    times = [time for time in trajectory.saves if time <= end]
    if method.trajectory == "fge":
        # Every other save is a maximum of the learning rate.
        times = times[::2]
    return [file_name(time) for time in times]


def is_trained(directory: Path, trajectories: Sequence[Trajectory]) -> bool:
    """Return True if all checkpoints of a seed are there."""
    for trajectory in trajectories:
        for time in trajectory.saves:
            if not (directory / trajectory.name / file_name(time)).exists():
                return False
    return True


def open_candidate(directory: Path, method: Method, settings: Settings) -> Candidate:
    """Return what a method makes of a seed's checkpoints, to be scored."""
    names = list_checkpoints(method, settings)
    run = ckptavg.open_run(*(directory / method.trajectory / name for name in names))
    if method.trajectory == "sgd":
        return Candidate.of_checkpoint(run[-1], method.title)
    if method.trajectory == "fge":
        return Candidate.of_ensemble(run, method.title)
    return Candidate.of_average(run, method.title, recompute=True)


@dataclass(frozen=True)
class Scoring:
    """What all seeds are scored with.

    Attributes:
        model: A network of the kind that was trained.
        test: Test images.
        training: Training images, for BatchNorm statistics.
        classes: Number of classes.
        bn_samples: Number of training images that are taken for it; all where None.
        device: Name of the device.
    """

    model: torch.nn.Module
    test: Dataset[Any]
    training: Dataset[Any]
    classes: int
    bn_samples: int | None
    device: str

    def score(self, candidates: Sequence[Candidate], file: Path) -> ckptavg.Results:
        """Score candidates, except for those whose scores a file holds; add them to the file."""
        return ckptavg.evaluate(
            candidates,
            self.model,
            self.test,
            train_loader=self.training,
            bn_samples=self.bn_samples,
            device=self.device,
            results=file,
            resume=True,
            progress=sys.stderr.isatty(),
        )


@dataclass(frozen=True)
class Scores:
    """Scores of the methods over the seeds.

    Attributes:
        network: Name of the network.
        settings: Settings of the training.
        methods: The columns of the table.
        top1: Accuracy in %, by seed, one per method.
        paper: The paper's rows for the same data; empty for digits.
    """

    network: str
    settings: Settings
    methods: Sequence[Method]
    top1: Mapping[int, Sequence[float]]
    paper: Mapping[str, Sequence[Spread]]

    def spread(self, position: int) -> Spread:
        """Return mean and standard deviation of the method at a position."""
        return Spread.of([values[position] for values in self.top1.values()])

    def gains(self, position: int) -> list[float]:
        """Return a method's accuracy minus that of SGD, by seed, in percentage points."""
        return [values[position] - values[0] for values in self.top1.values()]

    def remark(self, position: int) -> str:
        """Return a line that compares a method with SGD, seed by seed."""
        gains = self.gains(position)
        better = sum(gain > 0 for gain in gains)
        return (
            f"{self.methods[position].title} − SGD: {Spread.of(gains).text('+')} points, better in "
            f"{better} of {len(gains)} seeds"
        )

    @property
    def rows(self) -> list[list[str]]:
        """Rows of the table: measured, number of checkpoints, and the paper's, if any."""
        columns = range(len(self.methods))
        name = f"{self.network}, {self.settings.budget} epochs, n = {len(self.top1)}"
        counts = [str(len(list_checkpoints(m, self.settings))) for m in self.methods]
        rows = [[name, *(self.spread(i).text() for i in columns)], ["checkpoints", *counts]]
        for network, spreads in self.paper.items():
            rows.append([f"paper: {network}", *(spreads[i].text() for i in columns)])
        return rows

    @property
    def titles(self) -> list[str]:
        """Titles of the columns."""
        return ["top-1 %", *(method.title for method in self.methods)]

    @property
    def remarks(self) -> list[str]:
        """Lines below the table."""
        return [self.remark(i) for i in range(1, len(self.methods))]

    def as_text(self) -> str:
        """Return the table as it is printed."""
        name, *others = self.titles
        columns = (Column(name, "name"), *(Column(title, "number") for title in others))
        return printed_table(Table("", columns, rows_of_texts(self.rows), tuple(self.remarks)))

    def as_markdown(self) -> str:
        """Return the table and the remarks as Markdown."""
        lines = [self.titles, ["---"] * len(self.titles), *self.rows]
        table = ["| " + " | ".join(cells) + " |" for cells in lines]
        return "\n".join([*table, "", *(f"- {remark}" for remark in self.remarks), ""])

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values for JSON."""
        columns = []
        for position, method in enumerate(self.methods):
            spread = self.spread(position)
            names = list_checkpoints(method, self.settings)
            values = {str(seed): top1[position] for seed, top1 in self.top1.items()}
            columns.append(
                asdict(method)
                | {"checkpoints": names, "top1": values}
                | {"mean": spread.mean, "deviation": spread.deviation}
            )
        settings = asdict(self.settings)
        return {"network": self.network, "settings": settings, "methods": columns}


def check_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Record how a directory's seeds are trained, or make sure that it is as recorded before.

    Raises:
        SystemExit: The directory holds seeds that were trained in another way.
    """
    file = directory / "settings.json"
    if file.exists():
        before = json.loads(file.read_text())
        differing = [name for name, value in record.items() if before.get(name) != value]
        if differing:
            name = differing[0]
            raise SystemExit(
                f"the seeds in {directory} were trained with {name} {before.get(name)!r}, not "
                f"{record[name]!r}; name another directory by --out"
            )
        return
    directory.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n")


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description="Train, score and tabulate SGD, FGE and SWA as in table 1 of the SWA paper.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory of the seeds and of the table")
    add("--seeds", type=int, default=3, help="number of seeds")
    add("--bn-samples", type=int, help="training images for BatchNorm statistics (default: all)")
    add("--figures", type=int, default=0, help="draw figures from so many images; 0 draws none")
    add("--points", type=int, default=11, help="points of a figure along each axis")
    add("--train-only", action="store_true", help="leave the checkpoints and score nothing")
    train.add_options(parser)
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds: at least 1")
    return options


def train_seed(chosen: argparse.Namespace, seed: int, directory: Path) -> None:
    """Train the trajectories of one seed, unless their checkpoints are there."""
    trajectories = list_trajectories(train.read_settings(chosen))
    if is_trained(directory, trajectories):
        return
    print(f"training seed {seed}", file=sys.stderr)
    train.train(chosen, trajectories, directory, seed=seed)


def open_scoring(chosen: argparse.Namespace) -> Scoring:
    """Return the network and the data that candidates are scored with."""
    test = image_data.test(chosen.root)
    training = image_data.train(chosen.root)
    classes = test.images.classes
    model = getattr(networks, train.network_name(chosen))(classes)
    return Scoring(model, test, training, classes, chosen.bn_samples, chosen.device)


def tabulate(chosen: argparse.Namespace, directories: Mapping[int, Path]) -> Scores:
    """Score the methods on the checkpoints of each seed."""
    settings = train.read_settings(chosen)
    methods = list_methods(settings)
    scoring = open_scoring(chosen)
    top1: dict[int, list[float]] = {}
    for seed, directory in directories.items():
        candidates = [open_candidate(directory, method, settings) for method in methods]
        results = scoring.score(candidates, directory / "scores.json")
        top1[seed] = [result.metrics["top1"] for result in results]
    paper: Mapping[str, Sequence[Spread]] = {}
    if chosen.root:
        paper = PAPER.get(scoring.classes, {})
    return Scores(train.network_name(chosen), settings, methods, top1, paper)


def main() -> None:
    """Train, score and tabulate."""
    chosen = parse_options()
    record = asdict(train.read_settings(chosen))
    record |= {"network": train.network_name(chosen), "root": chosen.root, "bf16": chosen.bf16}
    check_record(chosen.out, record)
    directories = {seed: chosen.out / f"seed_{seed}" for seed in range(chosen.seeds)}
    for seed, directory in directories.items():
        train_seed(chosen, seed, directory)
    if chosen.train_only:
        return
    scores = tabulate(chosen, directories)
    print(scores.as_text())
    (chosen.out / "table.md").write_text(scores.as_markdown())
    (chosen.out / "table.json").write_text(json.dumps(scores.as_json(), indent=2) + "\n")
    if chosen.figures:
        paper_figures.draw(chosen)


if __name__ == "__main__":
    main()
