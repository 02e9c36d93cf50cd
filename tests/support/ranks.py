"""Runs commands as one of several processes, and notes what each of them said and read.

``python ranks.py PLAN.json`` under torchrun; or with ``count`` in the plan it starts them itself,
under no launcher. A plan has ``commands``: ``args``, ``other`` (arguments of process 1), and
``harm``: what happens to which process after some reads. Or ``call`` in place of ``args``: a
function as ``file.py:name``, called within a group of torch.distributed, that gives a ``value``.
"""

import contextlib
import io
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch.distributed as dist

import ckptavg.cli.build
import ckptavg.evaluation.evaluate  # noqa: F401
from ckptavg.cli import main
from ckptavg.errors import CheckpointError
from ckptavg.formats import reader
from ckptavg.outputs.sinks import FileSink
from ckptavg.specs.importing import call_factory

_read_at = reader._read_at
_write_at = FileSink._write_at
READS = 2  # before harm is done


def broken(command):
    raise CheckpointError("the disk of this test is broken")


HARMS = {
    "kill": lambda command: os.kill(os.getpid(), signal.SIGKILL),
    "terminate": lambda command: signal.raise_signal(signal.SIGTERM),
    "break": broken,
    "appear": lambda command: Path(command["args"][-1]).write_text("mine"),
    "linger": lambda command: time.sleep(3),
}


def called(function):
    """What a user's function gives within a group of the user's."""
    dist.init_process_group("gloo")
    value = call_factory(function)
    dist.destroy_process_group()
    return {"code": 0, "value": value}


def run(command, rank):
    """One command in this process: exit code, bytes read, first and last written, what it said."""
    if "call" in command:
        return called(command["call"])
    read, ends = [0, 0], []
    harm = HARMS.get(command.get("harm", {}).get(str(rank)))

    def counted(file, out, offset):
        got = _read_at(file, out, offset)
        read[0], read[1] = read[0] + got, read[1] + 1
        if read[1] == READS and harm:
            harm(command)
        return got

    def noted(sink, handle, data, offset):
        ends.extend((offset, offset + len(data)))
        _write_at(sink, handle, data, offset)

    reader._read_at, FileSink._write_at = counted, noted
    out, err = io.StringIO(), io.StringIO()
    args = command["other"] if rank == 1 and "other" in command else command["args"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(args)
        except SystemExit as error:
            code = error.code or 0
    wrote = [min(ends, default=0), max(ends, default=0)]
    said = {"out": out.getvalue(), "err": err.getvalue()}
    return {"code": code, "read": read[0], "wrote": wrote, **said}


def work(plan, numbers):
    """The commands of some numbers, as the process that the environment says this is."""
    rank = int(os.environ["RANK"])
    for i in numbers:
        result = run(plan["commands"][i], rank)
        Path(f"{plan['name']}-{i}-{rank}.json").write_text(json.dumps(result))
    return result["code"]


def start(plan, number, count):
    """Processes for one command, by fork: importing torch takes longer than all they do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for rank in range(count):
        if not os.fork():
            os.environ |= {"RANK": str(rank), "LOCAL_WORLD_SIZE": str(count)}
            os._exit(work(plan, [number]))  # taking torch down takes seconds
    for _ in range(count):
        os.wait()


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
    planned = json.loads(Path(sys.argv[1]).read_text())
    numbers = range(len(planned["commands"]))
    if "RANK" in os.environ:
        sys.exit(work(planned, numbers))
    for n in numbers:
        start(planned, n, planned["count"])
