"""Disks that are no files: images on Ceph and block devices, as source and as destination, in any combination with files."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from hosts.conftest import MakeCopy
from hosts.rig import Instance, MiB
from hosts.test_copy import a_raw_disk, an_overlay
from lab.ceph import Cluster
from lab.hosts import Host, Lab
from lab.processes import command
from lab.roster import Roster
from lab.settings import Cloud
from migrena import FinalError

pytestmark = pytest.mark.timeout(300)
SIZE = 192 * MiB
PLACES = ((0, 3 * MiB), (70 * MiB + 4096, 2 * MiB), (130 * MiB, 40 * MiB), (SIZE - 65536, 65536))


@dataclass(frozen=True)
class Small(Cloud):
    """A cloud of which there is only a Ceph."""

    place: Path
    at: str

    @property
    def folder(self) -> Path:
        return self.place

    @property
    def address(self) -> str:
        return self.at


@pytest.fixture(scope="module")
def ceph(namespaces: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A Ceph that both hosts reach."""
    with a_ceph(namespaces, tmp_path_factory.mktemp("ceph")) as cluster:
        yield cluster


@contextmanager
def a_ceph(lab: Lab, folder: Path) -> Iterator[Cluster]:
    """A Ceph that src and dst reach, and whose key libvirt has there; it is gone with the scope."""
    cluster = Cluster(Small("src", folder, lab.operator))
    roster = Roster(cluster.cloud.folder)
    (cluster.cloud.folder / "log").mkdir()
    cluster.folder.mkdir()
    cluster.write()
    try:
        cluster.start(roster)
        for name in ("src", "dst"):
            lab[name].run("sh", "-ec", "mkdir -p /root/secrets; cat > /root/secrets/$1", "sh", SECRET, input=cluster.key("cinder"))
        yield cluster
    finally:
        roster.stop(roster.processes)


SECRET = str(uuid.uuid4())
XML = """<domain type='kvm'><name>instance-00000001</name><uuid>{id}</uuid><devices><disk type='{type}' device='disk'>
<driver name='qemu' type='raw'/>{more}<target dev='vda' bus='virtio'/></disk></devices></domain>"""
ON_CEPH = """<auth username='cinder'><secret type='ceph' uuid='{secret}'/></auth>
<source protocol='rbd' name='volumes/{id}_disk'><host name='{address}' port='6789'/></source>"""


@dataclass
class Stored(Instance):
    """An instance whose disk is no file."""

    opts: str = ""  # how this machine's qemu opens it

    def write(self, seed: str, *places: tuple[int, int]) -> Instance:
        """The same bytes as a file would get."""
        source = Path("/tmp") / f"pattern-{uuid.uuid4().hex}"
        for offset, length in places:
            source.write_bytes(content(seed, offset, length))
            command("qemu-io", "-c", f"write -q -s {source} {offset} {length}", "--image-opts", self.opts)
        source.unlink()
        return self

    def sha256(self) -> str:
        """The digest of all that a guest would see."""
        flat = Path("/var/tmp") / f"flat-{uuid.uuid4().hex}"
        command("qemu-img", "convert", "-O", "raw", "--image-opts", self.opts, flat)
        found = command("sha256sum", flat).split()[0]
        flat.unlink()
        return found


