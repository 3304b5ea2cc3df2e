"""Hypervisors whose qemu and libvirt are in a container (hazard 24): a prefix enters it, and files lie elsewhere in it."""

from __future__ import annotations

import contextlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import short_are
from hosts.conftest import Reach
from hosts.operators import Operator, an_operator
from hosts.rig import INSTANCES, Instance, running, same_guest, wait_for
from lab.hosts import Host as LabHost
from lab.hosts import Lab
from migrena import HostEntry, HostError
from unit.makers import UUID

INSIDE = "/inside/nova"
BASE = f"{INSIDE}/instances/_base/debian"
# A container is made of the host's own tools, but for virsh, which tells paths as they are there; the host's own finds nothing.
VIRSH = "sed s,/var/lib/nova,/inside/nova, /usr/local/bin/virsh > /root/virsh; chmod 755 /root/virsh"
CHROOT = f"""
set -e
{VIRSH}
for name in usr etc dev proc run tmp root; do mkdir -p "/box/$name"; mount --rbind "/$name" "/box/$name"; done
for name in bin sbin lib lib64; do ln -sfn "usr/$name" "/box/$name"; done
mkdir -p /box{INSIDE}
mount --bind /var/lib/nova /box{INSIDE}
mount --bind /root/virsh /box/usr/local/bin/virsh
"""
NO_CHROOT = "for name in usr etc dev proc run tmp root inside/nova; do umount -l /box/$name; done; rm -rf --one-file-system /box"
NAMESPACE = f"""
set -e
{VIRSH}
mount -t tmpfs tmpfs /mnt
mkdir -p /mnt/nova
mount --bind /var/lib/nova /mnt/nova
ln -sfn /mnt /inside
mount --bind /root/virsh /usr/local/bin/virsh
exec sleep 1000
"""


@contextlib.contextmanager
def contained(host: LabHost, kind: str) -> Iterator[str]:
    """The prefix that enters a host's container."""
    if kind == "chroot":
        host.run("sh", "-c", CHROOT)
        try:
            yield "chroot /box"
        finally:
            host.run("sh", "-c", NO_CHROOT)
    else:
        with running(host, "unshare", "-m", "sh", "-c", NAMESPACE) as pid:
            yield f"nsenter -m -t {pid} --"


@pytest.fixture(params=["chroot", "namespace"])
def operator(request: pytest.FixtureRequest, lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Operator]:
    """Somebody whose hypervisors have such a container; bases are named as they are in it."""
    with contained(lab["src"], request.param) as there, contained(lab["dst"], request.param) as here:
        paths = {INSIDE: "/var/lib/nova"}
        rows = {name: {"address": lab[name].address, "prefix": prefix} for name, prefix in (("src", there), ("dst", here))}
        made = an_operator(lab, tmp_path, HOSTS={"*": {"paths": paths}, **rows})
        lab["src"].run("qemu-img", "rebase", "-u", "-F", "raw", "-b", BASE, f"{INSTANCES}/{UUID}/disk")
        lab["src"].run("tee", f"{INSTANCES}/{UUID}/disk.info", input=json.dumps({f"{INSIDE}/instances/{UUID}/disk": "qcow2"}))
        monkeypatch.setenv("BASE", BASE)
        yield made


def base_of(host: LabHost, path: str) -> str:
    """The name of its base in a disk's file."""
    return str(json.loads(host.run("qemu-img", "info", "--output=json", path).stdout)["backing-filename"])


@pytest.mark.parametrize("words", short_are([""], ["", "--no-tls", "--compress on", "--warm"]))
def test_hazard_24_a_disk_is_moved_where_qemu_and_libvirt_are_in_a_container(operator: Operator, words: str) -> None:
    done = operator.copy("--json", *words.split())
    assert done.returncode == 0, done.stderr
    path = f"{INSTANCES}/{json.loads(done.stdout)['destination']['id']}/disk"
    assert base_of(operator.lab["dst"], path) == BASE
    for name, disk in (("src", operator.source.path), ("dst", path)):
        operator.lab[name].run("qemu-img", "rebase", "-u", "-F", "raw", "-b", f"{INSTANCES}/_base/debian", disk)
    assert same_guest(operator.source, Instance(operator.lab["dst"], path, "qcow2"))


def test_a_container_is_entered_again_by_a_retry_and_a_folder_without_programs_is_passed_over(lab: Lab, reach: Reach) -> None:
    with contained(lab["src"], "namespace") as prefix:
        lab["src"].run("sh", "-c", "mount -t tmpfs -o noexec tmpfs /tmp")
        try:
            host = reach("src", hosts={"src": HostEntry(lab["src"].address, prefix=tuple(prefix.split()), paths={INSIDE: "/var/lib/nova"})})
            folder = host._tools[1].partition("=")[2].partition(":")[0]
            assert folder.startswith("/var/tmp/")
            (lease,) = host._lasting
            lease.release()
            wait_for("the end of the wrappers", lambda: lab["src"].run("test", "-d", folder, check=False).returncode != 0)
            host.reconnect()
            assert host._tools and host.run("qemu-img", "--version").startswith("qemu-img") and folder not in host._tools[1]
            host.close()
        finally:
            lab["src"].run("umount", "/tmp")


@pytest.mark.parametrize("operator", ["chroot"], indirect=True)
def test_hazard_24_a_copy_that_is_cut_off_leaves_nothing_in_a_container_and_is_undone(operator: Operator) -> None:
    run = operator.killed()
    done = operator.run("rollback", run)
    assert done.returncode == 0, done.stderr
    operator.is_as_found()


@pytest.mark.parametrize(("prefix", "said"), [
    ("podman exec -i nova_libvirt", "not found"),
    ("unshare -m sh -c 'mount --bind /srv /run; exec \"$@\"' sh", "it does not share the /run of its host"),
    ("env PATH=/nowhere /usr/bin/env", "readlink"),
    ("unshare -m sh -c 'mount --bind /dev/null /usr/bin/qemu-nbd; exec \"$@\"' sh", "it has no qemu-nbd"),
])
def test_hazard_24_a_prefix_that_does_not_lead_to_the_tools_is_reported(reach: Reach, lab: Lab, prefix: str, said: str) -> None:
    with pytest.raises(HostError, match=said) as caught:
        reach("src", hosts={"src": HostEntry(lab["src"].address, prefix=tuple(shlex.split(prefix)))})
    assert caught.value.reasons[0].way_out == "correct prefix in HOSTS"
