"""What becomes of each tensor, decided from the headers alone."""

import pytest
import torch
from helpers import opened, save

from ckptavg.averaging.planning.tensor_plan import Rules, make_plan, plan_copy
from ckptavg.errors import CkptavgError, MismatchError, UnsupportedTensorError, UsageError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.statistics_names import batchnorm_layers

ONE = {"w": torch.ones(2)}


def plan_of(directory, *states, coefficients=None, suffix=".pt", **rules):
    checkpoints = opened(directory, states, suffix)
    return make_plan(checkpoints, coefficients or [1.0] * len(states), Rules(**rules))


def table(plan):
    """Output name → (element type, shape)."""
    return {t.name: (t.dtype.name, t.shape) for t in plan.tensors}


def fails(kind, match, directory, *states, **options):
    with pytest.raises(kind, match=match) as caught:
        plan_of(directory, *states, **options)
    assert caught.value.exit_code == 1
    assert caught.value.remedy
    assert str(caught.value).endswith(caught.value.remedy)
    assert "\n" not in str(caught.value)


# Names, shapes and kinds


def test_plan_averages_floats_and_takes_integers_from_the_last(tmp_path):
    state = {
        "w": torch.ones(2, 3),
        "z": torch.ones(2, dtype=torch.complex64),
        "n": torch.tensor(3),
        "b": torch.tensor([True]),
        "e": torch.ones(0, 4),
    }
    plan = plan_of(tmp_path, state, state, state)
    assert table(plan) == {
        "w": ("float32", (2, 3)),
        "z": ("complex64", (2,)),
        "n": ("int64", ()),
        "b": ("bool", (1,)),
        "e": ("float32", (0, 4)),
    }
    assert [t.name for t in plan.tensors if t.averaged] == ["w", "z", "e"]
    assert all(t.owners == plan.checkpoints[-1:] for t in plan.tensors if not t.averaged)
    assert plan.notes == ()


def test_plan_normalizes_coefficients(tmp_path):
    assert plan_of(tmp_path, ONE, ONE, ONE, coefficients=[2, 3, 5]).coefficients == (0.2, 0.3, 0.5)


def test_plan_orders_names_as_the_last_checkpoint(tmp_path):
    states = [
        {"a": torch.zeros(1), "b": torch.zeros(2)},
        {"b": torch.zeros(2), "a": torch.zeros(1)},
    ]
    assert list(table(plan_of(tmp_path, *states))) == ["b", "a"]


def test_plan_refuses_missing_tensors_by_name(tmp_path):
    full = {f"layer{i}.w": torch.ones(1) for i in range(6)}
    lacking = {"layer5.w": full["layer5.w"]}
    fails(
        MismatchError,
        r"epoch_1\.pt lacks 5 tensors \(layer0\.w, layer1\.w, layer2\.w and 2 more\), "
        r"compared with .*epoch_2\.pt",
        tmp_path, lacking, full,
    )  # fmt: skip


def test_plan_refuses_extra_tensors_by_name(tmp_path):
    fails(
        MismatchError,
        r"epoch_2\.pt has 1 more \(head\.w\), compared with .*epoch_3\.pt",
        tmp_path, ONE, {**ONE, "head.w": torch.ones(1)}, ONE,
    )  # fmt: skip


def test_plan_reports_renamed_tensor_as_missing_and_extra(tmp_path):
    fails(
        MismatchError,
        r"lacks 1 tensors \(new\) and has 1 more \(old\)",
        tmp_path, {**ONE, "old": torch.ones(1)}, {**ONE, "new": torch.ones(1)},
    )  # fmt: skip


def test_plan_refuses_different_networks(tmp_path):
    fails(
        MismatchError, r"hold different networks.*'u' against 'w'.*`glob",
        tmp_path, {"u": torch.ones(1)}, ONE,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "other"),
    [((2, 3), (3, 2)), ((3,), (1,)), ((1,), ()), ((2, 3), (6,)), ((0, 2), (0, 3)), ((4, 1), (4,))],
)
def test_plan_refuses_different_shapes(tmp_path, shape, other):
    states = [{"w": torch.ones(other)}, {"w": torch.ones(shape)}]
    fails(
        MismatchError, r"w has the shape .* in .*epoch_1\.pt but .*epoch_2\.pt", tmp_path, *states
    )


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.int64, torch.float32),
        (torch.float32, torch.int64),
        (torch.bool, torch.float16),
        (torch.complex64, torch.float32),
        (torch.float32, torch.complex64),
    ],
)
def test_plan_refuses_different_kinds_of_number(tmp_path, dtypes):
    states = [{"w": torch.ones(2, dtype=dtype)} for dtype in dtypes]
    one, other = (str(dtype).removeprefix("torch.") for dtype in dtypes)
    fails(
        MismatchError, rf"w is {one} in .*epoch_1\.pt but {other} in .*epoch_2", tmp_path, *states
    )


