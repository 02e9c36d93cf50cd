"""Digests of weights against a recomputation from the documented rule, and what they notice."""

import hashlib
import json
import shutil
import zipfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from adapters import A, B, factors, write_adapters
from digest_rule import by_rule, flip, randoms
from helpers import listing, opened, save, save_states
from hypothesis import given, settings
from hypothesis import strategies as st
from norm_network import BATCHES, RUNTIME, Net, state_of
from random_runs import COMPLEX, FLOATS, INTEGERS, lay_out, random_values
from recomputed import write_averages
from small_cuts import CUTS, cut_small
from stores import upload
from writers import WRITERS, write_trainer_checkpoint

import ckptavg
from ckptavg import open_checkpoint, open_run
from ckptavg.averaging.compute import read_state_dict
from ckptavg.averaging.plan import plan_average
from ckptavg.averaging.planning.tensor_plan import Rules, make_plan
from ckptavg.averaging.read_groups import Job
from ckptavg.averaging.stream import StreamRequests, stream
from ckptavg.batchnorm.checkpoints import update_checkpoint
from ckptavg.batchnorm.recompute import StatisticsPass
from ckptavg.errors import CheckpointError, UsageError
from ckptavg.formats.provenance import Provenance
from ckptavg.inspection.verify import Verifier, digest
from ckptavg.outputs import digests as digests_module
from ckptavg.outputs import target
from ckptavg.outputs.digests import InputDigests, Leaves, OutputDigest
from ckptavg.outputs.sinks import MemorySink

FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def recorded(path):
    """The digests in an output: its own, and those of what it is made of."""
    made = open_checkpoint(path).provenance
    return made.digest, [source.digest for source in made.inputs]


def outcome(path, **options):
    """What verifying a checkpoint finds: (part, name, state)."""
    found = Verifier().verify(open_checkpoint(path, **options))
    return [(f.part, Path(f.path).name, f.state) for f in found]


# The digests themselves


