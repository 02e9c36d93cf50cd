"""Windows of text and token files: each token predicted once, and what is said if none can be."""

import json
import pickle
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ckptavg.data.token_windows import (
    IGNORED,
    TokenFile,
    Windows,
    default_length,
    open_text,
    open_tokens,
)
from ckptavg.errors import SpecError

TEXT = "the cat sat on the mat\nthe dog  sat\n"
WORDS = ["[UNK]", "the", "cat", "sat", "on", "mat", "dog"]


@st.composite
def layouts(draw):
    length = draw(st.integers(2, 12))
    return draw(st.integers(2, 80)), length, draw(st.none() | st.integers(1, length - 1))


@pytest.fixture
def tokenizer(tmp_path):
    """A directory with a tokenizer of words."""
    return save_tokenizer(tmp_path / "tokenizer")


def save_tokenizer(directory, *, first=None):
    """A tokenizer of words, which puts ``first`` in front of a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    if first is not None:
        pair = (first, WORDS.index(first))
        inner.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[pair]
        )
    PreTrainedTokenizerFast(tokenizer_object=inner).save_pretrained(directory)
    return str(directory)


def text_file(tmp_path, content=TEXT):
    path = tmp_path / "text.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def ids_of(windows):
    """The tokens that windows were cut from, read back from their labels."""
    return [int(i) for w in windows for i in w["labels"] if i != IGNORED]


def error_of(build, *args, **keywords):
    with pytest.raises(SpecError) as caught:
        build(*args, **keywords)
    return str(caught.value)


# Windows


@pytest.mark.slow
@given(layouts())
def test_windows_predict_each_token_once(layout):
    count, length, stride = layout
    tokens = torch.arange(100, 100 + count)
    windows = Windows(tokens, length, stride)
    predicted = []
    for window in (windows[i] for i in range(len(windows))):
        ids, labels = window["input_ids"], window["labels"]
        assert ids.shape == labels.shape == (min(length, count),)
        kept = labels != IGNORED
        assert torch.equal(ids[kept], labels[kept])
        predicted += labels[1:][kept[1:]].tolist()
    assert predicted == tokens[1:].tolist()


@given(layouts())
def test_windows_give_context_by_stride(layout):
    """Hugging Face's guide to perplexity, with the token that windows share counted in."""
    count, length, stride = layout
    windows = Windows(torch.arange(count), length, stride)
    least = length - (stride or length - 1)
    for number, window in enumerate(windows[i] for i in range(len(windows))):
        places = [t for t, label in enumerate(window["labels"].tolist()) if label != IGNORED]
        ids = window["input_ids"].tolist()
        assert all(ids[t] - ids[0] == t for t in places)  # its context is what precedes it
        assert number == 0 or min(places) == least


@given(layouts())
def test_windows_always_predict_some_token(layout):
    count, length, stride = layout
    windows = Windows(torch.arange(count), length, stride)
    assert all((windows[i]["labels"][1:] != IGNORED).any() for i in range(len(windows)))
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_windows_pad_last_window_at_end():
    last = Windows(torch.tensor([5, 6, 7, 8, 9, 10]), 4)[1]
    assert last["input_ids"].tolist() == [8, 9, 10, 0]
    assert last["labels"].tolist() == [IGNORED, 9, 10, IGNORED]


def test_windows_collate_into_batches():
    batch = next(iter(DataLoader(Windows(torch.arange(20), 5), 3)))
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 4], [4, 5, 6, 7, 8], [8, 9, 10, 11, 12]]
    assert batch["labels"].dtype == torch.int64


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"length": 1}, "length is expected to be a number of tokens from 2 but got 1"),
        ({"length": "many"}, "but got many"),
        ({"length": True}, "but got True"),
        ({"length": 8, "stride": 8}, "stride is expected to be from 1 to length - 1 (7) but got 8"),
        ({"length": 8, "stride": 0}, "but got 0"),
        ({"length": 8, "stride": 0.5}, "but got 0.5"),
    ],
)
def test_windows_refuse_bad_length_and_stride(arguments, said):
    assert said in error_of(Windows, torch.arange(20), **arguments)


@pytest.mark.parametrize("count", [0, 1])
def test_windows_refuse_fewer_than_two_tokens(count):
    assert f"the data has {count} tokens" in error_of(Windows, torch.arange(count))


