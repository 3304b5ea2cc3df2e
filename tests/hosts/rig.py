"""What tests of hosts share: instances laid out as Nova lays them out, and one whole copy between two hosts.

As a program (`python -m hosts.rig JSON`) it makes a copy in a process of its own, for those who want to kill it.
"""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
import time
import unittest.mock
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lab.hosts import Host as LabHost
from lab.hosts import Lab
from migrena import (
    ROOT,
    BothEnds,
    Callbacks,
    Cloud,
    Disk,
    DiskCopy,
    DiskJob,
    DiskLocks,
    Earlier,
    Ends,
    Host,
    HostEntry,
    Interrupted,
    Journal,
    Moved,
    Plan,
    Report,
    Run,
    Screen,
    Seen,
    Settings,
    Undo,
    connect,
    disk_chain,
    move_disk,
    plan_job,
    read_run,
    received,
    refuse_job,
    settle_disk,
    signals,
    space_needed,
    stand_of,
    survey_disks,
    transfer_disk,
)
from unit.makers import a_flavor, a_server, an_image

MiB = 1024**2
INSTANCES = "/var/lib/nova/instances"
NOVA = 64060  # the user's number on Debian's hypervisors
NEVER_ASKED = object.__new__(Cloud)  # a copy between two hosts asks no cloud

# Writes random bytes that only the seed decides: PATH FORMAT SEED OFFSET LENGTH [OFFSET LENGTH ...]; the format "file" knows no qemu.
WRITE = """
import os, random, subprocess, sys
path, format, seed, *places = sys.argv[1:]
source = random.Random(seed)
target = path if format == "file" else f"/var/lib/nova/random-{os.getpid()}"
fd = os.open(target, os.O_WRONLY | os.O_CREAT, 0o644)
for offset, length in zip(places[::2], places[1::2]):
    os.pwrite(fd, source.randbytes(int(length)), int(offset) if format == "file" else 0)
    if format != "file":
        subprocess.run(["qemu-io", "-f", format, "-c", f"write -q -s {target} {offset} {length}", path], check=True)
if format != "file":
    os.unlink(target)
"""
# Makes an instance's disk in Nova's form, in one go: PATH FORMAT SIZE [BASE BASE_FORMAT]
MAKE = """
set -e
path=$1; format=$2; size=$3; shift 3
mkdir -p "${path%/*}"
case $format in
raw) truncate -s "$size" "$path" ;;
*) qemu-img create -q -u -f "$format" ${1:+-F "$2" -b "$1"} -- "$path" "$size" ;;
esac
"""
KEEP = """
set -e
cat > "$1.info"
chown -R "$2:$2" "${1%/*}"
chmod 644 "$1"
"""


def settings_for(lab: Lab, **different: Any) -> Settings:
    """What an operator of this lab has in config.py."""
    known = {host.name: HostEntry(address=host.address) for host in lab}
    stall = 20 if set(lab.spec.kinds.values()) == {"ns"} else 120  # an emulated machine is slow, and more so beside other tests
    given = Settings(src_uid=str(uuid.uuid4()), dst_name="new", hosts=known, ssh_key=str(lab.key), known_hosts=str(lab.known_hosts),
                     ssh_config="/dev/null", stall_timeout=stall, chunk=4 * MiB, transport="qemu", retries=0, compress="off")
    return changed(given, **different)


def changed(settings: Settings, **different: Any) -> Settings:
    """Other settings; the rate may be a number."""
    if "limit_rate" in different:
        different["limit_rate"] = str(different["limit_rate"])
    return replace(settings, **different)


def processes(host: LabHost) -> dict[int, list[str]]:
    """What runs in a host (pid there, words) besides its process 1 and sshd."""
    return {pid: words for pid, words in host.processes() if pid > 1 and words[0] and not words[0].startswith(("sshd", "/usr/sbin/sshd"))}


