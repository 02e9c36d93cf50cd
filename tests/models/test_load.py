"""Weights into a module: names, wrappers, ties, and errors that say what does not fit."""

import warnings
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from ckptavg.errors import ModelError
from ckptavg.formats.wrappers import bare_names
from ckptavg.models.load import load_into


class Net(nn.Module):
    def __init__(self, classes=2):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.norm(self.body(x)))


class Tied(nn.Module):
    """A language model's embedding, which is its output layer too."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


class Remembering(nn.Linear):
    """Keeps something beside its tensors in its state dict."""

    def get_extra_state(self):
        return {"version": 1}

    def set_extra_state(self, state):
        pass


def bare_states(model):
    """A model's state as an opened checkpoint has it, under bare names."""
    bare = bare_names(list(model.state_dict()))
    return {bare[k]: v.clone() for k, v in model.state_dict().items() if k in bare}


def checkpoint_of(model, seed=1):
    """Other values for a model's weights."""
    torch.manual_seed(seed)
    states = bare_states(model)
    return {k: torch.rand_like(v) if v.is_floating_point() else v + seed for k, v in states.items()}


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "bare": lambda model: model,
    "DataParallel": nn.DataParallel,
    "AveragedModel": AveragedModel,
    "compiled": compiled,
    "compiled, then parallel": lambda model: nn.DataParallel(compiled(model)),
    "compiled inside": lambda model: nn.Sequential(compiled(model), nn.ReLU()),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_load_into_ignores_wrappers(wrap):
    model = wrap(Net())
    states = checkpoint_of(model)
    load_into(model, states, "a.pt")
    assert all(torch.equal(v, states[k]) for k, v in bare_states(model).items())
    assert not any("_orig_mod" in name or name.startswith("module") for name in states)


def test_load_into_keeps_averaged_model_counter():
    model = AveragedModel(Net())
    model.n_averaged.fill_(7)
    load_into(model, checkpoint_of(Net()), "a.pt")
    assert model.n_averaged.item() == 7


def test_load_into_copies_and_converts_weights():
    model, states = Net().to(torch.bfloat16), checkpoint_of(Net())
    weight = model.body.weight
    load_into(model, states, "a.pt")
    assert model.body.weight is weight
    assert torch.equal(weight, states["body.weight"].to(torch.bfloat16))
    states["body.weight"].zero_()
    assert weight.any()


def test_load_into_keeps_gradients_and_mode():
    model = Net().train()
    model.body.weight.requires_grad_(False)
    load_into(model, checkpoint_of(Net()), "a.pt")
    assert model.training
    assert [p.requires_grad for p in model.body.parameters()] == [False, True]


def test_load_into_allows_missing_tied_weight():
    model, values = Tied(), torch.rand(5, 3)
    for name in ("embedding.weight", "head.weight"):
        values = values + 1
        load_into(model, {name: values}, "a.pt")
        assert torch.equal(model.embedding.weight, values)
        assert model.head.weight is model.embedding.weight


def test_load_into_allows_missing_num_batches_tracked():
    model, states = Net(), checkpoint_of(Net())
    del states["norm.num_batches_tracked"]
    load_into(model, states, "a.pt")
    assert torch.equal(model.norm.running_mean, states["norm.running_mean"])


@pytest.mark.parametrize("name", ["norm.running_mean", "norm.running_var", "body.bias"])
def test_load_into_refuses_other_missing_tensors(name):
    states = checkpoint_of(Net())
    del states[name]
    with pytest.raises(ModelError, match=f"a.pt does not fit.*the model needs {name}.*`model`"):
        load_into(Net(), states, "a.pt")


def test_load_into_refuses_extra_tensor():
    states = checkpoint_of(Net()) | {"aux.weight": torch.ones(1)}
    with pytest.raises(ModelError, match=r"a\.pt does not fit.*the checkpoint has aux\.weight"):
        load_into(Net(), states, "a.pt")


def test_load_into_lists_first_few_names():
    with pytest.raises(ModelError) as caught:
        load_into(Net(), {f"layer{i}": torch.ones(1) for i in range(9)}, "a.pt")
    assert "the model needs body.weight, body.bias, norm.weight and 5 more" in str(caught.value)
    assert "the checkpoint has layer0, layer1, layer2 and 6 more" in str(caught.value)


def test_load_into_names_shapes_and_remedy():
    with pytest.raises(ModelError) as caught:
        load_into(Net(classes=2), checkpoint_of(Net(classes=7)), "a.pt")
    for part in ("a.pt", "head.weight", "(7, 4)", "(2, 4)", "`model`", "num_classes"):
        assert part in str(caught.value)


