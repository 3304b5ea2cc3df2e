"""What breaks in mid-copy ends the copy with a clear error in time; nothing is swapped in and nothing of ours is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from hosts.conftest import MakeCopy
from hosts.rig import INSTANCES, Copy, Instance, MiB, base, processes, wait_for
from lab.hosts import Host as LabHost
from lab.hosts import Lab
from migrena import DiskJob, HostError

STALL = 8  # seconds


@dataclass
class Broken:
    """A copy into which something is thrown at one moment."""

    copy: Copy
    source: Instance
    fresh: Instance
    chunks: int = 0

    def fails(self, words: str | None, at_chunk: int, throw: Callable[[DiskJob], object]) -> HostError:
        """Copies, throws after that many chunks, and gives the error back; the fresh disk must not have been touched."""
        before = self.fresh.sha256()
        with self.copy.prepared(self.source, self.fresh) as (ends, job):

            def check() -> None:
                self.chunks += 1
                if self.chunks == at_chunk:
                    throw(job)

            with pytest.raises(HostError, match=words) as caught:
                self.copy.move(ends, job, check)
        assert self.chunks >= at_chunk
        assert self.fresh.host.alive() and self.fresh.sha256() == before
        return caught.value


@pytest.fixture
def broken(overlays: tuple[Instance, Instance], make_copy: MakeCopy) -> Broken:
    """An overlay on the way to an equal base, in three chunks."""
    return Broken(make_copy(stall_timeout=STALL), *overlays)


@pytest.fixture(params=["file", "guest's view"])
def either(request: pytest.FixtureRequest, lab: Lab, broken: Broken) -> Broken:
    """The same, and the same by the guest's view."""
    if request.param != "file":
        broken.fresh = Instance.make(lab["dst"]).overlay(base(lab["dst"], "other"), 64 * MiB)
    return broken


def flip(host: LabHost, job: DiskJob, offset: int) -> None:
    """Changes one byte of the new file, as a bad disk would."""
    if job.landing.format == "raw":
        script = 'dd if="$1" bs=1 skip="$2" count=1 status=none | ' \
                 'tr "\\000-\\377" "\\001-\\377\\000" | dd of="$1" bs=1 seek="$2" conv=notrunc status=none'
        host.run("sh", "-c", script, "sh", job.new, str(offset))
    else:
        host.run("qemu-io", "-f", job.landing.format, "-c", f"write -q -P 99 {offset} 1", job.new)


def test_control_nothing_fails_where_nothing_is_thrown(either: Broken) -> None:
    with either.copy.prepared(either.source, either.fresh) as (ends, job):
        assert either.copy.move(ends, job).digest


@pytest.mark.parametrize(("at_chunk", "offset"), [(1, 700), (2, 2 * MiB), (3, 4 * MiB + 5)])
def test_one_byte_that_is_flipped_in_the_new_file_is_caught(either: Broken, at_chunk: int, offset: int) -> None:
    error = either.fails("the copy differs from the source", at_chunk, lambda job: flip(either.fresh.host, job, offset))
    assert f"{offset // MiB * MiB:,}" in str(error)


def test_one_byte_that_appears_in_a_hole_of_the_new_file_is_caught(lab: Lab, make_copy: MakeCopy) -> None:
    """After both chunks: qemu-img puts right what appears in a hole that it has not passed yet."""
    source, fresh = (Instance.make(lab[name]).raw(200 * MiB) for name in ("src", "dst"))
    source.write("guest", (0, MiB), (199 * MiB, MiB))
    Broken(make_copy(), source, fresh).fails("the copy differs from the source", 2, lambda job: flip(fresh.host, job, 100 * MiB))


def test_a_new_file_that_lost_its_end_is_caught(broken: Broken, make_copy: MakeCopy) -> None:
    broken.copy = make_copy(limit_rate=1024 * MiB)  # one chunk after the other, so that the end is there after the third or fourth

    def cut(job: DiskJob) -> None:
        broken.fresh.host.run("truncate", "-s", str(job.length - MiB), job.new)
        broken.fresh.host.run("truncate", "-s", str(job.length), job.new)

    broken.fails("the copy differs from the source", 3, cut)


@pytest.mark.parametrize("verify", [True, False])
def test_a_source_that_is_changed_while_it_is_copied_is_caught(broken: Broken, make_copy: MakeCopy, verify: bool) -> None:
    broken.copy = make_copy(verify=verify)
    words = ("dd", f"of={broken.source.path}", "bs=1", f"seek={2 * MiB}", "conv=notrunc", "status=none")
    broken.fails("was changed while it was being copied|the copy differs from the source", 2, lambda job: broken.source.host.run(*words, input="!"))