@pytest.mark.parametrize("worse", [0, 1, 2])
def test_plan_checks_every_checkpoint(tmp_path, worse):
    states = [ONE, ONE, ONE]
    states[worse] = {"w": torch.ones(3)}
    fails(MismatchError, "w has the shape", tmp_path, *states)


def test_plan_checks_checkpoints_with_coefficient_0(tmp_path):
    states = [{"w": torch.ones(3)}, ONE, ONE]
    fails(MismatchError, "w has the shape", tmp_path, *states, coefficients=[0.0, 0.5, 0.5])


# Wrappers


@pytest.mark.parametrize(
    "wrapper",
    [
        "module.",
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "_fsdp_wrapped_module.",
        "module._checkpoint_wrapped_module.",
    ],
)
def test_wrapper_prefix_is_removed(tmp_path, wrapper):
    bare = {"a.weight": torch.ones(1), "b.module.weight": torch.ones(1)}
    plan = plan_of(tmp_path, {wrapper + name: t for name, t in bare.items()}, bare)
    assert list(table(plan)) == list(bare)


def test_averaged_model_counter_is_left_out(tmp_path):
    model = torch.nn.Linear(2, 2)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    assert list(table(plan_of(tmp_path, averaged.state_dict(), model.state_dict()))) == [
        "weight", "bias",
    ]  # fmt: skip


def test_wrapper_prefix_of_some_tensors_stays(tmp_path):
    state = {"module.w": torch.ones(1), "head.w": torch.ones(1)}
    assert list(table(plan_of(tmp_path, state, state))) == ["module.w", "head.w"]


# Element types


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16, torch.float32), "float32"),
        ((torch.float32, torch.bfloat16), "float32"),
        ((torch.float64, torch.float32, torch.float16), "float64"),
        ((torch.bfloat16, torch.float16), "float32"),
        ((torch.complex64, torch.complex128), "complex128"),
    ],
)
def test_mixed_widths_become_the_widest_with_a_note(tmp_path, dtypes, expected):
    plan = plan_of(tmp_path, *({"w": torch.ones(2, dtype=dtype)} for dtype in dtypes))
    assert table(plan)["w"][0] == expected
    assert len(plan.notes) == 1
    assert f"w ({expected})" in plan.notes[0]


def test_mixed_widths_ignore_coefficient_0(tmp_path):
    states = [{"w": torch.ones(2, dtype=dtype)} for dtype in (torch.float64, torch.float16)]
    plan = plan_of(tmp_path, *states, coefficients=[0.0, 1.0])
    assert table(plan)["w"][0] == "float16"
    assert plan.notes == ()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_dtype_applies_to_averaged_real_floats_only(tmp_path, dtype):
    state = {
        "w": torch.ones(2),
        "h": torch.ones(2, dtype=torch.float16),
        "kept": torch.ones(2, dtype=torch.bfloat16),
        "z": torch.ones(2, dtype=torch.complex64),
        "n": torch.ones(2, dtype=torch.int32),
    }
    plan = plan_of(tmp_path, state, state, dtype=dtype, exclude=("kept",))
    kinds = {name: kind for name, (kind, _) in table(plan).items()}
    assert kinds == {"w": dtype, "h": dtype, "kept": dtype, "z": "complex64", "n": "int32"}


@pytest.mark.parametrize("dtype", ["int8", "fp16", "float8_e5m2", ""])
def test_dtype_refuses_unknown_types(dtype):
    with pytest.raises(UsageError, match="dtype is expected to be one of keep, float32"):
        Rules(dtype=dtype)