def content(seed: str, offset: int, length: int) -> bytes:
    """Bytes that differ from place to place."""
    block = hashlib.sha512(f"{seed} {offset}".encode()).digest()
    return block * (length // len(block))


def instance_of(host: Host, type: str, more: str, opts: str, id: str) -> Stored:
    """An instance whose domain has this disk."""
    made = Stored(host, f"/var/lib/nova/instances/{id}/disk", "raw", opts)
    host.run("sh", "-ec", 'mkdir -p "${1%/*}"; cat > "$1.xml"; echo "{}" > "$1.info"', "sh", made.path,
             input=XML.format(id=id, type=type, more=more))
    return made


def on_ceph(ceph: Cluster, host: Host, size: int = SIZE) -> Stored:
    """An instance with a disk on Ceph."""
    id, conf = str(uuid.uuid4()), ceph.folder / "ceph.conf"
    command("rbd", "-c", conf, "create", "--size", f"{size}B", f"volumes/{id}_disk")
    more = ON_CEPH.format(id=id, address=ceph.cloud.address, secret=SECRET)
    return instance_of(host, "network", more, f"driver=rbd,pool=volumes,image={id}_disk,conf={conf}", id)


def on_device(host: Host, folder: Path, size: int = SIZE) -> Stored:
    """An instance with a disk on a block device: a loop device here, as this kernel has no device mapper."""
    id = str(uuid.uuid4())
    file = folder / f"{id}_disk.img"
    with file.open("wb") as new:
        new.truncate(size)
    device = command("losetup", "--show", "-f", file).strip()
    link = f"/dev/{id}_disk"
    host.run("mknod", link, "b", "7", device.removeprefix("/dev/loop"))
    return instance_of(host, "block", f"<source dev='{link}'/>", f"driver=host_device,filename={device}", id)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Where the files behind loop devices lie."""
    yield tmp_path
    let_go(tmp_path)


def let_go(place: Path) -> None:
    """Detaches the loop devices of this file, or of those in this folder."""
    for entry in json.loads(command("losetup", "--json", "--list") or '{"loopdevices": []}')["loopdevices"]:
        if Path(entry["back-file"]).is_relative_to(place):
            command("losetup", "-d", entry["name"])


def made(kind: str, ceph: Cluster, host: Host, folder: Path) -> Instance:
    """An instance with a disk of this kind."""
    if kind == "ceph":
        return on_ceph(ceph, host)
    return on_device(host, folder) if kind == "device" else {"raw": a_raw_disk, "qcow2": an_overlay}[kind](SIZE)(host)


def seen(instance: Instance) -> str:
    """The digest of what a guest would see."""
    if isinstance(instance, Stored):
        return instance.sha256()
    flat = instance.flattened()
    return instance.host.run("sh", "-c", 'sha256sum "$1"; rm "$1"', "sh", flat).stdout.split()[0]


@pytest.mark.parametrize("kinds", ["ceph ceph", "raw device", *(pytest.param(kinds, marks=pytest.mark.long) for kinds in (
    "ceph qcow2", "qcow2 ceph", "device ceph", "ceph device", "device raw"))])
def test_a_disk_arrives_from_any_backend_on_any_other(
        lab: Lab, ceph: Cluster, folder: Path, make_copy: MakeCopy, kinds: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrena.require_identity", lambda host, image: None)  # loop devices are nobody's volumes
    kind, other = kinds.split()
    source, fresh = made(kind, ceph, lab["src"], folder), made(other, ceph, lab["dst"], folder)
    source.write("a", *PLACES)
    copy = make_copy(chunk=128 * MiB)
    moved = copy(source, fresh)
    assert seen(source) == seen(fresh) and moved.digest
    assert 45 * MiB < moved.held < 60 * MiB
    assert "ceph" in kinds or copy.sent < 80 * MiB  # Ceph's own bytes count too


def test_a_clone_arrives_with_what_its_parent_has(lab: Lab, ceph: Cluster, folder: Path, make_copy: MakeCopy) -> None:
    parent, source, fresh = (on_ceph(ceph, lab[side]) for side in ("src", "src", "dst"))
    parent.write("parent", *PLACES[:3])
    rbd, names = ("rbd", "-c", ceph.folder / "ceph.conf"), [Path(one.path).parent.name for one in (parent, source)]
    command(*rbd, "rm", "--no-progress", f"volumes/{names[1]}_disk")
    for words in (["snap", "create", "--no-progress"], ["snap", "protect"]):
        command(*rbd, *words, f"volumes/{names[0]}_disk@base")
    command(*rbd, "clone", f"volumes/{names[0]}_disk@base", f"volumes/{names[1]}_disk")
    source.write("own", *PLACES[1:])
    fresh.write("what is overwritten with zeros", (100 * MiB, MiB))
    moved = make_copy(chunk=128 * MiB)(source, fresh)
    assert seen(source) == seen(fresh) and moved.digest


def test_what_is_no_file_arrives_where_no_proof_is_wanted_too(lab: Lab, ceph: Cluster, folder: Path, make_copy: MakeCopy) -> None:
    source, fresh = made("ceph", ceph, lab["src"], folder), made("raw", ceph, lab["dst"], folder)
    source.write("a", *PLACES)
    moved = make_copy(chunk=128 * MiB, verify=False)(source, fresh)
    assert seen(source) == seen(fresh) and not moved.digest


def test_a_device_that_is_not_the_instance_s_is_neither_read_nor_written_to(lab: Lab, ceph: Cluster, folder: Path, make_copy: MakeCopy) -> None:
    source, fresh = made("raw", ceph, lab["src"], folder), made("device", ceph, lab["dst"], folder)
    source.write("a", *PLACES)
    before = seen(fresh)
    for one, other in ((source, fresh), (fresh, made("raw", ceph, lab["dst"], folder))):
        copy = make_copy() if one is source else replace(make_copy(), source=make_copy().destination)
        with pytest.raises(FinalError, match="is not proven to be the instance's disk: it is path:unknown loop"):
            copy(one, other)
    assert seen(fresh) == before
