"""A run's geometry against the weights laid side by side in memory, and the odd one out."""

import json
import math
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers import opened, same_bits, save
from hypothesis import given, settings
from hypothesis import strategies as st
from random_runs import COMPLEX, FLOATS, INTEGERS, lay_out, random_values
from small_cuts import CUTS, cut_small

import ckptavg
from ckptavg.averaging import stream as stream_module
from ckptavg.averaging.planning.tensor_plan import Rules, make_plan
from ckptavg.averaging.read_groups import Job
from ckptavg.averaging.stream import StreamRequests, stream
from ckptavg.errors import CheckpointError, MismatchError, NonFiniteError, UsageError
from ckptavg.formats import open_checkpoint
from ckptavg.inspection.geometry import geometry, geometry_of, list_weights
from ckptavg.outputs.sinks import MemorySink
from ckptavg.runs.run import Run


def flat(state):
    """All floating-point weights of a state, tied ones once, one after another."""
    distinct = {id(tensor): tensor for tensor in state.values()}.values()
    return torch.cat([doubles(t) for t in distinct if t.is_floating_point() or t.is_complex()])


def doubles(tensor):
    """Real numbers; of a complex one both parts."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.to(torch.complex128))
    return tensor.double().reshape(-1)


def side_by_side(states):
    return np.stack([flat(state).numpy() for state in states])


def products(checkpoints, **options):
    return stream([], StreamRequests(gram=list_weights(checkpoints)), **options).gram


def expected_products(rows):
    rows = rows.copy()
    rows[1:] -= rows[0]
    return rows @ rows.T


def near(found, expected):
    """Equal but for the rounding of sums, relative to the lengths of the vectors."""
    lengths = np.sqrt(np.diag(expected))
    np.testing.assert_allclose(
        found.numpy(), expected, rtol=0, atol=1e-13 * np.outer(lengths, lengths).max() + 1e-300
    )


# The stream's products


@st.composite
def small_runs(draw):
    """States of small whole numbers, in any layout and type, mixed ones too."""
    count = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layouts = st.sampled_from(["plain", "plain", "transposed", "sliced", "expanded"])
    states = [{} for _ in range(count)]
    for i in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
        dtypes = draw(st.sampled_from([FLOATS, FLOATS, COMPLEX]))
        for state in states:
            tensor = torch.from_numpy(np.asarray(rng.integers(-8, 9, shape)))
            dtype = draw(st.sampled_from(dtypes))
            if dtype.is_complex:
                imaginary = torch.from_numpy(np.asarray(rng.integers(-8, 9, shape)))
                tensor = torch.complex(tensor.double(), imaginary.double())
            state[f"t{i}"] = lay_out(tensor.to(dtype), draw(layouts))
            state[f"t{i}.tied"] = state[f"t{i}"]
    if draw(st.booleans()):
        whole = random_values(rng, draw(st.sampled_from(INTEGERS)), (3,))
        states = [state | {"counter": whole} for state in states]
    return states


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=150)
@given(states=small_runs(), **CUTS)
def test_geometry_products_of_whole_numbers_are_exact(states, block, strided_block, task, threads):
    with cut_small(strided_block=strided_block, task=task) as directory:
        checkpoints = opened(directory, states)
        found = products(checkpoints, block=block, threads=threads)
    rows = [[Fraction(x) for x in flat(state).tolist()] for state in states]
    rows[1:] = [[x - r for x, r in zip(row, rows[0], strict=True)] for row in rows[1:]]
    exact = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in rows] for a in rows]
    assert found.dtype == torch.float64
    assert found.tolist() == exact


def random_run(directory, count, size=9001):
    """Different layouts and types from one checkpoint to the next."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(size, generator=generator)
    states = []
    for i in range(count):
        drawn = torch.randn(50, 40, generator=generator)
        states.append(
            {
                "w": base + 0.1 * torch.randn(size, generator=generator),
                "rows": drawn.t() if i % 2 else drawn.t().contiguous(),
                "mixed": torch.randn(70, generator=generator).to(FLOATS[i % 4]),
                "phase": torch.randn(33, generator=generator, dtype=COMPLEX[i % 2]),
            }
        )
    return states, opened(directory, states)


@pytest.mark.parametrize("count", [1, 2, 3, 16, 70])
@pytest.mark.parametrize(("threads", "block"), [(None, stream_module.BLOCK), (3, 100)])
def test_geometry_products_match_float64_rows(tmp_path, monkeypatch, count, threads, block):
    monkeypatch.setattr(stream_module, "TASK", 2000)
    states, checkpoints = random_run(tmp_path, count)
    near(
        products(checkpoints, threads=threads, block=block), expected_products(side_by_side(states))
    )


