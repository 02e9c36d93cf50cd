"""Running statistics that stay: frozen in training, excluded, or of layers of no known class."""

import json
import threading

import pytest
import torch
from helpers import average_by_hand, same_bits, save
from recomputed import write_averages
from torch import nn
from torch.utils.data import TensorDataset

import ckptavg
from ckptavg import Candidate, evaluate, open_checkpoint, open_run
from ckptavg.averaging.compute import read_state_dict
from ckptavg.averaging.plan import plan_average
from ckptavg.averaging.planning.frozen_layers import find_frozen_layers
from ckptavg.batchnorm.checkpoints import update_checkpoint
from ckptavg.batchnorm.recompute import StatisticsPass
from ckptavg.errors import BatchNormError, StaleStatisticsWarning, UsageError
from ckptavg.evaluation.results import is_worse
from ckptavg.formats.statistics_names import layer_statistics
from ckptavg.models.runtime import Runtime

CPU = Runtime(torch.device("cpu"), batch_size=64)


class OwnNorm(nn.Module):
    """Batch normalization that is none of torch's classes."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = (
            nn.Parameter(torch.ones(channels)),
            nn.Parameter(torch.zeros(channels)),
        )
        self.register_buffer("mean", torch.zeros(channels))

    def forward(self, x):
        return (x - self.statistics[0]) / self.statistics[1] * self.weight + self.bias


class RenormLike(OwnNorm):
    """Keeps a standard deviation, as batch renormalization does, which only its trainer updates."""

    def __init__(self, channels):
        super().__init__(channels)
        del self.mean
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_std", torch.ones(channels))

    @property
    def statistics(self):
        return self.running_mean, self.running_std


class FrozenNorm(nn.Module):
    """A constant layer, as detectors have them: no count of batches."""

    def __init__(self, channels):
        super().__init__()
        for name, start in [("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)]:
            self.register_buffer(name, torch.full((channels,), float(start)))

    def forward(self, x):
        return (x - self.running_mean) * (self.running_var + 1e-5).rsqrt() * self.weight + self.bias


def net(stem=nn.BatchNorm1d, body=nn.BatchNorm1d):
    torch.manual_seed(0)
    parts = [
        ("one", nn.Linear(4, 5)),
        ("stem", stem(5)),
        ("two", nn.Linear(5, 6)),
        ("body", body(6)),
    ]
    return nn.Sequential(*(part for _, part in parts), nn.Linear(6, 2))


STEM, BODY = "1", "3"


def inputs(seed=5, count=200):
    return 2 + 3 * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def labelled(seed=6):
    x = inputs(seed)
    return TensorDataset(x, (x.sum(1) > 8).long())


def train(model, count=3, frozen=(), start=True):
    """States of a model while it is trained; frozen layers stay in evaluation mode."""
    x, y = labelled(7).tensors
    model.train()
    if start:
        model(x)  # statistics of something
    for name in frozen:
        model.get_submodule(name).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states = []
    for step in range(3 * count):
        part = slice(20 * step, 20 * step + 20)
        nn.functional.cross_entropy(model(x[part]), y[part]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 3 == 2:
            states.append({name: value.clone() for name, value in model.state_dict().items()})
    return states


def saved(directory, states, suffix=".pt"):
    for i, state in enumerate(states, 1):
        save(directory / f"epoch_{i}{suffix}", state)
    return open_run(directory)


def mean_of(states):
    return {
        name: average_by_hand([s[name] for s in states], [1] * len(states), value.dtype)
        for name, value in states[-1].items()
    }


def recomputed_by_hand(state, frozen):
    """Statistics of both layers in float64, the stem's kept where it is frozen."""
    x = inputs().double()
    x = x @ state["0.weight"].double().T + state["0.bias"].double()
    found = {}
    for layer, after in ((STEM, "2"), (BODY, None)):
        if layer not in frozen:
            found[f"{layer}.running_mean"], found[f"{layer}.running_var"] = x.mean(0), x.var(0)
            mean, var = x.mean(0), x.var(0, correction=0)
        else:
            mean, var = (state[f"{layer}.{s}"].double() for s in ("running_mean", "running_var"))
        x = (x - mean) / (var + 1e-5).sqrt() * state[f"{layer}.weight"] + state[f"{layer}.bias"]
        if after is not None:
            x = x @ state[f"{after}.weight"].double().T + state[f"{after}.bias"].double()
    return found


