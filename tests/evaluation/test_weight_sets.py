"""Which weights candidates need outputs of, and which run together."""

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import average_by_hand, counted_reads, opened, same_bits, save
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from ckptavg import open_checkpoint
from ckptavg.averaging.compute import as_average, compute_state_dicts
from ckptavg.averaging.plan import Average, plan_average
from ckptavg.averaging.weights import Weights
from ckptavg.errors import ModelError
from ckptavg.evaluation.candidates import Candidate
from ckptavg.evaluation.resume import Identity, keys_of
from ckptavg.evaluation.weight_sets import WeightSet, WeightSets, load_models, release_models
from ckptavg.models.perturbation import Direction, Perturbation
from ckptavg.models.runtime import Runtime
from ckptavg.runs.run import as_run

CPU = Runtime(torch.device("cpu"))
COUNT = 8


def state_of(seed):
    """Weights whose sums round otherwise in each order."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, 40, generator=generator, dtype=torch.float64) * 10.0 ** (seed % 5)
    return {"weight": weight, "bias": torch.full((3,), float(seed), dtype=torch.float64)}


def template():
    return nn.Linear(40, 3, dtype=torch.float64)


STATES = [state_of(seed) for seed in range(COUNT)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return opened(tmp_path_factory.mktemp("run"), STATES)


def single(checkpoints, place):
    return Candidate.of_checkpoint(checkpoints[place])


def ensemble(checkpoints, places):
    return Candidate.of_ensemble([checkpoints[place] for place in places])


def average(checkpoints, places, *, recompute=False):
    planned = plan_average([checkpoints[place] for place in places])
    return Candidate.of_average(planned, str(places), recompute=recompute)


# Who shares what


def test_weight_sets_share_a_checkpoint(checkpoints):
    again = open_checkpoint(checkpoints[1].path)
    candidates = [
        single(checkpoints, 1),
        ensemble(checkpoints, [0, 1, 0]),
        ensemble(checkpoints, [1, 2]),
        Candidate.of_checkpoint(again),
    ]
    weight_sets = WeightSets(candidates)
    assert len(weight_sets) == 3
    one, many, few, reopened = weight_sets.members
    assert one == reopened == [many[1]] == [few[0]]
    assert many[0] is many[2]


def test_weight_sets_separate_weights_of_one_file(tmp_path):
    path = save(tmp_path / "two.pt", {"w": torch.ones(1)}, ema={"w": torch.zeros(1)})
    candidates = [Candidate.of_checkpoint(open_checkpoint(path, k)) for k in ("state_dict", "ema")]
    assert len(WeightSets(candidates)) == 2


def test_weight_sets_group_recomputed_together(checkpoints):
    candidates = [
        candidate
        for place in range(4)
        for candidate in (single(checkpoints, place), average(checkpoints, [place], recompute=True))
    ]
    groups = WeightSets(candidates).groups(4)
    assert [[network.recompute for network in group] for group in groups] == [
        [True] * 4,
        [False] * 4,
    ]


def test_weight_sets_separate_stale_and_recomputed_average(checkpoints):
    planned = plan_average(checkpoints)
    stale, fresh, again = (
        Candidate.of_average(planned, name, recompute=recompute)
        for name, recompute in (("a", False), ("b", True), ("c", False))
    )
    members = WeightSets([stale, fresh, again]).members
    assert members[0] == members[2] != members[1]
    assert members[1][0].recompute


# Groups

PLACES = st.integers(0, COUNT - 1)
ASKED = st.lists(
    st.one_of(
        PLACES,
        st.lists(PLACES, min_size=1, max_size=6),
        st.tuples(st.integers(1, COUNT), st.booleans()),
    ),
    min_size=1,
    max_size=10,
)


def candidate_of(checkpoints, asked):
    if isinstance(asked, int):
        return single(checkpoints, asked)
    if isinstance(asked, list):
        return ensemble(checkpoints, asked)
    last, recompute = asked
    return average(checkpoints, range(COUNT - last, COUNT), recompute=recompute)


@settings(max_examples=80, deadline=None)
@given(asked=ASKED, size=st.integers(0, 12))
def test_groups_hold_each_weight_set_once_within_size(checkpoints, asked, size):
    weight_sets = WeightSets([candidate_of(checkpoints, one) for one in asked])
    groups = weight_sets.groups(size)
    in_groups = [id(network) for group in groups for network in group]
    assert sorted(in_groups) == sorted(map(id, weight_sets))
    assert all(1 <= len(group) <= max(1, size) for group in groups)
    longest = max(weight_sets.members, key=len)
    if len({*longest}) <= size:
        assert sum(not {*longest}.isdisjoint(group) for group in groups) == 1


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, COUNT), size=st.integers(1, 10))
def test_groups_of_single_checkpoints_are_fewest(checkpoints, count, size):
    weight_sets = WeightSets([single(checkpoints, place) for place in range(count)])
    assert len(weight_sets.groups(size)) == -(-count // size)


@pytest.mark.parametrize("first", [True, False])
def test_groups_keep_ensembles_together(checkpoints, first):
    ensembles = [ensemble(checkpoints, places) for places in ([0, 1, 2], [3, 4, 5], [6, 7])]
    singles = [single(checkpoints, place) for place in range(COUNT)]
    weight_sets = WeightSets([*ensembles, *singles] if first else [*singles, *ensembles])
    groups = weight_sets.groups(4)
    for members in weight_sets.members:
        assert sum(not {*members}.isdisjoint(group) for group in groups) == 1


# Weights


def loaded(candidates, **how):
    weight_sets = WeightSets(candidates)
    group = [*weight_sets]
    load_models(group, template(), CPU, **how)
    return group


def test_load_models_reads_averages_once(monkeypatch, checkpoints):
    read = counted_reads(monkeypatch)
    candidates = [
        average(checkpoints, range(4), recompute=True),
        average(checkpoints, range(2, 6)),
        average(checkpoints, range(6)),
    ]
    loaded(candidates)
    weights = sum(tensor.nbytes for tensor in STATES[0].values())
    assert read == {str(c.path): weights for c in checkpoints[:6]}


def test_load_models_reads_checkpoints_with_averages(monkeypatch, checkpoints):
    read = counted_reads(monkeypatch)
    members = [single(checkpoints, 1), ensemble(checkpoints, [2, 3])]
    group = loaded([average(checkpoints, range(4)), *members])
    weights = sum(tensor.nbytes for tensor in STATES[0].values())
    assert read == {str(c.path): weights for c in checkpoints[:4]}
    for network, state in zip(group[1:], STATES[1:4], strict=True):
        assert all(same_bits(v, state[k]) for k, v in network.model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64])
def test_compute_state_dicts_keeps_bits_of_checkpoints(tmp_path, dtype):
    odd = torch.tensor([-0.0, 0.0, 1e-40, 65504.0, float("inf"), -float("inf"), 1 / 3]).to(dtype)
    states = [
        {"odd": odd * sign, "mask": torch.tensor([False, True]), "tracked": torch.tensor(number)}
        for number, sign in enumerate((1, -1))
    ]
    run = opened(tmp_path, states)
    found = compute_state_dicts([plan_average(run[1:]), *map(as_average, run)])
    for state, weights in zip([states[1], *states], found, strict=True):
        assert state.keys() == weights.keys()
        assert all(same_bits(weights[name], value) for name, value in state.items())


@pytest.mark.parametrize(
    "selections",
    [
        [[0, 1, 2], [1, 2, 3, 4]],
        [[3, 4, 5], [0, 1, 2, 3, 4, 5]],
        [[2, 4], [1, 2, 3], [0, 4]],
        [[0, 1, 2, 3], [3, 2, 1, 0]],
        [[5, 1, 3], [1, 5], [3, 1]],
    ],
    ids=str,
)
def test_load_models_keeps_bits_of_averages_in_any_group(checkpoints, selections):
    group = loaded([average(checkpoints, places) for places in selections])
    for network, places in zip(group, selections, strict=True):
        states = [STATES[place] for place in places]
        weight = average_by_hand([s["weight"] for s in states], [1] * len(places), torch.float64)
        assert same_bits(network.model.weight.detach(), weight)
        assert isinstance(network.source, Average)
        (alone,) = compute_state_dicts([network.source])
        assert all(same_bits(v, alone[k]) for k, v in network.model.state_dict().items())


def test_load_models_gives_separate_weights_in_eval_mode(checkpoints):
    one = template()
    before = copy.deepcopy(one.state_dict())
    weight_sets = WeightSets([single(checkpoints, 2), ensemble(checkpoints, [3, 4])])
    group = [*weight_sets]
    load_models(group, one.train(), CPU)
    for network, state in zip(group, STATES[2:5], strict=True):
        assert all(torch.equal(v, state[k]) for k, v in network.model.state_dict().items())
        assert not network.model.training
    places = [p.data_ptr() for n in group for p in n.model.parameters()]
    assert len({*places, *(p.data_ptr() for p in one.parameters())}) == 2 * 4
    assert all(torch.equal(v, before[k]) for k, v in one.state_dict().items())


def test_load_models_copies_a_shared_average(checkpoints):
    planned = plan_average(checkpoints)
    stale, fresh = loaded(
        [Candidate.of_average(planned, str(r), recompute=r) for r in (False, True)]
    )
    assert torch.equal(stale.model.weight, fresh.model.weight)
    assert stale.model.weight.data_ptr() != fresh.model.weight.data_ptr()


def test_release_models_frees_memory(checkpoints):
    group = loaded([single(checkpoints, 0), average(checkpoints, [1, 2])])
    models = [weakref.ref(network.model) for network in group]
    release_models(group, CPU.device)
    gc.collect()
    assert [model() for model in models] == [None, None]


@pytest.mark.parametrize("kind", ["checkpoint", "average"])
def test_load_models_names_weights_that_do_not_fit(tmp_path, checkpoints, kind):
    other = opened(tmp_path, [{"weight": torch.ones(2, 2)}] * 2)
    candidate = (
        Candidate.of_checkpoint(other[1])
        if kind == "checkpoint"
        else Candidate.of_average(plan_average(as_run(other)), "the odd one", recompute=False)
    )
    named = r"epoch_2\.pt" if kind == "checkpoint" else "the odd one"
    with pytest.raises(ModelError, match=f"{named} does not fit the model"):
        loaded([single(checkpoints, 0), candidate])


# Steps away from weights


def test_load_models_moves_candidates_along_a_direction(monkeypatch, checkpoints):
    planned = plan_average(checkpoints[:3])
    steps = [Perturbation(Direction(0, number), 2.0) for number in (0, 1, 0)]
    average = Candidate.of_average(planned, "average")
    last = single(checkpoints, 2)
    moved = [
        replace(center, name=f"{center.name} {number}", perturbation=step)
        for center in (average, last)
        for number, step in enumerate(steps)
    ]
    read = counted_reads(monkeypatch)
    group = loaded([average, last, *moved])
    # The third step is the first again; centers and steps share one read.
    assert len({network.name for network in group}) == len(group) == 6
    assert set(read) == {str(c.path) for c in checkpoints[:3]}
    assert set(read.values()) == {sum(tensor.nbytes for tensor in STATES[0].values())}
    by_source = {}
    for network in group:
        weights = torch.cat([p.detach().flatten() for p in network.model.parameters()])
        by_source.setdefault(id(network.source), []).append(weights)
    directions = []
    for center, first, second in by_source.values():
        directions.append((first - center, second - center))
    for one, other in zip(*directions, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
        assert float(one.norm()) == pytest.approx(2)


def test_resume_keys_tell_steps_apart(checkpoints):
    candidate = single(checkpoints, 0)
    step = Perturbation(Direction(0, 0), 1.0)
    candidates = [candidate, *(replace(candidate, perturbation=s) for s in (
        step, Perturbation(Direction(0, 1), 1.0), Perturbation(Direction(0, 0), 1.5),
    ))]  # fmt: skip
    keys = keys_of(candidates, lambda _: Identity({}))
    assert len(set(keys)) == 4


@pytest.mark.parametrize("recompute", [True, False])
def test_load_models_advises_to_recompute_only_where_nobody_does(tmp_path, caplog, recompute):
    caplog.set_level("INFO", "ckptavg")
    states = [nn.BatchNorm1d(2).state_dict() for _ in range(2)]
    states[1]["running_mean"] += 1
    run = opened(tmp_path, states)
    candidate = Candidate.of_average(run, weights=[-0.25, 1.25], recompute=recompute)
    load_models([*WeightSets([candidate])], nn.BatchNorm1d(2), CPU)
    assert ("negative: recompute them" in caplog.text) is not recompute


class Tied(torch.nn.Module):
    """Two names of one parameter, a complex one, and a buffer."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        self.second = self.first
        self.third = torch.nn.Parameter(torch.tensor([3 + 4j]))
        self.register_buffer("mean", torch.tensor([100.0]))


def test_weight_set_norm_is_that_of_parameters_each_once():
    weight_set = WeightSet("tied", Weights({}))
    weight_set.model = Tied()
    weight_set.measure_norm()
    assert weight_set.squared_norm == 1 + 4 + 9 + 16