# Files of tokens


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "uint32", "int64"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_open_tokens_reads_npy_of_any_integer(tmp_path, dtype, order):
    ids = np.array([3, 1, 100, 5, 9], dtype=np.dtype(dtype).newbyteorder(order))
    np.save(tmp_path / "ids.npy", ids)
    windows = open_tokens(str(tmp_path / "ids.npy"), length=3)
    assert windows[0]["input_ids"].dtype == torch.int64
    assert ids_of(windows) == [3, 1, 100, 5, 9]


@pytest.mark.parametrize("dtype", [None, "uint16", "int32", "uint32", "int64", "uint64"])
def test_open_tokens_reads_raw_integers(tmp_path, dtype):
    """Without a type they are what nanoGPT writes."""
    ids = np.array([3, 1, 200, 5, 9])
    ids.astype(np.dtype(dtype or "uint16").newbyteorder("<")).tofile(tmp_path / "val.bin")
    arguments = {} if dtype is None else {"dtype": dtype}
    assert ids_of(open_tokens(str(tmp_path / "val.bin"), **arguments)) == ids.tolist()


def test_open_tokens_pickles_path_only(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(100_000, dtype=np.uint32))
    windows = open_tokens(str(tmp_path / "ids.npy"), length=64)
    sent = pickle.dumps(windows)
    assert len(sent) < 1000
    assert pickle.loads(sent)[5]["input_ids"].tolist() == windows[5]["input_ids"].tolist()


def test_token_file_is_memory_mapped(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(10, dtype=np.uint16))
    assert isinstance(TokenFile(tmp_path / "ids.npy", "uint16")._ids, np.memmap)


NO_TOKENS = {
    "a matrix": (np.zeros((2, 2), int), "one dimension of integers but holds int64"),
    "a number": (np.array(5), "shape ()"),
    "floats": (np.zeros(3), "holds float64"),
    "objects": (np.array([{}], dtype=object), "cannot be read as token ids"),
    "one token": (np.zeros(1, int), "the data has 1 tokens"),
    "no token": (np.zeros(0, int), "the data has 0 tokens"),
}


@pytest.mark.parametrize(("content", "said"), NO_TOKENS.values(), ids=NO_TOKENS)
def test_open_tokens_refuses_npy_without_tokens(tmp_path, content, said):
    np.save(tmp_path / "ids.npy", content, allow_pickle=True)
    assert said in error_of(open_tokens, str(tmp_path / "ids.npy"))


@pytest.mark.parametrize("content", [b"abc", b"PK\x03\x04zzz", pickle.dumps([1]), b"\x93NUMPY"])
def test_open_tokens_refuses_broken_npy(tmp_path, content):
    (tmp_path / "ids.npy").write_bytes(content)
    assert "cannot be read as token ids" in error_of(open_tokens, str(tmp_path / "ids.npy"))


def test_open_tokens_refuses_truncated_npy(tmp_path):
    np.save(tmp_path / "ids.npy", np.arange(100))
    with open(tmp_path / "ids.npy", "r+b") as file:
        file.truncate(500)
    assert "cannot be read as token ids" in error_of(open_tokens, str(tmp_path / "ids.npy"))


def test_open_tokens_executes_no_pickle(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "touched"), "w"))

    np.save(tmp_path / "ids.npy", np.array([Hostile()], dtype=object), allow_pickle=True)
    error_of(open_tokens, str(tmp_path / "ids.npy"))
    assert not (tmp_path / "touched").exists()


def test_open_tokens_refuses_partial_integer(tmp_path):
    (tmp_path / "val.bin").write_bytes(b"abc")
    assert "val.bin cannot be read as token ids" in error_of(open_tokens, str(tmp_path / "val.bin"))


def test_open_tokens_refuses_bad_dtype(tmp_path):
    (tmp_path / "val.bin").write_bytes(b"abcd")
    np.save(tmp_path / "ids.npy", np.arange(4))
    message = error_of(open_tokens, str(tmp_path / "val.bin"), dtype="float16")
    assert "dtype is expected to be one of uint8, int16, uint16" in message
    assert "the header of" in error_of(open_tokens, str(tmp_path / "ids.npy"), dtype="uint16")