def assert_statistics(path, expected):
    found = read_state_dict(open_checkpoint(path))
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-4, atol=1e-5)
    return found


def how(model, exclude=()):
    return StatisticsPass(model, [inputs()], CPU, exclude=exclude)


# What is frozen


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_frozen_layers_have_equal_statistics_throughout(tmp_path, suffix, caplog):
    caplog.set_level("INFO", "ckptavg")
    states = train(net(), frozen=[STEM])
    run = saved(tmp_path, states, suffix)
    assert find_frozen_layers(run.checkpoints) == (STEM,)
    planned = plan_average(run)
    assert (planned.batchnorm, planned.statistics.frozen) == ("stale", (STEM,))
    found = ckptavg.average(run)
    for name in (f"{STEM}.running_mean", f"{STEM}.running_var"):
        assert same_bits(found[name], states[0][name])
    assert "1 of 2 BatchNorm layers were frozen in training" in caplog.text


def test_stale_statistics_warning_excludes_frozen_layers(tmp_path):
    run = saved(tmp_path, train(net(), frozen=[STEM]))
    with pytest.warns(
        StaleStatisticsWarning, match=r"train_loader, exclude=\['1'\]\), which leaves"
    ):
        state = ckptavg.average(run)
    model = net()
    model.load_state_dict(state)
    ckptavg.update_bn(model, [inputs()], exclude=["1"])
    for name, expected in recomputed_by_hand(state, [STEM]).items():
        torch.testing.assert_close(
            model.state_dict()[name].double(), expected, rtol=1e-4, atol=1e-5
        )


def test_frozen_statistics_keep_every_bit(tmp_path):
    states = [{k: v.double() if v.is_floating_point() else v for k, v in s.items()}
              for s in train(net(), frozen=[STEM])]  # fmt: skip
    found = ckptavg.average(saved(tmp_path, states), weights=[0.1, 0.3, 0.7])
    assert same_bits(found[f"{STEM}.running_var"], states[-1][f"{STEM}.running_var"])


def repeated(states):
    return [states[0]] * 3


def single(states):
    return states[:1]


def unfrozen_midway(states):
    changed = {name: value + (name == f"{STEM}.running_mean") for name, value in states[1].items()}
    return [states[0], changed, states[2]]


@pytest.mark.parametrize("change", [repeated, single, unfrozen_midway])
def test_frozen_layers_need_equal_statistics_of_changing_weights(tmp_path, change):
    run = saved(tmp_path, change(train(net(), frozen=[STEM, BODY])))
    assert STEM not in find_frozen_layers(run.checkpoints)


def test_frozen_layers_leave_out_initial_statistics(tmp_path):
    states = train(net(), frozen=[STEM, BODY], start=False)
    assert find_frozen_layers(saved(tmp_path, states).checkpoints) == ()


@pytest.mark.parametrize("frozen", [(), (STEM,)], ids=["trained", "frozen"])
def test_frozen_layers_are_found_in_averaged_models(tmp_path, frozen):
    model = net()
    model.train()(inputs())
    averaged = torch.optim.swa_utils.AveragedModel(model)
    states = []
    for _ in range(3):
        train(model, 1, frozen, start=False)
        averaged.update_parameters(model)
        states.append({name: value.clone() for name, value in averaged.state_dict().items()})
    assert find_frozen_layers(saved(tmp_path, states).checkpoints) == frozen


def test_frozen_layers_need_equal_batch_counts(tmp_path):
    states = []
    for i, state in enumerate(train(net(), frozen=[STEM])):
        halves = {k: v.bfloat16() if v.is_floating_point() else v for k, v in state.items()}
        states.append(halves | {f"{STEM}.num_batches_tracked": torch.tensor(100 + i)})
    assert find_frozen_layers(saved(tmp_path, states).checkpoints) == ()


def test_frozen_layers_without_count_need_no_change(tmp_path):
    run = saved(tmp_path, train(net(FrozenNorm, FrozenNorm)))
    planned = plan_average(run)
    assert planned.batchnorm == "frozen"
    out = ckptavg.average(run, out=tmp_path / "out.pt")
    made = open_checkpoint(out).provenance
    assert (made.bn, made.bn_layers) == ("frozen", {"frozen": [STEM, BODY]})


