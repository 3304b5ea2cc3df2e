"""However migrena ends in mid-copy, by Ctrl-C or killed outright, nothing of it is on either host 5 s later."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from hosts.rig import Instance, MiB, base, remains, wait_until_clean
from lab.hosts import Lab
from migrena import LEASED_DAEMON, LEASED_FOLDER

Driver = Callable[..., "subprocess.Popen[str]"]
SLOW = 3 * MiB  # bytes per second


def at_a_third(driver: Driver, source: Instance, fresh: Instance, **settings: Any) -> subprocess.Popen[str]:
    """A copy in a process of its own that has just said that a third of its bytes are there."""
    process = driver(source, fresh, limit_rate=SLOW, **settings)
    assert process.stdout and process.stderr
    for line in process.stdout:
        if int(line) >= 3 * MiB:
            return process
    raise AssertionError(process.stderr.read())


def is_untouched(lab: Lab, source: Instance, fresh: Instance, before: list[str]) -> None:
    """Nothing of the run is on either host, and both disks are what they were."""
    for name in ("src", "dst"):
        wait_until_clean(lab[name])
    assert [source.sha256(), fresh.sha256(), fresh.owner()] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_copy_that_is_interrupted_leaves_nothing_on_the_hosts(
        lab: Lab, driver: Driver, overlays: tuple[Instance, Instance], number: signal.Signals) -> None:
    before = [overlays[0].sha256(), overlays[1].sha256(), overlays[1].owner()]
    process = at_a_third(driver, *overlays)
    assert remains(lab["src"]) and remains(lab["dst"])
    process.send_signal(number)
    assert process.wait(60) == (-9 if number == signal.SIGKILL else 128 + number)
    is_untouched(lab, *overlays, before)


@pytest.mark.parametrize("settings", [{"tls": False}, {"ssh_user": "operator"}, {"compress": "on"}], ids=str)
def test_a_copy_that_is_killed_outright_leaves_nothing_whatever_the_settings(
        lab: Lab, driver: Driver, overlays: tuple[Instance, Instance], settings: dict[str, Any]) -> None:
    before = [overlays[0].sha256(), overlays[1].sha256(), overlays[1].owner()]
    process = at_a_third(driver, *overlays, **settings)
    process.kill()
    process.wait(60)
    is_untouched(lab, *overlays, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_copy_of_the_guest_s_view_that_is_interrupted_leaves_nothing(
        lab: Lab, driver: Driver, overlays: tuple[Instance, Instance], number: signal.Signals) -> None:
    source, _ = overlays
    fresh = Instance.make(lab["dst"]).overlay(base(lab["dst"], "other"), 64 * MiB)
    before = [source.sha256(), fresh.sha256(), fresh.owner()]
    process = at_a_third(driver, source, fresh)
    process.send_signal(number)
    process.wait(60)
    is_untouched(lab, source, fresh, before)


def test_control_a_copy_that_nobody_interrupts_arrives(driver: Driver, overlays: tuple[Instance, Instance]) -> None:
    process = at_a_third(driver, *overlays)
    printed, said = process.communicate(timeout=120)
    assert (process.returncode, printed.splitlines()[-1]) == (0, "copied"), said
    assert overlays[1].sha256() != overlays[0].sha256()  # another base's name is in it


# Runs a script whose words reach nobody: SCRIPT WORDS...
UNHEARD = """
import os, subprocess, sys
heard, said = os.pipe()
os.close(heard)
subprocess.run(["sh", "-c", sys.argv[1], "migrena", *sys.argv[2:]], stdin=subprocess.DEVNULL, stdout=said, stderr=said)
"""
PIDFILE = "/run/migrena-unheard-x/pid"


@pytest.mark.parametrize("words", [
    (LEASED_FOLDER, "unheard"),
    (LEASED_DAEMON, PIDFILE, "qemu-nbd", "-r", "-t", "-k", "/run/migrena-unheard-x/socket", f"--pid-file={PIDFILE}", "-f", "raw", "/root/disk"),
], ids=["folder", "daemon"])
def test_a_connection_that_breaks_before_a_lease_has_said_that_it_is_ready_leaves_nothing(lab: Lab, words: tuple[str, ...]) -> None:
    host = lab["src"]
    host.run("sh", "-c", "mkdir -p /run/migrena-unheard-x; truncate -s 1M /root/disk")
    host.run("python3", "-c", UNHEARD, *words)
    host.run("rm", "-r", "/run/migrena-unheard-x", "/root/disk")
    wait_until_clean(host)
