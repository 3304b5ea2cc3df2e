"""Where a host has no python3 the copy is still made and, where sha256sum can do it, still proven."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from hosts.conftest import MakeCopy
from hosts.rig import Copy, Instance, MiB, same_guest
from hosts.test_failures import Broken, flip
from lab.hosts import Host as LabHost
from lab.hosts import Lab
from migrena import HostError


@contextlib.contextmanager
def without_python(*hosts: LabHost) -> Iterator[None]:
    """Within, no python3 is found on these hosts: it lies beside its place."""
    hide = 'while found=$(command -v python3); do mv "$found" "$found.away"; echo "$found"; done'
    with contextlib.ExitStack() as stack:
        for host in hosts:
            for path in host.run("sh", "-c", hide).stdout.split():
                stack.callback(host.run, "mv", f"{path}.away", path)
        yield


@pytest.fixture
def raw(lab: Lab) -> tuple[Instance, Instance]:
    """A raw disk with 6 MiB in it, and a fresh one."""
    source, fresh = (Instance.make(lab[name]).raw(40 * MiB) for name in ("src", "dst"))
    return source.write("guest", (MiB, 5 * MiB), (39 * MiB, MiB)), fresh


@pytest.mark.parametrize("names", [("src",), ("dst",), ("src", "dst")])
def test_a_raw_disk_arrives_and_is_proven(lab: Lab, make_copy: MakeCopy, raw: tuple[Instance, Instance], names: tuple[str, ...]) -> None:
    copy = make_copy()
    with without_python(*(lab[name] for name in names)):
        moved = copy(*raw)
    assert copy.job and not copy.job.with_python
    assert moved.digest
    assert raw[1].sha256() == raw[0].sha256()
    assert raw[1].owner() == "64060:64060 644"


def test_one_byte_that_is_flipped_is_caught(lab: Lab, make_copy: MakeCopy, raw: tuple[Instance, Instance]) -> None:
    with without_python(lab["src"], lab["dst"]):
        Broken(make_copy(), *raw).fails("the copy is not the source", 2, lambda job: flip(lab["dst"], job, 2 * MiB))


def test_an_overlay_is_refused_with_both_ways_out(lab: Lab, make_copy: MakeCopy, overlays: tuple[Instance, Instance]) -> None:
    with without_python(lab["src"]), pytest.raises(HostError, match="python3 is missing") as caught:
        make_copy()(*overlays)
    assert "install" in caught.value.reasons[0].way_out and "--no-verify" in caught.value.reasons[0].way_out


def test_an_overlay_arrives_unproven_where_that_was_asked_for(lab: Lab, make_copy: MakeCopy, overlays: tuple[Instance, Instance]) -> None:
    copy: Copy = make_copy(verify=False)
    with without_python(lab["src"], lab["dst"]):
        moved = copy(*overlays)
    assert copy.job and not copy.job.whole_file  # the bases cannot be compared
    assert moved.digest == ""
    assert same_guest(*overlays)