def ours(host: LabHost, *marks: str) -> list[int]:
    """The pids of the programs in a host that have all these words."""
    return [pid for pid, words in processes(host).items() if words[0] != "sh" and all(any(mark in word for word in words) for mark in marks)]


def signal_ours(host: LabHost, number: str, *marks: str) -> None:
    """Sends a signal to those programs; there must be one."""
    pids = ours(host, *marks)
    assert pids
    for pid in pids:
        host.run("kill", number, str(pid))


def test_an_exporter_that_dies_ends_the_copy(either: Broken) -> None:
    either.fails(None, 1, lambda job: signal_ours(either.source.host, "-9", "qemu-nbd", "-x"))


def test_a_lock_that_is_lost_ends_the_copy(broken: Broken, make_copy: MakeCopy) -> None:
    broken.copy = make_copy(limit_rate=MiB, chunk=MiB)  # slow enough for the next dot to tell
    broken.fails("blkdebug|qemu-nbd|ended by itself", 1, lambda job: signal_ours(broken.source.host, "-9", "qemu-nbd", "blkdebug"))


def test_an_exporter_that_freezes_is_given_up_and_gone(broken: Broken) -> None:
    broken.fails("no progress", 1, lambda job: signal_ours(broken.source.host, "-STOP", "qemu-nbd", "-x"))


def test_a_reader_that_dies_ends_the_copy(broken: Broken, make_copy: MakeCopy) -> None:
    killed: list[int] = []

    def kill(done: int) -> None:
        if done and not killed:  # between two chunks there is none
            killed.extend(ours(broken.fresh.host, "qemu-img", "convert"))
            for pid in killed:
                broken.fresh.host.run("kill", "-9", str(pid), check=False)

    broken.copy = make_copy(limit_rate=2 * MiB)
    broken.copy.progress = kill
    with broken.copy.prepared(broken.source, broken.fresh) as (ends, job), pytest.raises(HostError, match="dst: `qemu-img convert"):
        broken.copy.move(ends, job)
    assert killed


@pytest.fixture
def small(lab: Lab) -> Iterator[str]:
    """The destination's instances lie on a file system of 60 MiB."""
    lab["dst"].run("mount", "-t", "tmpfs", "-o", "size=140m", "tmpfs", INSTANCES)
    yield INSTANCES
    lab["dst"].run("umount", INSTANCES)


def test_hazard_no_space_is_left_at_the_destination_in_mid_copy(lab: Lab, small: str, make_copy: MakeCopy) -> None:
    source, fresh = (Instance.make(lab[name]).raw(40 * MiB) for name in ("src", "dst"))
    source.write("guest", (0, 40 * MiB))
    fill = f"head -c 1G /dev/zero > {small}/filler; truncate -s -2M {small}/filler"
    Broken(make_copy(), source, fresh).fails("No space left on device", 1, lambda job: lab["dst"].run("sh", "-c", fill, check=False))


@pytest.mark.parametrize("name", ["src", "dst"])
def test_a_host_that_vanishes_ends_the_copy(lab: Lab, broken: Broken, name: str) -> None:
    with broken.copy.prepared(broken.source, broken.fresh) as (ends, job):

        def check() -> None:
            if lab[name].alive():
                lab[name].kill()

        with pytest.raises(HostError):
            broken.copy.move(ends, job, check)
    other = lab["dst" if name == "src" else "src"]
    wait_for("the other host to be clean", lambda: not processes(other), 30)


def test_a_disk_that_somebody_opens_before_the_copy_is_not_copied(broken: Broken) -> None:
    with broken.copy.prepared(broken.source, broken.fresh) as (ends, job):
        host = broken.source.host
        pid = int(host.run("sh", "-c", '"$@" </dev/null >/dev/null 2>&1 & echo $!', "sh", "qemu-nbd", "-t", "-f", "qcow2", "-k", "/root/w.sock",
                           broken.source.path).stdout)
        wait_for("the writer", lambda: host.run("test", "-S", "/root/w.sock", check=False).returncode == 0)
        with pytest.raises(HostError, match="lock"):
            broken.copy.move(ends, job)
        host.run("kill", "-9", str(pid))
        host.run("rm", "/root/w.sock")


def test_a_proof_that_was_not_asked_for_is_not_given(broken: Broken, make_copy: MakeCopy) -> None:
    broken.copy = make_copy(verify=False)
    with broken.copy.prepared(broken.source, broken.fresh) as (ends, job):
        moved = broken.copy.move(ends, job, lambda: flip(broken.fresh.host, job, MiB + 700))
    assert moved.digest == ""  # the control of the tests above: without a proof the flipped byte is not seen