@st.composite
def runs(draw):
    """The states of a run with tied, strided, empty and 0-d tensors, one of them in 8 bits."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    states = [{} for _ in range(draw(st.integers(1, 3)))]
    layouts = st.sampled_from(["plain", "transposed", "sliced", "expanded"])
    for i in range(draw(st.integers(1, 3))):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        dtype = draw(st.sampled_from([*FLOATS, *COMPLEX, *INTEGERS]))
        for state in states:
            state[f"t{i}"] = lay_out(random_values(rng, dtype, shape), draw(layouts))
            state[f"t{i}.tied"] = state[f"t{i}"]
    for state in states:
        eight = draw(st.sampled_from(FLOAT8))
        state["f8"] = torch.from_numpy(rng.uniform(-9, 9, (3, 5)).astype("f4")).to(eight)
    return states


@pytest.mark.slow
@settings(derandomize=True, deadline=None, max_examples=150)
@given(
    states=runs(),
    leaf=st.integers(1, 20),
    leaves_a_task=st.integers(1, 4),
    block=CUTS["block"],
    strided_block=CUTS["strided_block"],
    threads=CUTS["threads"],
    first=st.sampled_from([0.0, 1.0]),
)
def test_digests_follow_the_rule_for_any_layout_and_threads(
    states, leaf, leaves_a_task, block, strided_block, threads, first
):
    with (
        cut_small(strided_block=strided_block, task=leaf * leaves_a_task) as directory,
        mock.patch.object(digests_module, "LEAF", leaf),
    ):
        checkpoints = opened(directory, states)
        coefficients = [first, *[1.0] * len(states)][: len(states)]
        coefficients[-1] = 1.0
        plan = make_plan(checkpoints, coefficients, Rules(exclude=("f8",)))
        sink = MemorySink(plan.outputs)
        inputs, output = InputDigests(checkpoints), OutputDigest(sink, plan.outputs)
        requests = StreamRequests(checkpoints, observed=inputs.tensors, observer=inputs.watch)
        job = Job(plan.tensors, output, keep_nonfinite=True)
        stream([job], requests, block=block, threads=threads)
    assert [inputs.of(c) for c in checkpoints] == [by_rule(state, leaf) for state in states]
    assert output.digest == by_rule(sink.state_dict, leaf)


@pytest.mark.parametrize("threads", [1, 4])
def test_leaves_have_2_to_the_20_elements(tmp_path, threads):
    state = {
        "long": torch.randint(256, (5 * 2**20 + 3,), dtype=torch.uint8),
        "exact": torch.randn(2**20),
        "rows": torch.randint(256, (1500, 1500), dtype=torch.uint8).t(),
    }
    checkpoints = opened(tmp_path, [state])
    inputs = InputDigests(checkpoints)
    requests = StreamRequests(observed=inputs.tensors, observer=inputs.watch)
    stream([], requests, threads=threads)
    assert inputs.of(checkpoints[0]) == by_rule(state)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")
def test_digest_is_the_same_in_every_format(tmp_path):
    state = {"body.weight": torch.randn(4, 3), "body.bias": torch.randn(4)}
    state["head.weight"] = torch.randn(2, 4)
    found = {}
    for name, write in WRITERS.items():
        write(state, tmp_path / name)
        found[name] = digest(open_checkpoint(tmp_path / name))
    assert found == dict.fromkeys(WRITERS, by_rule(state))
    run = [open_checkpoint(tmp_path / name) for name in WRITERS]
    ckptavg.average(run, out=tmp_path / "o.safetensors", digests=True)
    assert {state for _, _, state in outcome(tmp_path / "o.safetensors")} == {"same"}


@pytest.mark.parametrize(
    "other",
    [
        {"w": torch.tensor([[1.0, 2.0]]), "b": torch.zeros(0)},
        {"w": torch.tensor([1.0, 2.0]).view(torch.int32), "b": torch.zeros(0)},
        {"v": torch.tensor([1.0, 2.0]), "b": torch.zeros(0)},
        {"w": torch.tensor([1.0, 2.0]), "b": torch.zeros(0, 1)},
        {"w": torch.tensor([1.0, 2.0])},
    ],
)
def test_digest_covers_names_dtypes_and_shapes(tmp_path, other):
    state = {"w": torch.tensor([1.0, 2.0]), "b": torch.zeros(0)}
    one, two = opened(tmp_path, [state, other])
    assert digest(one) != digest(two)


def test_leaves_merge_processes(monkeypatch):
    monkeypatch.setattr(digests_module, "LEAF", 4)
    raw = memoryview(bytes(range(22)))  # 11 elements of 2 bytes: leaves of 8, 8 and 6
    ranks = [Leaves([(11, 2), (3, 2)]) for _ in range(2)]
    ranks[0].update(0, 0, raw[:8])
    ranks[1].update(0, 8, raw[8:11])
    ranks[1].update(0, 11, raw[11:])
    ranks[0].update(1, 0, raw[:6])
    with pytest.raises(RuntimeError, match="not all of tensor 0"):
        ranks[0].of(0)
    ranks[0].merge({number: bytes(leaves) for number, leaves in ranks[1].done.items()})
    assert ranks[0].of(0) == b"".join(
        hashlib.sha256(part).digest() for part in (raw[:8], raw[8:16], raw[16:])
    )
    assert ranks[0].of(1) == hashlib.sha256(raw[:6]).digest()


def test_leaves_refuse_bytes_out_of_order():
    leaves = Leaves([(10, 1)])
    with pytest.raises(RuntimeError, match="byte 4"):
        leaves.update(0, 4, memoryview(b"abc"))


def test_digest_refuses_a_changing_input(tmp_path):
    (checkpoint,) = opened(tmp_path, [randoms(0)])
    (tmp_path / "epoch_1.pt").touch()
    with pytest.raises(CheckpointError, match=r"epoch_1\.pt changed"):
        digest(checkpoint)


# Recorded in outputs


def write_run(directory, kind):
    """Three checkpoints of a kind; their states."""
    states = [randoms(i) for i in range(3)]
    for i, state in enumerate(states, 1):
        if kind == "shards":
            write_trainer_checkpoint(directory / f"checkpoint-{i}", state, i)
        elif kind == "distributed":
            dcp.save({"model": state, "step": i}, checkpoint_id=directory / f"step_{i}")
        elif kind == "bare":
            save(directory / f"epoch_{i}.pt", state)
        else:
            wrapped = {f"module.{name}": t for name, t in state.items()}
            beside = {"epoch": i, "optimizer": {"state": torch.randn(5)}}
            save(directory / f"epoch_{i}.pt", wrapped, **beside)
    return states


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable")
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        *[(kind, name) for kind in ("bare", "entries") for name in ("o.pt", "o.pth", "o.ckpt")],
        ("entries", "o.safetensors"),
        ("entries", "o"),
        ("shards", "o"),
        ("shards", "o.pt"),
        ("distributed", "o"),
    ],
)
def test_digests_are_recorded_in_every_format(tmp_path, kind, name):
    states, out = write_run(tmp_path / "run", kind), tmp_path / name
    ckptavg.average(open_run(tmp_path / "run"), out=out, digests=True)
    written = read_state_dict(open_checkpoint(out))
    assert recorded(out) == (by_rule(written), [by_rule(state) for state in states])
    plain = ckptavg.average(open_run(tmp_path / "run"))
    assert by_rule(plain) == by_rule(written)
    assert {state for _, _, state in outcome(out)} == {"same"}
    if out.is_file() and name != "o.safetensors":
        assert zipfile.ZipFile(out).testzip() is None
        torch.load(out, weights_only=True)
    if kind == "distributed":
        assert all(torch.equal(t, written[n]) for n, t in dcp_loaded(out, kind, written).items())


def dcp_loaded(out, kind, like):
    loaded = {"model": {name: torch.zeros_like(t) for name, t in like.items()}}
    dcp.load(loaded, checkpoint_id=out)
    return loaded["model"]


def test_digests_cover_excluded_tensors_and_base(tmp_path):
    states = [randoms(i) | {"odd": torch.full((i + 1,), 7.0)} for i in range(3)]
    run = save_states(tmp_path / "run", states)
    base = save(tmp_path / "base.pt", randoms(9) | {"odd": torch.zeros(1)})
    ckptavg.average(
        open_run(*run), weights=[0, 1, 1], exclude="odd", base=base,
        out=tmp_path / "o.pt", digests=True,
    )  # fmt: skip
    assert recorded(tmp_path / "o.pt")[1] == [by_rule(state) for state in states]
    made = open_checkpoint(tmp_path / "o.pt").provenance
    assert made.base.path == str(base)
    assert made.base.digest == by_rule(randoms(9) | {"odd": torch.zeros(1)})
    assert ("base", "base.pt", "same") in outcome(tmp_path / "o.pt")


def test_digests_read_each_byte_once(tmp_path):
    states = [randoms(i) for i in range(3)]
    run, calls = opened(tmp_path, states), []
    ckptavg.average(
        run, weights=[0, 1, 1], out=tmp_path / "o.pt", digests=True,
        progress=lambda *call: calls.append(call),
    )  # fmt: skip
    assert calls[-1] == ("averaging", *(3 * (4 * 45 + 2 * 7 + 8),) * 2)


def test_digests_change_nothing_else(tmp_path):
    run = opened(tmp_path, [randoms(i) for i in range(3)])
    for digests in (True, False):
        ckptavg.average(run, out=tmp_path / f"{digests}.pt", digests=digests)
    told, plain = (open_checkpoint(tmp_path / f"{d}.pt") for d in (True, False))
    assert by_rule(read_state_dict(told)) == by_rule(read_state_dict(plain))
    made = dict(told.provenance.entries)
    del made["digest"], made["seal"]
    made["checkpoints"] = [
        {k: v for k, v in c.items() if k != "digest"} for c in made["checkpoints"]
    ]
    assert made == plain.provenance.entries


def test_digests_of_average_many_are_separate(tmp_path):
    states = [randoms(i) for i in range(4)]
    save_states(tmp_path / "run", states)
    run = open_run(tmp_path / "run")
    paths = ckptavg.average_many(
        run, {"two": run.last(2), "ema.pt": "ema:decay=0.5"}, out_dir=tmp_path / "o", digests=True
    )
    known = [by_rule(state) for state in states]
    for name, inputs in (("two", known[2:]), ("ema.pt", known)):
        assert recorded(paths[name]) == (
            by_rule(read_state_dict(open_checkpoint(paths[name]))),
            inputs,
        )


def test_digests_of_adapters_cover_the_given_factors(tmp_path):
    states = [factors(i) for i in range(3)]
    run = open_run(write_adapters(tmp_path / "run", states))
    ckptavg.average(run, weights=[1, 2, 5], out=tmp_path / "o", digests=True)
    out = read_state_dict(open_checkpoint(tmp_path / "o"))
    assert out[A].shape[0] == 3 * states[0][A].shape[0]
    assert out[B].shape[1] == 3 * states[0][B].shape[1]
    assert recorded(tmp_path / "o") == (by_rule(out), [by_rule(state) for state in states])


def test_digest_covers_recomputed_statistics(tmp_path):
    states = [state_of(i) for i in range(3)]
    planned = plan_average(opened(tmp_path, states))
    out = tmp_path / "o.pt"
    how = StatisticsPass(Net(), BATCHES, RUNTIME)
    ((_, made),) = write_averages([planned], [out], how, digests=True)
    assert recorded(out) == (
        by_rule(read_state_dict(open_checkpoint(out))),
        list(map(by_rule, states)),
    )
    assert made == open_checkpoint(out).provenance
    assert {state for _, _, state in outcome(out)} == {"same"}


def test_update_checkpoint_records_a_new_digest(tmp_path):
    states = [state_of(i) for i in range(3)]
    ckptavg.average(opened(tmp_path, states), out=tmp_path / "o.pt", digests=True)
    checkpoint, out = open_checkpoint(tmp_path / "o.pt"), tmp_path / "n.safetensors"
    update_checkpoint(checkpoint, out, StatisticsPass(Net(), BATCHES, RUNTIME))
    assert recorded(out) == (
        by_rule(read_state_dict(open_checkpoint(out))),
        list(map(by_rule, states)),
    )
    assert recorded(out)[0] != recorded(tmp_path / "o.pt")[0]
    assert {state for _, _, state in outcome(out)} == {"same"}


def test_directory_with_a_dot_in_its_name_has_digests_too(tmp_path):
    states = [randoms(i) for i in range(2)]
    ckptavg.average(opened(tmp_path / "run", states), out=f"{tmp_path}/swa.v2/", digests=True)
    assert recorded(tmp_path / "swa.v2")[1] == list(map(by_rule, states))
    assert {state for _, _, state in outcome(tmp_path / "swa.v2")} == {"same"}


def test_digests_need_an_output(tmp_path):
    run = opened(tmp_path, [randoms(0)])
    with pytest.raises(UsageError, match="recorded in an output"):
        ckptavg.average(run, digests=True)
    with pytest.raises(UsageError, match="recorded in an output"):
        ckptavg.average_many(run, {"a": "uniform"}, digests=True)


def test_average_refuses_a_changing_template(tmp_path, monkeypatch):
    run, calls = opened(tmp_path / "run", [randoms(i) for i in range(2)]), []

    def lay_out(path, tensors, made, template):
        calls.append(path)
        return real(
            path,
            tensors,
            Provenance({**made.entries, "more": "x" * 64 * (len(calls) > 1)}),
            template,
        )

    real = target.lay_out
    monkeypatch.setattr(target, "lay_out", lay_out)
    with pytest.raises(CheckpointError, match=r"epoch_2\.pt changed while"):
        ckptavg.average(run, out=tmp_path / "o.pt", digests=True)
    assert listing(tmp_path) == ["run", "run/epoch_1.pt", "run/epoch_2.pt"]


# Verified


@pytest.fixture
def made(tmp_path):
    """An average of three checkpoints with an optimizer's state of 4 kB each."""
    for i in (1, 2, 3):
        save(tmp_path / f"epoch_{i}.pt", randoms(i), optimizer={"moments": torch.zeros(1024)})
    run = open_run(tmp_path)
    ckptavg.average(run, out=tmp_path / "o.safetensors", digests=True)
    return tmp_path