def test_frozen_layers_ignore_coefficient_0(tmp_path):
    states = train(net(), frozen=[STEM])
    states[0] = {k: v + 1 if k.startswith(f"{STEM}.running") else v for k, v in states[0].items()}
    run = saved(tmp_path, states)
    assert plan_average(run, weights=[0, 1, 1]).plan.frozen == (STEM,)
    assert plan_average(run).plan.frozen == ()


def test_frozen_layers_leave_out_statistics_of_another_base(tmp_path):
    states = train(net(), frozen=[STEM])
    run = saved(tmp_path / "run", states)
    base = save(tmp_path / "base.pt", train(net(), 1)[0])
    assert plan_average(run, base=base, exclude="*running_*").plan.frozen == ()
    assert plan_average(run, base=base).plan.frozen == (STEM,)


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        (["a.running_mean", "a.running_var", "b.weight"], {"a": ("running_mean", "running_var")}),
        (["a.running_mean", "a.running_std"], {"a": ("running_mean", "running_std")}),
        (["a.running_mean", "a.running_covar"], {"a": ("running_mean", "running_covar")}),
        (["a.moving_mean", "a.moving_variance"], {"a": ("moving_mean", "moving_variance")}),
        (["evonorm.weight", "evonorm.running_var"], {"evonorm": ("running_var",)}),
        (["running_mean", "running_var"], {"": ("running_mean", "running_var")}),
        (["a.avg_mean", "a.avg_var"], {"a": ("avg_mean", "avg_var")}),
        (["a.var_ema", "a.mean_ema"], {"a": ("mean_ema", "var_ema")}),
        (["observer.running_mean", "rms.running_var", "a.mean", "a.var"], {}),
        (["a.mean", "a.var", "a.gamma"], {"a": ("mean", "var")}),
        (["a._mean", "a._variance", "a.weight", "a.bias"], {"a": ("_mean", "_variance")}),
        (["a.mean", "a.weight", "b.std", "b.weight", "c.mean", "c.std"], {}),
        (["a.avg", "a.avg_sq", "b.ema_weight", "b.ema_count", "b.weight"], {}),
    ],
)
def test_layer_statistics_are_found_by_name(names, layers):
    expected = {
        layer: tuple(f"{layer}.{leaf}".lstrip(".") for leaf in leaves)
        for layer, leaves in layers.items()
    }
    assert layer_statistics(names) == expected


# What is recomputed, and what is not


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("frozen", [(), (STEM,)], ids=["trained", "frozen"])
def test_frozen_layers_stay_when_others_are_recomputed(tmp_path, frozen, name):
    states = train(net(), frozen=frozen)
    planned = plan_average(saved(tmp_path / "run", states))
    ((result, made),) = write_averages([planned], [tmp_path / name], how(net()))
    assert result.layers == 2 - len(frozen)
    assert made.bn == "recomputed"
    assert made.bn_layers == ({"frozen": [STEM]} if frozen else {})
    assert open_checkpoint(tmp_path / name).provenance == made
    state = mean_of(states)
    found = assert_statistics(tmp_path / name, recomputed_by_hand(state, frozen))
    for layer in frozen:
        assert same_bits(found[f"{layer}.running_mean"], states[0][f"{layer}.running_mean"])


def test_exclude_keeps_averaged_statistics(tmp_path):
    states = train(net())
    planned = plan_average(saved(tmp_path / "run", states))
    outs = [tmp_path / "a.pt"]
    ((_, made),) = write_averages([planned], outs, how(net(), ["1*"]), digests=True)
    assert made.bn_layers == {"excluded": [STEM]}
    state = mean_of(states)
    found = assert_statistics(outs[0], recomputed_by_hand(state, [STEM]))
    assert same_bits(found[f"{STEM}.running_mean"], state[f"{STEM}.running_mean"])


def test_exclude_without_match_is_refused_before_work(tmp_path):
    run = saved(tmp_path / "run", train(net()))
    planned = plan_average(run)
    for work in (
        lambda: write_averages([planned], [tmp_path / "a.pt"], how(net(), ["stem.*"])),
        lambda: update_checkpoint(run.checkpoints[0], tmp_path / "a.pt", how(net(), ["stem.*"])),
        lambda: evaluate(run.checkpoints, net(), labelled(), exclude=["stem.*"]),
    ):
        with pytest.raises(UsageError, match=r"'stem\.\*' matches no BatchNorm layer.* 1, 3"):
            work()
    assert not (tmp_path / "a.pt").exists()


