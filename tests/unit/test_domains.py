"""What virsh tells of a domain is read as libvirt 9.0 has told it: chains, jobs and names, and what stands against a copy."""

from __future__ import annotations

import pytest

from migrena import ROOT, Domain, HostError, Reason, chosen_drives, domain_in, refuse_domain

PATH = "/var/lib/nova/instances/x/disk"
BASE = f"{PATH.rpartition('/')[0]}/../_base/1"


def layer(file: str, format: str, below: str = "<backingStore/>") -> str:
    """One file below another."""
    return f"<backingStore type='file'><format type='{format}'/><source file='{file}'/>{below}</backingStore>"


def disk(source: str, format: str = "qcow2", inside: str = "", kind: str = "file", target: str = "vda") -> str:
    """One disk of a domain."""
    return f"<disk type='{kind}' device='disk'><driver name='qemu' type='{format}'/><source {source}/>{inside}<target dev='{target}'/></disk>"


def told(*disks: str, state: str = "running (booted)", checkpoints: str = "", snapshots: str = "", lines: str = "", info: str = "") -> Domain:
    """What is made of these disks, of a file that is there."""
    xml = f"a wrapper speaks\n<domain type='kvm'><devices>{''.join(disks)}</devices></domain>\n"
    return domain_in("x", PATH, "\0".join((xml, f"{state}\n", checkpoints, snapshots, lines, info, "there\n")))


class Silent:
    """A stand-in for a host that runs nothing for these tests."""

    name = "cmp1"


def reasons(domain: Domain) -> list[Reason]:
    """Why it is refused."""
    return refuse_domain(Silent(), domain)  # type: ignore[arg-type]


def test_a_plain_instance_is_not_refused() -> None:
    domain = told(disk("file='/dev/null'", target="vdb"), disk(f"file='{PATH}' index='1'", inside=layer(BASE, "raw")), info=f'{{"{PATH}": "qcow2"}}')
    root = domain.drives[ROOT]
    assert (root.format, root.target, root.chain) == ("qcow2", "vda", ((PATH, "qcow2"), (BASE, "raw")))
    assert reasons(domain) == [] and not domain.is_off and domain.ended == ""


@pytest.mark.parametrize(("lines", "job", "end"), [
    ("vda other Bandwidth limit: 1048576 bytes/s (1.000 MiB/s)  Block Copy: [100 %] ", "Block Copy", "virsh blockjob x vda --abort"),
    ("vda other Active Block Commit: [  1 %] ", "Active Block Commit", "virsh blockjob x vda --abort"),
    ("vda other Backup: [  0 %] ", "Backup", "virsh domjobabort x"),
    ("vdb other Backup: [  0 %] ", "", ""),
    ("vda other ", "", ""),
    ("vda other error: Requested operation is not valid: domain is not running ", "", ""),
])
def test_a_job_on_the_root_disk_is_reported_with_its_end(lines: str, job: str, end: str) -> None:
    found = reasons(told(disk(f"file='{PATH}'"), lines=lines))
    assert [reason.way_out.partition("or: ")[2] for reason in found] == ([end] if end else [])
    assert all(reason.problem.endswith(f"the disk: {job}") for reason in found)


def test_a_mirror_is_a_job_too() -> None:
    (reason,) = reasons(told(disk(f"file='{PATH}'", inside="<mirror type='file' job='copy'><source file='/x'/></mirror>")))
    assert "block copy" in reason.problem


