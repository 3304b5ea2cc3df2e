"""What is known of a disk comes from Nova and qemu-img; what stands against copying it is seen; nobody opens it meanwhile."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from hosts.conftest import Reach
from hosts.rig import Instance, MiB, base, running, wait_for
from lab.hosts import Host as LabHost
from lab.hosts import Lab
from migrena import (
    BROKEN,
    ROOT,
    CommandError,
    Host,
    HostError,
    Node,
    Server,
    differing,
    digests,
    disk_chain,
    free_space,
    held,
    same_content,
    survey_disks,
    survey_source_disks,
    tools_lacking,
)
from unit.makers import a_server

WRITE = ("-c", "write -q 0 512")
CELL = 64 * 1024


@pytest.fixture
def overlay(lab: Lab) -> Instance:
    """An overlay with a little in it."""
    return Instance.make(lab["src"]).overlay(base(lab["src"], "debian"), 64 * MiB).write("guest", (MiB, MiB))


@pytest.fixture
def raw(lab: Lab) -> Instance:
    """A raw disk with a little in it."""
    return Instance.make(lab["src"]).raw(64 * MiB).write("guest", (MiB, MiB))


@pytest.fixture(params=["qcow2", "raw"])
def disk(request: pytest.FixtureRequest) -> Instance:
    """Either of the two."""
    found: Instance = request.getfixturevalue("overlay" if request.param == "qcow2" else "raw")
    return found


def flaws(host: Host, instance: Instance) -> list[tuple[str, ...]]:
    """Of each file of the chain."""
    return [image.flaws for image in disk_chain(host, instance.path, "qcow2", shared=True)]


def test_a_raw_disk_into_which_the_guest_wrote_a_qcow2_header_stays_raw(lab: Lab, src: Host, raw: Instance) -> None:
    lab["src"].run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/shadow", "/var/lib/nova/forged", "1G")
    lab["src"].run("dd", "if=/var/lib/nova/forged", f"of={raw.path}", "conv=notrunc", "status=none")
    assert json.loads(lab["src"].run("qemu-img", "info", "--output=json", raw.path).stdout)["format"] == "qcow2"  # what a look into it says
    found = survey_disks(src, raw.id, raw.path, shared=False)[ROOT]
    assert [(image.path, image.format, image.size) for image in found.chain] == [(raw.path, "raw", 64 * MiB)]


@pytest.mark.parametrize("content", ["", "{}", "[]", "not json", '{"/elsewhere/image": "raw"}', '{"%s": null}'])
def test_a_disk_info_that_tells_nothing_makes_no_difference(lab: Lab, src: Host, overlay: Instance, content: str) -> None:
    lab["src"].run("tee", f"{overlay.path}.info", input=content.replace("%s", overlay.path))
    assert survey_disks(src, overlay.id, overlay.path, shared=False)[ROOT].top.format == "qcow2"


def test_a_file_that_is_not_there_is_reported_as_that(lab: Lab, src: Host, overlay: Instance) -> None:
    lab["src"].run("rm", overlay.path)
    with pytest.raises(HostError, match=f"{overlay.path} is the disk by libvirt, but does not exist"):
        survey_disks(src, overlay.id, overlay.path, shared=False)


def test_a_disk_that_lies_elsewhere_is_reported_with_the_setting(src: Host, overlay: Instance) -> None:
    with pytest.raises(HostError, match=f"the disk is {overlay.path}, not /srv/x/disk") as caught:
        survey_disks(src, overlay.id, "/srv/x/disk", shared=False)
    assert "DISK_PATH" in caught.value.reasons[0].way_out


def test_a_disk_path_that_is_a_link_to_the_file_is_as_good(lab: Lab, src: Host, overlay: Instance) -> None:
    lab["src"].run("ln", "-s", "/var/lib/nova/instances", "/srv/instances")
    other = f"/srv/instances/{overlay.id}/disk"
    assert survey_disks(src, overlay.id, other, shared=False)[ROOT].top.path == other


def test_an_instance_that_libvirt_does_not_know_is_reported_with_the_host(src: Host) -> None:
    with pytest.raises(HostError, match=r"src: libvirt gives no information on x: .*failed to get domain") as caught:
        survey_disks(src, "x", "/var/lib/nova/instances/x/disk", shared=False)
    assert "virsh list" in caught.value.reasons[0].way_out


def test_a_disk_without_flaws_has_none(src: Host, overlay: Instance) -> None:
    assert flaws(src, overlay) == [(), ()]


def test_internal_snapshots_are_seen(lab: Lab, src: Host, overlay: Instance) -> None:
    lab["src"].run("qemu-img", "snapshot", "-c", "before", overlay.path)
    assert flaws(src, overlay) == [("internal snapshots",), ()]


def test_internal_snapshots_of_a_base_are_seen(lab: Lab, src: Host) -> None:
    below = base(lab["src"], "debian", format="qcow2")
    lab["src"].run("qemu-img", "snapshot", "-c", "before", below)
    instance = Instance.make(lab["src"]).overlay(below, 64 * MiB, "qcow2")
    assert flaws(src, instance) == [(), ("internal snapshots",)]


def test_encryption_is_seen(lab: Lab, src: Host) -> None:
    instance = Instance.make(lab["src"])
    words = ("qemu-img", "create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=hunter2", "-o",
             "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10", instance.path, "8M")
    # it measures the processor first, and says so when a busy one cannot be measured
    wait_for("qemu-img", lambda: lab["src"].run(*words, check=False).returncode == 0, 60)
    instance.info("qcow2")
    assert flaws(src, instance) == [("encryption",)]
    assert survey_disks(src, instance.id, instance.path, shared=False)[ROOT].top.flaws == ("encryption",)  # and not qemu-img's word for it


def test_an_external_data_file_is_seen(lab: Lab, src: Host) -> None:
    instance = Instance.make(lab["src"])
    lab["src"].run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={instance.path}.data", instance.path, "8M")
    instance.info("qcow2")
    assert flaws(src, instance) == [("an external data file",)]


def test_the_mark_of_a_corrupt_disk_is_seen(lab: Lab, src: Host, overlay: Instance) -> None:
    lab["src"].run("dd", f"of={overlay.path}", "bs=1", "seek=79", "conv=notrunc", "status=none", input="\x02")  # incompatible features, bit 1
    assert flaws(src, overlay) == [("the corrupt flag",), ()]


DAMAGE = """
import struct, sys
with open(sys.argv[1], "r+b") as file:
    table = lambda at: file.seek(at) and struct.unpack(">Q", file.read(8))[0] & 0x00fffffffffffe00
    file.seek(table(table(40)) + 8 * int(sys.argv[2]))
    file.write(struct.pack(">Q", int(sys.argv[3], 16)))
