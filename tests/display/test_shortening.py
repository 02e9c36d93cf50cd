"""Names shortened so that they stay different, texts wrapped between words."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from ckptavg.display.shortening import shorten_names, wrap_words


@pytest.mark.parametrize(
    ("names", "room", "shortened"),
    [
        (["epoch_1.pt", "last.pt"], 10, ["epoch_1.pt", "last.pt"]),
        (["average of 12 (uniform)", "last.pt"], 11, ["avera…form)", "last.pt"]),
        (["層層層層層", "x"], 7, ["層…層", "x"]),
    ],
)
def test_shorten_names_cuts_in_middle(names, room, shortened):
    assert shorten_names(names, room) == shortened


@pytest.mark.parametrize(
    "names",
    [
        [f"lit-epoch={n:02}-val_acc=0.46.ckpt" for n in range(100)],
        [f"checkpoint-{n}/pytorch_model.bin" for n in range(500, 20_000, 500)],
        [f"runs/{run}/constant-lr/epoch_160.pt (last)" for run in ("seed0", "seed1", "seed22")],
        [f"model_iter{n}_of_some_long_name_in_the_middle_x{n % 2}.safetensors" for n in range(9)],
        ["epoch_160.pt (last) [state_dict]", "epoch_160.pt (last) [state_dict_ema]"],
        ["a" * 40, "a" * 41, "a" * 42],
        [f"{'x' * 30}{layer}.{expert}{'y' * 30}" for layer in range(12) for expert in range(64)],
        # The two kinds differ in the middle, their members further on.
        [f"{'x' * 30}{kind}{'y' * 4}{n}{'z' * 30}" for kind in "ab" for n in range(9)],
    ],
)
@pytest.mark.parametrize("room", [14, 20, 24])
def test_shorten_names_keeps_names_different(names, room):
    shortened = shorten_names(names, room)
    assert all(len(name) <= room for name in shortened)
    assert len({*shortened}) == len(names)


LONG = "resnet50-cyclic-sgd-lr0.05-epoch=119-step=150000-val_loss=0.8531.ckpt"


@pytest.mark.parametrize("room", range(20, 70))
def test_shorten_names_keeps_distinguishing_marks(room):
    keys = ("state_dict", "ema_state_dict")
    names = [f"{stem} [{key}]" for key in keys for stem in (f"{LONG} (last)", "average of 5")]
    shortened = shorten_names(names, room)
    assert all(len(name) <= room for name in shortened)
    assert all("(last) [" in name for name in shortened[::2])
    for name, beginning in zip(shortened, ["s", "s", "e", "e"], strict=True):
        assert name.rpartition("[")[2].startswith(beginning)
        assert name.endswith("]")
    assert shortened[0][:3] == LONG[:3]
    assert shortened[1][:3] == "ave"


def test_shorten_names_gives_names_half_of_room():
    names = [f"{LONG} (last)", LONG.replace("119", "118")]
    assert shorten_names(names, 20)[0] == "resnet50…ckpt (last)"
    assert shorten_names([f"{LONG} (uniform)"], 12) == ["resnet…form)"]


@pytest.mark.parametrize(
    ("name", "room", "shortened"),
    [
        ("checkpoint-11.pth.tar (last)", 24, "checkp…11.pth.tar (last)"),
        ("checkpoint-11.pth.tar (last)", 20, "checkp…th.tar (last)"),  # too narrow
        ("output/resnet10t-32/model_7.pth.tar", 24, "output/resne…l_7.pth.tar"),
        ("epoch=11-step=1200-val_acc=0.512.ckpt", 24, "epoch=11-step=1200….ckpt"),
    ],
)
def test_shorten_names_keeps_step(name, room, shortened):
    assert shorten_names([name], room) == [shortened]


marked = st.tuples(st.text("ab(]c ", max_size=20), st.sampled_from(["", " (last)", " [m]"]),
                   st.sampled_from(["", " [state_dict]", " [ema]", " ()"]))  # fmt: skip


@settings(deadline=None)
@given(st.lists(marked.map("".join), max_size=8), st.integers(3, 30))
def test_shorten_names_fits_marked_names(names, room):
    shortened = shorten_names(names, room)
    assert all(cell_len(name) <= room for name in shortened)
    for name, short in zip(names, shortened, strict=True):
        assert (short == name) or cell_len(name) > room


@pytest.mark.parametrize("room", range(17, 34))
def test_shorten_names_cuts_no_number(room):
    names = [f"checkpoint-{n}.pth.tar [state_dict_ema]" for n in (144, 1520, 16000)]
    for name, short in zip(names, shorten_names(names, room), strict=True):
        assert name[:16].partition(".")[0] in short


@settings(deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["C"]), max_size=30)), st.integers(3, 20))
def test_shorten_names_fits_and_is_consistent(names, room):
    shortened = shorten_names(names, room)
    assert all(cell_len(name) <= room for name in shortened)
    assert len({*zip(names, shortened, strict=True)}) == len({*names})
    for name, short in zip(names, shortened, strict=True):
        assert (short == name) or cell_len(name) > room


@settings(deadline=None)
@given(st.lists(st.text("ab", min_size=1, max_size=9), min_size=1), st.integers(1, 30))
def test_wrap_words_breaks_between_words_only(words, room):
    lines = wrap_words(" ".join(words), room)
    assert " ".join(lines) == " ".join(words)
    assert all(len(line) <= room or " " not in line for line in lines)
    for line, following in pairwise(lines):
        assert len(f"{line} {following.split(' ')[0]}") > room


@pytest.mark.parametrize("room", range(1, 40))
def test_wrap_words_keeps_intervals_whole(room):
    text = "best: a b; Δ to the last +1.50 [-0.46, +2.5e-05] and [inf, nan] of [some words]"
    lines = wrap_words(text, room)
    assert any("+1.50 [-0.46, +2.5e-05]" in line for line in lines)
    assert any("[inf, nan]" in line for line in lines)
    assert " ".join(lines) == text