def remains(host: LabHost) -> list[str]:
    """What a run has left on a host: processes, private folders, listening ports of ours, attached devices."""
    found = [" ".join(words) for words in processes(host).values()]
    found += host.run("find", "/run", "/tmp", "-maxdepth", "1", "-name", "migrena-*").stdout.split()
    found += [line for line in host.run("ss", "-Hltn").stdout.splitlines() if not line.split()[3].endswith((":22", ":2222"))]
    sizes = host.run("sh", "-c", "grep -H . /sys/block/nbd*/size 2>/dev/null; true").stdout.splitlines()
    return found + [line for line in sizes if not line.endswith(":0")]


def wait_for(what: str, ready: Callable[[], bool], seconds: float = 60.0) -> None:
    """Returns when it is so; fails with the words when it is not so in time."""
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.05)


def wait_until_clean(host: LabHost, seconds: float = 30.0) -> None:
    """Returns when nothing of ours is left on a host; fails with what is left when it stays. Leases without dots end in a minute only."""
    deadline = time.monotonic() + seconds
    while left := remains(host):
        assert time.monotonic() < deadline, f"still on {host.name} after {seconds:.0f} s: {left}"
        time.sleep(0.2)


def sweep(host: LabHost) -> None:
    """Ends and removes what a failed test has left, so that the next one finds the host clean."""
    for pid in processes(host):
        host.run("kill", "-9", str(pid), check=False)
    host.run("sh", "-c", "for device in /dev/nbd?; do [ ! -b $device ] || nbd-client -d $device; done", check=False)
    host.run("sh", "-c", "rm -rf /run/migrena-* /tmp/migrena-*")


@contextlib.contextmanager
def running(host: LabHost, *words: str) -> Iterator[int]:
    """The pid, in the host, of a program that runs for as long as the scope."""
    pid = int(host.run("sh", "-c", '"$@" </dev/null >/dev/null 2>&1 & echo $!', "sh", *words).stdout)
    try:
        yield pid
    finally:
        host.run("kill", "-9", str(pid), check=False)
        wait_for(f"the end of {words[0]}", lambda: pid not in dict(host.processes()))


@dataclass  # not frozen: its host may be another one after a power cut
class Instance:
    """One instance's disk on one host, as Nova lays it out."""

    host: LabHost
    path: str
    format: str = ""  # as disk.info names it

    @classmethod
    def make(cls, host: LabHost, pattern: str = f"{INSTANCES}/%s/disk") -> Instance:
        """An instance whose folder is empty."""
        path = pattern % uuid.uuid4()
        host.run("mkdir", "-p", path.rpartition("/")[0])
        return cls(host, path)

    def info(self, format: str) -> Instance:
        """Writes disk.info and gives everything Nova's owner and mode."""
        self.host.run("sh", "-c", KEEP, "sh", self.path, str(NOVA), input=json.dumps({self.path: format}))
        return Instance(self.host, self.path, format)

    def overlay(self, base: str, size: int, base_format: str = "raw") -> Instance:
        """A fresh overlay on a base; without a base a plain qcow2."""
        self.host.run("sh", "-c", MAKE, "sh", self.path, "qcow2", str(size), *((base, base_format) if base else ()))
        return self.info("qcow2")

    def raw(self, size: int) -> Instance:
        """A raw disk that is one hole."""
        self.host.run("sh", "-c", MAKE, "sh", self.path, "raw", str(size))
        return self.info("raw")

    def write(self, seed: str, *places: tuple[int, int]) -> Instance:
        """A guest writes random bytes to these places (offset, length)."""
        self.host.run("python3", "-c", WRITE, self.path, self.format, seed, *(str(number) for place in places for number in place))
        return self

    def lengthen(self, count: int) -> Instance:
        """The file gets so many further bytes at its end, which mean nothing to qemu and must arrive all the same."""
        length = self.length
        self.host.run("python3", "-c", WRITE, self.path, "file", "tail", str(length), str(count))
        return self

    @property
    def id(self) -> str:
        """The instance's id, by which libvirt and Nova know it: the name of its folder."""
        return self.path.split("/")[-2]

    @property
    def length(self) -> int:
        """Bytes of the file."""
        return int(self.host.run("stat", "-c", "%s", self.path).stdout)

    @property
    def allocated(self) -> int:
        """Bytes that the file takes of its file system."""
        return int(self.host.run("stat", "-c", "%b", self.path).stdout) * 512

    def sha256(self) -> str:
        """Digest of the file as it lies there."""
        return self.host.run("sha256sum", self.path).stdout.split()[0].lstrip("\\")

    def owner(self) -> str:
        """Owner, group and mode."""
        return self.host.run("stat", "-c", "%u:%g %a", self.path).stdout.strip()

    def node(self) -> dict[str, Any]:
        """What qemu-img tells of the file."""
        found: dict[str, Any] = json.loads(self.host.run("qemu-img", "info", "--output=json", "-f", self.format, self.path).stdout)
        return found

    def flattened(self) -> str:
        """The path, in the host, of all that the guest sees, as a raw file."""
        flat = "/var/lib/nova/flattened"
        self.host.run("qemu-img", "convert", "-f", self.format, "-O", "raw", self.path, flat)
        return flat


