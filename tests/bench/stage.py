"""Programs in hosts and on the operator's machine, each in a cgroup: what they cost is read there, and all that they began ends with them."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Final

from lab import namespaces
from lab.hosts import Lab
from lab.processes import CLEAN_ENV, LabError, Process, wait_until

OPERATOR: Final = "operator"  # where programs run that are in no host
ENTER: Final = 'echo $$ > "$0"/cgroup.procs && exec "$@"'
FOLDER: Final = "/var/lib/nova/bench"  # in a host: what a way makes
COUNT: Final = itertools.count()


class GaveUp(LabError):
    """A way took longer than anybody has patience for."""


@dataclass(frozen=True)
class Reading:
    """What was spent up to a moment."""

    at: float  # seconds
    cpu: Mapping[str, float]  # seconds, of each host and of the operator's programs
    received: Mapping[str, int]  # bytes on the wire, of each host
    sent: Mapping[str, int]

    def since(self, earlier: Reading) -> dict[str, object]:
        """What was spent between two moments, for the record."""
        return {"seconds": round(self.at - earlier.at, 4),
                "cpu": {name: round(spent - earlier.cpu[name], 3) for name, spent in self.cpu.items()},
                "received": {name: count - earlier.received[name] for name, count in self.received.items()},
                "sent": {name: count - earlier.sent[name] for name, count in self.sent.items()}}


def hierarchy() -> Path:
    """Where cgroups of version 2 are. Raises LabError where there are none."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(place, os.W_OK):
            return Path(place)
    raise LabError("no cgroup2 is mounted, by which CPU is measured: mount -t cgroup2 none /sys/fs/cgroup/unified")


def empty(group: Path) -> None:
    """Ends every process of a cgroup and of those below it, and removes them."""
    (group / "cgroup.kill").write_text("1")
    wait_until(f"the end of all in {group.name}", lambda: "populated 0" in (group / "cgroup.events").read_text(), 30)
    for below in (*(path for path in group.iterdir() if path.is_dir()), group):
        below.rmdir()


@dataclass(frozen=True)
class Stage:
    """The hosts, and what measures them."""

    lab: Lab
    work: Path  # on the operator's machine, for whatever a way keeps there
    images: str  # the name of the host that plays Glance
    patience: float = 600  # seconds that a way has
    groups: dict[str, Path] = field(default_factory=dict)

    @property
    def addresses(self) -> dict[str, str]:
        """Each host's address."""
        return {host.name: host.address for host in self.lab}

    def root(self, where: str) -> Path:
        """A host's / as this machine sees it."""
        found = self.lab[where].root
        assert found, "machines have no root that can be seen"
        return found

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Puts every host and the operator's programs into a cgroup each, for as long as the scope."""
        above = hierarchy()
        with ExitStack() as stack:
            for name in (OPERATOR, *self.lab.hosts):
                group = above / f"{self.lab.spec.tag}-{name}"
                if group.exists():  # of a benchmark that was killed
                    empty(group)
                group.mkdir()
                self.groups[name] = group
                stack.callback(_give_back, group)
            for host in self.lab:
                _put(namespaces.init_of(host.process), self.groups[host.name])
            yield

    def read(self) -> Reading:
        """What was spent up to now."""
        cpu = {name: int((group / "cpu.stat").read_text().split()[1]) / 1e6 for name, group in self.groups.items()}
        counters = {host.name: host.counters() for host in self.lab}
        return Reading(monotonic(), cpu, {name: both[0] for name, both in counters.items()}, {name: both[1] for name, both in counters.items()})

    @contextmanager
    def started(self, where: str, *words: str | Path, env: Mapping[str, str] | None = None) -> Iterator[subprocess.Popen[str]]:
        """A program in a host or on the operator's machine; it and all that it began are gone when the scope closes."""
        group = self.groups[where] / str(next(COUNT))
        group.mkdir()
        argv = [str(word) for word in words]
        if where != OPERATOR:
            argv = namespaces.enter(self.lab[where].process, argv)
        try:
            process = subprocess.Popen(["sh", "-c", ENTER, str(group), *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                       stderr=subprocess.PIPE, text=True, errors="replace", env={**CLEAN_ENV, **(env or {})})
            with process:
                try:
                    yield process
                finally:
                    process.kill()  # also one that is not in its cgroup yet
                    (group / "cgroup.kill").write_text("1")
        finally:
            empty(group)

    def run(self, where: str, *words: str | Path, seconds: float = 0) -> str:
        """Standard output of a program that must succeed. Raises LabError with its standard error, or GaveUp."""
        with self.started(where, *words) as process:
            try:
                out, said = process.communicate(timeout=seconds or self.patience)
            except subprocess.TimeoutExpired as error:
                raise GaveUp(f"gave up after {error.timeout:.0f} s") from error
        if process.returncode:
            raise LabError(f"{where}: `{' '.join(map(str, words))}` ended with status {process.returncode}: {said.strip()}")
        return out

    @contextmanager
    def serving(self, where: str, port: int, *words: str | Path) -> Iterator[None]:
        """A server that listens on a port of a host for as long as the scope."""
        with self.started(where, *words) as process:
            def ready() -> bool:
                if process.poll():
                    raise LabError(f"{where}: {words[0]} ended by itself: {process.communicate()[1]}")
                return _listens(namespaces.init_of(self.lab[where].process), port)

            wait_until(f"{words[0]} on {where}", ready, 30)
            yield


def cold() -> None:
    """Writes what is to be written, and forgets what was read: in all hosts, since they share this machine's kernel."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def _put(pid: int, group: Path) -> None:
    """Puts a process and all below it into a cgroup; first the parent, so that whatever it begins meanwhile is there too."""
    with suppress(ProcessLookupError):  # it has ended by itself
        (group / "cgroup.procs").write_text(str(pid))
    for child in Process.of(pid).children():
        _put(child, group)


def _listens(pid: int, port: int) -> bool:
    """Whether a socket listens in the network of a process. Nobody connects: to iperf3 that would be a client already, see proc_net_tcp.rst."""
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]]
    return any(fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port for fields in lines)


def _give_back(group: Path) -> None:
    """Removes a cgroup whose processes live on."""
    for pid in (group / "cgroup.procs").read_text().split():
        with suppress(ProcessLookupError):
            (group.parent / "cgroup.procs").write_text(pid)
    group.rmdir()
