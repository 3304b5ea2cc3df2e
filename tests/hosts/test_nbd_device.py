"""The transport nbd, with the real module: nbd-server on the source, nbd-client and /dev/nbdN on a virtual machine."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest

from hosts.conftest import MakeCopy, kept_clean
from hosts.rig import Instance, MiB, base, settings_for, wait_until_clean
from hosts.test_copy import arrives
from hosts.test_failures import ours, signal_ours
from hosts.test_resume import lives_through
from lab.hosts import Host as LabHost
from lab.hosts import Lab
from migrena import HostError, Settings

Driver = Callable[..., "subprocess.Popen[str]"]
THEIRS = "/root/theirs"
pytestmark = pytest.mark.timeout(600)  # a machine without KVM, beside other tests


@pytest.fixture
def lab(machines: Lab) -> Iterator[Lab]:
    """The hosts of these tests."""
    yield from kept_clean(machines)


@pytest.fixture
def settings(lab: Lab) -> Settings:
    """What an operator of this lab has in config.py."""
    return settings_for(lab, transport="nbd", stall_timeout=60, chunk=2 * MiB)


def an_overlay(host: LabHost, seed: str = "debian") -> Instance:
    """A small overlay on a small base."""
    return Instance.make(host).overlay(base(host, seed, 8 * MiB), 24 * MiB)


@pytest.fixture
def overlays(lab: Lab) -> tuple[Instance, Instance]:
    """An overlay into which a guest wrote 5 MiB, and a fresh one on an equal base."""
    return an_overlay(lab["src"]).write("guest", (MiB, 3 * MiB + 512), (22 * MiB, 2 * MiB)), an_overlay(lab["dst"])


def size_of(host: LabHost, device: str) -> int:
    """Bytes that a device shows."""
    return int(host.run("cat", f"/sys/block/{device.removeprefix('/dev/')}/size").stdout) * 512


def test_an_overlay_arrives_by_nbd_server_and_nbd_client_with_tls(
        lab: Lab, overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    source, fresh = overlays
    copy = make_copy()
    seen: list[bool] = []
    copy.progress = lambda done: seen.append(bool(ours(lab["src"], "nbd-server")) and size_of(lab["dst"], "nbd0") > 0) if not seen else None
    moved = arrives(copy, source, fresh)
    assert copy.job and copy.job.transport.name == "nbd" and copy.job.whole_file
    assert moved.digest and seen == [True]


@pytest.mark.long
def test_the_bytes_that_a_block_device_does_not_show_arrive_too_and_without_tls(lab: Lab, make_copy: MakeCopy) -> None:
    source, fresh = an_overlay(lab["src"]).write("guest", (MiB, MiB)).lengthen(777), an_overlay(lab["dst"])
    assert source.length % 512
    arrives(make_copy(tls=False), source, fresh)
    assert fresh.length == source.length
    ends = {side.host.run("tail", "-c", "777", side.path).stdout for side in (source, fresh)}
    assert len(ends) == 1


@pytest.mark.long
def test_hazard_the_size_is_no_multiple_of_the_nbd_block_and_196_640_bytes_arrive_whole(lab: Lab, make_copy: MakeCopy) -> None:
    source, fresh = (Instance.make(lab[name]).overlay(base(lab[name], "debian", 8 * MiB), 2048 * MiB) for name in ("src", "dst"))
    assert source.length == 196_640
    make_copy()(source, fresh)
    assert (fresh.length, fresh.node()["virtual-size"]) == (196_640, 2048 * MiB)


@pytest.mark.long
def test_the_guest_s_view_arrives_by_qemu_nbd_and_nbd_client(lab: Lab, overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    copy = make_copy(chunk=8 * MiB)  # each chunk costs an emulated machine half a minute
    arrives(copy, overlays[0], an_overlay(lab["dst"], "other"))
    assert copy.job and copy.job.transport.name == "nbd" and not copy.job.whole_file


@pytest.mark.long
def test_the_device_that_was_named_is_the_one_that_is_taken(lab: Lab, overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    copy = make_copy(nbd_device="/dev/nbd5")
    shown: list[int] = []
    copy.progress = lambda done: shown.append(size_of(lab["dst"], "nbd5")) if not shown else None
    with copy.prepared(*overlays) as (ends, job):
        copy.move(ends, job)
    assert shown == [overlays[0].length // 512 * 512]
    assert size_of(lab["dst"], "nbd5") == 0


@pytest.fixture
def theirs(lab: Lab) -> Iterator[str]:
    """Somebody else's disk, attached to /dev/nbd0 of the destination."""
    host = lab["dst"]
    host.run("modprobe", "nbd")
    host.run("truncate", "-s", "3M", THEIRS)
    pid = int(host.run("sh", "-c", 'qemu-nbd -t -f raw -k /root/theirs.sock "$1" </dev/null >/dev/null 2>&1 & echo $!', "sh", THEIRS).stdout)
    host.run("sh", "-c", "while [ ! -S /root/theirs.sock ]; do sleep 0.1; done; nbd-client -unix /root/theirs.sock /dev/nbd0")
    assert size_of(host, "nbd0") == 3 * MiB
    yield "/dev/nbd0"
    host.run("nbd-client", "-d", "/dev/nbd0")
    host.run("kill", "-9", str(pid))
    host.run("sh", "-c", "rm -f /root/theirs*")