"""


def damaged(instance: Instance, entry: int, value: str) -> Instance:
    """The same, after one entry of its first table of clusters was overwritten."""
    instance.host.run("python3", "-c", DAMAGE, instance.path, str(entry), value)
    return instance


def test_a_damaged_table_is_seen_although_the_file_is_not_marked(src: Host, overlay: Instance) -> None:
    damaged(overlay, 17, "80007fffffff0000")
    before = overlay.sha256()
    assert survey_disks(src, overlay.id, overlay.path, shared=False)[ROOT].top.flaws == (BROKEN,)
    assert overlay.sha256() == before


def test_leaked_clusters_are_counted_and_are_no_flaw(src: Host, overlay: Instance) -> None:
    damaged(overlay, 17, "0")
    top = survey_disks(src, overlay.id, overlay.path, shared=False)[ROOT].top
    assert (top.flaws, top.leaks) == ((), 1)


def test_a_chain_of_three_files_is_seen_whole_and_has_no_single_base(lab: Lab, src: Host, overlay: Instance) -> None:
    top = Instance.make(lab["src"]).overlay(overlay.path, 64 * MiB, "qcow2")
    found = survey_disks(src, top.id, top.path, shared=False)[ROOT]
    assert [image.format for image in found.chain] == ["qcow2", "qcow2", "raw"]
    assert [image.path for image in found.chain[:2]] == [top.path, overlay.path]
    assert found.base is None


def test_a_missing_base_is_reported(lab: Lab, src: Host, overlay: Instance) -> None:
    lab["src"].run("mv", overlay.node()["full-backing-filename"], "/var/lib/nova/away")
    with pytest.raises(HostError, match=f"{overlay.path} has the backing file .*, which does not exist"):
        survey_disks(src, overlay.id, overlay.path, shared=False)


def writer(host: LabHost, instance: Instance) -> tuple[str, ...]:
    """A program that has the disk open for writing, as a running guest would."""
    return ("qemu-nbd", "-t", "-f", instance.format, "-k", "/root/writer.sock", instance.path)


@pytest.fixture
def in_use(disk: Instance) -> Iterator[Instance]:
    """A disk that somebody has open for writing."""
    with running(disk.host, *writer(disk.host, disk)):
        wait_for("the writer", lambda: disk.host.run("test", "-S", "/root/writer.sock", check=False).returncode == 0)
        yield disk
    disk.host.run("rm", "-f", "/root/writer.sock")


def looked_at(host: Host, instance: Instance, status: str) -> Server:
    """Looks at a disk as a survey does, and gives the server back when nothing speaks against it."""
    identity = instance.path.split("/")[-2]
    server = a_server(id=identity, status=status)
    assert survey_source_disks(host, server, (), only=())
    return server


def test_a_disk_that_is_in_use_although_the_instance_is_stopped_is_refused(src: Host, in_use: Instance) -> None:
    with pytest.raises(HostError, match="is in use although the instance is SHUTOFF") as caught:
        looked_at(src, in_use, "SHUTOFF")
    assert "lsof" in caught.value.reasons[0].way_out


def test_the_disk_of_a_running_instance_can_be_looked_at(src: Host, in_use: Instance) -> None:
    assert looked_at(src, in_use, "ACTIVE")


def test_control_a_disk_that_nobody_uses_is_not_refused(src: Host, disk: Instance) -> None:
    assert looked_at(src, disk, "SHUTOFF")


def test_nobody_can_open_the_disk_for_writing_while_it_is_held(src: Host, disk: Instance) -> None:
    before = disk.sha256()
    with src.private_folder("test") as folder, held(src, Node.of_file(disk.path), folder):
        refused = disk.host.run("qemu-io", "-f", disk.format, *WRITE, disk.path, check=False)
        assert refused.returncode and "lock" in refused.stderr
        assert disk.host.run("qemu-img", "resize", "-f", disk.format, disk.path, "128M", check=False).returncode
        disk.host.run("qemu-io", "-r", "-f", disk.format, "-c", "read -q 0 512", disk.path)  # reading harms nobody
        assert disk.sha256() == before
    disk.host.run("qemu-io", "-f", disk.format, *WRITE, disk.path)
    assert disk.sha256() != before


def test_a_disk_that_somebody_writes_to_cannot_be_held(src: Host, in_use: Instance) -> None:
    with src.private_folder("test") as folder, pytest.raises(CommandError, match="lock"), held(src, Node.of_file(in_use.path), folder):
        pass


def test_a_disk_with_an_awkward_name_can_be_held(lab: Lab, src: Host) -> None:
    instance = Instance.make(lab["src"], "/var/lib/nova/a, b,,c 'd' \"e\"/%s/disk").raw(MiB)
    with src.private_folder("test") as folder, held(src, Node.of_file(instance.path), folder):
        assert lab["src"].run("qemu-io", "-f", "raw", *WRITE, instance.path, check=False).returncode


def test_tools_that_are_not_there_are_named(reach: Reach) -> None:
    for user in ("root", "operator"):
        assert tools_lacking(reach("src", ssh_user=user), ("qemu-img", "nbd-client", "no-such-tool", "ss", "-rf")) == ["no-such-tool", "-rf"]


def test_free_space_is_what_root_could_write(lab: Lab, src: Host, raw: Instance) -> None:
    before = free_space(src, raw.path)
    lab["src"].run("fallocate", "-l", "100M", "/var/lib/nova/filler")
    assert 99 * MiB < before - free_space(src, raw.path) < 102 * MiB


def test_digests_are_those_of_the_cells_that_are_not_zeros(lab: Lab, src: Host) -> None:
    instance = Instance.make(lab["src"]).raw(5 * MiB + 10).write("guest", (MiB + 5, 10), (MiB + 9 * CELL - 1, 2))
    instance.lengthen(3)  # an odd end
    content = Path(f"{lab['src'].root}{instance.path}").read_bytes()

    def digest(*runs: tuple[int, int]) -> str:
        return hashlib.sha256(b"".join(struct.pack(">QQ", at, count) + content[at : at + count] for at, count in runs)).hexdigest()

    found = digests(src, instance.path, 0, instance.length, 60)
    assert found == {1: digest((MiB, CELL), (MiB + 8 * CELL, 2 * CELL)), 5: digest((5 * MiB, 13))}
    assert digests(src, instance.path, MiB, MiB, 60) == {1: found[1]}


def test_holes_make_no_difference_to_digests_and_every_byte_does(lab: Lab, src: Host) -> None:
    instance = Instance.make(lab["src"]).raw(8 * MiB)
    instance.write("guest", (700, 5000), (MiB - 3, 6), (2 * MiB + 3 * CELL, CELL), (3 * MiB, 2 * MiB), (8 * MiB - 4096, 4096))
    host, dense, view = lab["src"], f"{instance.path}.dense", f"{instance.path}.qcow2"
    host.run("cp", "--sparse=never", instance.path, dense)
    host.run("qemu-img", "convert", "-O", "qcow2", instance.path, view)
    found = digests(src, instance.path, 0, 8 * MiB, 60)
    assert list(found) == [0, 1, 2, 3, 4, 7]
    assert digests(src, dense, 0, 8 * MiB, 60) == found
    with src.private_folder("test") as folder, src.daemon(f"{folder}/pid", "qemu-nbd", "-r", "-t", "-e", "8", "-k", f"{folder}/socket",
                                                          f"--pid-file={folder}/pid", "-f", "qcow2", view):
        assert digests(src, json.dumps({"driver": "nbd", "server.type": "unix", "server.path": f"{folder}/socket"}), 0, 8 * MiB, 60) == found
    for place in (0, 700, CELL, MiB - 1, MiB, 2 * MiB - 1, 5 * MiB + CELL - 1, 6 * MiB, 8 * MiB - 1):
        host.run("cp", "--sparse=always", instance.path, dense)
        before = Path(f"{host.root}{dense}").read_bytes()[place]
        host.run("dd", f"of={dense}", "bs=1", f"seek={place}", "conv=notrunc", "status=none", input="?" if before != ord("?") else "!")
        assert differing(digests(src, dense, 0, 8 * MiB, 60), found) == [place // MiB]


@pytest.mark.parametrize("place", [0, 5 * MiB, 16 * MiB - 1, 20 * MiB, 32 * MiB - 1])
def test_bases_that_differ_in_one_byte_anywhere_are_not_the_same(lab: Lab, src: Host, dst: Host, place: int) -> None:
    paths = [base(lab[name], "debian") for name in ("src", "dst")]

    def same() -> bool:
        images = [disk_chain(host, path, "raw", shared=False)[0] for host, path in zip((src, dst), paths, strict=True)]
        return same_content((src, images[0]), (dst, images[1]), 60)

    assert same()
    lab["dst"].run("dd", f"of={paths[1]}", "bs=1", f"seek={place}", "conv=notrunc", "status=none", input="!")
    assert not same()


def test_bases_of_other_lengths_are_not_the_same(lab: Lab, src: Host, dst: Host) -> None:
    paths = [base(lab[name], "debian") for name in ("src", "dst")]
    lab["dst"].run("truncate", "-s", "+1", paths[1])
    images = [disk_chain(host, path, "raw", shared=False)[0] for host, path in zip((src, dst), paths, strict=True)]
    assert not same_content((src, images[0]), (dst, images[1]), 60)


@pytest.mark.parametrize("shared", [True, False])
def test_hazard_22_a_backing_file_that_is_missing_is_named(lab: Lab, src: Host, shared: bool) -> None:
    below = base(lab["src"], "debian")
    source = Instance.make(lab["src"]).overlay(below, 64 * MiB)
    lab["src"].run("mv", below, f"{below}.aside")
    with pytest.raises(HostError, match=f"{source.path} has the backing file {below}, which does not exist"):
        disk_chain(src, source.path, "qcow2", shared=shared)