def base(host: LabHost, seed: str, size: int = 32 * MiB, format: str = "raw", path: str = "") -> str:
    """The path of a base image whose content the seed decides: a quarter of it random, the rest holes."""
    path = path or f"{INSTANCES}/_base/{uuid.uuid4().hex}"
    raw = path if format == "raw" else f"{path}.raw"
    host.run("sh", "-c", MAKE, "sh", raw, "raw", str(size))
    host.run("python3", "-c", WRITE, raw, "file", seed, "0", str(size // 8), str(size // 2 + 12345), str(size // 8))
    if format != "raw":
        host.run("qemu-img", "convert", "-f", "raw", "-O", format, raw, path)
        host.run("rm", raw)
    return path


def same_guest(one: Instance, other: Instance) -> bool:
    """Whether two guests would see the same; where one disk is larger, nothing but zeros beyond the smaller."""
    sides = [(side.host, side.flattened()) for side in (one, other)]
    if one.host.root and other.host.root:  # both lie on this machine, where qemu-img can look at both
        places = [f"{host.root}{path}" for host, path in sides]
        done = subprocess.run(["qemu-img", "compare", "-q", "-f", "raw", "-F", "raw", *places], check=False)
        for place in places:
            Path(place).unlink()
        return done.returncode == 0
    sizes = [int(host.run("stat", "-c", "%s", path).stdout) for host, path in sides]
    count = '{ head -c "$2" | sha256sum; tr -d "\\0" | wc -c; } < "$1"'
    said = [host.run("sh", "-c", count, "sh", path, str(min(sizes))).stdout.split() for host, path in sides]
    for host, path in sides:
        host.run("rm", path)
    return said[0][0] == said[1][0] and {said[0][2], said[1][2]} == {"0"}


@dataclass
class Copy:
    """One copy between two hosts, from the survey to the swap; what it decided stays here."""

    source: Host
    destination: Host
    settings: Settings
    state: Path
    undo: Undo = field(default_factory=lambda: Undo(Screen(stream=io.StringIO())))
    job: DiskJob | None = None
    report: Report = field(default_factory=Report)
    progress: Callable[[int], None] = lambda done: None
    name: str = ""  # of the run; one that has a journal in the state folder is gone on with
    sent: int = 0  # bytes that came to the destination while the disk arrived

    def run_of(self, disk: Disk) -> Run:
        """The facts that a copy's steps share, without any cloud."""
        self.name = self.name or f"test-{uuid.uuid4().hex[:8]}"
        server = a_server(id=self.settings.src_uid, status="SHUTOFF", power=4)
        plan = Plan(self.name, server, {ROOT: disk}, a_flavor(), an_image(), ())
        has_begun = (self.state / f"{self.name}.jsonl").exists()
        earlier = Earlier(read_run(self.state, self.name), Seen("new")) if has_begun else None
        journal, cloud = Journal(self.state, plan.run), NEVER_ASKED
        return Run(self.settings, self.undo.screen, journal, self.undo, self.report, plan, cloud, cloud, self.source, earlier)

    def job_of(self, run: Run, ends: Ends, fresh: Instance) -> DiskJob:
        """The job, refused where it must be, for a source that has stopped."""
        self.job = plan_job(run, ends, ROOT, survey_disks(self.destination, fresh.id, fresh.path, shared=False)[ROOT])
        refuse_job(ends, self.job, space_needed(self.job.source, run.plan.root, self.job.whole_file, 0))
        self.job = replace(self.job, stand=stand_of(self.source, self.job.source.node))
        return self.job

    @contextlib.contextmanager
    def prepared(self, source: Instance, fresh: Instance) -> Iterator[tuple[Ends, DiskJob]]:
        """Both ends and the job, refused where it must be; folders and certificates are gone with the scope."""
        run = self.run_of(survey_disks(self.source, source.id, source.path, shared=False)[ROOT])
        with contextlib.closing(run.journal), DiskLocks(run.plan.run) as locks, BothEnds(run, (self.source, self.destination), locks) as both:
            yield both.ends(), self.job_of(run, both.ends(), fresh)

    @contextlib.contextmanager
    def shown(self, total: int, label: str = "") -> Iterator[Callable[[int], None]]:
        """Progress, for those who look on."""
        yield self.progress

    def counted(self, ends: Callable[[], Ends], move: Callable[[], Moved]) -> Moved:
        """What a move gives; `sent` is then what came meanwhile."""
        before = received(ends())
        moved = move()
        self.sent = received(ends()) - before
        return moved

    def move(self, ends: Ends, job: DiskJob, check: Callable[[], None] = lambda: None) -> Moved:
        """The bytes arrive and are proven, at the first attempt or not at all; nothing is swapped in."""
        return self.counted(lambda: ends, lambda: move_disk(ends, job, Callbacks(self.shown, check=check))[0])

    def arrive(self, source: Instance, fresh: Instance, check: Callable[[], None] = lambda: None) -> Moved:
        """The bytes arrive and are proven, as often tried again as the settings say; nothing is swapped in."""
        run = self.run_of(survey_disks(self.source, source.id, source.path, shared=False)[ROOT])
        self.undo.screen.progress = self.shown  # type: ignore[method-assign]
        with contextlib.closing(run.journal), DiskLocks(run.plan.run) as locks, BothEnds(run, (self.source, self.destination), locks) as both:
            job = self.job_of(run, both.ends(), fresh)
            if run.earlier and (stand := run.earlier.record.disks[ROOT].job.get("stand")):
                job = replace(job, stand=stand)
            with unittest.mock.patch("migrena.gate", lambda *_, **__: None), unittest.mock.patch("migrena.at_intervals", lambda *_: check):
                return self.counted(both.ends, lambda: transfer_disk(run, DiskCopy(both, job)))  # there are no clouds to be asked

    def __call__(self, source: Instance, fresh: Instance) -> Moved:
        """The whole of it."""
        moved = self.arrive(source, fresh)
        assert self.job
        settle_disk(self.destination, self.job)
        return moved


def chain_of(host: Host, instance: Instance) -> list[tuple[str, str]]:
    """The files of a disk's chain, from the top down, each with its format."""
    return [(image.path, image.format) for image in disk_chain(host, instance.path, instance.format, shared=False)]


def main(orders: str) -> int:
    """Makes the copy that the orders name; says `N` at each N bytes done, and how it ended."""
    given = json.loads(orders)
    lab = Lab.recorded(given["lab"])
    assert lab
    undo = Undo(Screen())
    settings = settings_for(lab, **given["settings"])
    try:
        with signals(undo), contextlib.ExitStack() as stack, undo:
            ends = []
            for name in ("src", "dst"):
                ends.append(connect(name, settings, undo.screen))
                stack.callback(ends[-1].close)
            copy = Copy(ends[0], ends[1], settings, Path(given["state"]), undo, progress=lambda done: print(done, flush=True),
                        name=given["name"])
            copy(Instance(lab["src"], given["source"]), Instance(lab["dst"], given["fresh"]))
    except Interrupted as interruption:
        return 128 + interruption.number
    print("copied", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
