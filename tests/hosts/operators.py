"""Somebody who runs migrena on the lab's hosts, with a stand-in for the clouds; and what must be so after a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conftest import REPOSITORY
from hosts.rig import INSTANCES, Instance, MiB, base, same_guest, wait_until_clean
from hosts.standin import Servers
from lab.hosts import Lab
from migrena import DONE, ORIGIN, WAS, known_runs, read_run
from unit.makers import UUID

Throw = tuple[str, int]  # a line of the journal, and the signal that follows it


@dataclass(frozen=True)
class Operator:
    """Somebody with two clouds, one instance in the first, and a state folder."""

    lab: Lab
    folder: Path
    source: Instance
    id: str = UUID  # of the instance

    @property
    def clouds(self) -> tuple[Servers, Servers]:
        """Source and destination, to look at and to do things behind migrena's back."""
        return Servers(self.lab, self.folder / "src", "src"), Servers(self.lab, self.folder / "dst", "dst")

    def begin(self, *words: str, throw: Sequence[Throw] = (), **different: str) -> subprocess.Popen[str]:
        """migrena in a process of its own, in an environment that may be different; it sends itself signals at some lines of its journal."""
        env = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", "MIGRENA_CONFIG": str(self.folder / "config.py"), **different}
        return subprocess.Popen([sys.executable, "-m", "hosts.standin", self.lab.spec.tag, str(self.folder), json.dumps(throw), *words], env=env,
                                text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *words: str, throw: Sequence[Throw] = ()) -> subprocess.CompletedProcess[str]:
        """migrena to its end."""
        process = self.begin(*words, throw=throw)
        out, said = process.communicate(timeout=200)
        return subprocess.CompletedProcess(process.args, process.returncode, out, said)

    def copy(self, *words: str, throw: Sequence[Throw] = ()) -> subprocess.CompletedProcess[str]:
        """The copy."""
        return self.run("-s", self.id, "-d", "new", *words, throw=throw)

    def killed(self) -> str:
        """The id of a run that was killed outright when its second chunk had arrived."""
        process = self.begin("-s", self.id, "-d", "new", "--limit-rate", str(3 * MiB))
        while not (path := next((self.folder / "state").glob("*.jsonl"), None)) or path.read_text().count('"chunk"') < 3:
            assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
        for name in ("src", "dst"):
            wait_until_clean(self.lab[name])
        return path.stem

    def state(self) -> list[tuple[str, str]]:
        """What status tells: each run's name and state."""
        return [(run["run"], run["result"]) for run in json.loads(self.run("status", "--json").stdout)]

    def states(self) -> list[tuple[str, str]]:
        """The same, read without a process."""
        folder = self.folder / "state"
        return [(run, read_run(folder, run).state) for run in known_runs(folder)]

    def made(self) -> list[dict[str, Any]]:
        """The servers in the destination."""
        return list(self.clouds[1].rows().values())

    def is_as_found(self) -> None:
        """The source runs, is not locked and carries no mark."""
        row = self.clouds[0].rows()[self.id]
        assert (row["status"], row["locked"], row["metadata"]) == ("ACTIVE", False, {})


def ended(process: subprocess.Popen[str], status: int) -> str:
    """What a migrena has said that ended with this status; never a traceback."""
    out, said = process.communicate(timeout=250)
    assert process.returncode == status and "Traceback" not in said, (process.returncode, out, said)
    return said


def an_operator(lab: Lab, folder: Path, id: str = UUID, guest: Sequence[tuple[int, int]] = ((MiB, 12 * MiB), (36 * MiB, 14 * MiB)),
                **different: object) -> Operator:
    """One whose source instance runs, with 26 MiB of its guest's on its disk; the settings in config.py may be different."""
    for name in ("src", "dst"):
        if lab[name].run("test", "-e", f"{INSTANCES}/_base/debian", check=False).returncode:
            base(lab[name], "debian", path=f"{INSTANCES}/_base/debian")
    lab["src"].run("mkdir", "-p", f"{INSTANCES}/{id}")
    source = Instance(lab["src"], f"{INSTANCES}/{id}/disk").overlay(f"{INSTANCES}/_base/debian", 64 * MiB)
    source.write(id, *guest)
    settings = {"SRC_CREDS": {"auth_url": "http://alpha"}, "DST_CREDS": {"auth_url": "http://beta"},
                "HOSTS": {host.name: host.address for host in lab}, "SSH_CONFIG": "/dev/null", "SSH_KEY": str(lab.key),
                "KNOWN_HOSTS": str(lab.known_hosts), "CHUNK": "4M", "TRANSPORT": "qemu", "COMPRESS": "off",
                "STATE_FOLDER": str(folder / "state"), **different}
    (folder / "config.py").write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    made = Operator(lab, folder, source, id)
    made.clouds[0].add(id, "web")
    return made


def is_complete(operator: Operator, run: str) -> None:
    """The copy is in its place, and status and both clouds tell so."""
    has_arrived(operator, run)
    assert operator.state() == [(run, "done")]


def has_arrived(operator: Operator, run: str, status: str = "SHUTOFF") -> None:
    """The copy is in its place, nothing of ours lies beside it, and both clouds tell so; the source of one that was started stays locked."""
    (row,) = operator.made()
    assert (row["status"], row["locked"], row["metadata"]) == (status, False, {ORIGIN: operator.id, WAS: "ACTIVE", DONE: run})
    new = Instance(operator.lab["dst"], f"{INSTANCES}/{row['id']}/disk", "qcow2")
    assert same_guest(operator.source, new)
    assert new.host.run("ls", f"{INSTANCES}/{row['id']}").stdout.split() == ["disk", "disk.info"]
    source = operator.clouds[0].rows()[operator.id]
    assert (source["status"], source["locked"], source["metadata"]) == ("SHUTOFF", status == "ACTIVE", {})
    if status == "ACTIVE":
        assert source["locked_reason"] == f"migrena run {run}: {row['name']} {row['id']} takes its place; back with: migrena.py rollback {run}"
    assert (run, "done") in operator.states()
