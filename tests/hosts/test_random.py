"""Random faults at random moments, from one seed: whatever is thrown, nothing is lost.

    pytest hosts/test_random.py --random-runs 100 --random-seed 1a2b3c4d
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hosts.operators import Operator, an_operator
from hosts.rig import INSTANCES, Instance, MiB, remains, running, same_guest, wait_for
from hosts.test_failures import ours
from hosts.test_resume import end_connections
from lab.hosts import Host as LabHost
from lab.hosts import Lab
from lab.processes import command
from migrena import DONE, ROOT, DiskRecord, RunRecord, read_run

STRANGER = 2666  # somebody else's server listens on the first port that migrena would take
pytestmark = pytest.mark.long
SIGNALS = {name: signal.Signals[name].value for name in ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP")}
MOMENTS = 34  # lines that a journal has in the end, or a few more
COPY = range(10, 26)  # among them those at which the disk moves
CODES, EARLY = {0, 1, 3, 4, -9, 129, 130, 143}, {-1, -2, -15}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """As many runs as were asked for."""
    if "number" in metafunc.fixturenames:
        metafunc.parametrize("number", range(metafunc.config.getoption("--random-runs")))


def end_all(host: LabHost, *marks: str, number: str = "-9") -> None:
    """Sends a signal to those programs of ours that have all these words, if there are any."""
    for pid in ours(host, *marks):
        host.run("kill", number, str(pid), check=False)


def cut_network(lab: Lab, name: str, seconds: float) -> None:
    """Pulls a host's cable, and puts it in again."""
    link = lab.spec.link(name)
    command("ip", "link", "set", link, "down")
    time.sleep(seconds)
    command("ip", "link", "set", link, "up")


@dataclass
class Trial:
    """One run into which faults are thrown, until it is over."""

    operator: Operator
    dice: random.Random
    stranger: int  # pid of somebody else's server on the source
    told: list[str] = field(default_factory=list)  # what was thrown and what came of it

    def __post_init__(self) -> None:
        lab, dice = self.operator.lab, self.dice
        self.before = self.operator.source.sha256()
        self.words = ["-s", self.operator.id, "-d", "new", *dice.choice([(), ("-a", "dst")])]
        self.thrown = 0
        host = {"src": lab["src"], "dst": lab["dst"]}
        self.faults: dict[str, Callable[[], object]] = {
            "exporter killed": lambda: end_all(host["src"], "qemu-nbd", "-x"),
            "exporter stopped": lambda: end_all(host["src"], "qemu-nbd", "-x", number="-STOP"),
            "reader killed": lambda: end_all(host["dst"], "qemu-img", "convert"),
            "lock killed": lambda: end_all(host["src"], "qemu-nbd", "blkdebug"),
            "digest killed": lambda: end_all(host[dice.choice(["src", "dst"])], "python3", "digest"),
            "sessions of src ended": lambda: end_connections(host["src"]),
            "sessions of dst ended": lambda: end_connections(host["dst"]),
            "network of src cut": lambda: cut_network(lab, "src", dice.uniform(0.5, 8)),
            "network of dst cut": lambda: cut_network(lab, "dst", dice.uniform(0.5, 8)),
        }

    @property
    def journal(self) -> Path | None:
        """The run's journal, once there is one."""
        return next((self.operator.folder / "state").glob("*.jsonl"), None)

    @property
    def record(self) -> RunRecord | None:
        """What the journal says."""
        return read_run(self.journal.parent, self.journal.stem) if self.journal else None

    def lines(self) -> int:
        """How many lines the journal has."""
        return self.journal.read_bytes().count(b"\n") if self.journal else 0

    def go(self, *words: str, faults: int = 0) -> str:
        """migrena with these words, into which so many faults are thrown; what it said. All that must always be so is looked at."""
        process, began = self.operator.begin(*words), self.lines()
        for moment in sorted(self.dice.randrange(MOMENTS) for _ in range(faults)):
            wait_for("the moment", lambda moment=moment: self.lines() - began >= moment or process.poll() is not None, 200)  # type: ignore[misc]
            time.sleep(self.dice.uniform(0, 0.2))
            if process.poll() is None:
                self.throw(process)
        out, said = process.communicate(timeout=250)
        self.told.append(f"{words[0]}: {process.returncode}")
        if process.returncode not in EARLY or self.lines() > began:  # before its first line Python itself may still be starting
            assert process.returncode in CODES and "Traceback" not in said and "Exception" not in said, f"{self.told}\n{out}\n{said}"
        self.look()
        return said

    def throw(self, process: subprocess.Popen[str]) -> None:
        """One fault: to migrena itself, or while the disk moves rather to what moves it."""
        name = self.dice.choice([*SIGNALS] if self.dice.random() < (0.3 if self.lines() in COPY else 0.7) else [*self.faults])
        self.told.append(f"{name} after line {self.lines()}")
        self.thrown += 1
        if name in SIGNALS:
            process.send_signal(SIGNALS[name])
        else:
            self.faults[name]()

    def look(self) -> None:
        """What must always be so when migrena has ended."""
        lab = self.operator.lab

        def foreign(line: str) -> bool:
            return "stranger" in line or f":{STRANGER} " in line

        for host in lab:
            wait_for(f"the end of what is ours on {host.name}", lambda host=host: all(map(foreign, remains(host))), 90)  # type: ignore[misc]
        assert self.operator.source.sha256() == self.before, self.told
        assert self.stranger in dict(lab["src"].processes()), self.told

    def tamper(self, record: RunRecord) -> None:
        """While nobody runs: a stretch of the new file is overwritten, or the journal's last line is cut."""
        new, host = record.disks.get(ROOT, DiskRecord()).job.get("new"), self.operator.lab["dst"]
        if self.dice.random() < 0.3 and new and host.run("test", "-s", new, check=False).returncode == 0:
            self.told.append("new file overwritten")
            at = self.dice.randrange(max(int(host.run("stat", "-c", "%s", new).stdout) - 65536, 1))
            host.run("dd", "if=/dev/urandom", f"of={new}", "bs=1", f"seek={at}", "count=65536", "conv=notrunc", "status=none")
        if self.dice.random() < 0.3 and record.state == "killed" and self.journal:
            self.told.append("journal cut")
            last = self.journal.read_bytes().splitlines(keepends=True)[-1]
            os.truncate(self.journal, self.journal.stat().st_size - self.dice.randrange(1, len(last)))

    def as_found(self) -> None:
        """The source is as it was found, and there is no destination."""
        assert self.operator.made() == [], self.told
        self.operator.is_as_found()

    def arrived(self) -> None:
        """The destination has what the source has."""
        (row,) = self.operator.made()
        source = self.operator.clouds[0].rows()[self.operator.id]
        new = Instance(self.operator.lab["dst"], f"{INSTANCES}/{row['id']}/disk", "qcow2")
        assert same_guest(self.operator.source, new), self.told
        assert row["metadata"][DONE] and row["status"] == ("ACTIVE" if "dst" in self.words else "SHUTOFF"), self.told
        assert (source["status"], source["locked"], source["metadata"]) == ("SHUTOFF", "dst" in self.words, {}), self.told

    def over(self) -> str:
        """How the run ended, or nothing while there are ways on."""
        record = self.record
        state = record.state if record else "never begun"
        if state == "done":
            self.arrived()
            if any(line == "resume: 0" for line in self.told):
                return "done after resume"
            return "done after retries" if record and record.retries else "done at once"
        if state in ("failed", "rolled back", "never begun"):
            self.as_found()
            return {"failed": "undone by itself"}.get(state, state)
        return ""

    def go_on(self) -> None:
        """One of the ways that status names."""
        assert self.journal
        record, run = self.record, self.journal.stem
        assert record
        self.tamper(record)
        if self.dice.random() < 0.6 and not record.is_undoing and "refused" not in self.go("resume", run, faults=self.dice.choice([0, 0, 1, 2])):
            return
        if not (self.record and self.record.source):
            self.journal.unlink()  # as the refusal says: it has begun nothing
        elif "give --yes" in self.go("rollback", run, faults=self.dice.choice([0, 0, 1])):
            self.go("rollback", run, "--yes")