@pytest.mark.parametrize(("top", "told_so", "way"), [
    (disk("name='vms/another_disk' protocol='rbd'", "raw", kind="network"), "the disk is vms/another_disk", "carry the image"),
    (disk("name='pool/x_disk' protocol='gluster'", "raw", kind="network"), "the disk is pool/x_disk", "carry the image"),
    (disk("dev='/dev/vg/other'", "raw", kind="block"), "the disk is /dev/vg/other", "carry the image"),
    (disk("file='/snap'", inside=layer(PATH, "qcow2")), f"the guest writes to /snap, an external snapshot; {PATH} is the state before it",
     f"virsh blockcommit x vda --base {PATH} --active --pivot"),
])
def test_a_disk_that_is_elsewhere(top: str, told_so: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrena.disk_chain", lambda *_, shared: ())
    (reason,) = reasons(told(top))
    assert told_so in reason.problem and way in reason.way_out


def test_a_stopped_instance_is_not_merged_by_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("migrena.disk_chain", lambda *_, shared: ())
    (reason,) = reasons(told(disk("file='/snap'", inside=layer(PATH, "qcow2", "")), state="shut off (destroyed)"))
    assert reason.way_out.startswith(f"qemu-img commit -f qcow2 -b {PATH} /snap")


def test_checkpoints_and_snapshots_are_reported_by_name_and_ours_are_not() -> None:
    found = reasons(told(disk(f"file='{PATH}'"), checkpoints="migrena-1\nweekly 1\n\n", snapshots="a\nb\n"))
    assert [reason.way_out for reason in found] == ["virsh checkpoint-delete x 'weekly 1' --metadata",
                                                    "virsh snapshot-delete x a --metadata; virsh snapshot-delete x b --metadata"]


@pytest.mark.parametrize(("info", "refused"), [(f'{{"{PATH}": "raw"}}', True), (f'{{"{PATH}": "qcow2"}}', False), ("[]", False), ("?", False)])
def test_disk_info_is_a_witness_and_no_more(info: str, refused: bool) -> None:
    domain = told(disk(f"file='{PATH}'"), info=info)
    assert bool(reasons(domain)) is refused and domain.drives[ROOT].format == "qcow2"


@pytest.mark.parametrize(("state", "is_off", "ended"), [
    ("shut off (shutdown)", True, ""), ("shut off (destroyed)", True, "powered off hard"), ("shut off (crashed)", True, "killed or crashed"),
    ("running (unpaused)", False, ""), ("paused (I/O error)", False, ""), ("no state", False, ""),
])
def test_the_way_in_which_qemu_ended(state: str, is_off: bool, ended: str) -> None:
    domain = told(disk(f"file='{PATH}'"), state=state)
    assert domain.is_off is is_off and ended in domain.ended and bool(ended) is bool(domain.ended)


@pytest.mark.parametrize("printed", ["", "\0" * 6, "<domain>\0\0\0\0\0\0", "no such command"])
def test_what_is_not_an_answer_of_virsh_is_an_error(printed: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        domain_in("x", PATH, printed)


def test_ephemeral_disks_are_found_by_the_names_of_their_files_in_nova_s_order() -> None:
    folder = PATH.rpartition("/")[0]
    files = {"vda": PATH, "vdb": f"{folder}/disk.eph10", "vdc": f"{folder}/disk.eph2", "vdd": f"{folder}/disk.local", "vde": "/volumes/1"}
    lines = "vda same Active Block Commit: [  1 %] \nvdb beside Backup: [ 2 %]\nvdc beside \nvdd beside \nvde other \n"
    domain = told(*(disk(f"file='{file}'", target=target) for target, file in files.items()), lines=lines, info=f'{{"{files["vdb"]}": "raw"}}')
    assert {key: drive.target for key, drive in domain.drives.items()} == {ROOT: "vda", "eph0": "vdd", "eph1": "vdc", "eph2": "vdb"}
    assert list(chosen_drives("cmp1", domain.drives, (ROOT, "vdd", "eph1"))) == [ROOT, "eph0", "eph1"]
    for only, why in (("vdz", "has no disk vdz"), ("eph2", "eph0 is not among the chosen")):
        with pytest.raises(HostError, match=why):
            chosen_drives("cmp1", domain.drives, (ROOT, only))
    assert [reason.way_out.partition("or: ")[2] for reason in reasons(domain)] == ["virsh blockjob x vda --abort", "", "virsh domjobabort x"]


CEPH = ("<auth username='{user}'><secret type='ceph' uuid='s'/></auth><source protocol='rbd' name='{name}'>"
        "<host name='10.0.0.1' port='6789'/><host name='[fd00::1]'/></source>")
V1, V2 = "11111111-1111-1111-1111-111111111111", "22222222-2222-2222-2222-222222222222"


def stored(name: str, target: str, serial: str = "", user: str = "nova", more: str = "") -> str:
    """A disk on Ceph."""
    told_serial = f"<serial>{serial}</serial>" if serial else ""
    return (f"<disk type='network' device='disk'><driver name='qemu' type='raw'/>{CEPH.format(user=user, name=name)}"
            f"<target dev='{target}' bus='virtio'/>{told_serial}{more}</disk>")


def test_disks_on_ceph_are_found_by_nova_s_names_and_volumes_by_their_ids() -> None:
    domain = told(stored("vms/x_disk", "vda"), stored(f"volumes/volume-{V2}", "vdd", V2, "cinder"), stored("vms/x_disk.eph0", "vdb"),
                  stored(f"volumes/volume-{V1}", "vdc", more=f"<alias name='ua-{V1}'/>"), stored("vms/x_disk.swap", "vde"))
    assert [(key, drive.path, drive.volume) for key, drive in domain.drives.items()] == [
        (ROOT, "rbd:vms/x_disk", ""), ("eph0", "rbd:vms/x_disk.eph0", ""),
        (f"volume-{V1}", f"rbd:volumes/volume-{V1}", V1), (f"volume-{V2}", f"rbd:volumes/volume-{V2}", V2)]
    assert domain.drives[f"volume-{V2}"].storage == {
        "driver": "rbd", "pool": "volumes", "image": f"volume-{V2}", "user": "cinder", "server.0.host": "10.0.0.1",
        "server.0.port": "6789", "server.1.host": "fd00::1", "server.1.port": "6789"}
    assert reasons(domain) == []


@pytest.mark.parametrize("device", ["lun", "cdrom"])
def test_a_volume_that_is_no_plain_disk_is_seen_and_refused_and_no_other_disk_is_taken_for_the_root(device: str) -> None:
    root = stored(f"volumes/volume-{V1}", "sda", V1, more="<boot order='1'/>").replace("device='disk'", f"device='{device}'")
    domain = told(root, stored(f"volumes/volume-{V2}", "vdb", V2))
    assert (domain.drives[ROOT].volume, domain.drives[f"volume-{V2}"].volume) == (V1, V2)
    (reason,) = reasons(domain)
    assert f"volume {V1} is attached as a {device}" in reason.problem and reason.way_out == "attach it as a disk"
    domain = told(stored("vms/x_disk", "vda"), stored(f"volumes/volume-{V1}", "sda", V1).replace("device='disk'", f"device='{device}'"))
    assert "--root-only" in reasons(domain)[0].way_out and refuse_domain(Silent(), domain, [ROOT]) == []  # type: ignore[arg-type]


def test_a_drive_whose_volume_was_ejected_is_none() -> None:
    empty = f"<disk type='network' device='cdrom'><target dev='sda'/><serial>{V1}</serial></disk>"
    assert list(told(stored("vms/x_disk", "vda"), empty).drives) == [ROOT]


def test_the_root_may_be_a_volume_whatever_its_place_in_the_list() -> None:
    first, second = (stored(f"volumes/volume-{id}", target, id, more=boot) for id, target, boot in (
        (V1, "vdb", ""), (V2, "vda", "<boot order='1'/>")))
    assert {key: drive.volume for key, drive in told(first, second).drives.items()} == {ROOT: V2, f"volume-{V1}": V1}


def test_a_volume_beside_a_root_disk_that_is_a_file_is_no_root() -> None:
    lines = "vda same \nvdb other \n"
    domain = told(disk(f"file='{PATH}'"), stored(f"volumes/volume-{V1}", "vdb", V1, more="<boot order='1'/>"), lines=lines)
    assert domain.drives[ROOT].path == PATH and domain.drives[f"volume-{V1}"].volume == V1


def test_an_instance_without_disks_is_refused() -> None:
    assert "no disk" in reasons(told())[0].problem
