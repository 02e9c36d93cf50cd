"""Inputs at web servers: with ranges, without them, and with answers that never end."""

from __future__ import annotations

import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers import save

import ckptavg
from ckptavg.errors import CheckpointError
from ckptavg.formats import open_checkpoint
from ckptavg.io import remote

pytest.importorskip("aiohttp")
pytest.importorskip("fsspec")

PART = 1 << 16


class Server(ThreadingHTTPServer):
    """Serves one file under every name.

    Attributes:
        content: The file's bytes.
        claimed: The size that it tells.
        heeds_ranges: Whether a range is answered by the range.
        endless: Whether every answer goes on for ever.
        sent: Bytes that were sent.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.claimed, self.sent = b"", 0, 0
        self.heeds_ranges, self.endless = True, False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/model.pt"

    def serve(self, content: bytes, claimed: int | None = None) -> None:
        self.content, self.claimed = content, claimed or len(content)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.send_response(200)
        self.send_header("Content-Length", str(self.server.claimed))
        self.send_header("Content-Type", "application/octet-stream")
        self.end_headers()

    def do_GET(self):
        server, asked = self.server, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
        begin, end = (int(asked[1]), int(asked[2]) + 1) if asked else (0, server.claimed)
        partial = server.heeds_ranges and asked is not None
        content = server.content[begin:end] if partial else server.content
        self.send_response(206 if partial else 200)
        if not server.endless:
            self.send_header("Content-Length", str(len(content) if partial else server.claimed))
        self.end_headers()
        at = 0
        try:
            while at < len(content) or server.endless or (not partial and at < server.claimed):
                part = content[at : at + PART] or bytes(PART)
                self.wfile.write(part)
                at += len(part)
                server.sent += len(part)
        except OSError:
            pass


@pytest.fixture
def server(monkeypatch):
    remote._shared_pieces.cache_clear()
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def saved(tmp_path, count: int) -> bytes:
    torch.manual_seed(0)
    return save(tmp_path / "model.pt", {"w": torch.randn(count), "v": torch.randn(7)}).read_bytes()


@pytest.mark.parametrize("heeds_ranges", [True, False])
def test_http_small_file_opens_with_or_without_ranges(server, tmp_path, heeds_ranges):
    server.serve(saved(tmp_path, 1000))
    server.heeds_ranges = heeds_ranges
    assert open_checkpoint(server.url).nbytes == 4028


def test_http_large_file_is_read_by_ranges(server, tmp_path):
    server.serve(saved(tmp_path, 1_000_000))
    average = ckptavg.average(ckptavg.open_run(server.url))
    expected = torch.load(tmp_path / "model.pt", weights_only=True)
    assert all(torch.equal(average[name], tensor) for name, tensor in expected.items())
    assert server.sent < 1.3 * len(server.content)


MANY = 4 << 30  # bytes that a server tells of, or sends


@pytest.mark.parametrize("endless", [False, True])
def test_http_server_without_ranges_is_refused(server, tmp_path, endless):
    server.serve(saved(tmp_path, 100_000), claimed=MANY)
    server.heeds_ranges, server.endless = False, endless
    with pytest.raises(CheckpointError, match=rf"{server.url}.* its server sends the whole file"):
        open_checkpoint(server.url)
    assert server.sent < 64 << 20  # what the system's buffers hold


def test_http_endless_range_is_refused(server, tmp_path):
    server.serve(saved(tmp_path, 100_000), claimed=MANY)
    server.endless = True
    with pytest.raises(CheckpointError, match="its server sends the whole file"):
        open_checkpoint(server.url)
    assert server.sent < 64 << 20