INTACT = [
    ("record", "o.safetensors", "same"),
    ("weights", "o.safetensors", "same"),
    *[("input", f"epoch_{i}.pt", "same") for i in (1, 2, 3)],
]


def differing(found):
    return [finding for finding in found if finding not in INTACT]


def test_verify_reports_unchanged_files_as_same(made):
    assert outcome(made / "o.safetensors") == INTACT


def test_verify_reports_a_flipped_bit_in_any_input(made):
    path = made / "epoch_2.pt"
    for tensor in open_checkpoint(path).tensors.values():
        start = tensor.pieces[0].offset
        for at in (start, start + tensor.nbytes - 1):
            flip(path, at)
            assert differing(outcome(made / "o.safetensors")) == [
                ("input", "epoch_2.pt", "changed")
            ]
            flip(path, at)
    assert outcome(made / "o.safetensors") == INTACT


def test_verify_reports_renamed_inputs_as_changed(made):
    (made / "epoch_1.pt").rename(made / "x")
    (made / "epoch_3.pt").rename(made / "epoch_1.pt")
    (made / "x").rename(made / "epoch_3.pt")
    assert differing(outcome(made / "o.safetensors")) == [
        ("input", f"epoch_{i}.pt", "changed") for i in (1, 3)
    ]


def test_verify_reports_truncated_and_missing_inputs(made):
    path = made / "epoch_1.pt"
    path.write_bytes(path.read_bytes()[:-500])
    (made / "epoch_3.pt").unlink()
    assert differing(outcome(made / "o.safetensors")) == [
        ("input", "epoch_1.pt", "unreadable"),
        ("input", "epoch_3.pt", "not there"),
    ]


