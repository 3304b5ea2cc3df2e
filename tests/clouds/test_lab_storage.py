"""The lab's storage itself: Cinder's volumes in files and on Ceph, and Nova's own disks on Ceph, with guests that boot and use them."""

from __future__ import annotations

import base64
import hashlib
import xml.etree.ElementTree as ET
from collections.abc import Iterator

import pytest

from clouds.conftest import MACHINE, WITH_MACHINE, MiB, wait_for_console
from lab.api import Api
from lab.ceph import Cluster
from lab.clouds import Clouds
from lab.hosts import Host
from lab.processes import command
from lab.settings import Cloud, ceph_secret
from lab.volumes import exported

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]
ON_CEPH = "dst-cmp2"
PATIENCE = 900.0  # seconds for a guest to boot in a virtual machine without KVM
PATTERN = bytes(range(256)) * (MiB // 256)


@pytest.fixture(scope="module")
def on_ceph(storage: Clouds) -> Iterator[Host]:
    """A hypervisor whose own disks are on Ceph meanwhile."""
    storage.set_images_type(ON_CEPH, "rbd")
    yield storage.host(ON_CEPH)
    storage.set_images_type(ON_CEPH, "raw")


def domain(host: Host, api: Api, id: str) -> ET.Element:
    """What libvirt would start an instance with."""
    return ET.fromstring(host.run("virsh", "dumpxml", "--inactive", id).stdout)


def disks(tree: ET.Element) -> dict[str, ET.Element]:
    """The disks of a domain by their names there."""
    return {disk.find("target").get("dev", ""): disk for disk in tree.iterfind("devices/disk")}  # type: ignore[union-attr]


def rbd(cloud: Cloud, *words: str) -> str:
    """What `rbd` prints to the cluster's admin."""
    return command("rbd", "-c", Cluster(cloud).folder / "ceph.conf", *words)


def write_first(api: Api, volume: str) -> None:
    """Put a pattern into the first MiB of a volume that nobody has open."""
    if api.cloud.name == "src":
        path = exported(api.cloud) / f"volume-{volume}"
        with path.open("r+b") as file:
            file.write(PATTERN)
    else:
        source = Cluster(api.cloud).folder / "pattern"
        source.write_bytes(PATTERN)
        opts = f"rbd:volumes/volume-{volume}:conf={Cluster(api.cloud).folder}/ceph.conf"
        command("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, opts)


@pytest.mark.parametrize("place", ["src-cmp1", "dst-cmp1"])
def test_a_volume_is_attached_to_a_running_guest_and_is_there_after_a_stop(storage: Clouds, place: str) -> None:
    api, host = storage.api(place[:3]), storage.host(place)
    volume = api.create_volume("data")
    id = api.create("with-volume", availability_zone=f"nova:{place}")
    wait_for_console(api, id, "GUEST boots=1 ")
    assert api.attach(id, volume) == "/dev/vdb"
    seen = disks(domain(host, api, id))
    assert {name: disk.findtext("serial") for name, disk in seen.items()} == {"vda": None, "vdb": volume}
    assert seen["vdb"].get("type") == ("file" if api.cloud.name == "src" else "network")
    api.act(id, "os-stop", until="SHUTOFF")
    write_first(api, volume)
    api.act(id, "os-start", until="ACTIVE")
    shown = wait_for_console(api, id, f"GUEST disk vdb serial={volume[:20]} ")
    assert f"size={1024 * MiB} first={hashlib.md5(PATTERN).hexdigest()[:12]}" in shown
    api.detach(id, volume)
    api.delete(id)
    api.delete_volume(volume)


def test_a_guest_boots_from_a_volume_on_ceph(storage: Clouds) -> None:
    dst = storage.api("dst")  # whose token, unlike an older one, has Cinder in its catalog, from which Nova takes the endpoint
    image = dst.need("glance", "images", "guest")
    root = {"boot_index": 0, "uuid": image, "source_type": "image", "destination_type": "volume", "volume_size": 1,
            "delete_on_termination": True}
    id = dst.create("from-volume", "", block_device_mapping_v2=[root], availability_zone="nova:dst-cmp1")
    wait_for_console(dst, id, "GUEST boots=1 ")
    volume = dst.server(id)["os-extended-volumes:volumes_attached"][0]["id"]
    assert dst.volume(volume)["bootable"] == "true" and dst.volume(volume)["volume_type"] == "standard"
    assert f"volume-{volume}" in rbd(dst.cloud, "ls", "volumes")
    dst.delete(id)
    assert f"volume-{volume}" not in rbd(dst.cloud, "ls", "volumes")


def test_a_guest_with_all_its_disks_on_ceph_boots(storage: Clouds, on_ceph: Host) -> None:
    dst = storage.api("dst")
    image = dst.need("glance", "images", "guest")
    mapping = [{"boot_index": 0, "uuid": image, "source_type": "image", "destination_type": "local"},
               *({"boot_index": -1, "source_type": "blank", "destination_type": "local", "volume_size": 1} for _ in range(2)),
               {"boot_index": -1, "source_type": "blank", "destination_type": "local", "guest_format": "swap", "volume_size": 16}]
    id = dst.create("on-ceph", flavor="several", block_device_mapping_v2=mapping, config_drive=True, availability_zone=f"nova:{ON_CEPH}")
    shown = wait_for_console(dst, id, "GUEST wrote=")
    assert "GUEST boots=1 " in shown and all(f"GUEST disk {name} " in shown for name in ("vdb", "vdc", "vdd"))
    found = disks(domain(on_ceph, dst, id))
    sources = {name: disk.find("source") for name, disk in found.items()}
    assert {source.get("name") for source in sources.values() if source is not None} == {
        f"vms/{id}_{name}" for name in ("disk", "disk.eph0", "disk.eph1", "disk.swap", "disk.config")}
    secrets = {secret.get("uuid") for disk in found.values() for secret in disk.iterfind("auth/secret")}
    assert secrets == {ceph_secret(dst.cloud, "nova")}
    key = on_ceph.run("virsh", "secret-get-value", ceph_secret(dst.cloud, "nova")).stdout.strip()
    assert key == Cluster(dst.cloud).key("nova")
    dst.delete(id)
    assert id not in rbd(dst.cloud, "ls", "vms")


@pytest.mark.timeout(2400)
def test_a_volume_on_lvm_goes_by_iscsi_to_a_guest_whose_root_is_on_lvm(storage: Clouds, machine: Host) -> None:
    lab, src = Clouds(WITH_MACHINE), storage.api("src")
    lab.set_images_type(MACHINE, "lvm")
    volume = src.create_volume("data", volume_type="lvm")
    id = src.create("with-volume", availability_zone=f"nova:{MACHINE}")
    src.attach(id, volume)
    found = disks(domain(machine, src, id))
    places = {name: disk.find("source").get("dev", "") for name, disk in found.items()}  # type: ignore[union-attr]
    assert places["vda"] == f"/dev/instances/{id}_disk" and places["vdb"].startswith("/dev/sd") and found["vdb"].findtext("serial") == volume
    src.act(id, "os-stop", until="SHUTOFF")
    links = machine.run("sh", "-c", "ls -l /dev/disk/by-path").stdout
    assert f"iscsi-iqn.2010-10.org.openstack:volume-{volume}-lun-0" in links
    machine.run("sh", "-ec", "base64 -d | dd of=$1 bs=1M oflag=direct iflag=fullblock", "sh", places["vdb"],
                input=base64.b64encode(PATTERN).decode())
    src.act(id, "os-start", until="ACTIVE")
    shown = wait_for_console(src, id, f"GUEST disk vdb serial={volume[:20]} ", PATIENCE, 15)
    assert f"size={1024 * MiB} first={hashlib.md5(PATTERN).hexdigest()[:12]}" in shown
    src.act(id, "os-stop", until="SHUTOFF")  # this emulated guest takes minutes to let a device go
    src.detach(id, volume)
    src.delete(id)
    src.delete_volume(volume)
