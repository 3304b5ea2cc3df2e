"""--debug shows what the libraries say, but nothing of what was sent to a cloud or of what it answered."""

from __future__ import annotations

import http.server
import io
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Migrena
from migrena import without_bodies
from unit.makers import UUID


class Answering(http.server.BaseHTTPRequestHandler):
    """A cloud that answers everything with a secret."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = json.dumps({"version": {"id": "v3.14", "status": "stable", "links": []}, "adminPass": "answered-s3cret"}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def cloud() -> Iterator[str]:
    """Its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answering)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v3"
    server.shutdown()
    thread.join()
    server.server_close()


def logged(cloud: str, *filters: object) -> str:
    """What keystoneauth's session logs of a request that makes an instance."""
    from keystoneauth1 import session
    from keystoneauth1.noauth import NoAuth

    said, logger = io.StringIO(), logging.getLogger("keystoneauth.session")
    handler = logging.StreamHandler(said)
    for each in filters:
        handler.addFilter(each)  # type: ignore[arg-type]
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        opened = session.Session(auth=NoAuth(endpoint=cloud))
        opened.post(f"{cloud}/servers", json={"server": {"user_data": "sent-s3cret\n'quoted'"}}, headers={"X-Auth-Token": "token-s3cret"})
        opened.session.close()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
    return said.getvalue()


def test_what_is_sent_and_answered_is_not_logged(cloud: str) -> None:
    said = logged(cloud, without_bodies)
    assert "REQ: curl" in said and f"{cloud}/servers" in said and "RESP: [200]" in said and "s3cret" not in said


def test_control_without_the_filter_it_is(cloud: str) -> None:
    said = logged(cloud)
    assert "sent-s3cret" in said and "answered-s3cret" in said and "token-s3cret" not in said


def test_debug_of_a_whole_call_has_no_bodies(migrena: Migrena, tmp_path: Path, cloud: str) -> None:
    config = f"SRC_CREDS = DST_CREDS = {{'auth_url': {cloud!r}, 'username': 'u', 'password': 'hunter2'}}\nSTATE_FOLDER = {str(tmp_path)!r}\n"
    done = migrena("-s", UUID, "-d", "new", "--debug", config=config)
    assert "REQ: curl" in done.stderr and "RESP: [200]" in done.stderr, done.stderr
    assert "s3cret" not in done.stderr and "hunter2" not in done.stderr
