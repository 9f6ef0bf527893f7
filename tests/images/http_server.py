"""A server of files over HTTP that knows ranges of bytes and can be made to fail."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class FileServer(ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        failures: number of the next requests that are answered with status 503.
        requests: number of requests that were answered with content.
        limit: number of such requests after which all others are answered with status 503.
        url: address of the folder.
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), partial(_Handler, directory=str(folder)))
        self.failures = self.requests = 0
        self.limit = float("inf")
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.server.failures > 0 or self.server.requests >= self.server.limit:
            self.server.failures -= 1
            self._send(503, b"")
            return
        self.server.requests += 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        file = Path(self.translate_path(self.path))
        if not asked or not file.is_file():
            super().do_GET()
            return
        first, last = map(int, asked.groups())
        with file.open("rb") as opened:
            opened.seek(first)
            self._send(206, opened.read(last + 1 - first))

    def _send(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(folder: Path) -> Iterator[FileServer]:
    """Serve a folder on a free port."""
    server = FileServer(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