@pytest.mark.parametrize("digests", [False, True])
@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_unknown_layer_is_named_not_recomputed(tmp_path, name, digests, caplog):
    states = train(net(body=RenormLike))
    for i, state in enumerate(states):
        state[f"{BODY}.running_std"] += i
    planned = plan_average(saved(tmp_path / "run", states))
    outs = [tmp_path / name]
    ((_, made),) = write_averages([planned], outs, how(net(body=RenormLike)), digests=digests)
    assert made.bn == "partly recomputed"
    assert made.bn_layers == {"not_recomputed": [BODY]}
    assert open_checkpoint(outs[0]).provenance == made
    assert f"1 of 2 layers cannot be recomputed: {BODY}" in caplog.text
    expected = {k: v for k, v in recomputed_by_hand(mean_of(states), []).items() if k[0] == STEM}
    found = assert_statistics(outs[0], expected)
    assert same_bits(found[f"{BODY}.running_std"], mean_of(states)[f"{BODY}.running_std"])


def test_unknown_layers_alone_stay_stale(tmp_path, caplog):
    model = net(RenormLike, RenormLike)
    states = train(model)
    for i, state in enumerate(states):
        state[f"{STEM}.running_mean"] += i
        state[f"{BODY}.running_mean"] += i
    run = saved(tmp_path / "run", states)
    ((result, made),) = write_averages([plan_average(run)], [tmp_path / "a.pt"], how(model))
    assert (result.layers, made.bn) == (0, "stale")
    assert made.bn_layers == {"not_recomputed": [STEM, BODY]}
    assert "2 of 2 layers cannot be recomputed: 1, 3" in caplog.text
    with pytest.raises(BatchNormError, match=r"can be recomputed \(layers 1, 3\)"):
        update_checkpoint(open_checkpoint(tmp_path / "a.pt"), tmp_path / "b.pt", how(model))


def test_network_without_batchnorm_is_noted(tmp_path, caplog):
    caplog.set_level("INFO", "ckptavg")
    model = net(nn.LayerNorm, nn.LayerNorm)
    run = saved(tmp_path / "run", train(model))
    ((_, made),) = write_averages([plan_average(run)], [tmp_path / "a.pt"], how(model))
    assert made.bn == "none"
    assert "no BatchNorm layers: nothing to recompute" in caplog.text
    _, made = update_checkpoint(run.checkpoints[0], tmp_path / "b.pt", how(model))
    assert made.bn == "none"


def test_provenance_keeps_frozen_layers_for_later_passes(tmp_path):
    states = train(net(), frozen=[STEM])
    out = ckptavg.average(saved(tmp_path / "run", states), out=tmp_path / "a.safetensors")
    _, made = update_checkpoint(open_checkpoint(out), tmp_path / "b.safetensors", how(net()))
    assert (made.bn, made.bn_layers) == ("recomputed", {"frozen": [STEM]})
    assert_statistics(tmp_path / "b.safetensors", recomputed_by_hand(mean_of(states), [STEM]))


def test_update_checkpoint_knows_frozen_classes(tmp_path):
    path = save(tmp_path / "one.pt", train(net(FrozenNorm))[-1])
    _, made = update_checkpoint(open_checkpoint(path), tmp_path / "b.pt", how(net(FrozenNorm)))
    assert (made.bn, made.bn_layers) == ("recomputed", {"frozen": [STEM]})


@pytest.mark.parametrize(
    ("kinds", "frozen", "is_said"),
    [
        ((FrozenNorm, nn.BatchNorm1d), [STEM], False),
        ((FrozenNorm, FrozenNorm), [], True),
        ((nn.BatchNorm1d, nn.BatchNorm1d), [], False),
    ],
    ids=["backbone", "all", "none"],
)
def test_update_checkpoint_keeps_layers_without_batch_count(
    tmp_path, caplog, kinds, frozen, is_said
):
    """``FrozenBatchNorm2d`` is built where pretrained weights are asked for, and only there."""
    caplog.set_level("INFO", "ckptavg")
    state = train(net(*kinds))[-1]
    path = save(tmp_path / "one.pt", state)
    _, made = update_checkpoint(open_checkpoint(path), tmp_path / "b.pt", how(net()))
    assert made.bn_layers.get("frozen", []) == frozen
    assert ("update_bn(exclude='*')" in caplog.text) == is_said
    assert_statistics(tmp_path / "b.pt", recomputed_by_hand(state, frozen))