def test_verify_accepts_rewritten_weights(made):
    state = read_state_dict(open_checkpoint(made / "epoch_1.pt"))
    torch.save({"state_dict": dict(reversed(state.items())), "epoch": 5}, made / "epoch_1.pt")
    assert outcome(made / "o.safetensors") == INTACT


def test_verify_reports_flipped_bits_in_an_output(made):
    """Every seventh byte in turn; a digit beyond a number's precision, or a word, means nothing."""
    path = made / "o.safetensors"
    for i in (1, 2, 3):
        (made / f"epoch_{i}.pt").unlink()
    whole, unnoticed = path.read_bytes(), 0
    record, weights = (
        open_checkpoint(path).provenance,
        by_rule(read_state_dict(open_checkpoint(path))),
    )
    for at in range(0, len(whole), 7):
        flip(path, at)
        try:
            checkpoint = open_checkpoint(path)
            seen = [f.state for f in Verifier().verify(checkpoint) if f.part != "input"]
        except CheckpointError:
            seen = []
        if seen == ["same", "same"]:
            unnoticed += 1
            assert checkpoint.provenance == record
            assert by_rule(read_state_dict(checkpoint)) == weights
        path.write_bytes(whole)
    assert unnoticed < 5


@pytest.mark.parametrize("name", ["o.pt", "o.ckpt"])
def test_verify_checks_the_archive_of_a_torch_output(made, name):
    """What it keeps beside the weights, no digest covers, but the zip's own checksums do."""
    for i in (1, 2, 3):
        save(made / f"epoch_{i}.pt", randoms(i), note="as it was")
    run = open_run(*(made / f"epoch_{i}.pt" for i in (1, 2, 3)))
    ckptavg.average(run, out=made / name, digests=True)
    before = [(name if n == "o.safetensors" else n, p, s) for p, n, s in INTACT]
    expected = [("archive", name, "same"), *((p, n, s) for n, p, s in before)]
    assert outcome(made / name) == expected
    flip(made / name, (made / name).read_bytes().index(b"as it was") + 4)
    assert outcome(made / name) == [("archive", name, "changed"), *expected[1:]]


