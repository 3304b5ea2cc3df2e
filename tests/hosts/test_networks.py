"""Cables are cut and sshd ends in mid-copy, for a while or for good: the run goes on by itself, or it fails and can be undone."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import pytest

from hosts.faults import Fault
from hosts.operators import is_complete
from hosts.rig import processes, wait_for, wait_until_clean
from lab.hosts import Host, Lab
from lab.processes import command
from migrena import read_run

NOBODY = "02:00:00:00:00:99"  # what is sent to this hardware address reaches nobody
IMPATIENT = ("--stall-timeout", "4")


@contextlib.contextmanager
def cut(lab: Lab, one: str, *others: str) -> Iterator[None]:
    """No packet goes between a host and the others; "" is the operator's machine. What is under way meanwhile hears of nothing."""
    ways = [(side, lab[to].address if to else lab.operator) for other in others for side, to in ((one, other), (other, one))]

    def turn(verb: str, *more: str) -> None:
        for side, address in ways:
            run = lab[side].run if side else command
            run("ip", "neigh", verb, address, "dev", "eth0" if side else lab.spec.tag, *more)

    turn("replace", "lladdr", NOBODY, "nud", "permanent")
    try:
        yield
    finally:
        turn("del")


@contextlib.contextmanager
def without_sshd(host: Host) -> Iterator[None]:
    """A host whose sshd has ended, with all its connections."""
    host.run("touch", "/run/lab/sshd.down")
    for pid, words in host.processes():
        if words[0].startswith(("sshd:", "/usr/sbin/sshd")):
            host.run("kill", "-9", str(pid), check=False)
    try:
        yield
    finally:
        host.run("rm", "-f", "/run/lab/sshd.down")


def tries_again(fault: Fault) -> None:
    """Returns when the run has said so."""
    wait_for("another attempt", lambda: '"event": "retry"' in fault.journal.read_text(), 150)


def is_whole(fault: Fault, retries: int) -> None:
    """The run was successful, after so many further attempts at least."""
    run = fault.journal.stem
    is_complete(fault.operator, run)
    assert bool(read_run(fault.state, run).retries) == bool(retries)


def test_a_short_loss_of_the_operator_s_network_is_not_even_noticed(lab: Lab, fault: Fault) -> None:
    process = fault.begin(chunks=1)
    with cut(lab, "", "src", "dst"):
        time.sleep(3)
    fault.end(process, 0)
    is_whole(fault, retries=0)


def test_a_longer_loss_of_the_operator_s_network_is_lived_through(lab: Lab, fault: Fault) -> None:
    process = fault.begin(*IMPATIENT, chunks=1)
    with cut(lab, "", "src", "dst"):
        tries_again(fault)
    fault.end(process, 0, "made no progress", "attempt 2 of 6 follows in 2 s, the source stays stopped")
    is_whole(fault, retries=1)


def test_a_loss_for_good_of_the_operator_s_network_leaves_what_ends_by_itself_and_can_be_undone(
        lab: Lab, fault: Fault, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEASE_SECONDS", "20")
    process = fault.begin(*IMPATIENT, "--retries", "0")
    with cut(lab, "", "src", "dst"):
        said = fault.end(process, 4, "made no progress", "left behind: check that nothing of ours is left on src did not succeed")
        for name in ("src", "dst"):
            assert f"{name} did not confirm the end of" in said and "ends with the connection" in said
            wait_until_clean(lab[name], 100)
    fault.is_left()
    fault.rolls_back()


def test_a_loss_of_the_network_between_the_hypervisors_is_lived_through(lab: Lab, fault: Fault) -> None:
    process = fault.begin(*IMPATIENT)
    with cut(lab, "src", "dst"):
        tries_again(fault)
    fault.end(process, 0, "made no progress")
    is_whole(fault, retries=1)


def test_a_loss_for_good_of_the_network_between_the_hypervisors_fails_the_run_which_is_undone(lab: Lab, fault: Fault) -> None:
    process = fault.begin(*IMPATIENT, "--retries", "1")
    with cut(lab, "src", "dst"):
        fault.end(process, 1, "The run failed; undo.")
        fault.is_undone()
    assert fault.operator.state() == [(fault.journal.stem, "failed")]


def test_an_sshd_that_ends_and_is_started_again_is_lived_through(lab: Lab, fault: Fault) -> None:
    process = fault.begin()
    with without_sshd(lab["src"]), without_sshd(lab["dst"]):
        tries_again(fault)
    fault.end(process, 0, "attempt 2 of 6")
    is_whole(fault, retries=1)


@pytest.mark.parametrize("name", ["src", "dst"])
def test_an_sshd_that_ends_for_good_fails_the_run_and_what_is_left_can_be_undone(lab: Lab, fault: Fault, name: str) -> None:
    process = fault.begin("--retries", "1")
    with without_sshd(lab[name]):
        fault.end(process, 4, f"{name}: no SSH connection to {lab[name].address} port 22", "check address and port in HOSTS",
                  f"left behind: check that nothing of ours is left on {name}", "./migrena.py rollback")
        wait_for("the host to clean itself", lambda: not processes(lab[name]), 20)
        fault.is_left()
        run = fault.journal.stem
        assert fault.operator.run("rollback", run).returncode == (4 if name == "src" else 0)  # a destination that is gone has no host
    fault.call(0, "rollback", run)
    fault.is_undone()
