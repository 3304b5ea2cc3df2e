"""What changes between two looks at it: a host's address, and the time of day."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from hosts.conftest import Reach
from hosts.faults import Fault
from hosts.operators import is_complete
from hosts.test_resume import end_connections
from lab.hosts import Host, Lab
from migrena import read_run


def new_address(host: Host) -> str:
    """An address that nobody has on the lab's network."""
    network, _, number = host.address.rpartition(".")
    return f"{network}.{int(number) + 60}"


@contextlib.contextmanager
def moved(host: Host) -> Iterator[None]:
    """The host has its new address, and nobody answers at the old one; its connections end."""
    def turn(old: str, new: str) -> None:
        end_connections(host)
        host.run("ip", "addr", "del", f"{old}/24", "dev", "eth0")
        host.run("ip", "addr", "add", f"{new}/24", "dev", "eth0")

    turn(host.address, new_address(host))
    try:
        yield
    finally:
        turn(new_address(host), host.address)


def by_ssh_config(fault: Fault, host: Host, address: str) -> None:
    """The name of the host leads to this address, by ssh_config; its key is known at both."""
    (fault.operator.folder / "ssh_config").write_text(f"Host {host.name}\n  HostName {address}\n")
    known = fault.operator.folder / "known_hosts"
    if not known.exists():
        lines = host.known_hosts.read_text()
        known.write_text(lines + lines.replace(host.address, new_address(host)))
        config = (fault.operator.folder / "config.py").read_text()
        (fault.operator.folder / "config.py").write_text(
            f"{config}HOSTS.pop({host.name!r})\nSSH_CONFIG = {str(fault.operator.folder / 'ssh_config')!r}\nKNOWN_HOSTS = {str(known)!r}\n")


def test_a_host_whose_name_leads_elsewhere_in_mid_copy_is_found_there(lab: Lab, fault: Fault) -> None:
    host = lab["src"]
    by_ssh_config(fault, host, host.address)
    process = fault.begin("--stall-timeout", "4")  # no farewell comes from an address that is gone
    by_ssh_config(fault, host, new_address(host))
    with moved(host):
        fault.end(process, 0, "attempt 2 of 6")
    is_complete(fault.operator, fault.journal.stem)


@pytest.mark.parametrize("word", ["resume", "rollback"])
def test_a_host_whose_address_changed_before_the_run_is_resumed_is_found_there(lab: Lab, fault: Fault, word: str) -> None:
    host = lab["src"]
    by_ssh_config(fault, host, host.address)
    run = fault.operator.killed()
    by_ssh_config(fault, host, new_address(host))
    with moved(host):
        fault.call(0, word, run)
    assert fault.operator.state() == [(run, "done" if word == "resume" else "rolled back")]


def test_a_connection_that_is_opened_anew_tells_the_new_address_and_keeps_its_rights(
        lab: Lab, reach: Reach, fault: Fault) -> None:
    host, known = lab["dst"], fault.operator.folder / "known_hosts"
    by_ssh_config(fault, host, host.address)
    words = {"hosts": {}, "ssh_config": str(fault.operator.folder / "ssh_config"), "known_hosts": str(known), "ssh_user": "operator"}
    one = reach("dst", **words)
    assert one.nbd_address == host.address and one.run("id", "-u") == "0\n"
    by_ssh_config(fault, host, new_address(host))
    with moved(host):
        one.reconnect()  # sudo would hide where the connection came in
        assert one.nbd_address == new_address(host) and one.run("id", "-u") == "0\n"


def set_back(journal: Path, first: int, last: int) -> None:
    """These lines were written while the clock was an hour ahead."""
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    for entry in entries[first:last]:
        entry["at"] = (datetime.fromisoformat(entry["at"]) + timedelta(hours=1)).isoformat(timespec="milliseconds")
    journal.write_text("".join(f"{json.dumps(entry)}\n" for entry in entries))


@pytest.mark.parametrize("word", ["resume", "rollback"])
def test_a_clock_that_was_set_back_an_hour_in_mid_copy_or_afterwards_harms_nothing(fault: Fault, word: str) -> None:
    run = fault.operator.killed()
    entries = [json.loads(line) for line in fault.journal.read_text().splitlines()]
    act = next(number for number, entry in enumerate(entries) if entry["event"] == "intent" and entry["act"] == "stop source")
    set_back(fault.journal, 0, act + 1 if word == "resume" else len(entries))  # while the source was being stopped, or after the last line
    for _ in range(2):
        told = fault.operator.run("status", run).stdout
        assert not re.search(r"(?<![\w-])-\d", told) and "day" not in told, told
        assert ("stop source: done (the clock was set back)" in told) == (word == "resume")
        record = read_run(fault.state, run)
        assert record.rate >= 0 and record.seconds_left >= 0
        fault.call(0, *((word, run) if fault.operator.state() == [(run, "killed")] else ("status",)))
    assert fault.operator.state() == [(run, "done" if word == "resume" else "rolled back")]
