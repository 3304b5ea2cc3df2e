"""Instances with more than a root disk: every disk arrives, under one stop of the source, or nothing is left."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from clouds.conftest import (
    DESTINATION,
    SOURCE,
    MiB,
    Operator,
    as_before,
    boots,
    disk,
    has_been_put_back,
    has_moved,
    last_record,
    left_on,
    same_to_both_guests,
    wait_for_console,
    write_random,
)
from lab.api import Api
from lab.clouds import Clouds
from lab.hosts import Host

KILL = signal.SIGKILL.value
DISKS = ("disk", "disk.eph0", "disk.eph1")
BLANK = {"source_type": "blank", "destination_type": "local", "boot_index": -1, "delete_on_termination": True}


def targets(host: Host, id: str) -> list[tuple[str, str, str]]:
    """Each disk of a domain: its name in the guest, its bus, and its file's name."""
    devices = ElementTree.fromstring(host.run("virsh", "dumpxml", id).stdout).findall("devices/disk")
    return [(target.get("dev", ""), target.get("bus", ""), source.get("file", "").rpartition("/")[2])
            for device in devices if (target := device.find("target")) is not None and (source := device.find("source")) is not None]


@pytest.fixture(scope="module")
def with_more(clouds: Clouds, src: Api) -> Iterator[str]:
    """The id of an instance with two ephemeral disks of two sizes, swap and a config drive, stopped, with data on each disk."""
    image = src.need("glance", "images", "guest")
    root = {"source_type": "image", "uuid": image, "destination_type": "local", "boot_index": 0, "delete_on_termination": True}
    mapping = [root, {**BLANK, "volume_size": 1}, {**BLANK, "volume_size": 2}]
    id = src.create("with-more", flavor="several", availability_zone=f"nova:{SOURCE}", config_drive=True, block_device_mapping_v2=mapping)
    wait_for_console(src, id, "GUEST wrote=")
    src.act(id, "os-stop", until="SHUTOFF")
    for name in DISKS:
        write_random(clouds.host(SOURCE), id, (64 * MiB, 16 * MiB), (900 * MiB, 4 * MiB), name=name)
    yield id
    src.delete(id)


@pytest.fixture
def laden(src: Api, dst: Api, with_more: str) -> Iterator[str]:
    """That instance, unlocked and unmarked, and an empty destination, before and after."""
    as_before(src, dst, with_more)
    yield with_more
    as_before(src, dst, with_more)


def words(operator: Operator, id: str, place: str = DESTINATION) -> list[str]:
    """The command that moves it."""
    return ["-s", id, *operator.to(place, flavor="several")]


def test_every_local_disk_arrives_with_swap_and_config_drive_made_anew(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, laden: str) -> None:
    one, other = clouds.host(SOURCE), clouds.host(DESTINATION)
    plan = operator.run(*words(operator, laden), "-n")
    assert plan.returncode == 0 and all(re.search(rf"  {key} +\S+/{name}: qcow2", plan.stderr) for key, name in zip(
        ("root", "eph0", "eph1"), DISKS, strict=True)), plan.stderr
    report = operator.report(*words(operator, laden))
    id = report["destination"]["id"]
    assert all(same_to_both_guests(one, laden, other, id, name) for name in DISKS)
    assert report["copy"]["bytes"] > 3 * 20 * MiB and report["copy"]["verified"] and report["left_behind"] == []
    assert targets(one, laden) == targets(other, id) and "disk.swap" in str(targets(other, id))
    assert dst.server(id)["config_drive"] == "True" and left_on(one) == left_on(other) == []
    assert has_been_put_back(src, laden, "SHUTOFF")
    dst.act(id, "os-start", until="ACTIVE")
    shown = wait_for_console(dst, id, "GUEST boots=")
    assert f"GUEST boots={boots(one, laden) + 1} last={last_record(one, laden)} broken=0" in shown


