"""A Ceph cluster for a cloud, in user space: one monitor and one OSD on a sparse file, with cephx.

Nothing of it is in the kernel, so that it runs wherever the rest of the lab does. Nova asks for the sizes of pools, which only a
manager counts: one runs until the monitor knows them, and is ended then, since it would take more memory than all the rest.
"""

from __future__ import annotations

import base64
import json
import os
import struct
import time
import uuid
from collections.abc import Mapping
from typing import Any, Final

from lab.orders import File
from lab.processes import LabError, command, wait_until
from lab.roster import Roster
from lab.settings import Cloud, Ini, ceph_secret, ini, write_private

MONITOR: Final = (3300, 6789)  # its ports for both versions of Ceph's protocol
SIZE: Final = 40 * 1024**3  # bytes of the OSD's file; it takes what is written
POOLS: Final = {"images": "glance", "vms": "nova", "volumes": "cinder"}  # and who has a user for it
CAPS: Final[Mapping[str, Mapping[str, str]]] = {
    "mon.": {"mon": "allow *"},
    "client.admin": {"mon": "allow *", "osd": "allow *", "mgr": "allow *"},
    "mgr.x": {"mon": "allow profile mgr", "osd": "allow *", "mds": "allow *"},
    "osd.0": {"mon": "allow profile osd", "osd": "allow *", "mgr": "allow profile osd"},
    "client.glance": {"mon": "profile rbd", "osd": "profile rbd pool=images, "  # and it asks who has clones of an image
                                                   "profile rbd-read-only pool=vms, profile rbd-read-only pool=volumes"},
    "client.nova": {"mon": "profile rbd", "osd": "profile rbd pool=vms, profile rbd-read-only pool=images"},
    "client.cinder": {"mon": "profile rbd", "osd": "profile rbd pool=volumes, profile rbd pool=vms, "
                                                   "profile rbd-read-only pool=images"},
}
SECRET: Final = """\
<secret ephemeral='no' private='no'>
  <uuid>{}</uuid>
  <usage type='ceph'>
    <name>client.{} of {}</name>
  </usage>
</secret>
"""


