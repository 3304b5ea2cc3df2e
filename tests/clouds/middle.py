"""A stand-in for a failing API: it stands between migrena and the real clouds, as an HTTP proxy, and spoils the answers it is told to spoil."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from lab.settings import CLOUDS

PASS, LOST, SILENT, LATE = "", "lost", "silent", "late"  # or an HTTP status in digits, which is answered in the cloud's place
# LATE is done 15 s after it was answered with 504.
Spoil = Callable[[str, int], str]  # what to do with a request, by its name and how many of this name came before
SIDES = {urlsplit(cloud.url("nova")).hostname: cloud.name for cloud in CLOUDS}


def name_of(method: str, url: str, body: bytes) -> str:
    """What a request asks for, as `src POST os-stop` or `dst GET server`."""
    parts = urlsplit(url)
    path = re.sub(r"^/v\d[.\d]*", "", parts.path)
    kind = "server" if re.fullmatch(r"/servers/[^/]+", path) and "detail" not in path else path.strip("/").split("/")[-1]
    if kind == "action":
        kind = next(iter(json.loads(body)))
    elif "/metadata/" in path:
        kind = "metadata"
    return f"{SIDES[parts.hostname]} {method} {kind}"


@dataclass
class Middle:
    """The requests that came by, in their order, and what happens to the next ones."""

    port: int = 0
    spoil: Spoil = lambda name, before: PASS
    seen: list[str] = field(default_factory=list)  # names of requests
    spoiled: list[str] = field(default_factory=list)  # the same of those that were not answered as they should
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def environment(self) -> dict[str, str]:
        """What sends a program's requests this way."""
        return {"http_proxy": f"http://127.0.0.1:{self.port}", "no_proxy": ""}

    def verdict(self, name: str) -> str:
        """What happens to this request."""
        verdict = self.spoil(name, Counter(self.seen)[name])
        self.seen.append(name)
        if verdict:
            self.spoiled.append(name)
        return verdict


class Handler(BaseHTTPRequestHandler):
    """One request."""

    middle: Middle

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        verdict = self.middle.verdict(name_of(self.command, self.path, body))
        self.close_connection = True
        if verdict == SILENT:
            self.middle.ended.wait(600)
            return
        if verdict.isdigit():
            self.answer(int(verdict), [("Content-Type", "application/json")], json.dumps({"spoiled": {"message": "spoiled on the way"}}).encode())
            return
        if verdict == LATE:
            threading.Timer(15, self.ask, [body]).start()
            self.answer(504, [("Content-Type", "text/plain")], b"spoiled on the way")
            return
        status, headers, text = self.ask(body)
        if verdict != LOST:
            self.answer(status, headers, text)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = do_HEAD = handle_one  # the names that http.server looks for

    def ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        """What the cloud itself answers."""
        parts = urlsplit(self.path)
        place = f"{parts.path}?{parts.query}" if parts.query else parts.path
        with contextlib.closing(http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=300)) as cloud:
            cloud.request(self.command, place, body or None, {**dict(self.headers.items()), "Connection": "close"})
            answer = cloud.getresponse()
            return answer.status, answer.getheaders(), answer.read()

    def answer(self, status: int, headers: list[tuple[str, str]], text: bytes) -> None:
        """Sends an answer; whoever asked may be gone by now."""
        with contextlib.suppress(ConnectionError):
            self.send_response(status)
            for key, value in headers:
                if key.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


@contextlib.contextmanager
def middle() -> Iterator[Middle]:
    """The proxy, on a port of this machine's own."""
    found = Middle()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"middle": found}))
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        found.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
