"""What nobody may read: passwords, secrets of application credentials, tokens and private keys, in a run on real clouds that tells all it can."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

from clouds.conftest import DESTINATION, SOURCE, Operator, ended
from lab.clouds import Clouds
from lab.settings import PASSWORD

TOKEN = "gAAAAA"  # how Keystone's tokens begin
KEY = "PRIVATE KEY"


def words_of_all_processes(over: threading.Event, found: set[str]) -> None:
    """Collects the arguments of every process of this machine, those in the lab's hosts too, until it is over."""
    while not over.wait(0.05):
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                found.add(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue


def private_places(clouds: Clouds) -> str:
    """Owner, mode and kind of what a run has in its private folders, and of these, on both hosts: a line each."""
    look = "find /run/migrena-* -printf '%u %m %y %p\\n' 2>/dev/null"
    return "".join(clouds.host(name).run("sh", "-c", look, check=False).stdout for name in (SOURCE, DESTINATION))


def secrets_in(text: str, *more: str) -> list[str]:
    """Which secrets a text holds."""
    return [secret for secret in (*more, TOKEN, KEY) if secret in text]


def test_no_secret_is_in_any_argument_log_journal_or_report(
        operator: Operator, clouds: Clouds, source: str, application: dict[str, str]) -> None:
    secret, seen, over, log = application["application_credential_secret"], set[str](), threading.Event(), operator.folder / "log"
    watcher = threading.Thread(target=words_of_all_processes, args=(over, seen))
    watcher.start()
    try:
        process = operator.begin("-s", source, *operator.to(DESTINATION), "--debug", "--json", "--limit-rate", "20M", "--log-file", str(log),
                                 extra=f"SRC_CREDS = {application}")
        assert process.stderr
        for line in process.stderr:
            if "Migrate disk" in line:
                break
        while "server-key.pem" not in (places := private_places(clouds)):
            assert process.poll() is None
        done = ended(process)
    finally:
        over.set()
        watcher.join()
    assert done.returncode == 0, done.stderr
    kinds = {tuple(line.split()[:3]) for line in places.splitlines()}
    assert {("root", "700", "d"), ("root", "600", "f")} <= kinds, places
    assert {mode for _, mode, kind in kinds if kind == "d"} == {"700"} and private_places(clouds) == ""
    journal = (operator.folder / "state" / f"{operator.last_run}.jsonl").read_text()
    for text in (done.stdout, done.stderr, log.read_text(), journal):
        assert text and secrets_in(text, secret, PASSWORD) == []
    words = "\n".join(line for line in seen if "keystone-manage" not in line and "mariadb" not in line)
    assert "qemu-img convert" in words and secrets_in(words, secret) == []


def test_control_a_secret_in_an_argument_is_noticed() -> None:
    seen, over = set[str](), threading.Event()
    watcher = threading.Thread(target=words_of_all_processes, args=(over, seen))
    watcher.start()
    subprocess.run(["sh", "-c", "sleep 0.5", "very", "secret-3712"], check=True)
    over.set()
    watcher.join()
    assert secrets_in("\n".join(seen), "secret-3712") == ["secret-3712"]