@pytest.mark.long
def test_hazard_other_people_s_device_is_cut_off(
        lab: Lab, theirs: str, overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    copy = make_copy(nbd_device=theirs)
    with copy.prepared(*overlays) as (ends, job), pytest.raises(HostError, match="/dev/nbd0 is in use"):
        copy.move(ends, job)
    assert size_of(lab["dst"], theirs) == 3 * MiB
    lab["dst"].run("cmp", theirs, THEIRS)


@pytest.mark.long
def test_hazard_a_fixed_device_where_another_one_is_free(
        lab: Lab, theirs: str, overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    copy = make_copy()
    with copy.prepared(*overlays) as (ends, job):
        copy.move(ends, job)
    assert size_of(lab["dst"], theirs) == 3 * MiB
    lab["dst"].run("cmp", theirs, THEIRS)


@pytest.mark.long
def test_hazard_the_nbd_device_is_missing(lab: Lab, overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    copy = make_copy(nbd_device="/dev/nbd99")
    with copy.prepared(*overlays) as (ends, job), pytest.raises(HostError, match="/dev/nbd99 does not exist"):
        copy.move(ends, job)


@pytest.mark.long
def test_hazard_the_nbd_device_has_size_0(lab: Lab, overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    """A device that is not connected has size 0, and reading it succeeds; the real nbd-client cannot be made to lie, so one is put in its place."""
    place = "/usr/local/sbin/nbd-client"
    write = 'mkdir -p "${1%/*}"; cat > "$1"; chmod 755 "$1"'
    lab["dst"].run("sh", "-ec", write, "sh", place, input="#!/bin/sh\necho Connected /dev/nbd0\n")
    try:
        copy = make_copy()
        with copy.prepared(*overlays) as (ends, job), pytest.raises(HostError, match=r"dst: /dev/nbd0 shows 0 bytes of the export's"):
            copy.move(ends, job)
    finally:
        lab["dst"].run("rm", place)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_hazard_ctrl_c_and_kill_leave_nbd_server_and_nbd_client_behind(
        lab: Lab, driver: Driver, overlays: tuple[Instance, Instance], number: signal.Signals) -> None:
    source, fresh = overlays
    before = [source.sha256(), fresh.sha256()]
    process = driver(source, fresh, transport="nbd", stall_timeout=60, chunk=16 * MiB, limit_rate=MiB)
    assert process.stdout and process.stderr
    for line in process.stdout:
        if int(line) >= 5 * MiB // 3:
            break
    else:
        raise AssertionError(process.stderr.read())
    assert size_of(lab["dst"], "nbd0") > 0
    process.send_signal(number)
    process.wait(60)
    for name in ("src", "dst"):
        wait_until_clean(lab[name])
    assert size_of(lab["dst"], "nbd0") == 0
    assert [source.sha256(), fresh.sha256()] == before


@pytest.mark.long
def test_a_server_that_dies_ends_the_copy_and_the_device_is_detached(lab: Lab, overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    copy, thrown = make_copy(), list[bool]()
    with copy.prepared(*overlays) as (ends, job):

        def check() -> None:
            if not thrown:
                thrown.append(True)
                signal_ours(lab["src"], "-9", "nbd-server")

        with pytest.raises(HostError):
            copy.move(ends, job, check)
    assert size_of(lab["dst"], "nbd0") == 0


@pytest.mark.long
@pytest.mark.parametrize("name", ["src", "dst"])
def test_a_copy_lives_through_the_power_cut_of_a_hypervisor_that_comes_up_again(
        lab: Lab, overlays: tuple[Instance, Instance], make_copy: MakeCopy, name: str) -> None:
    """The file that is being written may lose what its host's kernel had not written yet: the digests tell what is there."""
    def cut() -> None:
        lab[name].kill()
        overlays[name == "dst"].host = lab.start(name)

    for host in lab:
        host.run("sync")
    assert lives_through(make_copy(retries=9), overlays, cut) >= 1


@contextlib.contextmanager
def without_module(host: LabHost) -> Iterator[None]:
    """Within, the host's kernel has no module nbd, neither loaded nor to be loaded."""
    host.run("modprobe", "-r", "nbd")
    path = host.run("modinfo", "-n", "nbd").stdout.strip()
    host.run("mv", path, "/root/nbd.away")
    host.run("depmod")
    try:
        yield
    finally:
        host.run("mv", "/root/nbd.away", path)
        host.run("depmod")


@pytest.mark.long
def test_a_missing_module_is_seen_before_anything_is_done(lab: Lab, overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    with without_module(lab["dst"]):
        with pytest.raises(HostError, match="missing: the module nbd on dst"), make_copy().prepared(*overlays):
            pass
        copy = make_copy(transport="auto")
        with copy.prepared(*overlays) as (_, job):
            assert job.transport.name == "qemu"
        assert "the module nbd on dst" in str(copy.report.copy["why_transport"])


@pytest.mark.long
def test_auto_takes_nbd_where_it_serves(lab: Lab, overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> None:
    source, fresh = overlays
    assert source.length % 512 == 0
    copy = make_copy(transport="auto")
    with copy.prepared(source, fresh) as (_, job):
        assert job.transport.name == "nbd"
