"""A hub on this machine: what huggingface_hub asks for of one repository, over HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """asked: (path, first byte) of every file sent. broken_at: bytes after which one breaks off, once
    or, with `for_good`, whenever it is asked for."""

    def __init__(self, repository: str, files: Mapping[str, bytes]) -> None:
        self.repository, self.files = repository, dict(files)
        self.asked: list[tuple[str, int]] = []
        self.broken_at: int | None = None
        self.for_good = False
        self.url = ""

    def reply(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = request.path.split("?")[0]
        headers = {"X-Repo-Commit": COMMIT}
        found = re.fullmatch(rf"/{self.repository}/resolve/[^/]+/(.+)", path)
        if found and found[1] in self.files:
            data = self.files[found[1]]
            headers |= {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        elif path.startswith(f"/api/models/{self.repository}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            data = json.dumps(tree).encode()
        elif path.startswith(f"/api/models/{self.repository}"):
            siblings = [{"rfilename": name} for name in self.files]
            data = json.dumps({"id": self.repository, "sha": COMMIT, "siblings": siblings}).encode()
        else:
            headers["X-Error-Code"] = "EntryNotFound" if found else "RepoNotFound"
            request.send_response(404)
            for name, value in headers.items():
                request.send_header(name, value)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        first = int((re.match(r"bytes=(\d+)-", request.headers.get("Range", "")) or ["", "0"])[1])
        request.send_response(206 if first else 200)
        headers["Content-Length"] = str(len(data) - first)
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()
        if body and found:
            self.asked.append((found[1], first))
        if body and found and self.broken_at is not None and len(data) > self.broken_at:
            request.wfile.write(data[first : self.broken_at])
            self.broken_at = self.broken_at if self.for_good else None
            request.close_connection = True
        elif body:
            request.wfile.write(data[first:])


@contextmanager
def hub(repository: str, files: Mapping[str, bytes]) -> Iterator[Hub]:
    """Serve a repository until the context ends."""
    served = Hub(repository, files)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            served.reply(self, body=True)

        def do_HEAD(self) -> None:
            served.reply(self, body=False)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