class Affine(nn.BatchNorm1d):
    """Evaluates always; its name does not tell."""

    def forward(self, x):
        return nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False
        )


@pytest.mark.parametrize(
    ("body", "state", "frozen"),
    [(nn.BatchNorm1d, "recomputed", [STEM]), (Affine, "own", [STEM, BODY])],
    ids=["some", "all"],
)
def test_update_checkpoint_keeps_layers_always_evaluating(tmp_path, caplog, body, state, frozen):
    weights = train(net(Affine, body))[-1]
    path = save(tmp_path / "one.pt", weights)
    _, made = update_checkpoint(open_checkpoint(path), tmp_path / "b.pt", how(net(Affine, body)))
    assert (made.bn, made.bn_layers) == (state, {"frozen": frozen})
    assert "cannot be recomputed" not in caplog.text
    found = read_state_dict(open_checkpoint(tmp_path / "b.pt"))
    for layer in frozen:
        assert same_bits(found[f"{layer}.running_mean"], weights[f"{layer}.running_mean"])


# What a model's own train() leaves in evaluation mode


class KeepsStem(nn.Sequential):
    """Keeps its pretrained stem in evaluation mode, as people write it."""

    def train(self, mode=True):
        super().train(mode)
        self[int(STEM)].eval()
        return self


