"""The stand-in for two clouds (hosts.standin), whose new instances have disks of the format and size that the source has.

As a program (`python -m bench.clouds TAG FOLDER FORMAT SIZE BASE WORDS...`) it is migrena on these clouds.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import migrena
from hosts.rig import INSTANCES, Instance
from hosts.standin import FLAVOR, Row, Servers, StandIn
from lab.hosts import Lab
from unit.makers import a_flavor

LARGE = 100  # GiB, of the only flavor's disk: there is room in it for every disk


class SizedServers(Servers):
    """Servers whose disks are as large as they are told to be."""

    format, size, base = "", 0, ""

    def add(self, id: str, name: str, **different: Any) -> None:
        """One more server, of the large flavor."""
        super().add(id, name, flavor={**FLAVOR, "disk": LARGE}, **different)

    def create(self, name: str, image: str, flavor: str, meta: Mapping[str, str], **extra: object) -> Row:
        id, host = str(uuid.uuid4()), self.lab[self.host]
        host.run("mkdir", "-p", f"{INSTANCES}/{id}")
        fresh = Instance(host, f"{INSTANCES}/{id}/disk")
        if self.format == "raw":
            fresh.raw(self.size)
        else:
            fresh.overlay(self.base, self.size)
        self.add(id, name, metadata=dict(meta))
        return self.get(id)


class SizedStandIn(StandIn):
    """migrena's own Cloud over these servers."""

    def __init__(self, label: str, creds: Mapping[str, Any], glance_endpoint: str = "") -> None:
        super().__init__(label, creds, glance_endpoint)
        side = "src" if label == "source" else "dst"
        self._nova.servers = SizedServers(self.lab, self.folder / side, side)

    def flavors(self) -> list[migrena.Flavor]:
        return [a_flavor(disk=LARGE)]


if __name__ == "__main__":
    tag, folder, format, size, base, *words = sys.argv[1:]
    found = Lab.recorded(tag)
    assert found
    StandIn.lab, StandIn.folder = found, Path(folder)
    SizedServers.format, SizedServers.size, SizedServers.base = format, int(size), base
    migrena.Cloud = SizedStandIn  # type: ignore[misc]
    sys.exit(migrena.main(words))