@pytest.mark.long
@pytest.mark.parametrize("line", ["chunk on eph1", "done of swap in on eph0", "done of swap in", "intent of swap in on eph1"])
def test_a_run_that_was_killed_amid_its_disks_is_resumed_there(
        operator: Operator, clouds: Clouds, src: Api, laden: str, line: str) -> None:
    one, other = clouds.host(SOURCE), clouds.host(DESTINATION)
    assert operator.run(*words(operator, laden), throw=[(line, KILL)]).returncode == -KILL
    done = operator.run("resume", operator.last_run)
    assert done.returncode == 0, done.stderr
    assert all(same_to_both_guests(one, laden, other, done.stdout.strip(), name) for name in DISKS)
    assert left_on(one) == left_on(other) == [] and has_been_put_back(src, laden, "SHUTOFF")


@pytest.mark.long
@pytest.mark.parametrize("line", ["chunk on eph1", "done of swap in on eph0"])
def test_a_run_that_was_killed_amid_its_disks_is_rolled_back(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, laden: str, line: str) -> None:
    assert operator.run(*words(operator, laden), throw=[(line, KILL)]).returncode == -KILL
    done = operator.run("rollback", operator.last_run, "--yes")
    assert done.returncode == 0, done.stderr
    assert dst.call("GET", "nova", "/servers?all_tenants=1")["servers"] == [] and has_been_put_back(src, laden, "SHUTOFF")
    assert left_on(clouds.host(SOURCE)) == left_on(clouds.host(DESTINATION)) == []


@pytest.mark.long
def test_every_local_disk_of_a_running_instance_arrives_warm_on_a_hypervisor_with_raw_disks(
        operator: Operator, clouds: Clouds, src: Api, dst: Api, laden: str) -> None:
    src.act(laden, "os-start", until="ACTIVE")
    report = operator.report(*words(operator, laden, "dst-cmp2"), "--warm", "--bitmap", "-a", "dst")
    id = report["destination"]["id"]
    assert len(report["copy"]["passes"]) > 1 and has_moved(src, laden, id)
    assert all(same_to_both_guests(clouds.host(SOURCE), laden, clouds.host("dst-cmp2"), id, name) for name in DISKS[1:])
    assert wait_for_console(dst, id, "GUEST boots=")


@pytest.mark.long
def test_an_ephemeral_disk_with_an_external_snapshot_is_refused(operator: Operator, clouds: Clouds, src: Api, laden: str) -> None:
    host = clouds.host(SOURCE)
    src.act(laden, "os-start", until="ACTIVE")
    target = next(target for target, _, name in targets(host, laden) if name == "disk.eph0")
    others = [word for other, _, name in targets(host, laden) if name != "disk.eph0" for word in ("--diskspec", f"{other},snapshot=no")]
    path = disk(laden, "snap")
    host.run("virsh", "snapshot-create-as", laden, "s1", "--disk-only", "--no-metadata", "--diskspec", f"{target},file={path}", *others)
    try:
        done = operator.run(*words(operator, laden), "-n")
        assert done.returncode == 3 and "the guest does not write to disk.eph0" in done.stderr
        assert operator.run(*words(operator, laden), "-n", "--root-only").returncode == 0
    finally:
        host.run("virsh", "blockcommit", laden, target, "--base", disk(laden, "disk.eph0"), "--active", "--pivot", "--wait")
        host.run("rm", "-f", path)


@pytest.mark.long
def test_a_second_port_that_is_filtered_fails_the_rehearsal_before_the_stop(operator: Operator, clouds: Clouds, src: Api, laden: str) -> None:
    src.act(laden, "os-start", until="ACTIVE")
    host, rule = clouds.host(SOURCE), ("INPUT", "-p", "tcp", "--dport", "2667", "-j", "REJECT")
    host.run("iptables", "-I", *rule)
    try:
        done = operator.run(*words(operator, laden), extra="NBD_SERVER_PORT = '2666-2667'")
    finally:
        host.run("iptables", "-D", *rule)
    assert done.returncode == 1 and "cannot read from src-cmp1" in done.stderr, done.stderr
    assert "Stop source instance" not in done.stderr and has_been_put_back(src, laden, "ACTIVE")


def test_hazard_only_the_root_disk_is_copied_and_nobody_says_so(operator: Operator, laden: str) -> None:
    done = operator.run(*words(operator, laden), "--root-only", "-n")
    assert done.returncode == 0 and "config drive" not in done.stderr  # Nova makes a new one
    assert all(f"ephemeral disk {name} stays behind" in done.stderr for name in DISKS[1:])