def test_verify_checks_zip_checksums_where_present(tmp_path):
    path = save(tmp_path / "a.pt", randoms(1), optimizer={"moments": torch.zeros(1024)})
    assert outcome(path) == [("archive", "a.pt", "same")]
    flip(path, path.read_bytes().index(bytes(4096)) + 9)
    assert outcome(path) == [("archive", "a.pt", "changed")]
    assert "data/" in Verifier().verify(open_checkpoint(path))[0].why
    torch.save(randoms(1), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save(tmp_path / "b.safetensors", randoms(1))
    torch.serialization.set_crc32_options(False)
    try:
        save(tmp_path / "none.pt", randoms(1))
    finally:
        torch.serialization.set_crc32_options(True)
    for name in ("old.pt", "b.safetensors", "none.pt"):
        assert outcome(tmp_path / name) == []


def test_verify_takes_the_key_that_was_averaged(tmp_path):
    for i in (1, 2):
        torch.save({"model": randoms(i), "ema": {"now": randoms(10 + i)}}, tmp_path / f"{i}.pt")
    run = open_run(tmp_path, key="ema.now")
    ckptavg.average(run, out=tmp_path / "o.safetensors", digests=True)
    assert recorded(tmp_path / "o.safetensors")[1] == [by_rule(randoms(10 + i)) for i in (1, 2)]
    assert {state for _, _, state in outcome(tmp_path / "o.safetensors")} == {"same"}


@pytest.mark.parametrize("output", ["o.pt", "runs/swa/o.pt", "elsewhere/o.pt"])
def test_verify_finds_inputs_moved_with_the_output(tmp_path, monkeypatch, output):
    (tmp_path / "old" / output).parent.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(tmp_path / "old")
    save_states(Path("runs/swa"), [randoms(1), randoms(2)])
    ckptavg.average(open_run("runs/swa"), out=output, digests=True)
    shutil.move(tmp_path / "old", tmp_path / "new")
    monkeypatch.chdir(tmp_path)
    found = outcome(Path("new") / output)
    assert [state for part, _, state in found if part == "input"] == ["same"] * 2
    save(tmp_path / "runs/swa/epoch_1.pt", randoms(7))  # another run where the first one was
    assert outcome(Path("new") / output) == found


def test_verify_reads_remote_inputs(tmp_path, store):
    save_states(tmp_path / "run", [randoms(1), randoms(2)])
    run = open_run(upload(tmp_path / "run"))
    out = tmp_path / "o.pt"
    ckptavg.average(run, out=out, digests=True)
    assert recorded(out)[1] == [by_rule(randoms(1)), by_rule(randoms(2))]
    assert {state for _, _, state in outcome(out)} == {"same"}
    store.store.clear()
    assert [state for _, _, state in outcome(out)][3:] == ["not there"] * 2


def test_verify_survives_a_malicious_record(tmp_path):
    strange = {
        "digest": "x",
        "base": {"path": 5},
        "checkpoints": [{"path": "/dev/zero", "digest": "x"}, {"path": "a\0b", "digest": "x"}, {}],
    }
    path = save(tmp_path / "o.safetensors", randoms(1), ckptavg=json.dumps(strange))
    assert [(part, state) for part, _, state in outcome(path)] == [
        ("record", "changed"),
        ("weights", "changed"),
        ("input", "unreadable"),
        ("input", "not there"),
        ("input", "unreadable"),
        ("base", "unreadable"),
    ]


def test_digests_of_a_repeated_checkpoint_are_equal(tmp_path):
    one, two = opened(tmp_path, [{"w": torch.randn(9)} for _ in range(2)])
    ckptavg.average([one, two, one], out=tmp_path / "out.pt", digests=True)
    made = ckptavg.open_checkpoint(tmp_path / "out.pt").provenance
    digests = [source.digest for source in made.inputs]
    assert digests[0] == digests[2] != digests[1]