def test_geometry_products_are_the_same_for_any_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(stream_module, "TASK", 1000)
    _, checkpoints = random_run(tmp_path, 9, size=40_001)
    first = products(checkpoints, threads=1)
    ballast = []
    for threads in (1, 2, 4, 4, 4):
        ballast.append(bytearray(1000 * threads + 8))  # so that memory is found elsewhere
        assert torch.equal(products(checkpoints, threads=threads), first)


@pytest.mark.parametrize(
    "vectors",
    [[[1.0] * 5], [[0.3, 0.5, 1.0, 2.0, 1.0]], [[1.0] * 5, [0.0, 0.5, 0.0, 2.0, 1.0]]],
)
def test_geometry_products_come_with_averages(tmp_path, vectors):
    states, checkpoints = random_run(tmp_path, 5)
    plans = [make_plan(checkpoints, vector, Rules()) for vector in vectors]
    sinks = [MemorySink(plan.outputs) for plan in plans]
    calls = []
    both = stream(
        [Job(plan.tensors, sink) for plan, sink in zip(plans, sinks, strict=True)],
        StreamRequests(order=checkpoints, gram=list_weights(checkpoints)),
        progress=lambda *call: calls.append(call),
    )
    near(both.gram, expected_products(side_by_side(states)))
    assert calls[-1][1] == sum(t.nbytes for s in states for t in s.values())
    for plan, sink in zip(plans, sinks, strict=True):
        alone = MemorySink(plan.outputs)
        stream([Job(plan.tensors, alone)])
        assert all(same_bits(alone.state_dict[n], t) for n, t in sink.state_dict.items())


def test_geometry_distance_to_itself_is_zero(tmp_path):
    states, (one, two, three) = random_run(tmp_path, 3)
    found = geometry([one, three, two, three])
    assert found.distances[1, 3] == 0
    near(found.gram, (rows := side_by_side([states[i] for i in (0, 2, 1, 2)])) @ rows.T)


def test_geometry_keeps_thread_count_of_torch(tmp_path):
    usual = torch.get_num_threads()
    seen = []
    _, checkpoints = random_run(tmp_path, 2)
    torch.set_num_threads(3)
    try:
        products(checkpoints, threads=4)
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert [torch.get_num_threads(), *seen] == [3, 3]
    finally:
        torch.set_num_threads(usual)


# What is computed from them


def test_geometry_matches_weights_in_memory(tmp_path):
    states, checkpoints = random_run(tmp_path, 6)
    rows = side_by_side(states)
    found = geometry(checkpoints)
    apart = np.linalg.norm(rows[:, None] - rows, axis=2)
    norms = np.linalg.norm(rows, axis=1)
    moves = np.diff(rows, axis=0)
    along = np.linalg.norm(moves, axis=1)
    turns = (moves[1:] * moves[:-1]).sum(1) / along[1:] / along[:-1]
    for ours, expected in [
        (found.gram, rows @ rows.T),
        (found.norms, norms),
        (found.distances, apart),
        (found.cosines, rows @ rows.T / np.outer(norms, norms)),
        (found.steps, along),
        (found.step_cosines, turns),
        (found.to_mean, np.linalg.norm(rows - rows.mean(0), axis=1)),
    ]:
        assert ours.dtype == torch.float64
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-9)
    assert found.checkpoints == tuple(checkpoints)


def test_geometry_distances_do_not_cancel(tmp_path):
    base = torch.full((100,), 1e3, dtype=torch.float64)
    states = [{"w": base + i * 1e-9} for i in (0, 1, 3)]
    found = geometry(opened(tmp_path, states))
    rows = side_by_side(states)
    np.testing.assert_allclose(found.distances[0, 1], np.linalg.norm(rows[1] - rows[0]), rtol=1e-9)
    np.testing.assert_allclose(found.distances[1, 2], np.linalg.norm(rows[2] - rows[1]), rtol=1e-9)


def test_geometry_rounding_makes_no_nan(tmp_path):
    checkpoints = opened(tmp_path, [{"w": torch.ones(1)}] * 3)
    more = math.nextafter(1, 2)
    found = torch.tensor([[1, 0, 0], [0, 1, more], [0, more, 1]], dtype=torch.float64)
    assert geometry_of(checkpoints, found).distances[1, 2] == 0


def test_geometry_products_give_plane_of_three(tmp_path):
    points = ([0.0, 0, 0], [4.0, 0, 0], [1.0, 2, 2])
    found = geometry(opened(tmp_path, [{"w": torch.tensor(p)} for p in points]))
    along = found.products[1, 2] / found.distances[0, 1]
    assert along.item() == 1
    assert math.isclose((found.products[2, 2] - along**2).sqrt().item(), 2.8284271, rel_tol=1e-7)