# What has no average


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_float8_is_refused(tmp_path, dtype, suffix):
    state = {**ONE, "f8": torch.ones(2).to(dtype)}
    fails(
        UnsupportedTensorError, rf"epoch_1\{suffix}: 8-bit floats .*f8 \({str(dtype)[6:]}\)",
        tmp_path, state, state, suffix=suffix,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("packed", "scale"),
    [
        ("l.weight", "l.weight_scale"),
        ("l.weight", "l.weight_scale_inv"),
        ("l.weight", "l.weight.absmax"),
        ("l.weight", "l.SCB"),
        ("l.qweight", "l.scales"),
        ("l.weight_packed", "l.weight_scale"),
        ("l.experts_blocks", "l.experts_scales"),
    ],
)
def test_quantized_weights_with_scales_are_refused(tmp_path, packed, scale):
    state = {packed: torch.ones(2, 2, dtype=torch.int8), scale: torch.ones(2)}
    fails(
        UnsupportedTensorError, rf"quantized weights with scales: {packed}.*`exclude",
        tmp_path, state, state,
    )  # fmt: skip


def test_quantized_weights_need_scale_of_same_layer(tmp_path):
    state = {"ids": torch.ones(2, dtype=torch.int64), "l.weight_scale": torch.ones(2)}
    assert table(plan_of(tmp_path, state, state))["ids"] == ("int64", (2,))


def test_float_beside_scale_is_averaged(tmp_path):
    state = {"l.weight": torch.ones(2), "l.weight_scale": torch.ones(2)}
    assert all(t.averaged for t in plan_of(tmp_path, state, state).tensors)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.*TypedStorage")
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantized"),
        (lambda: torch.ones(2, 2).to_sparse(), "sparse"),
        (lambda: torch.ones(2, dtype=torch.complex64).conj(), "conjugated"),
    ],
    ids=["quantized", "sparse", "conjugated"],
)
def test_tensors_without_plain_bytes_are_refused(tmp_path, make, why):
    state = {**ONE, "odd": make()}
    fails(UnsupportedTensorError, rf"epoch_1\.pt .*odd \(.*{why}.*`exclude", tmp_path, state, state)


def test_float8_excluded_is_copied(tmp_path):
    state = {**ONE, "f8": torch.ones(2).to(torch.float8_e5m2)}
    plan = plan_of(tmp_path, state, state, exclude=("f8",), dtype="float64")
    assert table(plan) == {"w": ("float64", (2,)), "f8": ("float8_e5m2", (2,))}


@pytest.mark.parametrize("rules", [{"exclude": ("odd",)}, {"include": ("w",)}])
def test_tensors_without_plain_bytes_excluded_are_left_out(tmp_path, rules):
    state = {**ONE, "odd": torch.ones(2, 2).to_sparse()}
    plan = plan_of(tmp_path, state, state, **rules)
    assert list(table(plan)) == ["w"]
    assert plan.missing == {"odd": "a sparse tensor"}


# include, exclude, base

LAYERS = {"body.0.w": torch.ones(2), "body.1.w": torch.ones(2), "head.w": torch.ones(2)}


@pytest.mark.parametrize(
    ("rules", "averaged"),
    [
        ({"include": ("body.*",)}, ["body.0.w", "body.1.w"]),
        ({"exclude": ("head.*",)}, ["body.0.w", "body.1.w"]),
        ({"include": ("body.*", "head.w"), "exclude": ("*.0.*",)}, ["body.1.w", "head.w"]),
        ({"include": ("body.[1-9].w",)}, ["body.1.w"]),
        ({"exclude": ("head",)}, ["body.0.w", "body.1.w", "head.w"]),
    ],
)
def test_patterns_match_whole_names(tmp_path, rules, averaged):
    plan = plan_of(tmp_path, LAYERS, LAYERS, **rules)
    assert [t.name for t in plan.tensors if t.averaged] == averaged
    assert list(table(plan)) == list(LAYERS)
    assert all(t.owners == plan.checkpoints[-1:] for t in plan.tensors if not t.averaged)


@pytest.mark.parametrize("rules", [{"include": ("tail.*",)}, {"exclude": ("*",)}])
def test_patterns_matching_no_tensor_are_refused(tmp_path, rules):
    with pytest.raises(
        UsageError, match=r"include and exclude patterns leave no tensor of .* to average"
    ):
        plan_of(tmp_path, LAYERS, LAYERS, **rules)


def test_exclude_allows_differing_tensors(tmp_path):
    states = [
        {**ONE, "head.w": torch.ones(10, 4), "head.old": torch.ones(1)},
        {**ONE, "head.w": torch.ones(7, 4, dtype=torch.int32)},
    ]
    plan = plan_of(tmp_path, *states, exclude=("head.*",))
    assert table(plan) == {"w": ("float32", (2,)), "head.w": ("int32", (7, 4))}


