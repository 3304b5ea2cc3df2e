"""What libvirt says of a disk is the truth about it: whatever stands against that is refused by name, and the way out works."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator

import pytest

from clouds.conftest import DISKS, SOURCE, Operator, disk, ended, has_been_put_back, same_to_both_guests, write_random
from clouds.test_refusals import refused
from lab.api import Api
from lab.clouds import Clouds
from lab.hosts import Host

MiB = 1024**2


@pytest.fixture(scope="module")
def host(clouds: Clouds) -> Host:
    """The source's hypervisor."""
    return clouds.host(SOURCE)


@pytest.fixture(scope="module")
def theirs(src: Api, host: Host) -> Iterator[str]:
    """The id of an instance that all these tests share, and what backup tools do to."""
    id = src.create("theirs", availability_zone=f"nova:{SOURCE}")
    src.act(id, "os-stop", until="SHUTOFF")
    write_random(host, id, (64 * MiB, 16 * MiB))
    yield id
    src.delete(id)
    host.run("sh", "-c", f"rm -f {DISKS}/their-*")


@pytest.fixture
def ran(src: Api, theirs: str) -> str:
    """The same, while it runs."""
    if src.server(theirs)["status"] != "ACTIVE":
        src.act(theirs, "os-start", until="ACTIVE")
    return theirs


@pytest.fixture
def stopped(src: Api, theirs: str) -> str:
    """The same, while it does not run."""
    if src.server(theirs)["status"] != "SHUTOFF":
        src.act(theirs, "os-stop", until="SHUTOFF")
    return theirs


def virsh(host: Host, *words: str) -> str:
    """What virsh prints there."""
    return host.run("virsh", "-q", *words).stdout


def look(operator: Operator, id: str) -> subprocess.CompletedProcess[str]:
    """What a dry run says, which surveys and refuses as any other."""
    return operator.run("-s", id, *operator.to("dst-cmp1"), "-n")


def allowed(operator: Operator, id: str) -> None:
    """Nothing stands in the way any more."""
    done = look(operator, id)
    assert done.returncode == 0, done.stderr


def way_out(done: subprocess.CompletedProcess[str], begin: str) -> list[str]:
    """The command that a refusal advises, as words."""
    line = next(line for line in done.stderr.splitlines() if begin in line)
    return line[line.index(begin):].split(";")[0].split()


def test_a_running_source_with_an_external_snapshot(operator: Operator, host: Host, ran: str) -> None:
    shared = host.run("sh", "-c", f"sha256sum {DISKS}/_base/*").stdout
    virsh(host, "snapshot-create-as", ran, "nightly", "--disk-only", "--diskspec", f"vda,file={DISKS}/their-snapshot")
    done = look(operator, ran)
    refused(done, f"the guest writes to {DISKS}/their-snapshot, an external snapshot; {disk(ran)} is the state before it",
            "libvirt has a snapshot of the instance, nightly")
    host.run(*way_out(done, "virsh blockcommit"))
    host.run(*way_out(done, "virsh snapshot-delete"))
    assert host.run("sh", "-c", f"sha256sum {DISKS}/_base/*").stdout == shared  # without --base blockcommit goes down to there
    allowed(operator, ran)


def test_a_stopped_source_with_an_external_snapshot(operator: Operator, src: Api, host: Host, ran: str) -> None:
    """libvirt's own tools merge that of a running one alone, and Nova would start it without what was written since."""
    virsh(host, "snapshot-create-as", ran, "nightly", "--disk-only", "--no-metadata", "--diskspec", f"vda,file={DISKS}/their-other")
    src.act(ran, "os-stop", until="SHUTOFF")
    done = look(operator, ran)
    refused(done, f"the guest writes to {DISKS}/their-other, an external snapshot")
    host.run(*way_out(done, "qemu-img commit"))
    refused(look(operator, ran), "an external snapshot")
    src.act(ran, "os-start", until="ACTIVE")
    allowed(operator, ran)


@pytest.mark.parametrize("job", ["blockcopy", "backup"])
def test_a_source_of_which_a_copy_is_being_made(operator: Operator, host: Host, ran: str, job: str) -> None:
    if job == "blockcopy":
        virsh(host, "blockcopy", ran, "vda", f"{DISKS}/their-copy", "--transient-job", "--bandwidth", "1", "--format", "qcow2")
        name, end = "Block Copy", f"virsh blockjob {ran} vda --abort"
    else:
        pull = f"""<domainbackup mode='pull'><server transport='unix' socket='/var/lib/libvirt/qemu/their.sock'/>
                   <disks><disk name='vda' backup='yes' type='file'><scratch file='{DISKS}/their-scratch'/></disk></disks></domainbackup>"""
        host.run("tee", "/tmp/their-backup.xml", input=pull)
        virsh(host, "backup-begin", ran, "/tmp/their-backup.xml")
        name, end = "Backup", f"virsh domjobabort {ran}"
    done = look(operator, ran)
    host.run(*end.split())
    refused(done, f"a block job is active on the disk: {name}", end)
    allowed(operator, ran)