@pytest.mark.parametrize("build", [open_text, open_tokens])
def test_open_text_and_tokens_refuse_missing_or_empty_file(tmp_path, build):
    assert "none.npy does not exist. Expected" in error_of(build, str(tmp_path / "none.npy"))
    assert "is no file" in error_of(build, str(tmp_path))
    (tmp_path / "empty.bin").touch()
    assert "empty.bin is empty" in error_of(build, str(tmp_path / "empty.bin"))
    missing = error_of(build, str(tmp_path / "emtpy.bin"))
    assert f"does not exist. Did you mean {tmp_path / 'empty.bin'}?" in missing


def test_open_tokens_names_missing_numpy(tmp_path, monkeypatch):
    np.save(tmp_path / "ids.npy", np.arange(4))
    monkeypatch.setitem(sys.modules, "numpy", None)
    assert "pip install numpy" in error_of(open_tokens, str(tmp_path / "ids.npy"))


# Text


def test_open_text_tokenizes_file_as_whole(tmp_path, tokenizer):
    windows = open_text(text_file(tmp_path), tokenizer=tokenizer, length=4)
    assert ids_of(windows) == [1, 2, 3, 4, 1, 5, 1, 6, 3]
    assert len(windows) == 3


def test_open_text_keeps_special_first_token(tmp_path):
    directory = save_tokenizer(tmp_path / "tokenizer", first="on")
    assert ids_of(open_text(text_file(tmp_path, "the cat"), tokenizer=directory)) == [4, 1, 2]


def test_open_text_logs_tokens_and_windows(tmp_path, tokenizer, caplog):
    caplog.set_level("INFO", "ckptavg")
    open_text(text_file(tmp_path), tokenizer=tokenizer, length=4, stride=2)
    assert "9 tokens in 4 windows of 4, 2 apart" in caplog.text


def test_open_text_refuses_non_utf8(tmp_path, tokenizer):
    path = text_file(tmp_path, b"the \xff cat")
    assert "text.txt is no UTF-8 text" in error_of(open_text, path, tokenizer=tokenizer)


def test_open_text_refuses_single_token(tmp_path, tokenizer):
    path = text_file(tmp_path, "cat\n")
    assert "the data has 1 tokens" in error_of(open_text, path, tokenizer=tokenizer)


def test_open_text_needs_tokenizer(tmp_path):
    message = error_of(open_text, text_file(tmp_path))
    assert "tokenizer=DIR" in message
    assert "hf:DIR" in message


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": json.dumps({"model_type": "gpt2", "vocab_size": 9})},
        {"tokenizer.json": "{}", "tokenizer_config.json": "{}"},
        {"tokenizer.json": "no json"},
    ],
    ids=["nothing", "a configuration only", "an empty tokenizer", "a broken one"],
)
def test_open_text_refuses_directory_without_tokenizer(tmp_path, files):
    directory = tmp_path / "model"
    directory.mkdir()
    for name, content in files.items():
        (directory / name).write_text(content)
    message = error_of(open_text, text_file(tmp_path), tokenizer=str(directory))
    assert f"{directory} holds no tokenizer" in message
    assert "\n" not in message


def test_open_text_downloads_no_tokenizer(tmp_path, monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.chdir(tmp_path)
    assert "gpt2 holds no tokenizer" in error_of(open_text, text_file(tmp_path), tokenizer="gpt2")


def test_open_text_names_missing_transformers(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = error_of(open_text, text_file(tmp_path), tokenizer=tokenizer)
    assert "pip install transformers" in message


# The length that a model takes


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({"max_position_embeddings": 512}, 512),
        ({"n_positions": 256}, 256),
        ({"n_ctx": 128}, 128),
        ({"n_positions": 256, "n_ctx": 128}, 128),
        ({"max_position_embeddings": 131072}, 1024),
        ({"max_position_embeddings": -1}, 1024),
        ({"max_position_embeddings": None}, 1024),
        ({}, 1024),
        ([], 1024),
    ],
)
def test_default_length_is_context_of_model(tmp_path, config, length):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert default_length(tmp_path) == length


def test_default_length_without_config_is_1024(tmp_path):
    assert default_length(tmp_path) == 1024
    (tmp_path / "config.json").write_bytes(b"\xff")
    assert default_length(tmp_path) == 1024
