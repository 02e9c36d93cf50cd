"""A real S3 server on the loopback, which counts what it is asked for."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server


class Request(NamedTuple):
    """What a client asked for, and how many bytes of contents it got."""

    method: str
    path: str
    range: str
    size: int


class _Quiet(WSGIRequestHandler):
    def log(self, *args: Any, **kwargs: Any) -> None:
        pass


class S3Server(AbstractContextManager["S3Server"]):
    """An S3 server with one bucket, ``bucket``.

    Attributes:
        url: Its endpoint.
        requests: Every request since the server started or they were cleared.
        before: Called with the method and the path of a request; a status it returns is the answer.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.before: Callable[[str, str], str | None] = lambda method, path: None
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1", 0, self._counting, threaded=True, request_handler=_Quiet
        )
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> S3Server:
        self._thread.start()
        self.client = boto3.client("s3", endpoint_url=self.url, region_name="us-east-1")
        self.client.create_bucket(Bucket="bucket")
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def put(self, path: Path, key: str) -> str:
        """Upload a file, or a directory with all it holds; returns its URL."""
        files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        for file in files:
            below = f"{key}/{file.relative_to(path).as_posix()}" if path.is_dir() else key
            content = file.read_bytes()
            self.client.put_object(Bucket="bucket", Key=below, Body=content, ACL="public-read")
        return f"s3://bucket/{key}"

    def read(self, key: str) -> list[tuple[int, int]]:
        """The ranges of an object that were asked for, in order; (0, -1) is all of it."""
        found = (
            re.fullmatch(r"bytes=(\d+)-(\d+)", request.range)
            for request in self.requests
            if request.method == "GET" and request.path == f"/bucket/{key}"
        )
        return [(int(m[1]), int(m[2]) + 1) if m else (0, -1) for m in found]

    def _counting(self, environ: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        status = self.before(environ["REQUEST_METHOD"], path)
        if status is not None:
            respond(status, [("Content-Length", "0")])
            body = b""
        else:
            body = b"".join(self._app(environ, respond))
        ranges = environ.get("HTTP_RANGE", "")
        self.requests.append(Request(environ["REQUEST_METHOD"], path, ranges, len(body)))
        return [body]
