"""Grafted networks beside the worked value and the loop of the published code."""

import json
import math
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers import counted_reads, same_bits, save
from safetensors.torch import save_file
from torch import nn

import ckptavg
from ckptavg.averaging import schemes
from ckptavg.averaging.compute import compute_state_dicts
from ckptavg.averaging.plan import plan_average
from ckptavg.averaging.schemes.grafting import Grafting
from ckptavg.cli import main
from ckptavg.errors import NonFiniteError, RunError, UsageError

FIRST, SECOND = [0.0, 1.0, 2.0, 3.0], [0.0, 0.0, 0.0, 3.0]
ALPHA = 0.6996909


class Block(nn.Module):
    """A residual block, with a shortcut that is a convolution in a Sequential."""

    def __init__(self, inside, out):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, out, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = nn.Sequential(nn.Conv2d(inside, out, 1), nn.BatchNorm2d(out))


class ResNet(nn.Module):
    """Names as of torchvision's, and more than nine blocks."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(*(Block(4, 4) for _ in range(11)))
        self.fc = nn.Linear(4, 3)


def network(seed, model=ResNet):
    torch.manual_seed(seed)
    state = model().state_dict()
    return {
        name: value * (1 + torch.randn_like(value)) if value.is_floating_point() else value + seed
        for name, value in state.items()
    }


def entropy(values):
    """Entropy as the paper has it, by counting: ten bins, the last one closed."""
    flat = values.double().flatten().tolist()
    low, width = min(flat), (max(flat) - min(flat)) / 10
    counts = [0] * 10
    for value in flat:
        place = 9
        while place > 0 and value < low + place * width:
            place -= 1
        counts[place] += 1
    return -sum(c / len(flat) * math.log(c / len(flat)) for c in counts if c)


def graft_by_hand(own, other, measures=lambda value: value.dim() > 1):
    """The loop of the published code: each entry takes the weight of the last measured one."""
    grafted = {}
    for name, value in own.items():
        if measures(value):
            difference = entropy(value) - entropy(other[name])
            alpha = 0.4 / math.pi * math.atan(500 * difference) + 0.5
        if value.is_floating_point():
            mixed = alpha * value.double() + (1 - alpha) * other[name].double()
            grafted[name] = mixed.to(value.dtype)
    return grafted


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(name, state, suffix=".pt"):
    path = Path(f"{name}{suffix}")
    if suffix == ".pt":
        save(path, state)
    else:
        save_file(state, path)
    return path


# The formula


def test_grafting_coefficient_has_worked_value():
    assert Grafting().coefficient(1.3862944, 0.5623351) == pytest.approx(ALPHA, abs=1e-7)
    assert Grafting().coefficient(0.5623351, 1.3862944) == pytest.approx(1 - ALPHA, abs=1e-7)
    assert Grafting().coefficient(1.0, 1.0) == 0.5
    assert Grafting(a=1.0, c=1.0).coefficient(1.0, 0.0) == pytest.approx(0.75)


@pytest.mark.parametrize("shape", [(4,), (2, 2), (4, 1, 1, 1)])
def test_grafting_of_worked_layer(home, shape):
    first = saved("first", {"w": torch.tensor(FIRST, dtype=torch.float64).reshape(shape)})
    second = saved("second", {"w": torch.tensor(SECOND, dtype=torch.float64).reshape(shape)})
    into_first = ckptavg.average([second, first], scheme="grafting")["w"].flatten().tolist()
    into_second = ckptavg.average([first, second], scheme="grafting")["w"].flatten().tolist()
    # The coefficients are the same either way: the first network has more information.
    assert into_first == pytest.approx([0, ALPHA, 2 * ALPHA, 3], abs=1e-6)
    assert into_second == pytest.approx(into_first)


def test_grafting_is_the_published_loop(home):
    own, other = network(1), network(2)
    grafted = ckptavg.average([saved("z", other), saved("a", own)], scheme="grafting")
    for name, expected in graft_by_hand(own, other).items():
        assert torch.allclose(grafted[name], expected, rtol=1e-6, atol=1e-7), name
    # What is not averaged is of the network that the last path names.
    assert grafted["bn1.num_batches_tracked"] == own["bn1.num_batches_tracked"] == 1


def test_grafting_does_not_depend_on_format(home):
    own, other = network(1), network(2)
    plain = ckptavg.average([saved("b", other), saved("a", own)], scheme="grafting")
    files = [saved("b", other, ".safetensors"), saved("a", own, ".safetensors")]
    alphabetical = ckptavg.average(files, scheme="grafting")
    assert plain.keys() == alphabetical.keys()
    assert all(same_bits(plain[name], alphabetical[name]) for name in plain)


def test_grafting_by_l1_norm(home):
    own, other = {"w": torch.tensor([[1.0, -2.0]])}, {"w": torch.tensor([[1.0, 1.5]])}
    planned = plan_average([saved("b", other), saved("a", own)], "grafting:measure=l1,c=2")
    (layer,) = planned.plan.layers
    assert layer.information == (2.5, 3.0)
    assert layer.coefficients[1] == pytest.approx(0.4 / math.pi * math.atan(1.0) + 0.5)


def test_grafting_needs_no_convolution(home):
    own = {"0.weight": torch.rand(5, 4), "0.bias": torch.rand(5), "2.weight": torch.rand(3, 5)}
    other = {name: torch.rand_like(value) ** 3 for name, value in own.items()}
    grafted = ckptavg.average([saved("b", other), saved("a", own)], scheme="grafting")
    for name, expected in graft_by_hand(own, other).items():
        assert torch.allclose(grafted[name], expected)


def test_grafting_of_vectors_alone_has_a_layer_each(home):
    own = {"a": torch.tensor(FIRST), "b": torch.tensor(SECOND), "c": torch.ones(4)}
    other = {"a": torch.tensor(SECOND), "b": torch.tensor(FIRST), "c": torch.ones(4)}
    planned = plan_average([saved("y", other), saved("x", own)], "grafting")
    shares = [layer.coefficients[1] for layer in planned.plan.layers]
    assert shares == pytest.approx([ALPHA, 1 - ALPHA, 0.5], abs=1e-6)


def test_grafting_keeps_ties(home):
    states = []
    for seed in (1, 2):
        weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))
        states.append({"embedding": weight, "body": torch.rand(4, 4), "head": weight})
    grafted = ckptavg.average([saved("a", states[0]), saved("b", states[1])], scheme="grafting")
    assert same_bits(grafted["embedding"], grafted["head"])


def test_grafting_of_network_with_itself_is_itself(home):
    state = network(1)
    # Named as files, the second would count as a repeat of the first.
    both = [ckptavg.open_checkpoint(saved(name, state)) for name in "ab"]
    grafted = ckptavg.average(both, scheme="grafting")
    assert all(torch.allclose(grafted[name], value) for name, value in state.items() if value.dim())


# Which networks


@pytest.mark.parametrize("order", ["abc", "cba", "bca"])
def test_grafting_takes_networks_as_named(home, order):
    states = {name: network(seed) for seed, name in enumerate("abc")}
    for name, state in states.items():
        saved(name, state)
    grafted = ckptavg.average([f"{name}.pt" for name in order], scheme="grafting")
    expected = graft_by_hand(states[order[2]], states[order[1]])
    assert all(torch.allclose(grafted[name], value, atol=1e-6) for name, value in expected.items())


def test_grafting_takes_last_networks_of_runs(home):
    for seed, run in enumerate(("one", "two")):
        for epoch in (1, 2):
            save(Path(run, f"epoch_{epoch}.pt"), network(10 * seed + epoch), epoch=epoch)
    run = ckptavg.open_run("two", "one").last(1)
    grafted = ckptavg.average(run, scheme="grafting")
    expected = graft_by_hand(network(2), network(12))
    assert all(torch.allclose(grafted[name], value, atol=1e-6) for name, value in expected.items())


def test_grafting_beside_averages_of_other_order(home):
    for seed, name in enumerate("abc"):
        saved(name, network(seed, lambda: Block(3, 4)))
    run = ckptavg.open_run("c.pt", "b.pt", "a.pt")
    asked = {
        "graft": "grafting",
        "mean": "uniform",
        "other": "grafting:c=1",
        "ema": "ema:decay=0.9",
    }
    together = ckptavg.average_many(run, asked)
    for name, scheme in asked.items():
        alone = ckptavg.average(run, scheme=scheme)
        assert all(same_bits(together[name][key], alone[key]) for key in alone), name


def test_grafting_reads_weights_twice(home, monkeypatch):
    files = [saved(name, {"w": torch.rand(400, 300)}) for name in "ab"]
    planned = plan_average(files)
    reads = counted_reads(monkeypatch)
    compute_state_dicts([planned])
    once = dict(reads)
    reads.clear()
    compute_state_dicts([plan_average(files, "grafting")])
    twice = {name: 2 * count for name, count in once.items()}
    assert dict(reads) == pytest.approx(twice, rel=0.05)


def test_grafting_coefficients_of_plan_are_means_over_elements(home):
    own, other = network(1), network(2)
    planned = plan_average([saved("b", other), saved("a", own)], "grafting")
    total, share = 0, 0.0
    for tensor in planned.plan.tensors:
        if tensor.averaged:
            total += tensor.output.numel
            share += tensor.output.numel * tensor.coefficients[1]
    assert planned.plan.coefficients == pytest.approx((1 - share / total, share / total))


# What is refused


def test_grafting_of_one_network_is_refused(home):
    with pytest.raises(RunError, match="two networks or more, and one is selected"):
        plan_average([saved("a", network(1))], "grafting")


def test_grafting_of_non_finite_weights_is_refused(home):
    bad = network(1) | {"fc.weight": torch.full((3, 4), math.nan)}
    with pytest.raises(NonFiniteError, match=r"fc\.weight is not finite in .*b\.pt"):
        plan_average([saved("a", network(2)), saved("b", bad)], "grafting")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("grafting:measure=l2", "measure is expected to be one of entropy, l1 but got 'l2'"),
        ("grafting:a=1.5", "grafting:a=A is expected to have 0 <= A <= 1 but got '1.5'"),
        ("grafting:a=x", "grafting:a=A is expected to have 0 <= A <= 1 but got 'x'"),
        ("grafting:c=-1", "grafting:c=C is expected to have 0 <= C < inf but got '-1'"),
        ("grafting:bins=1", "grafting:bins=N is expected to have a whole N from 2 on but got '1'"),
        ("grafting:measure=l1,bins=5", "grafting:bins belongs to measure=entropy"),
        ("grafting:bin=5", "but got 'bin=5'. Did you mean grafting:bins=5?"),
        ("graft", "Did you mean grafting?"),
    ],
)
def test_grafting_refuses_options(text, message):
    with pytest.raises(UsageError) as error:
        schemes.parse(text)
    assert message in str(error.value)


# The command


def command(*args):
    result = CliRunner().invoke(main, ["average", *map(str, args)], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result


def test_dry_run_shows_coefficients_of_layers(home):
    files = [saved("b", {"w": torch.tensor([SECOND])}), saved("a", {"w": torch.tensor([FIRST])})]
    result = command(*files, "--scheme", "grafting", "--dry-run")
    assert "1 layer, 0.7 to 0.7 of a.pt" in result.output
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("w ")]
    assert line.split() == ["w", "0.562335", "1.38629", "0.699691"]
    assert "b.pt is grafted into a.pt, the last of the networks" in result.output


def test_json_has_coefficients_of_layers(home):
    for seed, name in enumerate("abc"):
        saved(name, network(seed))
    result = command("a.pt", "b.pt", "c.pt", "--scheme", "grafting", "-o", "out.pt", "--json")
    value = json.loads(result.stdout)
    assert value["scheme"] == "grafting"
    first = value["layers"][0]
    assert first["layer"] == "conv1.weight"
    assert first["coefficients"][0] == 0.0
    assert first["information"][0] is None
    assert sum(first["coefficients"]) == pytest.approx(1)
    assert first["information"][1] == pytest.approx(entropy(network(1)["conv1.weight"]))
    assert len(value["layers"]) == 2 + 3 * 11
    record = ckptavg.open_checkpoint("out.pt").provenance
    assert record.scheme == "grafting"
    assert "a.pt would be grafted into other networks" in result.output


@pytest.mark.parametrize(("flags", "full"), [([], False), (["-v"], True)])
def test_long_table_of_layers_is_cut(home, flags, full):
    files = [saved(name, network(seed)) for seed, name in enumerate("ab")]
    output = command(*files, "--scheme", "grafting", "--dry-run", *flags).stdout
    assert ("layer1.5.conv1.weight" in output) == full
    assert ("... 15 more: -v" in output) == (not full)
    assert "layer1.10.conv2.weight" in output


def test_other_schemes_have_no_layers(home):
    files = [saved(name, network(seed)) for seed, name in enumerate("ab")]
    result = command(*files, "--dry-run", "--json")
    assert "layers" not in json.loads(result.stdout)