class KeepsStemAndReturnsNothing(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[int(STEM)].eval()


class KeepsAll(nn.Sequential):
    """As backbones with ``norm_eval`` do."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self


class AlwaysInEvaluation(nn.BatchNorm1d):
    def train(self, mode=True):
        del mode
        return super().train(False)


class Merges(nn.Linear):
    """Takes its weights apart in training mode, which must not happen to the model itself."""

    def train(self, mode=True):
        if mode:
            self.weight.data.zero_()
        return super().train(mode)


def keeping(kind):
    return kind(*net().children())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda: keeping(KeepsStem),
        lambda: keeping(KeepsStemAndReturnsNothing),
        lambda: net(stem=AlwaysInEvaluation),
    ],
    ids=["of the model", "without return", "of the layer"],
)
def test_update_bn_keeps_layers_that_train_leaves_in_eval(make, training):
    state = train(net(), 1)[-1]
    model = make()
    model.load_state_dict(state)
    for module in model.modules():
        module.training = training
    result = ckptavg.update_bn(model, [inputs()])
    assert (result.layers, result.frozen) == (1, (STEM,))
    assert all(module.training == training for module in model.modules())
    found = model.state_dict()
    for name, expected in recomputed_by_hand(state, [STEM]).items():
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-4, atol=1e-5)
    assert same_bits(found[f"{STEM}.running_var"], state[f"{STEM}.running_var"])


def test_update_bn_reads_no_data_if_train_leaves_all_in_eval():
    model = keeping(KeepsAll)
    model.load_state_dict(train(net(), 1)[-1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = ckptavg.update_bn(model, iter(()))
    assert (result.layers, result.frozen) == (0, (STEM, BODY))
    assert all(same_bits(value, before[name]) for name, value in model.state_dict().items())


def test_update_bn_tries_train_on_a_copy():
    model = net()
    model[2] = Merges(5, 6)
    weight = model[2].weight.detach().clone()
    result = ckptavg.update_bn(model.eval(), [inputs()])
    assert (result.layers, result.frozen) == (2, ())
    assert torch.equal(model[2].weight, weight)


def test_update_bn_shares_uncopyable_parts_with_its_copy():
    model = keeping(KeepsStem)
    model.lock, model.config = threading.Lock(), {"locks": [threading.Lock()]}
    model.kept = [model[int(STEM)]]
    assert ckptavg.update_bn(model, [inputs()]).frozen == (STEM,)


def test_update_bn_freezes_nothing_if_train_fails_on_copy():
    class Counts(nn.Sequential):
        def train(self, mode=True):
            assert self[0].weight.sum().item() != 0
            return super().train(mode)

    assert ckptavg.update_bn(keeping(Counts), [inputs()]).layers == 2


def test_update_checkpoint_keeps_layers_that_train_leaves(tmp_path, caplog):
    caplog.set_level("INFO", "ckptavg")
    state = train(net(), 1)[-1]
    path = save(tmp_path / "one.pt", state)
    _, made = update_checkpoint(open_checkpoint(path), tmp_path / "b.pt", how(keeping(KeepsStem)))
    assert (made.bn, made.bn_layers) == ("recomputed", {"frozen": [STEM]})
    assert "1 of 2 BatchNorm layers are frozen in training" in caplog.text
    found = assert_statistics(tmp_path / "b.pt", recomputed_by_hand(state, [STEM]))
    assert same_bits(found[f"{STEM}.running_var"], state[f"{STEM}.running_var"])


def test_frozen_layers_of_a_run_override_train(tmp_path):
    """Statistics that differ were not frozen, whatever the model does today."""
    states = train(net())
    planned = plan_average(saved(tmp_path, states))
    ((_, made),) = write_averages([planned], [tmp_path / "a.pt"], how(keeping(KeepsStem)))
    assert made.bn == "recomputed"
    assert not made.bn_layers
    assert_statistics(tmp_path / "a.pt", recomputed_by_hand(mean_of(states), []))


# Scores


def scored(run, model, **settings):
    planned = plan_average(run)
    candidates = [
        Candidate.of_checkpoint(run.checkpoints[-1], last=True),
        Candidate.of_average(planned, "stale", recompute=False),
        Candidate.of_average(planned, "anew", recompute=True),
    ]
    return evaluate(candidates, model, labelled(), train_loader=[inputs()], **settings)


@pytest.mark.parametrize(
    ("kinds", "frozen", "exclude", "state", "layers"),
    [
        ((nn.BatchNorm1d, nn.BatchNorm1d), (STEM,), (), "recomputed", {"frozen": [STEM]}),
        ((nn.BatchNorm1d, nn.BatchNorm1d), (), "1", "recomputed", {"excluded": [STEM]}),
        ((nn.BatchNorm1d, FrozenNorm), (), (), "recomputed", {"frozen": [BODY]}),
        ((FrozenNorm, FrozenNorm), (), (), "frozen", {"frozen": [STEM, BODY]}),
        ((nn.LayerNorm, nn.LayerNorm), (), (), "none", None),
    ],
)
def test_evaluate_reports_state_of_statistics(tmp_path, kinds, frozen, exclude, state, layers):
    run = saved(tmp_path, train(net(*kinds), frozen=frozen))
    results = scored(run, net(*kinds), exclude=exclude)
    assert results[2].bn == state
    assert results[2].details.get("bn_layers") == layers
    assert json.loads(json.dumps(results[2].as_json())).get("bn_layers") == layers
    assert isinstance(is_worse(results), bool)


def test_evaluate_scores_with_frozen_layers_kept(tmp_path):
    states = train(net(), frozen=[STEM])
    result = scored(saved(tmp_path, states), net())[2]
    model, state = net(), mean_of(states)
    model.load_state_dict(
        state | {k: v.float() for k, v in recomputed_by_hand(state, [STEM]).items()}
    )
    x, y = labelled().tensors
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model.eval()(x).double(), y)
    assert result.metrics["nll"] == pytest.approx(loss.item(), rel=1e-5)


def test_evaluate_allows_train_without_return(tmp_path):
    run = saved(tmp_path, train(net(), frozen=[STEM]))
    found, expected = (
        scored(run, make()) for make in (lambda: keeping(KeepsStemAndReturnsNothing), net)
    )
    assert [one.metrics for one in found] == [other.metrics for other in expected]


def test_is_worse_judges_partly_recomputed_average(tmp_path):
    states = train(net(body=RenormLike))
    for i, state in enumerate(states):
        state[f"{BODY}.running_std"] += i
    results = scored(saved(tmp_path, states), net(body=RenormLike))
    assert [r.bn for r in results] == ["own", "stale", "partly recomputed"]
    last, stale, anew = (r.metrics["top1"] for r in results)
    assert is_worse(results) == (anew < last), (last, stale, anew)