def test_base_gives_excluded_tensors_of_any_shape(tmp_path):
    base = {"head.w": torch.ones(5, 5), "head.new": torch.ones(1), "w": torch.zeros(2)}
    base = open_checkpoint(save(tmp_path / "base.pt", base))
    state = {**ONE, "head.w": torch.ones(3)}
    plan = plan_of(tmp_path, state, state, exclude=("head.*",), base=base)
    assert table(plan) == {
        "head.w": ("float32", (5, 5)), "head.new": ("float32", (1,)), "w": ("float32", (2,)),
    }  # fmt: skip
    owners = {t.name: t.owners for t in plan.tensors}
    assert owners["head.w"] == owners["head.new"] == (base,)
    assert owners["w"] == plan.checkpoints
    assert base in plan.files


def test_base_without_part_is_not_read(tmp_path):
    base = open_checkpoint(save(tmp_path / "base.pt", ONE))
    assert base not in plan_of(tmp_path, ONE, ONE, base=base).files


# Ties


def tied(first=1.0):
    weight = torch.full((2, 2), float(first))
    return {"emb.w": weight, "head.w": weight, "emb.t": weight.t()}


def test_ties_are_planned_once(tmp_path):
    plan = plan_of(tmp_path, tied(1), tied(2))
    assert plan.ties == [["emb.w", "head.w"]]
    assert {t.name: t.tied_to for t in plan.tensors} == {
        "emb.w": None, "head.w": "emb.w", "emb.t": None,
    }  # fmt: skip


def test_ties_need_every_checkpoint(tmp_path):
    loose = {name: tensor.clone() for name, tensor in tied(2).items()}
    assert plan_of(tmp_path, tied(1), loose).ties == []
    assert plan_of(tmp_path, loose, tied(1)).ties == []


def test_ties_are_cut_by_exclude(tmp_path):
    assert plan_of(tmp_path, tied(1), tied(2), exclude=("head.*",)).ties == []


def test_ties_leave_out_empty_tensors(tmp_path):
    state = {"w": torch.ones(1), "a": torch.ones(0), "b": torch.ones(0)}
    assert plan_of(tmp_path, state, state).ties == []


# BatchNorm


def test_batchnorm_layers_are_found_by_name():
    network = torch.nn.Sequential(
        torch.nn.BatchNorm2d(3),
        torch.nn.BatchNorm1d(3, track_running_stats=False),
        torch.nn.Sequential(torch.nn.InstanceNorm2d(3, track_running_stats=True)),
        torch.nn.LayerNorm(3),
    )
    assert batchnorm_layers(network.state_dict()) == ("0", "2.0")
    assert batchnorm_layers(["running_mean", "running_var", "a.running_mean"]) == ("",)


# One checkpoint as it is


def test_plan_copy_takes_every_tensor(tmp_path):
    state = {
        "w": torch.ones(2).bfloat16(),
        "n": torch.tensor(1),
        "f8": torch.ones(1).to(torch.float8_e5m2),
    }
    plan = plan_copy(open_checkpoint(save(tmp_path / "a.pt", state)))
    assert {name: kind for name, (kind, _) in table(plan).items()} == {
        "w": "bfloat16", "n": "int64", "f8": "float8_e5m2",
    }  # fmt: skip
    assert not any(t.averaged for t in plan.tensors)


def test_plan_copy_refuses_tensors_without_plain_bytes(tmp_path):
    checkpoint = open_checkpoint(save(tmp_path / "a.pt", {**ONE, "s": torch.ones(2).to_sparse()}))
    with pytest.raises(CkptavgError, match="not plain: s"):
        plan_copy(checkpoint)


def test_pattern_without_match_is_noted(tmp_path):
    checkpoints = opened(tmp_path, [{"a": torch.zeros(1)}, {"a": torch.ones(1)}])
    notes = make_plan(checkpoints, [1, 1], Rules(exclude=("epoch_2*",))).notes
    assert notes == ("the pattern 'epoch_2*' matches no tensor (`glob` selects files)",)


def test_pattern_mistyped_gets_a_suggestion(tmp_path):
    checkpoints = opened(tmp_path, [{"head.fc.weight": torch.zeros(1), "w": torch.ones(1)}] * 2)
    notes = make_plan(checkpoints, [1, 1], Rules(exclude=("fc",))).notes
    assert notes == ("the pattern 'fc' matches no tensor. Did you mean *.fc.*?",)
    with pytest.raises(UsageError, match=r"leave no tensor .*\. Did you mean head\.\*\?"):
        make_plan(checkpoints, [1, 1], Rules(include=("haed.*",)))
