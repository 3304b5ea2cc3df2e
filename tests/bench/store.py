"""A Glance of ours: keeps what is PUT and gives it back, without accounts and databases. Words: ADDRESS PORT FOLDER; runs in a host."""

from __future__ import annotations

import shutil
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MiB = 1024**2


class Store(BaseHTTPRequestHandler):
    """One request."""

    folder = Path()
    protocol_version = "HTTP/1.1"

    def path_of(self) -> Path:
        """The file of this request."""
        return self.folder / Path(self.path).name

    def do_PUT(self) -> None:
        """Keeps the body."""
        left = int(self.headers["Content-Length"])
        with self.path_of().open("wb") as file:
            while left and (part := self.rfile.read(min(left, MiB))):
                file.write(part)
                left -= len(part)
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        """Gives it back."""
        with self.path_of().open("rb") as file:
            self.send_response(200)
            self.send_header("Content-Length", str(self.path_of().stat().st_size))
            self.end_headers()
            shutil.copyfileobj(file, self.wfile, MiB)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


if __name__ == "__main__":
    Store.folder = Path(sys.argv[3])
    Store.folder.mkdir(parents=True, exist_ok=True)
    ThreadingHTTPServer((sys.argv[1], int(sys.argv[2])), Store).serve_forever()
