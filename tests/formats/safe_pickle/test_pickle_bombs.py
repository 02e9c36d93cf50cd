"""Small files that mean huge work: opened within limits, or refused."""

from __future__ import annotations

import struct

from pickle import (  # isort: skip
    ADDITEMS, APPEND, APPENDS, BUILD, DUP, EMPTY_DICT, EMPTY_LIST, EMPTY_SET, EMPTY_TUPLE, INST,
    LONG4, MARK, NEWOBJ, NONE, OBJ, POP, PROTO, PUT, REDUCE, SETITEM, SETITEMS, STACK_GLOBAL, STOP,
    TUPLE, TUPLE1, TUPLE2,
)  # fmt: skip

from assembler import get, glob, number, put, tensor, text
from selecting import first_only

BIG = EMPTY_LIST + put(0) + MARK + NONE * 50_000 + APPENDS + POP
WIDE = MARK + NONE * 30_000 + TUPLE + put(0) + POP
DOUBLED = EMPTY_TUPLE + (DUP + TUPLE2) * 80  # 2^80 leaves
LIST = glob("builtins", "list") + put(1) + POP
FROM_TYPE = glob("torch._tensor", "_rebuild_from_type_v2") + put(2) + POP


def fan(push: bytes, leaf: bytes, fill) -> bytes:
    """Containers of containers, each level many times the one below: leaves in the billions."""
    levels = leaf + put(10) + POP
    for level in range(11, 15):
        levels += push + put(level) + MARK + fill(get(level - 1)) + POP
    return levels


def named(inner: bytes) -> bytes:
    return b"".join(text(f"k{i}") + inner for i in range(400)) + SETITEMS


def in_weights(entry: bytes = b"", before: bytes = b"") -> bytes:
    """A pickled state dict with an odd entry, or something else read before it."""
    return before + EMPTY_DICT + MARK + text("w") + tensor() + entry + SETITEMS


def beside_weights(entry: bytes, key="model") -> bytes:
    return EMPTY_DICT + MARK + text(key) + in_weights() + entry + SETITEMS


