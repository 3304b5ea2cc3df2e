"""A disk in thousands of small pieces is brought by one process, and all that holds for a copy holds for this one."""

from __future__ import annotations

import pytest

from hosts.conftest import MakeCopy
from hosts.rig import Instance, MiB, processes
from hosts.test_copy import a_raw_disk, an_overlay, arrives
from lab.hosts import Lab

PIECES, APART = 2000, 32 * 1024
# A raw file gets a piece of 4 KiB at every 32 KiB: random ones, and at every tenth place one of zeros, that takes room all the same.
SCATTER = """
import os, sys
disk = os.open(sys.argv[1], os.O_RDWR)
for piece in range(int(sys.argv[2])):
    os.pwrite(disk, bytes(4096) if piece % 10 == 5 else os.urandom(4096), piece * int(sys.argv[3]))
os.fsync(disk)
"""


@pytest.fixture
def scattered(lab: Lab) -> tuple[Instance, Instance]:
    """A raw disk of many small pieces, and a fresh one."""
    source, fresh = (a_raw_disk()(lab[name]) for name in ("src", "dst"))
    lab["src"].run("python3", "-c", SCATTER, source.path, str(PIECES), str(APART))
    return source, fresh


def bringers(instance: Instance) -> list[int]:
    """The processes that bring pieces to this instance's host."""
    return [pid for pid, words in processes(instance.host).items() if words[0] == "python3" and "patch" in words]


@pytest.mark.parametrize("different", [
    {}, {"tls": False}, {"compress": "on"}, {"compress": "on", "tls": False}, {"chunk": 4 * MiB}, {"limit_rate": 8 * MiB}, {"verify": False}])
def test_many_small_extents_arrive_whatever_the_settings(
        scattered: tuple[Instance, Instance], make_copy: MakeCopy, different: dict[str, bool | int | str]) -> None:
    source, fresh = scattered
    copy = make_copy(**different)
    moved = arrives(copy, source, fresh)
    assert source.sha256() == fresh.sha256()
    assert moved.held == PIECES * 4096
    assert copy.sent < moved.held * 12 // 10  # qemu-img, which asks twice for each piece: 1.26, with TLS 1.47
    assert fresh.allocated <= source.allocated * 9 // 10 + MiB  # zeros became holes


def test_what_a_guest_sees_in_small_extents_arrives_too(lab: Lab, make_copy: MakeCopy) -> None:
    source, fresh = an_overlay()(lab["src"]), a_raw_disk()(lab["dst"])
    writes = [word for piece in range(PIECES // 4) for word in ("-c", f"write -q -P {piece % 255 + 1} {piece * 2 * 65536} 4k")]
    lab["src"].run("qemu-io", "-f", "qcow2", *writes, source.path)
    arrives(make_copy(), source, fresh)


def test_a_limit_of_the_rate_holds_for_small_extents_too(scattered: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    moved = arrives(make_copy(limit_rate=2 * MiB), *scattered)
    assert moved.seconds > moved.held / (2 * MiB) - 1  # later is no fault


def test_one_that_is_killed_costs_an_attempt_and_no_more(scattered: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    source, fresh = scattered
    killed: list[int] = []

    def kill(done: int) -> None:
        for pid in () if killed else bringers(fresh):
            killed.append(pid)
            fresh.host.run("kill", "-9", str(pid))

    copy = make_copy(retries=3, limit_rate=4 * MiB)
    copy.progress = kill
    arrives(copy, source, fresh)
    assert killed and source.sha256() == fresh.sha256()