@pytest.fixture
def stranger(lab: Lab) -> Iterator[int]:
    """Somebody else's nbd-server on the source, of whom nobody takes notice."""
    host = lab["src"]
    host.run("sh", "-c", f"head -c 1M /dev/urandom > /root/stranger; printf '[generic]\\nport = {STRANGER}\\n[stranger]\\n"
                         "exportname = /root/stranger\\n' > /root/stranger.conf")
    with running(host, "nbd-server", "-d", "-C", "/root/stranger.conf") as pid:
        wait_for("the stranger", lambda: f":{STRANGER}" in host.run("ss", "-Hltn").stdout)
        yield pid


def test_whatever_is_thrown_at_a_run_nothing_is_lost(
        lab: Lab, tmp_path: Path, stranger: int, number: int, request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    seed = request.config.getoption("--random-seed")
    dice = random.Random(f"{seed} {number}")
    guest = [(MiB * dice.randrange(20), MiB * dice.randrange(1, 5)), (MiB * dice.randrange(30, 55), MiB * dice.randrange(1, 5))]
    operator = an_operator(lab, tmp_path, guest=guest, CHUNK="1M", STALL_TIMEOUT=5, LIMIT_RATE=f"{dice.choice([1, 2, 4])}M")
    trial = Trial(operator, dice, stranger)
    print(f"again: pytest hosts/test_random.py --random-runs {number + 1} --random-seed {seed} -k '[{number}]'")
    trial.go(*trial.words, faults=dice.randrange(1, 4))
    for _ in range(12):
        if end := trial.over():
            record_property("random run", end)
            print("; ".join(trial.told), "->", end)
            return
        trial.go_on()
    raise AssertionError(f"it does not end: {trial.told}")