def bombs() -> dict[str, bytes]:
    collisions = [number(i * (2**61 - 1)) for i in range(1, 40_000)]
    dictionary = b"".join(number(i) + NONE for i in range(20_000))
    many = b"".join(text(f"ema{i}") + get(0) for i in range(10_000))
    wrapped = b"".join(text(f"ema{i}") + EMPTY_LIST + get(0) + APPEND for i in range(10_000))
    sharing = b"".join(text(f"{i}") + in_weights(text("l") + get(0)) for i in range(5000))
    wide_dict = EMPTY_DICT + put(0) + MARK + dictionary + SETITEMS + POP
    name = text("x" * 500_000) + put(0)
    long_keys = (
        name
        + NONE
        + b"".join(
            get(0) + text(f"k{i}") + TUPLE2 + NONE + get(0) + text(f"k{i}") + STACK_GLOBAL + NONE
            for i in range(2500)
        )
    )
    long_metrics = name + EMPTY_DICT + MARK
    long_metrics += b"".join(text(f"k{i}") + number(i) for i in range(5000)) + SETITEMS
    long_paths = name + EMPTY_DICT + MARK
    long_paths += b"".join(text(f"k{i}") + in_weights() for i in range(5000)) + SETITEMS
    fanned_lists = fan(EMPTY_LIST, NONE, lambda inner: inner * 400 + APPENDS) + get(14)
    fanned_dicts = fan(EMPTY_DICT, EMPTY_LIST, named) + get(14)
    before = {
        "copies by REDUCE": BIG + LIST + (get(1) + get(0) + TUPLE1 + REDUCE) * 20_000,
        "copies by NEWOBJ": BIG + LIST + (get(1) + get(0) + TUPLE1 + NEWOBJ) * 20_000,
        "copies by OBJ": BIG + LIST + (MARK + get(1) + get(0) + OBJ) * 20_000,
        "copies by INST": BIG + (MARK + get(0) + INST + b"builtins\nlist\n") * 20_000,
        "copies inside a subclass": BIG + LIST + FROM_TYPE
        + (get(2) + MARK + get(1) + NONE + get(0) + TUPLE1 + NONE + TUPLE + REDUCE) * 20_000,
        "pairs of great length": BIG + glob("collections", "OrderedDict") + EMPTY_LIST + MARK
        + get(0) * 50_000 + APPENDS + TUPLE1 + REDUCE,
        "attributes merged": EMPTY_DICT + put(0) + MARK + dictionary + SETITEMS
        + (glob("x", "y") + EMPTY_TUPLE + REDUCE + get(0) + get(0) + TUPLE2 + BUILD) * 10_000,
        "wide keys": WIDE + EMPTY_DICT + (get(0) + NONE + SETITEM) * 20_000,
        "wide members": WIDE + EMPTY_SET + MARK + get(0) * 20_000 + ADDITEMS,
        "wide arguments": WIDE + glob("x", "y") + put(1)
        + (get(1) + get(0) + REDUCE + POP) * 20_000,
        "wide state": WIDE + EMPTY_LIST + (get(0) + BUILD) * 20_000,
        "a huge key": LONG4 + struct.pack("<i", 500_000) + b"\x7f" * 500_000 + put(0) + POP
        + EMPTY_DICT + (get(0) + NONE + SETITEM) * 50_000,
        "colliding keys": EMPTY_DICT + MARK + b"".join(c + NONE for c in collisions) + SETITEMS,
        "colliding tuples": EMPTY_SET + MARK + b"".join(c + TUPLE1 for c in collisions) + ADDITEMS,
        "colliding memo indices": EMPTY_LIST
        + b"".join(PUT + b"%d\n" % (i * (2**61 - 1)) for i in range(1, 40_000)),
        "a doubled member": EMPTY_SET + MARK + DOUBLED + ADDITEMS,
        "nested deeply": EMPTY_LIST * 100_000 + APPEND * 99_999,
        "a memo index of 4 billion": EMPTY_LIST + put(2**32 - 1),
    }  # fmt: skip
    entries = {
        "a doubled key": DOUBLED + NONE,
        "a doubled type": text("x") + DOUBLED + EMPTY_TUPLE + REDUCE,
        "a doubled dtype": text("x") + glob("torch._utils", "_rebuild_tensor_v3") + MARK
        + NONE * 6 + DOUBLED + TUPLE + REDUCE,
        "fanned lists": text("x") + fanned_lists,
        "fanned dicts": text("x") + fanned_dicts,
        "long keys": long_keys,
        "numbers below a long name": long_metrics,
        "weights below a long name": long_paths,
    }  # fmt: skip
    return (
        {name: in_weights(before=data) for name, data in before.items()}
        | {f"{name}, in the weights": in_weights(data) for name, data in entries.items()}
        | {f"{name}, beside the weights": beside_weights(data) for name, data in entries.items()}
        | {f"{name}, no weights": beside_weights(data, "?") for name, data in entries.items()}
        | {
            "a doubled type alone": DOUBLED + EMPTY_TUPLE + REDUCE,
            "one dict many times, in the weights": wide_dict + in_weights(many),
            "one dict many times, beside the weights": wide_dict + beside_weights(many),
            "one list many times, beside the weights": BIG + beside_weights(many),
            "one list many times, no weights": BIG + beside_weights(many, "?"),
            "weights beside one list, no weights": BIG + beside_weights(sharing, "?"),
            "lists of one list, beside the weights": BIG + beside_weights(wrapped),
            "lists of one list, no weights": BIG + beside_weights(wrapped, "?"),
        }
    )


BOMBS = bombs()


def test_pickle_limits_admit_honest_file(forge, open_within_limits):
    path = forge(PROTO + b"\2" + in_weights(before=BIG) + STOP, {"0": bytes(16)})
    assert open_within_limits(path).startswith("opened")


@first_only("bomb", BOMBS)
def test_pickle_bomb_takes_little_time_and_memory(bomb, forge, open_within_limits):
    open_within_limits(forge(PROTO + b"\2" + BOMBS[bomb] + STOP, {"0": bytes(16)}))