def test_load_into_broadcasts_nothing():
    states = checkpoint_of(Net()) | {"body.bias": torch.tensor([1.0])}
    with pytest.raises(ModelError, match=r"body\.bias has the shape \(1,\)"):
        load_into(Net(), states, "a.pt")


@pytest.mark.parametrize("spoil", ["missing", "extra", "shape"])
def test_load_into_leaves_model_unchanged_on_error(spoil):
    model, states = Net(), checkpoint_of(Net())
    if spoil == "missing":
        del states["head.bias"]
    else:
        states["head.bias" if spoil == "shape" else "other"] = torch.ones(9)
    before = bare_states(model)
    with pytest.raises(ModelError):
        load_into(model, states, "a.pt")
    assert all(torch.equal(v, before[k]) for k, v in bare_states(model).items())


def test_load_into_allows_missing_extra_state():
    model = nn.Sequential(Remembering(2, 2))
    load_into(model, {"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}, "a.pt")
    assert torch.equal(model[0].weight, torch.ones(2, 2))


def test_load_into_materializes_lazy_model():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d())
    states = checkpoint_of(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    load_into(model, states, "a.pt")
    assert torch.equal(model[0].weight, states["0.weight"])


@pytest.mark.parametrize(
    ("prefix_of", "said"),
    [("checkpoint", "The checkpoint's names begin with 'net.'"), ("model", "The model's names")],
)
def test_load_into_points_at_differing_prefix(prefix_of, said):
    inner = nn.Linear(2, 2)
    outer = nn.Sequential(OrderedDict(net=nn.Linear(2, 2)))
    model, other = (inner, outer) if prefix_of == "checkpoint" else (outer, inner)
    with pytest.raises(ModelError, match=said):
        load_into(model, other.state_dict(), "swa.pt")


def test_load_into_names_networks_that_fit():
    state = Net().state_dict()
    both = {f"{network}.{name}": t for network in ("critic", "actor") for name, t in state.items()}
    with pytest.raises(ModelError, match=r"the one that fits: `key='actor'`, `key='critic'`\.$"):
        load_into(Net(), both, "step_1.pt")
    both |= {"critic.extra": torch.zeros(1)}
    with pytest.raises(ModelError, match="`key='actor'`, `key='critic'`"):
        load_into(Net(), both, "step_1.pt")
    del both["actor.head.bias"]
    with pytest.raises(ModelError, match=r"the one that fits: `key='critic'`\.$"):
        load_into(Net(), both, "step_1.pt")


# What torch itself makes fit


class Observer(nn.Module):
    """As observers of quantization: takes the shape of what it loads."""

    def __init__(self):
        super().__init__()
        self.register_buffer("low", torch.empty(0))
        self.scale = nn.Parameter(torch.ones(1))

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        for name in ("low", "scale"):
            value = state_dict[prefix + name]
            getattr(self, name).data = torch.zeros_like(value)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def test_load_into_takes_self_sizing_buffers():
    model = nn.Sequential(nn.Linear(2, 2), Observer())
    state = model.state_dict() | {"1.low": torch.arange(3.0), "1.scale": torch.arange(4.0)}
    load_into(model, state, "x.pt")
    assert torch.equal(model[1].low, torch.arange(3.0))
    assert torch.equal(model[1].scale, torch.arange(4.0))


def test_load_into_takes_qat_model():
    quantization = pytest.importorskip("torch.ao.quantization")

    def prepared():
        model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).train()
        quantization.fuse_modules_qat(model, [["0", "1", "2"]], inplace=True)
        model.qconfig = quantization.get_default_qat_qconfig("fbgemm", version=0)
        return quantization.prepare_qat(model, inplace=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained, fresh, expected = prepared(), prepared(), prepared()
        trained(torch.randn(2, 3, 4, 4))
        expected.load_state_dict(trained.state_dict())
        load_into(fresh, trained.state_dict(), "x.pt")
    for name, value in expected.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], value), name


def test_load_into_takes_old_weight_norm_names():
    """The weights of a layer under the old weight norm, in one under the new."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)))
    new = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    load_into(nn.DataParallel(new), old.state_dict(), "x.pt")
    x = torch.randn(4, 3)
    assert torch.equal(new(x), old(x))


def test_load_into_restores_resized_buffers_on_error():
    model = nn.Sequential(nn.Linear(2, 2), Observer())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = model.state_dict() | {"1.low": torch.ones(3), "0.bias": torch.ones(3)}
    with pytest.raises(ModelError, match=r"shape \(3,\) where the model has"):
        load_into(model, state, "x.pt")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
