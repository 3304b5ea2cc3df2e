"""During a whole run nobody finds a secret: not in processes, on the hosts' file systems, the screen, the log, the journal or the report."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path

import pytest

from hosts.faults import Fault
from hosts.rig import running
from lab.hosts import Host, Lab

OWN = uuid.uuid4().hex  # another worker of pytest-xdist runs the same test with secrets of its own
PASSWORDS = (f"first-{OWN}", f"second-{OWN}")
GIVEN = {"userdata": f"user-{OWN}", "admin_pass": f"admin-{OWN}", "files": {"/etc/x": f"file-{OWN}"}, "meta": {"token": f"meta-{OWN}"}}
SECRETS = (OWN,)
KEYS = 'cat /run/migrena-*/*-key.pem /tmp/migrena-*/*-key.pem 2>/dev/null; true'
MODES = "find /run /tmp -path '*/migrena-*' \\( -type d -o -name '*.pem' \\) -printf '%y %#m\\n'"
OPEN = "find /run /tmp -type f -perm /044 -exec grep -lF -e \"$1\" {} + ; true"


def keys(host: Host) -> list[str]:
    """What no one may see of the private keys that a run has on a host just now: their lines without the frame."""
    return [line for line in host.run("sh", "-c", KEYS).stdout.splitlines() if line and not line.startswith("-----")]


def in_processes(secrets: list[str], but: int) -> list[str]:
    """The words of every process on this machine and in the hosts, and the environment of all but one, that hold one of these."""
    found = []
    for entry in Path("/proc").iterdir():
        for name in ("cmdline", "environ") if entry.name.isdigit() else ():
            try:
                content = (entry / name).read_bytes().decode(errors="replace")
                if any(secret in content for secret in secrets) and not (name == "environ" and entry.name == str(but)):
                    found.append(f"{name} of {content[:80]}")
            except OSError:
                continue  # it ended while we looked
    return found


def in_open_files(host: Host, secrets: list[str]) -> list[str]:
    """The files in /run and /tmp of a host that others than root can read and that hold one of these."""
    return [path for secret in secrets for path in host.run("sh", "-c", OPEN, "sh", secret).stdout.split()]


def modes(host: Host) -> set[str]:
    """Kind and mode of the folders and certificates that a run has on a host."""
    return set(host.run("sh", "-c", MODES).stdout.splitlines())


def test_control_a_secret_in_a_process_or_a_file_of_a_host_is_found(lab: Lab) -> None:
    host = lab["src"]
    with running(host, "python3", "-c", "import time; time.sleep(999)", "planted-s3cret"):
        assert in_processes(["planted-s3cret"], 0)
    host.run("sh", "-c", "mkdir -m 755 /run/migrena-x && echo planted-s3cret > /run/migrena-x/key.pem && chmod 644 /run/migrena-x/key.pem")
    try:
        assert in_open_files(host, ["planted-s3cret"]) == ["/run/migrena-x/key.pem"] and modes(host) == {"d 0755", "f 0644"}
    finally:
        host.run("rm", "-r", "/run/migrena-x")


@pytest.mark.parametrize("words", [("--json",), ("--json", "--debug", "-v")], ids=["json", "debug"])
def test_no_secret_is_seen_anywhere_while_a_disk_is_moved(
        lab: Lab, fault: Fault, words: tuple[str, ...]) -> None:
    config = fault.operator.folder / "config.py"
    config.write_text(config.read_text() + "".join(
        f"{side}_CREDS['password'] = {password!r}\n" for side, password in zip(("SRC", "DST"), PASSWORDS, strict=True)))
    config.chmod(0o600)
    log = fault.operator.folder / "log"
    process = fault.begin("--log-file", str(log), *words, chunks=1, MIGRENA_EXTRA_ARGS=json.dumps(GIVEN))
    private = [line for host in (lab["src"], lab["dst"]) for line in keys(host)]
    secrets = [*SECRETS, *private]
    assert len(private) >= 4
    while fault.chunks() < 4 and process.poll() is None:
        assert in_processes(secrets, process.pid) == []
        for host in (lab["src"], lab["dst"]):
            assert in_open_files(host, secrets) == []
            assert modes(host) == {"d 0700", "f 0600"}
    out, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    told = {"screen": said, "report": out, "log": log.read_text(), "journal": fault.journal.read_text(),
            "status": fault.call(0, "status", fault.journal.stem)}
    assert {name: secret for name, text in told.items() for secret in secrets if secret in text} == {}
    assert json.loads(out)["result"] == "done" and "userdata: (not shown)" in told["log"]
    assert oct(log.stat().st_mode & 0o777) == oct(fault.journal.stat().st_mode & 0o777) == "0o600"
    assert os.stat(fault.state).st_mode & 0o777 == 0o700
    assert modes(lab["src"]) == modes(lab["dst"]) == set()
