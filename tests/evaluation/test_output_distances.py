"""Distances between the outputs of candidates, by hand and over several processes."""

import math

import pytest
import torch
from helpers import opened

from ckptavg.distributed.peers import SingleProcess
from ckptavg.evaluation import output_distances
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.output_distances import OutputDistances
from ckptavg.tasks.classification import Classification
from ckptavg.tasks.language import CausalLM


class TwoProcesses(SingleProcess):
    """Peers of this process and of one with a state of its own."""

    world_size = 2

    def __init__(self, other):
        self.other = other

    def gather(self, value):
        return [value, self.other]


class Listening(SingleProcess):
    """Keeps what a process would send."""

    def gather(self, value):
        self.sent = value
        return [value]


@pytest.fixture
def candidates(tmp_path):
    states = [{"w": torch.zeros(1)} for _ in range(3)]
    return [Candidate.of_checkpoint(checkpoint) for checkpoint in opened(tmp_path, states)]


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def test_output_distances_are_those_of_probabilities(candidates):
    first, second, third = candidates
    distances = OutputDistances([(first, second), (first, third)], Classification())
    distances.add(first, 0, logs([0.5, 0.5], [0.9, 0.1]))
    distances.add(second, 0, logs([0.2, 0.8], [0.9, 0.1]))
    distances.add(third, 0, logs([0.5, 0.5], [0.1, 0.9]))
    distances.add(first, 1, logs([0.25, 0.75]))
    distances.add(second, 1, logs([0.25, 0.75]))
    distances.add(third, 1, logs([0.75, 0.25]))
    root = math.sqrt(2)
    expected = [0.3 * root / 3, (0.8 * root + 0.5 * root) / 3]
    assert distances.read(SingleProcess()) == pytest.approx(expected, rel=1e-6)


def test_output_distances_of_a_repeated_pass_count_once(candidates):
    first, second, _ = candidates
    distances = OutputDistances([(first, second)], Classification())
    for _ in range(2):
        distances.add(first, 0, logs([0.5, 0.5]))
        distances.add(second, 0, logs([0.2, 0.8]))
    assert distances.read(SingleProcess()) == pytest.approx([0.3 * math.sqrt(2)], rel=1e-6)


def test_output_distances_wait_for_a_later_pass(candidates):
    first, second, _ = candidates
    distances = OutputDistances([(first, second)], Classification())
    for candidate, row in ((first, [0.5, 0.5]), (second, [0.2, 0.8])):
        for number in range(3):
            distances.add(candidate, number, logs(row))
    assert distances.read(SingleProcess()) == pytest.approx([0.3 * math.sqrt(2)], rel=1e-6)


def test_output_distances_are_unknown_where_outputs_did_not_meet(candidates, monkeypatch):
    monkeypatch.setattr(output_distances, "_MOST_WAITING", 100)
    first, second, _ = candidates
    distances = OutputDistances([(first, second)], Classification())
    # Of 20 batches of 8 bytes only some find room until the second candidate comes.
    for candidate in (first, second):
        for number in range(20):
            distances.add(candidate, number, logs([0.5, 0.5]))
    assert distances.read(SingleProcess()) == [None]


def test_output_distances_are_unknown_of_tokens(candidates):
    first, second, _ = candidates
    distances = OutputDistances([(first, second)], CausalLM())
    for candidate in (first, second):
        distances.add(candidate, 0, torch.zeros(1, 2, 3))
    assert distances.read(SingleProcess()) == [None]


def test_output_distances_are_means_over_the_samples_of_all_processes(candidates):
    first, second, _ = candidates
    here, there = (OutputDistances([(first, second)], Classification()) for _ in range(2))
    here.add(first, 0, logs([0.5, 0.5], [0.5, 0.5]))
    here.add(second, 0, logs([0.5, 0.5], [0.5, 0.5]))
    there.add(first, 0, logs([0.5, 0.5]))
    there.add(second, 0, logs([0.2, 0.8]))
    listening = Listening()
    there.read(listening)
    found = here.read(TwoProcesses(listening.sent))
    assert found == pytest.approx([0.3 * math.sqrt(2) / 3], rel=1e-6)
