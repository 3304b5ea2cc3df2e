"""A stand-in for two clouds: their servers are files and their disks lie on the lab's hosts, since no Nova runs in namespaces.

As a program (`python -m hosts.standin TAG FOLDER THROW WORDS...`) it is migrena on these clouds. THROW is a list (JSON) of lines of
the journal and signals, as [["done of copy", 9]]: when that line has been written, the process sends itself that signal, and then
waits for the next one of the list. What a real Nova does, tests/clouds shows.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import migrena
from hosts.rig import INSTANCES, Instance, MiB
from lab.halting import line_of
from lab.hosts import Host, Lab
from unit.makers import a_flavor

# A guest that runs is a qemu-io with the disk open: see hosts/test_warm.py. It ends as one that is asked to by its power button.
POWER_OFF = 'pid=$(cat "$1/guest.pid" 2>/dev/null) || exit 0; kill "$pid"; while [ -e "$1/guest.pid" ]; do sleep 0.05; done'
PAGE = 20  # servers that are listed unless all are asked for; 1000 in a real Nova
IMAGE = {"id": "image-1", "name": "debian", "status": "active", "os_hash_value": "hash-1", "checksum": "sum-1"}
FLAVOR = {"original_name": "small", "vcpus": 1, "ram": 512, "disk": 10, "ephemeral": 0, "swap": 0}


def a_row(id: str, name: str, host: str, **different: Any) -> dict[str, Any]:
    """A running server, as Nova tells it."""
    return {"id": id, "name": name, "status": "ACTIVE", "OS-EXT-STS:power_state": 1, "OS-EXT-SRV-ATTR:host": host, "locked": False,
            "OS-EXT-SRV-ATTR:hypervisor_hostname": host, "metadata": {}, "image": {"id": "image-1"}, "flavor": FLAVOR, **different}


class Row(dict[str, Any]):
    """A server as novaclient gives it."""

    @property
    def id(self) -> str:
        return str(self["id"])

    @property
    def name(self) -> str:
        return str(self["name"])

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


class Servers:
    """The servers of one cloud, with novaclient's verbs; what is done is done at once. Each is a file, written by rename."""

    def __init__(self, lab: Lab, folder: Path, host: str) -> None:
        self.lab, self.folder, self.host = lab, folder, host

    def _path(self, id: str) -> Path:
        return self.folder / f"{id}.json"

    def _write(self, row: Mapping[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        draft = self._path(row["id"]).with_suffix(f".{uuid.uuid4()}")
        draft.write_text(json.dumps(row))
        draft.replace(self._path(row["id"]))

    def rows(self) -> dict[str, dict[str, Any]]:
        """All servers by their ids, in the order of these."""
        found = {}
        for path in sorted(self.folder.glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # deleted while we looked
                found[path.stem] = json.loads(path.read_text())
        return found

    def hypervisor(self) -> Host:
        """The host by what is written down of it: it may have died and come up again since this process began."""
        return (Lab.recorded(self.lab.spec.tag) or self.lab)[self.host]

    def change(self, id: str, how: Callable[[Row], Mapping[str, Any]]) -> None:
        """Changes a server; whoever else does that at the same time waits."""
        with open(self.folder / f"{id}.lock", "w", encoding="utf-8") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            row = self.get(id)
            self._write({**row, **how(row)})

    def put(self, id: str, **different: Any) -> None:
        """Changes a server's facts."""
        self.change(id, lambda row: different)

    def add(self, id: str, name: str, **different: Any) -> None:
        """One more server, which runs on this cloud's host."""
        self._write(a_row(id, name, self.host, **different))

    def get(self, id: str) -> Row:
        from novaclient import exceptions

        try:
            return Row(json.loads(self._path(id).read_text()))
        except FileNotFoundError:
            raise exceptions.NotFound(404) from None

    def list(self, search_opts: object = None, limit: int | None = None) -> list[Row]:
        rows = [Row(row) for row in self.rows().values()]
        return rows if limit == -1 else rows[:PAGE]

    def create(self, name: str, image: str, flavor: str, meta: Mapping[str, str], **extra: object) -> Row:
        id = str(uuid.uuid4())
        host = self.hypervisor()
        host.run("mkdir", "-p", f"{INSTANCES}/{id}")
        Instance(host, f"{INSTANCES}/{id}/disk").overlay(os.environ.get("BASE", f"{INSTANCES}/_base/debian"), 64 * MiB)
        self.add(id, name, metadata=dict(meta))
        return self.get(id)

    def delete(self, id: str) -> None:
        self.hypervisor().run("rm", "-rf", f"{INSTANCES}/{id}")
        self._path(id).unlink(missing_ok=True)

    def stop(self, id: str) -> None:
        self.hypervisor().run("sh", "-c", POWER_OFF, "sh", f"{INSTANCES}/{id}")
        self.put(id, status="SHUTOFF", **{"OS-EXT-STS:power_state": 4})

    def start(self, id: str) -> None:
        self.hypervisor().run("chown", "64060:64060", f"{INSTANCES}/{id}/disk")  # as libvirt does, and so the file's ctime changes
        self.put(id, status="ACTIVE", **{"OS-EXT-STS:power_state": 1})

    def lock(self, id: str, reason: str) -> None:
        self.put(id, locked=True, locked_reason=reason)

    def unlock(self, id: str) -> None:
        self.put(id, locked=False, locked_reason=None)

    def set_meta(self, id: str, meta: Mapping[str, str]) -> None:
        self.change(id, lambda row: {"metadata": {**row["metadata"], **meta}})

    def delete_meta(self, id: str, keys: Sequence[str]) -> None:
        self.change(id, lambda row: {"metadata": {key: value for key, value in row["metadata"].items() if key not in keys}})


class StandIn(migrena.Cloud):
    """migrena's own Cloud over these servers."""

    lab: Lab
    folder: Path

    def __init__(self, label: str, creds: Mapping[str, Any], glance_endpoint: str = "") -> None:
        self.label, self.url, self._version = label, str(creds["auth_url"]), (2, 96)
        self.identity, self.has_volumes = {"nova": self.url, "region": "", "project": "admin"}, False
        self.networks: Any = SimpleNamespace(all=lambda *_: [], made_by=lambda *_: [])
        side = "src" if label == "source" else "dst"
        self._nova = SimpleNamespace(servers=Servers(self.lab, self.folder / side, side),
                                     instance_action=SimpleNamespace(list=lambda id: []))
        self.store = migrena.ImageStore(self, SimpleNamespace(images=SimpleNamespace(list=lambda filters: [IMAGE], get=lambda id: IMAGE)))

    def flavors(self) -> list[migrena.Flavor]:
        return [a_flavor()]

    def sees_hosts(self) -> bool:
        return True

    def limits(self) -> dict[str, int]:
        return {}

    def refuses(self, extra: Mapping[str, Any]) -> str:
        return ""


class ThrowingJournal(migrena.Journal):
    """The journal, and what is thrown at some of its lines."""

    throw: list[tuple[str, int]]

    def write(self, event: str, **facts: object) -> None:
        super().write(event, **facts)
        if self.throw and self.throw[0][0] == line_of(event, facts):
            os.kill(os.getpid(), self.throw.pop(0)[1])


if __name__ == "__main__":
    found = Lab.recorded(sys.argv[1])
    assert found
    StandIn.lab, StandIn.folder, ThrowingJournal.throw = found, Path(sys.argv[2]), json.loads(sys.argv[3])
    migrena.Cloud, migrena.Journal = StandIn, ThrowingJournal  # type: ignore[misc]
    migrena.CLAIM_PAUSE = float(os.environ.get("CLAIM_PAUSE", "0.1"))  # type: ignore[misc]  # these servers are files, and answer at once
    for script in ("LEASED_COMMAND", "LEASED_DAEMON", "LEASED_FOLDER"):  # who waits for the end of leases need not wait for a minute
        setattr(migrena, script, getattr(migrena, script).replace("timeout 60 head", f"timeout {os.environ.get('LEASE_SECONDS', '60')} head"))
    sys.exit(migrena.main(sys.argv[4:]))