def test_geometry_steps_stay_within_training(tmp_path):
    places = [
        save(tmp_path / f"{i}.pt", {"w": torch.tensor([float(i)])}) for i in (0, 1, 3, 10, 14)
    ]
    checkpoints = [open_checkpoint(place) for place in places]
    found = geometry(Run((tuple(checkpoints[:3]), tuple(checkpoints[3:]))))
    assert found.steps.tolist() == [1, 2, 4]
    assert found.step_cosines.tolist() == [1]


def test_geometry_of_single_checkpoints_has_no_steps(tmp_path):
    one, two = opened(tmp_path, [{"w": torch.ones(3)}, {"w": torch.zeros(3)}])
    found = geometry(Run(((one,), (two,))))
    assert found.steps.tolist() == []
    assert found.step_cosines.tolist() == []
    assert found.outliers is None


def test_geometry_omits_statistics_and_counters(tmp_path):
    state = torch.nn.BatchNorm1d(3).state_dict()
    alone = {"running_mean": torch.tensor([7.0])}  # no running_var beside it: a weight by that name
    states = [
        {f"bn.{k}": v + i for k, v in state.items()} | {f"x.{k}": v * i for k, v in alone.items()}
        for i in (1, 2)
    ]
    found = geometry(opened(tmp_path, states))
    assert math.isclose(found.distances[0, 1].item(), math.sqrt(3 + 3 + 49))


def test_geometry_omits_statistics_of_bare_layer(tmp_path):
    states = [{k: v + i for k, v in torch.nn.BatchNorm1d(3).state_dict().items()} for i in (1, 2)]
    assert math.isclose(geometry(opened(tmp_path, states)).distances[0, 1].item(), math.sqrt(6))


def test_geometry_omits_excluded_tensors(tmp_path):
    states = [{"a": torch.tensor([3.0 * i]), "b": torch.tensor([4.0 * i])} for i in (0, 1)]
    checkpoints = opened(tmp_path, states)
    found = stream([], StreamRequests(gram=list_weights(checkpoints, Rules(exclude=("b",))))).gram
    assert geometry_of(checkpoints, found).distances[0, 1] == 3


def test_geometry_measures_adapter_factors(tmp_path):
    a, b = "base_model.model.l.lora_A.weight", "base_model.model.l.lora_B.weight"
    for i in range(3):
        state = {a: torch.full((2, 4), 1.0 + i), b: torch.full((3, 2), 2.0 * i)}
        save(tmp_path / f"step_{i}" / "adapter_model.safetensors", state)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (tmp_path / f"step_{i}" / "adapter_config.json").write_text(json.dumps(config))
    found = geometry(ckptavg.open_run(tmp_path))
    np.testing.assert_allclose(found.steps.numpy(), math.sqrt(8 + 6 * 4))


def test_geometry_reads_run_and_reports_bytes(tmp_path):
    opened(tmp_path, [{"w": torch.tensor([float(i)] * 10)} for i in range(3)])
    calls = []
    found = ckptavg.geometry(ckptavg.open_run(tmp_path), progress=lambda *call: calls.append(call))
    assert found.steps.tolist() == [math.sqrt(10)] * 2
    assert calls[-1] == ("measuring", 120, 120)


# What is refused


def test_geometry_refuses_one_checkpoint(tmp_path):
    with pytest.raises(UsageError, match=r"epoch_1\.pt is one"):
        geometry(opened(tmp_path, [{"w": torch.ones(3)}]))


def test_geometry_refuses_mismatched_shapes(tmp_path):
    with pytest.raises(MismatchError, match="w has the shape"):
        geometry(opened(tmp_path, [{"w": torch.ones(3)}, {"w": torch.ones(4)}]))


def test_geometry_refuses_integers_alone(tmp_path):
    with pytest.raises(CheckpointError, match="no floating-point weights"):
        geometry(opened(tmp_path, [{"n": torch.arange(3)}] * 2))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("culprits", "named"), [([0], [0]), ([2], [2]), ([1, 3], [1, 3])])
def test_geometry_names_checkpoints_not_finite(tmp_path, wrong, culprits, named):
    states = [{"a": torch.ones(9), "w": torch.ones(5)} for _ in range(4)]
    for i in culprits:
        states[i]["w"][2] = wrong
    with pytest.raises(NonFiniteError) as caught:
        geometry(opened(tmp_path, states))
    assert [i for i in range(4) if f"epoch_{i + 1}.pt" in str(caught.value)] == named


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.complex64])
def test_geometry_ignores_shared_masks(tmp_path, dtype):
    mask = torch.tensor([-math.inf, math.inf, math.nan, 0.0], dtype=dtype)
    states = [{"mask": mask, "w": torch.tensor([3.0 * i], dtype=dtype)} for i in range(3)]
    found = geometry(opened(tmp_path, states))
    assert found.distances[0].tolist() == [0, 3, 6]
    states[1]["mask"] = torch.tensor([-math.inf, math.inf, 1.0, 0.0], dtype=dtype)
    with pytest.raises(NonFiniteError):
        geometry(opened(tmp_path, states))