class Cluster:
    """The Ceph of one cloud."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self.folder = cloud.ceph

    # ---- its files ----

    def write(self) -> None:
        """Write the configuration and the keys, 0600; keys that are there stay."""
        write_private(self.folder / "ceph.conf", ini(self._daemons()))
        write_private(self.cloud.ceph_conf, ini({**self._clients(), **{
            f"client.{user}": {"keyring": self.folder / f"client.{user}.keyring"} for user in POOLS.values()}}))
        if not (self.folder / "keyring").exists():
            keys = {entity: _new_key() for entity in CAPS}
            for entity, key in keys.items():
                write_private(self.folder / f"{entity}.keyring", _keyring(entity, key))
            write_private(self.folder / "keyring", "".join(_keyring(entity, key) for entity, key in keys.items()))

    def _clients(self) -> Ini:
        """What a client needs to know."""
        ports = ",".join(f"v{3 - number}:{self.cloud.address}:{port}" for number, port in enumerate(MONITOR, 1))
        return {"global": {"fsid": self.fsid, "mon host": f"[{ports}]"}}

    def _daemons(self) -> Ini:
        sections = {**self._clients()["global"],
                    "public addr": self.cloud.address, "keyring": self.folder / "keyring",
                    **{f"auth {side} required": "cephx" for side in ("cluster", "service", "client")},
                    "auth allow insecure global id reclaim": "false",
                    "admin socket": f"{self.folder}/$name.asok", "run dir": self.folder, "log file": "", "log to stderr": "true",
                    "err to stderr": "true", "mon cluster log to file": "false", "mon cluster log to stderr": "false",
                    "mon data": self.folder / "mon", "osd data": self.folder / "osd", "mgr data": self.folder,
                    "mgr initial modules": "", "crash dir": self.folder, "osd mon shutdown timeout": 0.2,
                    "osd objectstore": "bluestore", "bluestore block size": SIZE, "osd memory target": 896 * 1024**2,
                    # One copy of everything on one OSD, and no durability beyond what a test sees.
                    "osd pool default size": 1, "osd pool default min size": 1, "mon allow pool size one": "true",
                    "mon warn on pool no redundancy": "false", "osd crush chooseleaf type": 0, "osd pool default pg num": 8,
                    "osd pool default pg autoscale mode": "off", "mon allow pool delete": "true"}
        return {"global": sections}

    @property
    def fsid(self) -> str:
        """The cluster's own id."""
        return str(uuid.uuid5(uuid.NAMESPACE_DNS, str(self.folder)))

    def key(self, user: str) -> str:
        """The key of client.USER, in base64 as Ceph and libvirt write it."""
        text = (self.folder / f"client.{user}.keyring").read_text()
        return next(line.partition(" = ")[2] for line in text.splitlines() if line.startswith("key = "))

    def files_of_hypervisor(self) -> list[File]:
        """What lets a hypervisor use the cluster: Nova by its user's file, libvirt by a secret for each user that a disk may name."""
        files = [
            File("/etc/ceph/ceph.conf", ini(self._clients())),
            File("/etc/ceph/ceph.client.nova.keyring", _keyring("client.nova", self.key("nova")), 0o600, "nova"),
        ]
        for user in ("nova", "cinder"):
            secret = ceph_secret(self.cloud, user)
            files += [
                File(f"/etc/libvirt/secrets/{secret}.xml", SECRET.format(secret, user, self.cloud.name), 0o600),
                File(f"/etc/libvirt/secrets/{secret}.base64", self.key(user), 0o600),
            ]
        return files

    # ---- up ----

    def start(self, roster: Roster) -> None:
        """Start what does not run, and return when pools can be used and their sizes are known."""
        monitor, osd = (f"{self.cloud.name}-ceph-{part}" for part in ("mon", "osd"))
        conf = ("-c", self.folder / "ceph.conf")
        if not (self.folder / "mon").is_dir():
            self._make_monitor()
        roster.start(monitor, ["ceph-mon", "-f", *conf, "-i", "a"], place=(self.cloud.address, MONITOR[0]))
        roster.await_listening(monitor, (self.cloud.address, MONITOR[0]))
        if not (self.folder / "osd" / "ready").exists():
            self._make_osd()
        if not roster.runs(osd):
            self.ask("osd", "down", "0")  # it could not tell when it ended: its network was gone already
        roster.start(osd, ["ceph-osd", "-f", *conf, "-i", "0"])
        wait_until(f"{osd} to be up", lambda: self._is_up(roster, osd), 60, roster.log(osd))
        if not (self.folder / "pools.done").exists():
            self._make_pools(roster)

    def ask(self, *words: str) -> Any:
        """What the cluster answers to its admin, decoded from JSON."""
        text = command("ceph", "-c", self.folder / "ceph.conf", "--connect-timeout", "20", *words, "-f", "json")
        return json.loads(text) if text.strip() else None

    def _is_up(self, roster: Roster, osd: str) -> bool:
        roster.require(osd)
        return bool(self.ask("osd", "stat")["num_up_osds"])

    def _make_monitor(self) -> None:
        conf, monmap = self.folder / "ceph.conf", self.folder / "monmap"
        place = self._clients()["global"]["mon host"]
        command("monmaptool", "--create", "--clobber", "--fsid", self.fsid, "--addv", "a", str(place), monmap)
        command("ceph-mon", "-c", conf, "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", self.folder / "keyring")

    def _make_osd(self) -> None:
        """The OSD's number must be 0: its key was given to the monitor under that name."""
        identity = str(uuid.uuid5(uuid.NAMESPACE_DNS, f"osd.0 {self.folder}"))
        number = self.ask("osd", "new", identity)["osdid"]
        if number:
            raise LabError(f"Ceph of {self.cloud.name} has an OSD already: the new one has number {number}")
        (self.folder / "osd").mkdir(exist_ok=True)
        command("truncate", "-s", str(SIZE), self.folder / "osd" / "block")
        command("ceph-osd", "-c", self.folder / "ceph.conf", "-i", "0", "--mkfs", "--osd-uuid", identity)

    def _make_pools(self, roster: Roster) -> None:
        for pool in POOLS:
            self.ask("osd", "pool", "create", pool)
            self.ask("osd", "pool", "application", "enable", pool, "rbd")
        manager = f"{self.cloud.name}-ceph-mgr"
        roster.start(manager, ["ceph-mgr", "-f", "-c", self.folder / "ceph.conf", "-i", "x"])
        try:
            wait_until(f"{manager} to count what pools hold", self._sizes_are_known, 90, roster.log(manager))
        finally:
            roster.stop([manager])
        (self.folder / "pools.done").touch()

    def _sizes_are_known(self) -> bool:
        pools = self.ask("df")["pools"]
        return len(pools) >= len(POOLS) and all(pool["stats"]["max_avail"] for pool in pools)


def _new_key() -> str:
    """A key as `ceph-authtool --gen-print-key` makes it: type AES, a time, a length, and 16 random bytes."""
    return base64.b64encode(struct.pack("<HIIH", 1, int(time.time()), 0, 16) + os.urandom(16)).decode()


def _keyring(entity: str, key: str) -> str:
    caps = "".join(f'caps {service} = "{value}"\n' for service, value in CAPS[entity].items())
    return f"[{entity}]\nkey = {key}\n{caps}"