def test_a_source_with_a_checkpoint_which_nova_could_not_start_again(operator: Operator, host: Host, ran: str) -> None:
    virsh(host, "checkpoint-create-as", ran, "weekly-1", "--diskspec", "vda,checkpoint=bitmap")
    done = look(operator, ran)
    refused(done, "libvirt has a checkpoint of the instance, weekly-1: once stopped, Nova cannot start it",
            f"virsh checkpoint-delete {ran} weekly-1 --metadata")
    virsh(host, "checkpoint-delete", ran, "weekly-1", "--metadata")
    allowed(operator, ran)


def test_a_checkpoint_that_is_made_meanwhile_is_seen_before_the_stop(operator: Operator, src: Api, dst: Api, host: Host, ran: str) -> None:
    process = operator.at_a_third("-s", ran, *operator.to("dst-cmp1"), "--warm", rate="2M")
    virsh(host, "checkpoint-create-as", ran, "weekly", "--diskspec", "vda,checkpoint=bitmap")
    said = ended(process).stderr
    virsh(host, "checkpoint-delete", ran, "weekly", "--metadata")
    assert process.returncode == 1 and "libvirt has a checkpoint of the instance, weekly" in said, said
    assert has_been_put_back(src, ran, "ACTIVE") and dst.call("GET", "nova", "/servers")["servers"] == []


def test_a_disk_info_that_libvirt_contradicts(operator: Operator, host: Host, stopped: str) -> None:
    info = host.run("cat", f"{disk(stopped)}.info").stdout
    host.run("tee", f"{disk(stopped)}.info", input=info.replace("qcow2", "raw"))
    try:
        refused(look(operator, stopped), f"the format of {disk(stopped)} is qcow2 by libvirt, raw by {disk(stopped)}.info")
    finally:
        host.run("tee", f"{disk(stopped)}.info", input=info)
    allowed(operator, stopped)


def test_a_qemu_that_was_killed_is_reported_though_nova_has_not_seen_it(operator: Operator, src: Api, host: Host, ran: str) -> None:
    kill(host, ran)
    refused(look(operator, ran), "the instance runs by Nova, but is shut off (crashed) by libvirt", f"openstack server stop {ran}")
    src.act(ran, "os-stop", until="SHUTOFF")
    allowed(operator, ran)


def kill(host: Host, id: str) -> None:
    """Its qemu dies."""
    (pid,) = [pid for pid, words in host.processes() if "qemu-system" in words[0] and id in " ".join(words)]
    host.run("kill", "-9", str(pid))
    limit = time.monotonic() + 30
    while "shut off" not in virsh(host, "domstate", id):
        assert time.monotonic() < limit


def test_a_qemu_that_is_killed_in_a_warm_pass_is_reported_as_that(operator: Operator, src: Api, dst: Api, host: Host, ran: str) -> None:
    process = operator.at_a_third("-s", ran, *operator.to("dst-cmp1"), "--warm", rate="2M")
    kill(host, ran)
    said = ended(process).stderr
    assert process.returncode == 1 and ("during the copy: shut off (crashed)" in said or "the source's qemu was killed or crashed" in said), said
    assert dst.call("GET", "nova", "/servers")["servers"] == []
    src.act(ran, "os-stop", until="SHUTOFF")


def test_a_bitmap_that_a_killed_qemu_had_in_use_is_not_in_the_new_disk_and_a_hard_stop_is_reported(
        operator: Operator, src: Api, dst: Api, clouds: Clouds, host: Host, stopped: str) -> None:
    write_random(host, stopped, (0, MiB))  # so that it does not boot, and hears of no power button
    host.run("qemu-img", "bitmap", "--add", "-f", "qcow2", "--", disk(stopped), "-their bitmap")
    src.act(stopped, "os-start", until="ACTIVE")
    kill(host, stopped)
    src.act(stopped, "reboot", {"type": "HARD"}, until="ACTIVE")
    done = operator.run("-s", stopped, *operator.to("dst-cmp1", flavor="small"), "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert any("the dirty bitmap -their bitmap, which a killed qemu had in use" in line for line in report["warnings"])
    assert any("the guest did not shut down in time and was powered off hard" in line for line in report["warnings"])
    arrived = report["destination"]["id"]
    assert same_to_both_guests(host, stopped, clouds.host("dst-cmp1"), arrived)
    assert "their bitmap" in host.run("qemu-img", "info", "--output=json", disk(stopped)).stdout
    dst.act(arrived, "os-start", until="ACTIVE")
    dst.delete(arrived)
    host.run("qemu-img", "bitmap", "--remove", "-f", "qcow2", "--", disk(stopped), "-their bitmap")