def test_geometry_of_refuses_products_of_other_size(tmp_path):
    checkpoints = opened(tmp_path, [{"w": torch.ones(3)}] * 3)
    with pytest.raises(UsageError, match=r"3 checkpoints are expected but got \(2, 2\)"):
        geometry_of(checkpoints, torch.ones(2, 2, dtype=torch.float64))


# The odd one out


def odd_ones(directory, rows):
    """Positions that are pointed at, for vectors of weights."""
    run = opened(directory, [{"w": torch.from_numpy(np.asarray(row))} for row in rows])
    found = geometry(run).outliers
    return [] if found is None else [run.index(c) for c in found.checkpoints]


def trajectory(kind, count, rng, size=400):
    """A run's weights: scattered around a point, drifting, walking at random, slowing down."""
    start, noise = rng.normal(size=size), rng.normal(size=(count, size))
    direction = rng.normal(size=size)
    time = np.arange(count)[:, None]
    return {
        "scatter": start + 0.3 * noise,
        "drift": start + 0.2 * time * direction + 0.02 * noise,
        "walk": start + 0.2 * noise.cumsum(0),
        "slowing": start + direction * 0.6**time + 0.01 * noise,
        "still": start + 0 * noise,
        "stopping": start + direction * np.minimum(time, count // 2),
    }[kind]


KINDS = ["scatter", "drift", "walk", "slowing"]


@pytest.mark.parametrize("kind", [*KINDS, "still", "stopping"])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 10, 30])
def test_geometry_finds_no_outlier_in_ordinary_run(tmp_path, kind, count):
    for seed in range(3):
        rows = trajectory(kind, count, np.random.default_rng(seed))
        assert odd_ones(tmp_path / str(seed), rows) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [4, 5, 10, 30])
@pytest.mark.parametrize("place", [0, 2, -1])
@pytest.mark.parametrize("how", ["another seed", "diverged"])
def test_geometry_points_at_outlier(tmp_path, kind, count, place, how):
    rng = np.random.default_rng(1)
    rows = trajectory(kind, count, rng)
    if how == "another seed":
        usual = np.linalg.norm(np.diff(rows, axis=0), axis=1).max()
        foreign = rng.normal(size=400)
        rows[place] = foreign * max(1, 4 * usual / np.linalg.norm(foreign))
    else:
        rows[place] *= 50
    assert odd_ones(tmp_path, rows) == [place % count]


def test_geometry_points_at_two_outliers(tmp_path):
    rng = np.random.default_rng(0)
    rows = trajectory("scatter", 10, rng)
    other = 5 * rng.normal(size=400)
    rows[3], rows[7] = other, other + 0.3 * rng.normal(size=400)
    assert odd_ones(tmp_path / "pair", rows) == [3, 7]
    rows[7] = 5 * rng.normal(size=400)
    assert odd_ones(tmp_path / "strangers", rows) == [3, 7]


def test_geometry_finds_no_outlier_in_halves(tmp_path):
    rng = np.random.default_rng(0)
    rows = trajectory("scatter", 10, rng)
    rows[6:] += 5 * rng.normal(size=400)
    assert odd_ones(tmp_path, rows) == []


def test_geometry_outlier_distance_is_to_nearest(tmp_path):
    rows = [[0.0], [1.0], [2.0], [4.0], [14.0]]
    found = geometry(opened(tmp_path, [{"w": torch.tensor(row)} for row in rows])).outliers
    assert (found.distance, found.typical) == (10, 2)


def test_geometry_groups_halves_of_two_trainings(tmp_path):
    rng = torch.Generator().manual_seed(0)
    made = []
    for _ in range(2):
        start = torch.randn(500, generator=rng)
        made += [{"w": start + 0.05 * torch.randn(500, generator=rng)} for _ in range(3)]
    found = ckptavg.geometry(opened(tmp_path, made))
    assert found.outliers is None
    names = [[c.path.name for c in group] for group in found.groups.members]
    assert names == [[f"epoch_{i}.pt" for i in part] for part in ((1, 2, 3), (4, 5, 6))]
    least = min(found.distances[i, j] for i in range(3) for j in range(3, 6))
    assert found.groups.distance == least
